"""Checks arguments: each by its name, its value and a rule.

    num_steps = _validation.check("num_steps", num_steps, _validation.COUNT)

returns the value as a plain int, or raises `errors.ArgumentError`: "num_steps
must be an integer >= 1, got 0". `integer`, `real` and `one_of` make rules, and
`check_fields` checks a dataclass against a table of them. Where a condition
depends on several arguments, use `require`.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import difflib
import math
import numbers
from typing import Any, NamedTuple

from dpdist import errors

# Some larger integers are too large for a float.
_LARGEST = 2**63
# Letters of a value in a message.
_LONGEST = 200


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
  text = rule.text
  is_integer = isinstance(value, int) and not isinstance(value, bool)
  if is_integer and abs(value) >= _LARGEST:
    text += ", and below 2**63"
  require(_meets(value, rule), name, text, value)
  return rule.plain(value)


def suggestion(name: Any, known: Collection[str]) -> str:
  """Returns ": did you mean NAME?" for one that is close, else ""."""
  lower = {word.lower(): word for word in known}
  close = difflib.get_close_matches(str(name).lower(), lower, 1, 0.6)
  return f": did you mean {lower[close[0]]!r}?" if close else ""


def described(value: Any) -> str:
  """Returns what a thing of a wrong type is, in words that follow "got"."""
  name = getattr(value, "__name__", "")
  if isinstance(value, type):
    return f"the class {name}, which must be called first, as {name}(...)"
  if callable(value) and name:
    return f"the function {name}, and not what it returns when it is called"
  if value is None or isinstance(value, str | int | float):
    return f"{type(value).__name__} {value!r}" if value is not None else "None"
  return type(value).__name__


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
  """Raises ArgumentError, "NAME must be RULE, got VALUE", unless `holds`.

  The value is shown by its repr, of which the beginning is in one line.
  """
  if not holds:
    shown = " ".join(repr(value).split())
    if len(shown) > _LONGEST:
      shown = f"{shown[:_LONGEST]}... ({len(shown)} letters)"
    raise errors.ArgumentError(f"{name} must be {rule}, got {shown}")
