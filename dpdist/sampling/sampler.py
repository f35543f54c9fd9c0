"""The interface through which a run draws the rows of its steps.

A `Sampling` is a class in one module. It describes itself, checks the numbers
that it is given, and makes samplers. It is registered by name, or settings name
it as "package.module:attribute". It needs a proof of its own; see
`dpdist.accounting.step_events`. It uses NumPy alone, so that a plan needs no
jax.
"""

from collections.abc import Iterator
import itertools
from typing import Protocol

import numpy as np


class Numbers(Protocol):
  """The numbers of a plan or config that a sampling may use; all are public."""

  @property
  def num_examples(self) -> int:
    """Returns the number of rows."""

  @property
  def truncated_batch_size(self) -> int | None:
    """Returns the most rows of a step, where there is a limit."""

  @property
  def cycle_length(self) -> int:
    """Returns the number of parts of the rows that take turns."""

  @property
  def group_size(self) -> int:
    """Returns how many rows are drawn and clipped as one."""

  @property
  def neighboring_relation(self) -> str:
    """Returns the neighboring relation."""

  @property
  def unit(self) -> str:
    """Returns what a row is."""

  @property
  def expected_batch_size(self) -> float:
    """Returns the mean number of rows of the first step."""

  @property
  def batch_size_schedule(self) -> tuple[tuple[int, float], ...]:
    """Returns (step, number) for each step from which that number changes."""


class Sampler(Protocol):
  """Draws steps: a pure function, so that every process draws the same."""

  def __call__(self, step: int) -> np.ndarray:
    """Returns int64 indices of rows or groups, strictly increasing; private."""


class Steps:
  """Lets a sampler be iterated: its draws of step 0, 1 and so on, for ever."""

  def __call__(self, step: int) -> np.ndarray:
    """Returns the draw of a step; see `Sampler`."""
    raise NotImplementedError

  def __iter__(self) -> Iterator[np.ndarray]:
    return map(self, itertools.count())

  def __repr__(self) -> str:
    shown = [f"{k}={v}" for k, v in vars(self).items() if k[0] != "_"]
    return f"{type(self).__name__}({', '.join(shown)}, seed=<secret>)"


class Sampling(Protocol):
  """A way of sampling, made without arguments.

  A batch size is the mean number of rows of a step, before groups are made.
  """

  def check(self, numbers: Numbers) -> None:
    """Raises ValueError for numbers that cannot be sampled so."""

  def probability(self, numbers: Numbers, batch_size: float) -> float:
    """Returns a row's probability, in (0, 1], in a step that can draw it."""

  def typical_rows(self, numbers: Numbers, batch_size: float) -> int:
    """Returns a number of rows or groups that very few steps exceed."""

  def most_rows(self, numbers: Numbers, batch_size: float, tail: float) -> int:
    """Returns a number of rows that steps exceed with a chance below `tail`."""

  def make(
    self,
    numbers: Numbers,
    batch_size: float,
    *,
    seed: bytes,
    first_release: int,
  ) -> Sampler:
    """Returns a sampler that draws each step independently of all others.

    first_release is the place of step 0 among all steps charged under the plan;
    it may be negative. The seed is secret.
    """

  def summary(self, numbers: Numbers) -> str:
    """Returns a few words on how steps sample."""

  def describe(self, numbers: Numbers) -> str:
    """Returns the sentences on sampling in the privacy statement."""


def num_units(numbers: Numbers) -> int:
  """Returns the number of rows, or groups of rows, to draw from."""
  return -(-numbers.num_examples // numbers.group_size)


def mean_probability(numbers: Numbers, batch_size: float) -> float:
  """Returns the probability of each row that is in turn."""
  q = batch_size * numbers.cycle_length / numbers.num_examples
  return min(1.0, q)  # Rounding may make it a bit more than 1.


def in_words(numbers: Numbers, q: float) -> str:
  """Returns a part of a sentence that says how likely each row is drawn."""
  changing = (
    " at first; it changes on a schedule" if numbers.batch_size_schedule else ""
  )
  return (
    f"with probability q = {numbers.expected_batch_size:g} /"
    f" {numbers.num_examples / numbers.cycle_length:,.12g} = {q:.6g}{changing}"
  )
