"""Checks the numbers of a config and of its plan."""

from collections.abc import Callable
import dataclasses
import math
import numbers
from typing import Any

from dpdist.accounting import search
from dpdist.accounting import step_events
from dpdist.privacy import schedule

_LARGEST_WHOLE = 2**63
_REAL, _WHOLE = (float, numbers.Real), (int, numbers.Integral)
_POSITIVE = (_REAL, lambda x: 0 < x < math.inf, "finite and > 0")
_COUNT = (_WHOLE, lambda x: x >= 1, "an integer >= 1")
_DELTA = (_REAL, lambda x: 0 < x < 1, "in (0, 1)")


def _one_of(choices: tuple[str, ...]) -> tuple[Any, Callable[[Any], bool], str]:
  return (str, str), lambda x: x in choices, f"one of {choices}"


# For each attribute: the type to convert to, the types accepted, a condition,
# and that condition in words. NaN meets no condition.
_RULES: dict[str, tuple[tuple[Any, Any], Callable[[Any], bool], str]] = {
  "num_examples": _COUNT,
  "expected_batch_size": _POSITIVE,
  "num_steps": _COUNT,
  "l2_clip_norm": _POSITIVE,
  "target_delta": _DELTA,
  "delta": _DELTA,
  "target_epsilon": _POSITIVE,
  "noise_multiplier": (
    _REAL,
    lambda x: 0 < x <= search.MOST_NOISE,
    f"finite and > 0, and at most {search.MOST_NOISE:g}",
  ),
  "accountant": ((str, str), lambda x: x in ("pld", "rdp"), "'pld' or 'rdp'"),
  "truncated_batch_size": _COUNT,
  "cycle_length": _COUNT,
  "examples_per_user": _COUNT,
  "group_size": _COUNT,
  "neighboring_relation": _one_of(step_events.NEIGHBORING_RELATIONS),
  "sampling": _one_of(step_events.SAMPLINGS),
  "unit": _one_of(("example", "user")),
}


def check(record: Any) -> None:
  """Checks each attribute against its rule, and makes it a plain number.

  Args:
    record: a config or a plan; see `dpdist.privacy.plan`.

  Raises:
    ValueError: with the attribute's name, its value and what would be right.
  """
  # Schedules last: their check uses other attributes, which must be valid.
  is_last = lambda field: field.name.endswith("_schedule")
  for field in sorted(dataclasses.fields(record), key=is_last):
    value = getattr(record, field.name)
    if value is None and "None" in str(field.type):
      continue
    if field.name.endswith("_schedule"):
      value = schedule.checked(field.name, value, record.num_steps)
    else:
      (plain, kind), holds, right = _RULES[field.name]
      # Some integers are too large for a float.
      is_small = not isinstance(value, int) or abs(value) < _LARGEST_WHOLE
      if not (schedule.is_a(kind, value) and is_small and holds(plain(value))):
        raise ValueError(f"{field.name} must be {right}, got {value!r}")
      value = plain(value)
    # The fingerprint of a plan must not depend on whether 1 or 1.0 was written.
    object.__setattr__(record, field.name, value)
  num_units = -(-record.num_examples // record.group_size)
  if record.cycle_length > num_units:
    raise ValueError(
      f"cycle_length must be at most {num_units}, the rows or groups of rows"
      f" that take turns, got {record.cycle_length}"
    )
  largest = record.num_examples / record.cycle_length
  sizes = [x for _, x in record.batch_size_schedule]
  for size in (record.expected_batch_size, *sizes):
    if size > largest:
      over = "num_examples" + (
        f" / cycle_length={largest:g}"
        if record.cycle_length > 1
        else f"={record.num_examples}"
      )
      raise ValueError(
        f"expected_batch_size must be at most {over}, got {size!r}"
      )
    if record.sampling == "fixed_size" and size != int(size):
      raise ValueError(
        "expected_batch_size must be whole with sampling='fixed_size', got"
        f" {size!r}"
      )
  pair_of(record, 1.0, 1.0)  # Raises for settings of no mechanism.


def pair_of(record: Any, noise_multiplier: float, q: float) -> step_events.Pair:
  is_truncated = record.sampling == "truncated_poisson"
  # A neighbour has one row more or one less.
  may_grow = is_truncated and record.neighboring_relation == "add_or_remove_one"
  return step_events.of(
    noise_multiplier=noise_multiplier,
    sampling_probability=q,
    sampling=record.sampling,
    neighboring_relation=record.neighboring_relation,
    num_examples=record.num_examples + may_grow if is_truncated else None,
    truncated_batch_size=record.truncated_batch_size,
    cycle_length=record.cycle_length,
    examples_per_user=record.examples_per_user,
    group_size=record.group_size,
    may_grow=may_grow,
  )
