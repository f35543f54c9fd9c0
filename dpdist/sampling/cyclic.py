"""Draws Poisson samples from parts of the examples that take turns."""

import numpy as np

from dpdist import registry
from dpdist.sampling import philox
from dpdist.sampling import poisson
from dpdist.sampling import sampler


class CyclicPoissonSampler(sampler.Steps):
  """Draws from the parts of the examples in turn.

  Example i is in part i modulo `cycle_length`, whatever the other examples are.
  At a step, every example of one part is drawn with `sampling_probability`,
  independently of all others. Examples of the other parts are not drawn. So an
  example can take part in only one of `cycle_length` consecutive steps.

  Attributes:
    num_examples: The number of examples in all parts.
    sampling_probability: The probability of each example of the step's part.
    cycle_length: The number of parts.
    offset: Step t draws from part t + offset, modulo `cycle_length`.
  """

  def __init__(
    self,
    *,
    num_examples: int,
    sampling_probability: float,
    cycle_length: int,
    seed: int | bytes,
    offset: int = 0,
  ):
    """Checks the arguments.

    Args:
      num_examples: See `PoissonSampler`.
      sampling_probability: See `PoissonSampler`.
      cycle_length: In [1, num_examples].
      seed: See `PoissonSampler`.
      offset: Where in the cycle step 0 is; at least 0.

    Raises:
      ValueError: An argument is not as described.
    """
    self.num_examples = philox.check_int(
      "num_examples", num_examples, 1, 1 << 62
    )
    self.cycle_length = philox.check_int(
      "cycle_length", cycle_length, 1, self.num_examples
    )
    self.offset = philox.check_int("offset", offset, 0, 1 << 62)
    self._part = poisson.PoissonSampler(
      num_examples=-(-self.num_examples // self.cycle_length),
      sampling_probability=sampling_probability,
      seed=seed,
    )
    self.sampling_probability = self._part.sampling_probability

  def __call__(self, step: int) -> np.ndarray:
    """Draws the examples of a step; see `PoissonSampler`."""
    places = self._part(step)
    indices = places * self.cycle_length + (
      (step + self.offset) % self.cycle_length
    )
    # The last index of some parts is beyond the end. Draws are independent, so
    # dropping it does not change the others.
    return indices[indices < self.num_examples]


@registry.register("sampling", "cyclic_poisson")
class CyclicPoisson(poisson.Poisson):
  """Draws like `Poisson`, from the parts in turn; see `sampler.Sampling`."""

  def make(
    self,
    numbers: sampler.Numbers,
    batch_size: float,
    *,
    seed: bytes,
    first_release: int,
  ) -> CyclicPoissonSampler:
    return CyclicPoissonSampler(
      num_examples=sampler.num_units(numbers),
      sampling_probability=self.probability(numbers, batch_size),
      cycle_length=numbers.cycle_length,
      # A later branch's may be negative; Python's remainder is not.
      offset=first_release % numbers.cycle_length,
      seed=seed,
    )

  def summary(self, numbers: sampler.Numbers) -> str:
    return f"Poisson, from {numbers.cycle_length} parts in turn"

  def describe(self, numbers: sampler.Numbers) -> str:
    what, grouped = numbers.unit, ""
    if numbers.group_size > 1:
      grouped = f", in groups of {numbers.group_size},"
      what = f"group of {numbers.group_size} {numbers.unit}s"
    q = self.probability(numbers, numbers.expected_batch_size)
    return (
      f"The {numbers.unit}s{grouped} are in {numbers.cycle_length} parts that"
      f" take turns. At each step every {what} of one part is drawn, apart from"
      f" all others (cyclic Poisson sampling), {sampler.in_words(numbers, q)}."
      " Each takes part in at most one step of a"
      f" turn.{poisson.describe_groups(numbers)}"
    )
