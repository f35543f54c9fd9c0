"""The law of the samples that a run gets, and which samplers it would refuse.

Seeds are fixed, so that every answer is always the same. Over seeds, a Poisson
sampler fails a test here with probability below 1e-6 (`_LEVEL`). Samplers that
are often taken for it, and are accounted for otherwise or not at all, fail at
the same sizes: see the last test. tests/sampling/sampling_test.py has the
subsets' exact law and the independence of neighbours, at all probabilities; the
laws of the other samplers are in tests/sampling/samplers_test.py.
"""

import numpy as np
import pytest
from scipy import stats

import dpdist
from dpdist.keys import keys
from dpdist.mechanism import mechanism

_LEVEL = 1e-6
_UNITS, _STEPS, _BATCH = 24, 6000, 6
_Q = _BATCH / _UNITS


def _plan(**changes):
  return dpdist.make_plan(
    dpdist.PrivacyConfig(
      **{
        "num_examples": _UNITS,
        "expected_batch_size": _BATCH,
        "num_steps": _STEPS,
        "l2_clip_norm": 1.0,
        "target_delta": 1e-5,
        "noise_multiplier": 5.0,
      }
      | changes
    )
  )


def _drawn(sampler):
  """[steps, units] bool."""
  drawn = np.zeros((_STEPS, _UNITS), bool)
  for step in range(_STEPS):
    drawn[step, sampler(step)] = True
  return drawn


def _run(seed=1, branch=""):
  streams = mechanism.Streams(keys.insecure_secret(seed), branch)
  return _drawn(streams.sampler(_plan()))


def _both(score):
  return 2 * stats.norm.sf(abs(score))


def _about(statistic, law):
  """Two-sided: too even is as wrong as too uneven."""
  return 2 * min(law.sf(statistic), law.cdf(statistic))


def _p_values(drawn):
  """Of what must hold if units are drawn apart, each with probability q."""
  # Standardised, so that sums of products of what is independent are nearly
  # standard normals, and uncorrelated with one another.
  x = (drawn - _Q) / np.sqrt(_Q * (1 - _Q))
  pairs = (x.T @ x / np.sqrt(len(x)))[np.triu_indices(_UNITS, 1)]
  sizes = drawn.sum(1)
  # The fourth moment of a binomial is near that of a normal distribution.
  ratio = np.mean((sizes - _BATCH) ** 2) / (_UNITS * _Q * (1 - _Q))
  found = {
    "inclusions": _about(
      np.sum((x.sum(0) / np.sqrt(len(x))) ** 2), stats.chi2(_UNITS)
    ),
    "pairs": _about(np.sum(pairs**2), stats.chi2(len(pairs))),
    "all pairs": _both(pairs.sum() / np.sqrt(len(pairs))),
    "batch size": _both((ratio - 1) / np.sqrt(2 / len(x))),
  }
  for lag in (*range(1, 2 * _UNITS // _BATCH + 1), 24, 100):
    # Of a unit with itself, and of all units.
    own = np.sum(x[lag:] * x[:-lag], 0) / np.sqrt(len(x) - lag)
    found[f"lag {lag}, one by one"] = _about(np.sum(own**2), stats.chi2(_UNITS))
    found[f"lag {lag}"] = _both(own.sum() / np.sqrt(_UNITS))
  return found


def _is_poisson(drawn):
  p_values = _p_values(drawn)
  return min(p_values.values()) > _LEVEL / len(p_values)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_units_are_drawn_apart_from_one_another_and_from_step_to_step(seed):
  assert _is_poisson(_run(seed))


def test_branches_and_runs_are_independent():
  one, *others = [
    (drawn - _Q) / np.sqrt(_Q * (1 - _Q))
    for drawn in (_run(), _run(branch="after a restart"), _run(seed=2))
  ]
  for other in others:
    assert _both(np.sum(one * other) / np.sqrt(one.size)) > _LEVEL / 2
  assert np.array_equal(_run(), _run())


def _shuffled(rng):
  """Each epoch in a new order, cut into batches."""
  epoch = _UNITS // _BATCH
  orders = [rng.permutation(_UNITS) for _ in range(_STEPS // epoch)]
  batches = np.concatenate(orders).reshape(-1, _BATCH)
  return lambda step: batches[step]


def _sizes_alone(rng):
  """A batch of the right law of sizes, of neighbours."""
  sizes = rng.binomial(_UNITS, _Q, _STEPS)
  starts = rng.integers(0, _UNITS, _STEPS)
  return lambda step: (starts[step] + np.arange(sizes[step])) % _UNITS


def _again(rng, share):
  """A unit's coin is sometimes that of the step before."""
  drawn = rng.random((_STEPS, _UNITS)) < _Q
  for step in range(1, _STEPS):
    kept = rng.random(_UNITS) < share
    drawn[step, kept] = drawn[step - 1, kept]
  return lambda step: np.flatnonzero(drawn[step])


def _poisson(probability=_Q):
  return dpdist.PoissonSampler(
    num_examples=_UNITS, sampling_probability=probability, seed=1
  )


_WRONG = {
  "a fixed size": lambda rng: dpdist.FixedSizeSampler(
    num_examples=_UNITS, batch_size=_BATCH, seed=1
  ),
  "shuffled": _shuffled,
  "the right sizes, of neighbours": _sizes_alone,
  "cut at 9": lambda rng: dpdist.TruncatedPoissonSampler(
    num_examples=_UNITS,
    sampling_probability=_Q,
    truncated_batch_size=9,
    seed=1,
  ),
  "the same at every step": lambda rng: lambda step: np.arange(_BATCH),
  "each sample twice": lambda rng: lambda step: _poisson()(step // 2),
  "one coin in twenty is an old one": lambda rng: _again(rng, 0.05),
  "q is 5 % more": lambda rng: _poisson(1.05 * _Q),
  "q is 5 % less": lambda rng: _poisson(0.95 * _Q),
  "the last unit is left out": lambda rng: (
    lambda step: np.setdiff1d(_poisson()(step), [_UNITS - 1])
  ),
}


@pytest.mark.parametrize("name", _WRONG)
def test_samplers_that_are_not_poisson_are_refused(name):
  assert not _is_poisson(_drawn(_WRONG[name](np.random.default_rng(0))))
