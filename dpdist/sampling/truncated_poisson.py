"""Draws Poisson samples, and cuts those that are larger than a limit."""

import numpy as np

from dpdist import registry
from dpdist.sampling import fixed_size
from dpdist.sampling import philox
from dpdist.sampling import poisson
from dpdist.sampling import sampler


class TruncatedPoissonSampler(sampler.Steps):
  """Draws like `PoissonSampler`, and keeps at most `truncated_batch_size`.

  It keeps a uniform subset of a larger sample. This costs much privacy unless
  the limit is several standard deviations above the mean. The accountant must
  know the limit: see `dpdist.accounting.calibration`.

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
    self.truncated_batch_size = philox.check_int(
      "truncated_batch_size", truncated_batch_size, 1, 1 << 62
    )
    self._key = philox.philox_key(seed)

  def __call__(self, step: int) -> np.ndarray:
    """Draws the examples of a step; see `PoissonSampler`."""
    drawn = self._whole(step)
    if drawn.size <= self.truncated_batch_size:
      return drawn
    kept = fixed_size.uniform_subset(
      self._key, step, drawn.size, self.truncated_batch_size
    )
    return drawn[kept]


@registry.register("sampling", "truncated_poisson")
class TruncatedPoisson(poisson.Poisson):
  """Draws like `Poisson`, up to a limit of rows; see `sampler.Sampling`."""

  def typical_rows(self, numbers: sampler.Numbers, batch_size: float) -> int:
    return min(super().typical_rows(numbers, batch_size), _limit(numbers))

  def most_rows(
    self, numbers: sampler.Numbers, batch_size: float, tail: float
  ) -> int:
    # The limit almost always decides; Chernoff's bound would hardly gain.
    return min(sampler.num_units(numbers), _limit(numbers))

  def make(
    self,
    numbers: sampler.Numbers,
    batch_size: float,
    *,
    seed: bytes,
    first_release: int,
  ) -> TruncatedPoissonSampler:
    return TruncatedPoissonSampler(
      num_examples=sampler.num_units(numbers),
      sampling_probability=self.probability(numbers, batch_size),
      truncated_batch_size=_limit(numbers),
      seed=seed,
    )

  def summary(self, numbers: sampler.Numbers) -> str:
    return f"Poisson, cut to {numbers.truncated_batch_size}"

  def describe(self, numbers: sampler.Numbers) -> str:
    return (
      f"{super().describe(numbers)} Of a sample of more than"
      f" {numbers.truncated_batch_size}, as many are kept, all subsets alike"
      " (truncated Poisson sampling)."
    )


def _limit(numbers: sampler.Numbers) -> int:
  assert numbers.truncated_batch_size is not None  # As the proof demands.
  return numbers.truncated_batch_size
