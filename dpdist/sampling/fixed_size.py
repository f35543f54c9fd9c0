"""Samplers of uniform subsets, whose size is fixed or bounded.

As in `dpdist.sampling.poisson`, draws depend on the words of Philox and on
integers alone. A subset is made of the first distinct numbers of a sequence of
independent uniform ones. It is exactly uniform over all subsets of its size.
"""

import numpy as np

from dpdist.sampling import poisson


class FixedSizeSampler:
  """Draws `batch_size` of `num_examples` examples without replacement.

  At each step all subsets of that size are equally likely. The privacy of such
  steps is that of replacing one example by another, with twice the sensitivity;
  see `dpdist.accounting.gaussian_events`.

  Guarantees:
    Given uniform words, every subset has the same probability, and the subsets
    of two steps are independent. As with `PoissonSampler`, the words come from
    Philox, and indices are private.

  Attributes:
    num_examples: The number of examples that are drawn from.
    batch_size: The number of examples of each step.
  """

  def __init__(self, *, num_examples: int, batch_size: int, seed: int | bytes):
    """Checks the arguments.

    Args:
      num_examples: The number of examples, in [1, 2^62].
      batch_size: The number of examples of a step, in [1, num_examples].
      seed: See `PoissonSampler`.

    Raises:
      ValueError: An argument is not as described.
    """
    self.num_examples = poisson.check_int(
      "num_examples", num_examples, 1, 1 << 62
    )
    self.batch_size = poisson.check_int(
      "batch_size", batch_size, 1, self.num_examples
    )
    self._key = poisson.philox_key(seed)

  def __repr__(self) -> str:
    return (
      f"FixedSizeSampler(num_examples={self.num_examples}, "
      f"batch_size={self.batch_size}, seed=<secret>)"
    )

  def __call__(self, step: int) -> np.ndarray:
    """Draws the examples of a step.

    Args:
      step: The step, an int in [0, 2^63).

    Returns:
      int64[batch_size], indices in [0, num_examples), strictly increasing.
      Private.

    Raises:
      ValueError: `step` is not as described.
    """
    step = poisson.check_int("step", step, 0, (1 << 63) - 1)
    return _subset(self._key, step, self.num_examples, self.batch_size)


class TruncatedPoissonSampler:
  """Draws like `PoissonSampler`, and keeps at most `truncated_batch_size`.

  Of a larger sample a uniform subset is kept. That costs much privacy unless
  the bound is several standard deviations above the mean. The accountant must
  know of it: see `dpdist.accounting.calibration`.

  Attributes:
    num_examples: The number of examples that are drawn from.
    sampling_probability: The probability of each, before the cut.
    truncated_batch_size: The most examples that are kept.
  """

  def __init__(
    self,
    *,
    num_examples: int,
    sampling_probability: float,
    truncated_batch_size: int,
    seed: int | bytes,
  ):
    """Checks the arguments.

    Args:
      num_examples: See `PoissonSampler`.
      sampling_probability: See `PoissonSampler`.
      truncated_batch_size: At least 1.
      seed: See `PoissonSampler`.

    Raises:
      ValueError: An argument is not as described.
    """
    self._whole = poisson.PoissonSampler(
      num_examples=num_examples,
      sampling_probability=sampling_probability,
      seed=seed,
    )
    self.num_examples = self._whole.num_examples
    self.sampling_probability = self._whole.sampling_probability
    self.truncated_batch_size = poisson.check_int(
      "truncated_batch_size", truncated_batch_size, 1, 1 << 62
    )
    self._key = poisson.philox_key(seed)

  def __repr__(self) -> str:
    return (
      f"TruncatedPoissonSampler(num_examples={self.num_examples}, "
      f"sampling_probability={self.sampling_probability}, "
      f"truncated_batch_size={self.truncated_batch_size}, seed=<secret>)"
    )

  def __call__(self, step: int) -> np.ndarray:
    """Draws the examples of a step; see `PoissonSampler`."""
    drawn = self._whole(step)
    if drawn.size <= self.truncated_batch_size:
      return drawn
    kept = _subset(self._key, step, drawn.size, self.truncated_batch_size)
    return drawn[kept]


def _subset(key: np.ndarray, step: int, size: int, count: int) -> np.ndarray:
  """Returns a uniform subset of `count` of range(size), sorted, int64."""
  if 2 * count > size:  # Drawing what is left out takes fewer words.
    everything = np.arange(size, dtype=np.int64)
    if count == size:
      return everything
    return np.delete(everything, _subset(key, step, size, size - count))
  bits = max(1, (size - 1).bit_length())
  stream = poisson.stream(key, step, poisson.SUBSET)
  found = np.empty(0, np.uint64)
  while found.size < count:
    # On average at least half of the words are below size, and at least half of
    # those are new.
    words = stream.random_raw(4 * (count - found.size) + 8)
    numbers = words >> np.uint64(64 - bits)
    sequence = np.concatenate([found, numbers[numbers < size]])
    _, first = np.unique(sequence, return_index=True)
    found = sequence[np.sort(first)[:count]]
  return np.sort(found).astype(np.int64)
