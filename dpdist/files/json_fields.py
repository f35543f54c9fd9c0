"""Checks JSON that is read from outside, and writes strict JSON.

Python's parser accepts values of the wrong type: an integer where a float was
written, True for 1, a list for a text, numbers too large for a float. So what
is read from disk is checked field by field, before anything is computed with
it.
"""

from collections.abc import Mapping
import json
import math
from typing import Any

# Counts are below this number.
_LARGEST = 2**63


def parse(data: bytes | str, what: str) -> dict[str, Any]:
  """Reads a JSON object, or raises ValueError, which calls it `what`."""
  try:
    value = json.loads(data)
  except (ValueError, RecursionError):
    value = None
  if not isinstance(value, dict):
    raise ValueError(f"{what} must hold a JSON object, and cannot be read")
  return value


def counts(data: bytes) -> dict[str, int]:
  """Reads a JSON object of counts; what is none is left out."""
  try:
    value = parse(data, "it")
  except ValueError:
    return {}
  return {name: n for name, n in value.items() if is_of(int, n)}


def strict(value: Any) -> Any:
  """Returns the same value in a form that strict JSON can hold.

  JSON cannot write NaN and infinity. They become the strings "NaN", "Infinity"
  and "-Infinity", which Python's float reads.
  """
  if isinstance(value, Mapping):
    return {name: strict(x) for name, x in value.items()}
  if isinstance(value, list | tuple):
    return [strict(x) for x in value]
  if not isinstance(value, float) or math.isfinite(value):
    return value
  return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"


def text(value: Any) -> str:
  """Returns strict JSON on several lines, easy to read; see `strict`."""
  return json.dumps(strict(value), indent=2, allow_nan=False)


def check(record: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
  """Raises ValueError unless a record's fields, from JSON, are of their kinds.

  A kind is int (not negative, below 2^63), float (any finite number), bool, str
  or dict. The record may have more fields.
  """
  for name, kind in kinds.items():
    if name not in record:
      raise ValueError(f"{name} must be there, got {sorted(record)}")
    if not is_of(kind, record[name]):
      raise ValueError(
        f"{name} must be of kind {kind.__name__}, got {_shown(record[name])}"
      )


def is_of(kind: type, value: Any) -> bool:
  """Returns whether a value is of a kind; see `check`."""
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
