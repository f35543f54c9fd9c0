"""The laws of samples of fixed size, cut samples, and parts in turn.

Seeds are fixed, so that nothing here is left to chance; bounds are five
standard errors.
"""

import numpy as np
import pytest

import dpdist
from dpdist.sampling import philox

_STEPS = 4000


def _counts(sampler, size):
  """How often each example, and each pair of them, was drawn."""
  pairs = np.zeros((size, size))
  for step in range(_STEPS):
    drawn = sampler(step)
    assert drawn.dtype == np.int64
    assert np.all(np.diff(drawn) > 0)
    pairs[np.ix_(drawn, drawn)] += 1
  return np.diag(pairs), pairs[np.triu_indices(size, 1)]


def _assert_rate(counts, rate):
  error = 5 * np.sqrt(rate * (1 - rate) / _STEPS)
  np.testing.assert_allclose(counts / _STEPS, rate, atol=error)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_subsets_of_a_size_are_alike(batch_size):
  sampler = dpdist.FixedSizeSampler(
    num_examples=10, batch_size=batch_size, seed=1
  )
  assert {len(sampler(step)) for step in range(100)} == {batch_size}
  singles, pairs = _counts(sampler, 10)
  _assert_rate(singles, batch_size / 10)
  _assert_rate(pairs, batch_size * (batch_size - 1) / 90)


def test_a_cut_keeps_a_uniform_part_of_what_was_drawn():
  run = {"num_examples": 12, "sampling_probability": 0.5, "seed": b"s"}
  whole = dpdist.PoissonSampler(**run)
  cut = dpdist.TruncatedPoissonSampler(**run, truncated_batch_size=6)
  kept = []
  for step in range(_STEPS):
    drawn, mine = whole(step), cut(step)
    assert len(mine) == min(len(drawn), 6)
    assert set(mine) <= set(drawn)
    kept.append(len(mine))
  singles, _ = _counts(cut, 12)
  _assert_rate(singles, np.mean(kept) / 12)


def test_what_a_cut_keeps_has_no_word_in_common_with_the_draw(monkeypatch):
  words, make = [], philox.stream

  class Listening:
    def __init__(self, *args, **kwargs):
      self._stream = make(*args, **kwargs)
      words.append([])

    def random_raw(self, count):
      found = self._stream.random_raw(count)
      words[-1].extend(found.tolist())
      return found

  monkeypatch.setattr(philox, "stream", Listening)
  for q in (0.5, 0.05):  # Drawn in either of two ways.
    words.clear()
    cut = dpdist.TruncatedPoissonSampler(
      num_examples=200, sampling_probability=q, truncated_batch_size=2, seed=3
    )
    for step in range(5):
      assert len(cut(step)) == 2
    assert len(words) >= 10
    whole = [word for stream in words for word in stream]
    assert len(set(whole)) == len(whole)


def test_parts_take_turns_and_are_drawn_as_poisson():
  sampler = dpdist.CyclicPoissonSampler(
    num_examples=11, sampling_probability=0.5, cycle_length=4, seed=1
  )
  for step in range(40):
    assert set(sampler(step) % 4) <= {step % 4}
  singles, pairs = _counts(sampler, 11)
  _assert_rate(singles, 0.5 / 4)
  same = [i % 4 == j % 4 for i, j in zip(*np.triu_indices(11, 1), strict=True)]
  _assert_rate(pairs[same], 0.25 / 4)
  assert not np.any(pairs[~np.array(same)])


@pytest.mark.parametrize(
  "make",
  [
    lambda seed: dpdist.FixedSizeSampler(
      num_examples=500, batch_size=60, seed=seed
    ),
    lambda seed: dpdist.TruncatedPoissonSampler(
      num_examples=500,
      sampling_probability=0.2,
      truncated_batch_size=60,
      seed=seed,
    ),
  ],
)
def test_draws_depend_on_seed_and_step_alone(make):
  one, again, other = make(1), make(1), make(2)
  backwards = [again(step) for step in reversed(range(20))][::-1]
  overlaps = []
  for step in range(20):
    np.testing.assert_array_equal(one(step), backwards[step])
    assert not np.array_equal(one(step), other(step))
    overlaps.append(len(np.intersect1d(one(step), one(step + 1))))
  # As those of two independent samples: 7.2 on average.
  assert 5.5 < np.mean(overlaps) < 9
  assert "seed=<secret>" in repr(one)


def test_more_than_there_are_cannot_be_drawn():
  with pytest.raises(
    ValueError, match=r"batch_size must be .*\[1, 10\], got 11"
  ):
    dpdist.FixedSizeSampler(num_examples=10, batch_size=11, seed=1)


def test_a_sampler_is_iterated_step_by_step():
  sampler = dpdist.CyclicPoissonSampler(
    num_examples=20, sampling_probability=0.5, cycle_length=2, seed=b"s"
  )
  for step, drawn in zip(range(5), sampler, strict=False):
    np.testing.assert_array_equal(drawn, sampler(step))
