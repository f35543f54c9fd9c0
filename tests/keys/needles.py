"""Finds keys in whatever a program left behind, however they were written.

A needle is a part of a key in one of the ways in which programs write bytes or
numbers. Parts are short, so that a key that was cut is found too. A haystack is
a file with all that is packed into it: gzip, zlib, zstd (which checkpoints are
made of), zip archives, and base64 in pages.
"""

import base64
import binascii
from collections.abc import Iterable, Iterator
import gzip
import io
import json
import pathlib
import re
from typing import NamedTuple
import zipfile
import zlib

import jax
import numpy as np
import pyarrow

from dpdist.keys import keys
from dpdist.mechanism import mechanism

# Bytes of a key that are enough to tell it: 2^-64 for each place to be wrong.
_PART = 8
_ZSTD = b"\x28\xb5\x2f\xfd"
_DEEPEST = 4
# NumPy pads numbers to one width.
_SEPARATORS = (
  *(", ", ",  ", ",   ", ",", " ", "  ", "   ", "\n", ",\n", "], ["),
  *("\t", ":", "-", "_"),
)


STREAMS = (
  *("commitments", "init", "model_rng", "noise", "release_inputs"),
  *("sampling",),
  *("sentinel_direction", "sentinel_step", "unit_examples"),
)


class Found(NamedTuple):
  """A key where it should not be.

  Attributes:
    where: the file, and what is packed in it.
    what: which key, and how it is written.
  """

  where: str
  what: str


class Needles:
  """What to look for."""

  def __init__(self) -> None:
    self._names: dict[bytes, str] = {}
    self._by_start: dict[int, list[bytes]] = {}
    self._starts = np.zeros(0, np.uint64)

  def add(self, name: str, key: bytes) -> None:
    """Adds all ways of writing a key of 8 bytes or more."""
    for way, needle in ways(key):
      self._names.setdefault(needle, f"{name} in {way}")
    self._starts, self._by_start = np.zeros(0, np.uint64), {}

  def add_words(self, name: str, words: np.ndarray) -> None:
    """Adds all ways of writing the two words of a key, uint32 [2]."""
    self.add(name, words.astype("<u4").tobytes())
    self.add(name, words.astype(">u4").tobytes())
    one, other = map(int, words)
    for way, number in (
      ("hex", "{:08x}"),
      ("hex, upper", "{:08X}"),
      ("hex with 0x", "0x{:x}"),
      ("decimal", "{}"),
    ):
      for separator in _SEPARATORS:
        self._put(
          f"{name} in {way} words",
          separator.join([number.format(one), number.format(other)]),
        )

  def _put(self, name: str, text: str) -> None:
    if len(text) >= _PART:
      self._names.setdefault(text.encode(), name)

  def in_data(self, where: str, data: bytes) -> Iterator[Found]:
    """Yields what is found in data, as it is and unpacked."""
    for inside, layer in layers(data):
      for name in sorted(self._in_layer(layer)):
        yield Found(where + inside, name)

  def in_files(self, paths: Iterable[pathlib.Path]) -> list[Found]:
    """What is found in files, and in their names."""
    found = []
    for path in paths:
      found += self.in_data(str(path), path.read_bytes())
      found += self.in_data(f"the name {path}", str(path).encode())
    return found

  def _in_layer(self, data: bytes) -> set[str]:
    # Eight bytes are looked up at once; what begins right is compared whole.
    if not len(self._starts):
      for needle in self._names:
        start = int.from_bytes(needle[:_PART], "little")
        self._by_start.setdefault(start, []).append(needle)
      self._starts = np.array(sorted(self._by_start), np.uint64)
    names = set()
    for shift in range(_PART):
      size = (len(data) - shift) // _PART
      if size < 1:
        continue
      windows = np.frombuffer(data, "<u8", size, shift)
      places = np.searchsorted(self._starts, windows)
      places[places == len(self._starts)] = 0
      for row in np.flatnonzero(self._starts[places] == windows):
        for needle in self._by_start[int(windows[row])]:
          if data.startswith(needle, shift + int(row) * _PART):
            names.add(self._names[needle])
    return names


def of_run(secret: bytes, branches: Iterable[str], *, steps: int) -> Needles:
  """The secret of a run and all keys that its steps have.

  Args:
    secret: 32 bytes.
    branches: their identities.
    steps: of which to derive keys.
  """
  made = Needles()
  made.add("the secret", secret)
  for branch in {"", *branches}:
    streams = mechanism.Streams(secret, branch)
    for stream in STREAMS:
      name = f"{stream} of branch {branch[:6]!r}"
      made.add(name, keys.derive(secret, stream, branch=branch))
      for step in (None, *range(steps)):
        made.add_words(f"{name}, step {step}", streams.key_data(stream, step))
    for step in range(steps):
      step_key = jax.random.fold_in(streams.key("noise"), step)
      words = np.asarray(jax.random.key_data(step_key))
      made.add_words(f"noise of branch {branch[:6]!r}, draw {step}", words)
  return made


def ways(key: bytes) -> Iterator[tuple[str, bytes]]:
  """Yields (way, needle): parts of a key as programs may write them."""
  for start in range(len(key) - _PART + 1):
    part = key[start : start + _PART]
    yield "raw", part
    yield "raw, reversed", part[::-1]
    yield "hex", part.hex().encode()
    yield "hex, upper", part.hex().upper().encode()
    for separator in (" ", ":", "-"):
      yield "hex of bytes", part.hex(separator).encode()
    yield "a Python literal", repr(part)[2:-1].encode()
    yield "octal", "".join(f"\\{x:03o}" for x in part).encode()
    yield "percent", "".join(f"%{x:02X}" for x in part).encode()
    text = part.decode("latin-1")
    yield "UTF-8", text.encode()
    yield "JSON", json.dumps(text)[1:-1].encode()
    for separator in (", ", ",", " "):
      yield "decimal bytes", separator.join(map(str, part)).encode()
  for shift in range(3):
    # Characters that depend on the key's neighbours are cut off.
    whole = base64.b64encode(bytes(shift) + key)
    first = -(-shift * 8 // 6)
    inner = whole[first : (shift + len(key)) * 8 // 6]
    for start in range(len(inner) - 9):
      part = inner[start : start + 10]
      yield "base64", part
      yield "base64, urlsafe", part.translate(bytes.maketrans(b"+/", b"-_"))
  padded = base64.b32encode(key).rstrip(b"=")
  yield "base32", padded[: len(key) * 8 // 5]
  for order in ("big", "little"):
    for words in (key, *(key[i : i + 8] for i in range(0, len(key), 8))):
      digits = str(int.from_bytes(words, order))
      # Leading digits alone, too, as of a number that was rounded.
      yield f"decimal, {order} endian", digits[:16].encode()
      yield f"decimal, {order} endian", digits[-16:].encode()


def layers(data: bytes, depth: int = 0) -> Iterator[tuple[str, bytes]]:
  """Yields data, and all that is packed in it, each with its place."""
  yield "", data
  if depth == _DEEPEST:
    return
  for name, unpacked in _packed(data):
    for inside, layer in layers(unpacked, depth + 1):
      yield f" > {name}{inside}", layer


def _packed(data: bytes) -> Iterator[tuple[str, bytes]]:
  for match in re.finditer(re.escape(_ZSTD), data):
    frame = _zstd_frame(data, match.start())
    unpacked = _read(
      pyarrow.CompressedInputStream(pyarrow.BufferReader(frame), "zstd")
    )
    if unpacked:
      yield f"zstd at {match.start()}", unpacked
  for match in re.finditer(rb"\x1f\x8b\x08", data):
    unpacked = _read(gzip.GzipFile(fileobj=io.BytesIO(data[match.start() :])))
    if unpacked:
      yield f"gzip at {match.start()}", unpacked
  # Two bytes are no magic: at the start of a file, and of an image's data.
  for start in {0, *(m.end() for m in re.finditer(b"IDAT", data))}:
    if data[start : start + 1] == b"\x78":
      try:
        unpacked = zlib.decompressobj().decompress(data[start:])
      except zlib.error:
        continue
      if unpacked:
        yield f"zlib at {start}", unpacked
  if b"PK\x03\x04" in data:
    try:
      with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
          yield f"zip, {name}", archive.read(name)
    except (zipfile.BadZipFile, NotImplementedError, OSError, RuntimeError):
      pass
  for match in re.finditer(rb"base64,\s*([A-Za-z0-9+/=\s]{8,})", data):
    try:
      yield f"base64 at {match.start()}", base64.b64decode(match[1])
    except (binascii.Error, ValueError):
      continue


def _zstd_frame(data: bytes, start: int) -> bytes:
  """A frame without what follows it (RFC 8878, section 3.1.1)."""
  descriptor = data[start + 4] if start + 4 < len(data) else 0
  is_single = descriptor >> 5 & 1
  content_size = (is_single, 2, 4, 8)[descriptor >> 6]
  place = start + 5 + (1 - is_single) + (0, 1, 2, 4)[descriptor & 3]
  place += content_size
  while True:
    header = int.from_bytes(data[place : place + 3], "little")
    is_repeated = header >> 1 & 3 == 1
    place += 3 + (1 if is_repeated else header >> 3)
    if header & 1 or place >= len(data):
      return data[start : place + 4 * (descriptor >> 2 & 1)]


def _read(stream: object) -> bytes:
  """All that can be unpacked before what follows it is no part of it."""
  pieces = []
  try:
    while piece := stream.read(1 << 16):  # type: ignore[attr-defined]
      pieces.append(piece)
  except (EOFError, OSError, ValueError, zlib.error):
    pass
  return b"".join(pieces)
