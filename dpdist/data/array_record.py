"""Reads examples that stay in ArrayRecord files, one record each."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import copy
import errno
import hashlib
import io
import json
import math
import os
import re
from typing import Any

import numpy as np

from dpdist.data import arrays as arrays_lib
from dpdist.data import sources
from dpdist.files import places
from dpdist.files import stamps

# Bytes of columns that are kept in memory while earlier columns are hashed.
_HELD_BYTES = 1 << 28


class ArrayRecordSource:
  """ArrayRecord files whose records are .npz archives of one example each.

  Examples stay on disk; a read fetches its records at random positions and
  decodes them. Records are numbered through the files in the order given.
  `write_array_record` makes such files. Raises ValueError if there is no such
  file or no record in it, and OSError if it cannot be read, or is no
  ArrayRecord file.
  """

  def __init__(
    self,
    paths: sources.Path | Sequence[sources.Path],
    *,
    decode: Callable[[bytes], Mapping[str, Any]] | None = None,
  ):
    import grain

    given = sources.check_paths(paths)
    self._digest: str | None = None
    # Before anything is read, so that no change is missed.
    self._stamps = stamps.FileStamps(given)
    self._paths = [places.on_disk(path) for path in given]
    with _array_record_errors():
      self._records = grain.sources.ArrayRecordDataSource(self._paths)
    if not len(self._records):
      raise ValueError(f"paths must hold records, got {self._paths} with none")
    with _array_record_errors():
      first = self._records[0]
    self._decode = decode or _decode_record
    self._spec = _spec(self._example(first))

  def __len__(self) -> int:
    return len(self._records)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Reads examples, which must be of one shape; see `sources.Source.read`."""
    indices = sources.check_indices(indices, len(self))
    batch = {
      name: np.empty((len(indices), *shape), dtype)
      for name, (shape, dtype) in self._spec.items()
    }
    if len(indices):
      records = self._fetch(indices.tolist())
      for row, record in enumerate(records):
        example = self._example(record)
        # Without this check, NumPy would broadcast or cast silently.
        if _spec(example) != self._spec:
          raise ValueError(
            "paths must hold records of the same names, shapes and dtypes as"
            f" the first, {self._spec}, got one with {_spec(example)}"
          )
        for name, array in example.items():
          batch[name][row] = array
    return batch

  def read_each(self, indices: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Reads examples one by one, which may differ in shape and dtype."""
    indices = sources.check_indices(indices, len(self))
    records = self._fetch(indices.tolist()) if len(indices) else ()
    return [self._example(record) for record in records]

  def _example(self, record: bytes) -> dict[str, np.ndarray]:
    example = self._decode(record)
    return {name: np.asarray(value) for name, value in example.items()}

  def _fetch(self, indices: list[int]) -> Sequence[bytes]:
    records = self._records
    try:
      with _array_record_errors():
        found = records.__getitems__(indices)
      if b"" in found:
        # It returns b"" for records behind the end of a file (array_record
        # 0.8.6).
        raise OSError(errno.EIO, "a file of it is cut short")
    except OSError:
      # A reader that failed once would always fail: a copy has no reader, and
      # opens what it needs.
      self._records = copy.copy(records)
      raise
    return found

  def content_digest(self) -> str:
    """Returns the digest of an `ArraySource` of the same examples."""
    if self._digest is None:
      columns = sorted(self._spec.items())
      header = [
        [name, dtype.str, [len(self), *shape]]
        for name, (shape, dtype) in columns
      ]
      digest = hashlib.sha256(json.dumps(header).encode() + b"\n")
      for block in self._columns():
        digest.update(block.tobytes())
      self._digest = digest.hexdigest()
    return self._digest

  def _columns(self) -> Iterator[np.ndarray]:
    """Yields all examples in blocks of rows, column by column."""
    sizes = {
      name: dtype.itemsize * math.prod(shape)
      for name, (shape, dtype) in sorted(self._spec.items())
    }
    rows = max(1, sources.HASH_BLOCK_BYTES // max(1, sum(sizes.values())))
    left = list(sizes)
    while left:
      # All columns are read at once. Those whose turn comes later are kept as
      # far as memory allows, and otherwise read again.
      first, room = left.pop(0), _HELD_BYTES
      held: dict[str, list[np.ndarray]] = {}
      for name in left:
        room -= sizes[name] * len(self)
        if room < 0:
          break
        held[name] = []
      for start in range(0, len(self), rows):
        batch = self.read(np.arange(start, min(start + rows, len(self))))
        yield batch[first]
        for name, blocks in held.items():
          blocks.append(batch[name])
      for blocks in held.values():
        yield from blocks
      left = left[len(held) :]

  def changed_files(self) -> list[str]:
    """See `dpdist.data.sources.changed_files`."""
    return self._stamps.changed(self._is_same)

  def _is_same(self) -> bool:
    if self._digest is None:
      return True  # There is no digest yet that could have changed.
    try:
      # Opened anew, so that nothing comes from a reader's memory.
      return ArrayRecordSource(self._paths).content_digest() == self._digest
    except ValueError:  # Other shapes, or no records.
      return False

  def is_touched(self) -> bool:
    """See `dpdist.data.sources.is_touched`."""
    return self._stamps.is_touched()

  def earlier_digests(self) -> list[str]:
    """Returns the SHA-256 over base names, sizes and bytes of the files."""
    header = [[os.path.basename(p), os.path.getsize(p)] for p in self._paths]
    digest = hashlib.sha256(json.dumps(header).encode() + b"\n")
    for path in self._paths:
      with open(path, "rb") as file:
        while block := file.read(sources.HASH_BLOCK_BYTES):
          digest.update(block)
    return [digest.hexdigest()]


def write_array_record(
  path: sources.Path, examples: Iterable[Mapping[str, np.ndarray]]
) -> None:
  """Writes examples as a file that `ArrayRecordSource` reads.

  Args:
    path: of the file; an existing one is replaced.
    examples: by name, the arrays of one example, without a batch axis. All
      examples must have the same names, shapes and dtypes.

  Raises:
    ValueError: an example differs from the first in a name, shape or dtype.
  """
  from array_record.python import array_record_module

  # One record a group: the layout for reads at random positions.
  writer = array_record_module.ArrayRecordWriter(
    os.fspath(path), "group_size:1"
  )
  try:
    first = None
    for number, example in enumerate(examples):
      example = {name: np.asarray(array) for name, array in example.items()}
      first = _spec(example) if first is None else first
      if _spec(example) != first:
        raise ValueError(
          f"examples must all be like the first, {first}, got example"
          f" {number} with {_spec(example)}"
        )
      buffer = io.BytesIO()
      np.savez(buffer, allow_pickle=False, **example)
      writer.write(buffer.getvalue())
  finally:
    writer.close()


@contextlib.contextmanager
def _array_record_errors() -> Iterator[None]:
  """Turns RuntimeErrors that ArrayRecord raises into OSErrors."""
  try:
    yield
  except (EOFError, RuntimeError) as error:
    # The rest of the message contains the file, and the place in it.
    reason = re.split(r"; | \(|, ", str(error))[0]
    raise OSError(errno.EIO, reason) from error


def _decode_record(record: bytes) -> dict[str, np.ndarray]:
  try:
    return arrays_lib.load_npz(io.BytesIO(record), "a record")
  except ValueError as error:
    raise ValueError(
      "paths must hold records that are .npz archives, got one that is not"
    ) from error


def _spec(
  example: Mapping[str, np.ndarray],
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  return {name: (a.shape, a.dtype) for name, a in example.items()}
