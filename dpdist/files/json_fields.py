"""JSON: what comes from outside is held against what it should be.

Python reads more than one means: an integer where a float was, True for 1, a
list for a text, numbers that no float holds. What is read from a disk is
therefore checked field by field, before anything is computed with it. What goes
out is strict JSON.
"""

from collections.abc import Mapping
import json
import math
from typing import Any

# Beyond it nothing here counts anything.
_LARGEST = 2**63


def parse(data: bytes | str, what: str) -> dict[str, Any]:
  """Reads a JSON object.

  Args:
    data: its text.
    what: it is, for messages.

  Raises:
    ValueError: it is no JSON, or no object.
  """
  try:
    value = json.loads(data)
  except (ValueError, RecursionError):
    value = None
  if not isinstance(value, dict):
    raise ValueError(f"{what} must hold a JSON object, and cannot be read")
  return value


def strict(value: Any) -> Any:
  """The same value, as JSON can hold it.

  JSON has no way to write NaN and infinity. They become the strings "NaN",
  "Infinity" and "-Infinity", which Python's float reads.

  Args:
    value: of dicts, lists, tuples, strings, numbers, bools and None.
  """
  if isinstance(value, Mapping):
    return {name: strict(x) for name, x in value.items()}
  if isinstance(value, list | tuple):
    return [strict(x) for x in value]
  if not isinstance(value, float) or math.isfinite(value):
    return value
  return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"


def text(value: Any) -> str:
  """Strict JSON for programs and people, of several lines; see `strict`."""
  return json.dumps(strict(value), indent=2, allow_nan=False)


def check(record: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
  """Holds fields of a record against their kinds; others may be there.

  Args:
    record: from JSON.
    kinds: by name, int (not negative, below 2^63), float (any finite number),
      bool, str or dict.

  Raises:
    ValueError: names a field that is missing, or is of another kind.
  """
  for name, kind in kinds.items():
    if name not in record:
      raise ValueError(f"{name} must be there, got {sorted(record)}")
    if not is_of(kind, record[name]):
      raise ValueError(
        f"{name} must be of kind {kind.__name__}, got {_shown(record[name])}"
      )


def is_of(kind: type, value: Any) -> bool:
  """Whether a value is of a kind; see `check`."""
  if isinstance(value, bool):
    return kind is bool
  if kind is int:
    return isinstance(value, int) and 0 <= value < _LARGEST
  if kind is float:
    if isinstance(value, int):
      return abs(value) < _LARGEST
    return isinstance(value, float) and math.isfinite(value)
  return isinstance(value, kind)


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) < 60 else f"{text[:40]}... of {len(text)} characters"
