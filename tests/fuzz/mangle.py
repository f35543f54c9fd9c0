"""Ways in which files, JSON and settings go wrong, drawn from a generator."""

from collections.abc import Mapping
import copy
import json
import random
from typing import Any

# What a field may hold that nobody meant.
NUMBERS = (
  *(0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30),
  *(10**400, -(2**63), 0.0, -0.0, 0.5, 1.5, 1e-320, 1e-12, 1e15, 1e308, -1e308),
)
TEXTS = (
  *("", " ", "x", "0", "1e5", "NaN", "inf", "None", "../../x", "/", "~", "\0"),
  *("\ud800", "\u202e", "é", "a" * 5000, "%s", "{}", "{0}", "a/b", "-", "--x"),
)
VALUES: tuple[Any, ...] = (
  *(None, True, False, [], [[]], {}, {"a": 1}, [1, 2], [[1, 2.5]], [None]),
  *NUMBERS,
  *TEXTS,
)
# Of JSON, as text: what no Python value is written as.
_TOKENS = (
  *(
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"1" * 5000,
    b"-",
    b"tru",
    b"'x'",
    b"{",
    b"",
  ),
  *(b'"\\ud800"', b'"\xff\xfe"', b'"\\x"', b"[" * 100_000, b'{"a":' * 50_000),
  *(
    b"\xef\xbb\xbf{}",
    b"0x10",
    b"1_000",
    b"01",
    b"\0",
    b'{"a":1,"a":2}',
    b"[1,]",
  ),
)


def value(rng: random.Random, was: Any = None) -> Any:
  """Something else than what was there, often of its kind."""
  roll = rng.random()
  if isinstance(was, bool) or roll < 0.5 or was is None:
    return copy.deepcopy(rng.choice(VALUES))
  if isinstance(was, int):
    return was + rng.choice([-2, -1, 1, 2, 1000, 0.5, 10**18])
  if isinstance(was, float):
    return was * rng.choice([-1, 0, 0.5, 2, 1e9, 1e-9, 1e300])
  if isinstance(was, str):
    return text(rng, was)
  if isinstance(was, list):
    return rng.choice([[], was + was, was + [None], dict.fromkeys("ab", was)])
  return rng.choice(VALUES)


def text(rng: random.Random, was: str) -> str:
  """Text that is a little different."""
  if not was:
    return rng.choice(TEXTS)
  at = rng.randrange(len(was))
  return rng.choice(
    [
      was[:at] + rng.choice(TEXTS) + was[at:],
      was[:at],
      was[at:],
      was[:at] + was[at + 1 :],
      was.upper(),
      was * 2,
    ]
  )


def fields(rng: random.Random, record: Mapping[str, Any]) -> dict[str, Any]:
  """JSON with a field, somewhere in it, that is gone, new or another."""
  changed = copy.deepcopy(dict(record))
  for _ in range(rng.choice([1, 1, 1, 2, 3])):
    place: Any = changed
    while True:
      if isinstance(place, dict) and place:
        key = rng.choice(sorted(place))
      elif isinstance(place, list) and place:
        key = rng.randrange(len(place))
      else:
        break
      inner = place[key]
      if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
        place = inner
        continue
      roll = rng.random()
      if roll < 0.12:
        del place[key]
      elif roll < 0.2 and isinstance(place, dict):
        place[rng.choice(["x", "", "seq", "kind", key + "x"])] = value(rng)
      elif roll < 0.3 and isinstance(place, dict):
        place[key] = copy.deepcopy(place[rng.choice(sorted(place))])
      else:
        place[key] = value(rng, inner)
      break
  return changed


def json_text(rng: random.Random, data: bytes) -> bytes:
  """JSON as text with one token replaced, doubled or taken away."""
  try:
    record = json.loads(data)
  except ValueError:
    return raw(rng, data)
  if not isinstance(record, dict) or not record:
    return rng.choice(_TOKENS)
  roll = rng.random()
  key = rng.choice(sorted(record))
  if roll < 0.2:
    # A key that is there twice: readers differ on which one counts.
    twice = json.dumps({key: value(rng, record[key])})[1:-1].encode()
    return b"{" + twice + b"," + data.lstrip()[1:]
  if roll < 0.6:
    marker = "@@marker@@"
    marked = json.dumps({**record, key: marker}).encode()
    return marked.replace(f'"{marker}"'.encode(), rng.choice(_TOKENS))
  if roll < 0.7:
    return rng.choice(_TOKENS)
  if roll < 0.8:
    return json.dumps(record).encode(rng.choice(["utf-16", "utf-32", "cp500"]))
  return json.dumps(fields(rng, record)).encode()


def raw(rng: random.Random, data: bytes) -> bytes:
  """Bytes that a disk, a network or a kill left otherwise."""
  changed = bytearray(data)
  for _ in range(rng.choice([1, 1, 2, 8])):
    if not changed:
      return rng.randbytes(rng.randrange(1, 40))
    at = rng.randrange(len(changed))
    # Most of a format is in its first and last bytes.
    if rng.random() < 0.5:
      near = rng.randrange(min(64, len(changed)))
      at = near if rng.random() < 0.5 else len(changed) - 1 - near
    stop = at + rng.choice([1, 1, 2, 4, 8, 64])
    roll = rng.random()
    if roll < 0.35:
      changed[at] ^= 1 << rng.randrange(8)
    elif roll < 0.5:
      changed[at:stop] = rng.choice([b"\0", b"\xff"]) * (stop - at)
    elif roll < 0.65:
      del changed[at:]
    elif roll < 0.75:
      changed[at:at] = rng.randbytes(stop - at)
    elif roll < 0.85:
      del changed[at:stop]
    elif roll < 0.95:
      changed[at:stop] = rng.randbytes(stop - at)
    else:
      changed += rng.choice([b"\0" * 64, bytes(changed), rng.randbytes(9)])
  return bytes(changed)


def file(rng: random.Random, data: bytes) -> bytes:
  """Either of the two above, or nothing like it."""
  roll = rng.random()
  if roll < 0.02:
    return b""
  if roll < 0.05:
    return rng.randbytes(rng.randrange(2000))
  return json_text(rng, data) if rng.random() < 0.5 else raw(rng, data)
