"""Checks arguments: each by its name, its value and a rule.

    num_steps = _validation.check("num_steps", num_steps, _validation.COUNT)

returns the value as a plain int, or raises `errors.ArgumentError`: "num_steps
must be an integer >= 1, got 0". `integer`, `real` and `one_of` make rules, and
`check_fields` checks a dataclass against a table of them. Where a condition
depends on several arguments, use `require`.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
import numbers
from typing import Any, NamedTuple

from dpdist import errors

# Some larger integers are too large for a float.
_LARGEST = 2**63


class Rule(NamedTuple):
  """What an argument must be."""

  text: str  # The rule in words, to follow "must be".
  kind: type  # That is accepted. A boolean does not count as a number.
  plain: Callable[[Any], Any]  # Converts it to the type that is kept.
  # The condition on the converted value. NaN fails every comparison.
  holds: Callable[[Any], bool]


def integer(at_least: int, at_most: int = _LARGEST - 1) -> Rule:
  """Returns the rule for a whole number; NumPy's are accepted as well."""
  text = f"an integer >= {at_least}"
  if at_most < _LARGEST - 1:
    text = f"an integer in [{at_least}, {at_most}]"
  return Rule(
    text, numbers.Integral, int, lambda value: at_least <= value <= at_most
  )


def real(
  *,
  above: float = -math.inf,
  at_least: float = -math.inf,
  below: float = math.inf,
  at_most: float = math.inf,
) -> Rule:
  """Returns the rule for a finite number between bounds, some exclusive."""
  low, high = max(above, at_least), min(below, at_most)
  if math.isinf(high):
    text = "finite"
    if low > -math.inf:
      text += f" and {'>' if above >= at_least else '>='} {low:g}"
  else:
    opening = "(" if above >= at_least else "["
    closing = ")" if below <= at_most else "]"
    text = f"in {opening}{low:g}, {high:g}{closing}"
  return Rule(
    text,
    numbers.Real,
    float,
    lambda value: (
      math.isfinite(value)
      and value > above
      and at_least <= value <= at_most
      and value < below
    ),
  )


def one_of(choices: Collection[str]) -> Rule:
  """Returns the rule for one of several names."""
  return Rule(
    f"one of {tuple(choices)}", str, str, lambda value: value in choices
  )


def optional(rule: Rule) -> Rule:
  """Returns the rule for what may be None, which stays as it is."""
  return Rule(
    f"None or {rule.text}",
    object,
    lambda value: value if value is None else rule.plain(value),
    lambda value: value is None or _meets(value, rule),
  )


COUNT = integer(1)
POSITIVE = real(above=0)
PROBABILITY = real(above=0, at_most=1)
DELTA = real(above=0, below=1)
FLAG = Rule("True or False", bool, bool, lambda value: True)


def check(name: str, value: Any, rule: Rule) -> Any:
  """Returns the value as a plain int, float, str or bool."""
  require(_meets(value, rule), name, rule.text, value)
  return rule.plain(value)


def _meets(value: Any, rule: Rule) -> bool:
  if not isinstance(value, rule.kind):
    return False
  if isinstance(value, bool) and rule.kind not in (bool, object):
    return False
  if rule.plain is float and isinstance(value, int) and abs(value) >= _LARGEST:
    return False
  return rule.holds(rule.plain(value) if rule.kind is not object else value)


def check_fields(record: Any, rules: Mapping[str, Rule]) -> None:
  """Checks a frozen dataclass in its `__post_init__`; makes its values plain.

  None is accepted if the attribute's annotation allows it. Attributes without a
  rule stay as they are.
  """
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    if field.name not in rules or (value is None and "None" in str(field.type)):
      continue
    object.__setattr__(
      record, field.name, check(field.name, value, rules[field.name])
    )


def require(holds: bool, name: str, rule: str, value: Any) -> None:
  """Raises ArgumentError, "NAME must be RULE, got VALUE", unless `holds`."""
  if not holds:
    raise errors.ArgumentError(f"{name} must be {rule}, got {value!r}")
