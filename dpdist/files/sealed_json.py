"""JSON values that carry their own SHA-256."""

from collections.abc import Mapping
import hashlib
import json
from typing import Any


def digest(value: bytes) -> str:
  """Returns SHA-256, hex."""
  return hashlib.sha256(value).hexdigest()


def _canonical(value: Mapping[str, Any]) -> bytes:
  return json.dumps(
    value, sort_keys=True, separators=(",", ":"), allow_nan=False
  ).encode()


def seal(value: Mapping[str, Any]) -> bytes:
  """Returns canonical JSON of a value with its digest, under "sha256"."""
  return _canonical({**value, "sha256": digest(_canonical(value))})


def is_whole(value: bytes) -> bool:
  """Returns whether a value is exactly what `seal` returned."""
  try:
    body = json.loads(value)
    del body["sha256"]
    return seal(body) == value
  except (ValueError, KeyError, TypeError, RecursionError):
    return False


def trim(value: bytes) -> bytes:
  """Returns a value without what a killed writer may have left at its end.

  On a disk, tensorstore overwrites the file that a killed process was writing,
  but does not shorten it if it was longer.
  """
  try:
    _, end = json.JSONDecoder().raw_decode(value.decode("latin-1"))
  except (ValueError, RecursionError):
    return value
  return value[:end] if is_whole(value[:end]) else value
