"""Draws uniform subsets of a fixed size.

As in `dpdist.sampling.poisson`, draws depend on the words of Philox and on
integers alone. A subset holds the first distinct numbers of a sequence of
independent uniform numbers. So all subsets of its size are equally likely.
"""

import math

import numpy as np

from dpdist import errors
from dpdist import registry
from dpdist.sampling import philox
from dpdist.sampling import poisson
from dpdist.sampling import sampler


class FixedSizeSampler(sampler.Steps):
  """Draws `batch_size` of `num_examples` examples without replacement.

  At each step all subsets of that size are equally likely. Neighbouring data
  sets then differ by replacing one example, which has twice the sensitivity;
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
    self.num_examples = philox.check_int(
      "num_examples", num_examples, 1, 1 << 62
    )
    self.batch_size = philox.check_int(
      "batch_size", batch_size, 1, self.num_examples
    )
    self._key = philox.philox_key(seed)

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
    step = philox.check_int("step", step, 0, (1 << 63) - 1)
    return uniform_subset(self._key, step, self.num_examples, self.batch_size)


@registry.register("sampling", "fixed_size")
class FixedSize:
  """Draws the same number of rows at each step; see `sampler.Sampling`."""

  probability = staticmethod(sampler.mean_probability)

  def check(self, numbers: sampler.Numbers) -> None:
    later = [size for _, size in numbers.batch_size_schedule]
    for size in (numbers.expected_batch_size, *later):
      if size != int(size):
        raise errors.ArgumentError(
          "expected_batch_size must be whole with sampling='fixed_size', got"
          f" {size!r}"
        )

  def typical_rows(self, numbers: sampler.Numbers, batch_size: float) -> int:
    size = math.ceil(batch_size / numbers.group_size)
    return min(size, sampler.num_units(numbers))

  def most_rows(
    self, numbers: sampler.Numbers, batch_size: float, tail: float
  ) -> int:
    return math.ceil(batch_size)

  def make(
    self,
    numbers: sampler.Numbers,
    batch_size: float,
    *,
    seed: bytes,
    first_release: int,
  ) -> FixedSizeSampler:
    return FixedSizeSampler(
      num_examples=sampler.num_units(numbers),
      batch_size=int(batch_size),
      seed=seed,
    )

  def summary(self, numbers: sampler.Numbers) -> str:
    return "fixed size, without replacement"

  def describe(self, numbers: sampler.Numbers) -> str:
    size = numbers.expected_batch_size
    how_likely = sampler.in_words(numbers, self.probability(numbers, size))
    return (
      f"At each step {size:g} of them are drawn without replacement, all"
      f" subsets alike, so each {how_likely}."
    )


def uniform_subset(
  key: np.ndarray, step: int, size: int, count: int
) -> np.ndarray:
  """Returns a uniform subset of `count` of range(size), sorted, int64."""
  if 2 * count > size:  # Drawing what is left out takes fewer words.
    everything = np.arange(size, dtype=np.int64)
    if count == size:
      return everything
    return np.delete(everything, uniform_subset(key, step, size, size - count))
  bits = max(1, (size - 1).bit_length())
  stream = philox.stream(key, step, poisson.SUBSET)
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
