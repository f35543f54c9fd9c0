"""Numbers that change at fixed steps of a plan, known before its first step."""

import numbers
import operator
from typing import Any, NamedTuple

from dpdist.accounting import search


class Phase(NamedTuple):
  """The numbers that hold from a step of the plan on."""

  start: int  # The first such step, counted from 0.
  noise_multiplier: float  # Noise standard deviation over l2 sensitivity.
  expected_batch_size: float  # Mean number of rows in a step.


Schedule = tuple[tuple[int, float], ...]


def checked(name: str, value: Any, num_steps: int) -> Schedule:
  """Checks a schedule and returns it as plain tuples."""
  number = {
    "noise_schedule": "noise_multiplier",
    "batch_size_schedule": "expected_batch_size",
  }[name]
  try:
    if not all(
      is_a(numbers.Integral, step) and is_a(numbers.Real, x)
      for step, x in value
    ):
      raise TypeError
    schedule = tuple((operator.index(step), float(x)) for step, x in value)
  except (TypeError, ValueError, OverflowError):
    schedule = ((-1, 0.0),)
  starts = [start for start, _ in schedule]
  if (
    starts != sorted(set(starts))
    or not all(0 < start < num_steps for start in starts)
    or not all(0 < x <= search.MOST_NOISE for _, x in schedule)
  ):
    raise ValueError(
      f"{name} must be (step, {number}) pairs, of rising steps in"
      f" [1, num_steps={num_steps}) and numbers > 0 and at most"
      f" {search.MOST_NOISE:g}, got"
      f" {value!r}"
    )
  return schedule


def is_a(kind: Any, value: Any) -> bool:
  """Returns whether a value is of a kind; a boolean is of none."""
  return isinstance(value, kind) and not isinstance(value, bool)
