"""Makes streams of uniform words: one for each purpose of each step."""

import hashlib
import operator

import numpy as np


def stream(
  key: np.ndarray, step: int, purpose: int, group: int = 0, *, attempt: int = 0
) -> np.random.Philox:
  """Returns the words of one purpose, from word 4 * group on."""
  counter = np.array([group, attempt, purpose, step], dtype=np.uint64)
  return np.random.Philox(counter=counter, key=key)


def philox_key(seed: int | bytes) -> np.ndarray:
  """Returns the uint64[2] key of a seed."""
  if isinstance(seed, bytes):
    if not seed:
      raise ValueError("seed must be an int or non-empty bytes, got b''")
    encoded = b"bytes:" + seed
  elif isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
    encoded = b"int:" + format(operator.index(seed), "x").encode()
  else:
    # A seed is secret even if its type is wrong.
    raise ValueError(
      f"seed must be an int or non-empty bytes, got a {type(seed).__name__}"
    )
  digest = hashlib.sha256(b"dpdist.sampling/philox_key/v1\0" + encoded).digest()
  return np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)


def check_int(name: str, value: int, low: int, high: int) -> int:
  """Returns an argument as an int; raises ValueError if it is not one."""
  is_integer = isinstance(value, (int, np.integer))
  if not is_integer or isinstance(value, bool) or not low <= value <= high:
    raise ValueError(f"{name} must be an int in [{low}, {high}], got {value!r}")
  return operator.index(value)
