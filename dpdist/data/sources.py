"""Example sources: random access to examples by index.

A source knows how many examples it has, reads any of them by index, and can
say, by a hash, what its content is. It neither shuffles nor batches: which
examples a step sees is the sampler's choice alone, and `dpdist.data.pipeline`
turns that choice into padded chunks.

An example is one unit of privacy. By convention it is named
`{"inputs": ..., "targets": ...}`, but any names will do.
"""

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
from typing import Any, BinaryIO, Protocol

import numpy as np

from dpdist import errors
from dpdist.files import stamps

Path = str | os.PathLike[str]

_HASH_BLOCK_BYTES = 1 << 24
# Of columns that are held back while those before them are hashed.
_HELD_BYTES = 1 << 28


# For the record of a run: it names no file.
CHANGED = "files of the training data were changed while the run read them"


class Source(Protocol):
  """What the data pipeline asks of a data set.

  `read` is called from several threads at once and must be thread-safe.

  A source may have three methods more; see `changed_files`, `is_touched` and
  `earlier_digests`, which ask them.
  """

  def __len__(self) -> int:
    """The number of examples."""
    ...

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Reads examples.

    Args:
      indices: int64 of shape (k,), each in [0, len(self)); k may be zero.

    Returns:
      By name, arrays of leading axis k in the order of `indices`. Shapes
      beyond the first axis, and dtypes, are the same at every call.

    Raises:
      ValueError: an index is out of range, or what is there is no example. The
        message does not repeat the index, because which examples are read is
        private.
      OSError: they cannot be had now, but perhaps later.
    """
    ...

  def content_digest(self) -> str:
    """SHA-256 of the content, 64 hex digits; safe to record beside a run.

    Of the examples in their order, and of nothing that can change without them,
    such as the names of files: what a data set may spend is kept under it.
    """
    ...


def changed_files(source: Source) -> list[str]:
  """The files that a source still reads from and that were changed since.

  Once this is empty, all that was read so far is what the manifest is of, but
  for what was changed and changed back in between, and for what a program
  writes through a memory map of its own, which moves no time of the file. A
  source that reads from files after it was made has a method of this name. It
  may take as long as the manifest did; see `is_touched`.

  Raises:
    OSError: they cannot be looked at now, but perhaps later.
  """
  return list(getattr(source, "changed_files", list)())


def is_touched(source: Source) -> bool:
  """Whether `changed_files` has to hash content again; looks at none itself.

  A source whose files can be renamed, or have another mode, and be what they
  were has a method of this name.

  Raises:
    OSError: as in `changed_files`.
  """
  return bool(getattr(source, "is_touched", bool)())


def changed_error(changed: Sequence[str]) -> errors.ChangedError:
  """What to raise where files were changed, of which some may be known here."""
  where = f", here {', '.join(changed)}" if changed else ""
  return errors.ChangedError(
    f"{CHANGED}{where}: the run stops, since it cannot vouch for its data; what"
    " it read since its last checkpoint is neither shown nor saved. Start a new"
    " run on data that stays as it is"
  )


def earlier_digests(source: Source) -> list[str]:
  """What earlier releases called the same content, and may have recorded.

  A source whose manifest was once made otherwise has a method of this name.
  """
  return list(getattr(source, "earlier_digests", list)())


class ArraySource:
  """Examples held in arrays of equal leading length.

  The arrays are not copied, so those of `np.load(..., mmap_mode="r")` stay on
  disk and a read touches only the rows that it asks for. They must not be
  changed afterwards: the manifest is computed once.

  Args:
    arrays: by name, arrays of shape (num_examples, ...). No object dtypes.
    convert: applied to what `read` selects, so that compact arrays (uint8
      pixels, say) become what the model takes only when they are read. The
      manifest covers `arrays`, not `convert`.

  Raises:
    ValueError: no arrays, unequal lengths, or an object dtype.
  """

  def __init__(
    self,
    arrays: Mapping[str, np.ndarray],
    *,
    convert: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    | None = None,
  ):
    self._arrays = {name: np.asarray(a) for name, a in arrays.items()}
    self._convert = convert
    self._manifest: str | None = None
    mapped = {_mapped_file(array) for array in self._arrays.values()} - {None}
    # One that was removed by now is nobody's to change.
    self._stamps = stamps.FileStamps(
      path for path in mapped if path and os.path.exists(path)
    )
    shapes = {name: a.shape for name, a in self._arrays.items()}
    if len({shape[:1] for shape in shapes.values()}) != 1 or () in (
      shapes.values()
    ):
      raise ValueError(
        "arrays must be at least one array, all of the same leading length,"
        f" got shapes {shapes}"
      )
    for name, array in self._arrays.items():
      if array.dtype.hasobject:
        raise ValueError(
          f"arrays[{name!r}] must have a plain dtype, got {array.dtype}"
        )

  @classmethod
  def from_npz(cls, path: Path) -> "ArraySource":
    """Reads every array of an .npz file into memory.

    Raises:
      ValueError: it is no such file, or damaged.
    """
    return cls(load_npz(path))

  def __len__(self) -> int:
    return len(next(iter(self._arrays.values())))

  @property
  def is_in_memory(self) -> bool:
    """Whether no read touches a file."""
    return not any(_is_mapped(array) for array in self._arrays.values())

  def changed_files(self) -> list[str]:
    """Those of mapped arrays; see `changed_files` of the module."""
    return self._stamps.changed(self._is_same)

  def is_touched(self) -> bool:
    """See `is_touched` of the module."""
    return self._stamps.is_touched()

  def _is_same(self) -> bool:
    # Before there is a manifest nothing was said of the content.
    return self._manifest is None or self._hashed() == self._manifest

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """See `Source.read`."""
    indices = check_indices(indices, len(self))
    batch = {name: array[indices] for name, array in self._arrays.items()}
    return self._convert(batch) if self._convert else batch

  def content_digest(self) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name."""
    if self._manifest is None:
      self._manifest = self._hashed()
    return self._manifest

  def _hashed(self) -> str:
    """The manifest of what the arrays hold now."""
    arrays = sorted(self._arrays.items())
    header = [[name, a.dtype.str, a.shape] for name, a in arrays]
    digest = hashlib.sha256(json.dumps(header).encode() + b"\n")
    for _, array in arrays:
      # In blocks of rows, so that an array on disk never enters memory whole.
      row_bytes = max(1, array.dtype.itemsize * math.prod(array.shape[1:]))
      block = max(1, _HASH_BLOCK_BYTES // row_bytes)
      for start in range(0, len(array), block):
        digest.update(array[start : start + block].tobytes())
    return digest.hexdigest()


class ParquetSource(ArraySource):
  """Columns of Parquet files, read into memory once.

  Rows are numbered through the files in the order given. A column of lists of
  one length becomes an array with that axis (nested lists, one axis a level).

  Args:
    paths: one path or several.
    columns: column by example name, as {"inputs": "x", "targets": "label"}.

  Raises:
    ModuleNotFoundError: pyarrow is not installed.
    ValueError: a column is missing, holds nulls, lists of unequal lengths, or
      values that are neither numbers nor booleans; or there are no rows.
  """

  def __init__(
    self,
    paths: Path | Sequence[Path],
    columns: Mapping[str, str],
  ):
    try:
      from pyarrow import parquet
    except ModuleNotFoundError as error:
      raise errors.missing("Parquet", "pyarrow", "parquet") from error
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    for path in _check_paths(paths):
      # Opened by hand: given a path, pyarrow would also read a "key=value"
      # in a folder's name as one more column.
      with reading(path), parquet.ParquetFile(path) as file:
        available = file.schema_arrow.names
      for name, column in columns.items():
        if column not in available:
          raise ValueError(
            f"columns[{name!r}] must be one of {available} of {path},"
            f" got {column!r}"
          )
      with reading(path), parquet.ParquetFile(path) as file:
        table = file.read(columns=list(columns.values()))
        # What it does not look at until it is used.
        table.validate(full=True)
      for name, column in columns.items():
        for chunk in table[column].chunks:
          if len(chunk):
            pieces[name].append(_arrow_to_numpy(chunk, f"{column!r} of {path}"))
    for name, column in columns.items():
      shapes = {piece.shape[1:] for piece in pieces[name]}
      if len(shapes) != 1:
        raise ValueError(
          f"columns[{name!r}] must be rows of one shape, got column"
          f" {column!r} with shapes {sorted(shapes)}"
        )
    super().__init__({n: np.concatenate(parts) for n, parts in pieces.items()})


class ArrayRecordSource:
  """ArrayRecord files whose records are .npz archives of one example each.

  Examples stay on disk; a read fetches its records at random positions and
  decodes them. Records are numbered through the files in the order given.
  `write_array_record` makes such files.

  Args:
    paths: one path or several.

  Raises:
    ValueError: no such file, or no records.
    OSError: a file cannot be read, or is no ArrayRecord file.
  """

  def __init__(self, paths: Path | Sequence[Path]):
    import grain

    self._paths = _check_paths(paths)
    self._manifest: str | None = None
    # Before anything is read, so that no change is missed.
    self._stamps = stamps.FileStamps(self._paths)
    with _array_record_errors():
      self._records = grain.sources.ArrayRecordDataSource(self._paths)
    if not len(self._records):
      raise ValueError(f"paths must hold records, got {self._paths} with none")
    with _array_record_errors():
      first = self._records[0]
    self._spec = _spec(_decode_record(first))

  def __len__(self) -> int:
    return len(self._records)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """See `Source.read`; ValueError too where records differ in shape."""
    indices = check_indices(indices, len(self))
    batch = {
      name: np.empty((len(indices), *shape), dtype)
      for name, (shape, dtype) in self._spec.items()
    }
    if len(indices):
      records = self._fetch(indices.tolist())
      for row, record in enumerate(records):
        example = _decode_record(record)
        # Without this check, NumPy would broadcast or cast without a word.
        if _spec(example) != self._spec:
          raise ValueError(
            "paths must hold records of the same names, shapes and dtypes as"
            f" the first, {self._spec}, got one with {_spec(example)}"
          )
        for name, array in example.items():
          batch[name][row] = array
    return batch

  def _fetch(self, indices: list[int]) -> Sequence[bytes]:
    records = self._records
    try:
      with _array_record_errors():
        found = records.__getitems__(indices)
      if b"" in found:
        # So it returns what lies behind the end of a file (array_record 0.8.6).
        raise OSError(errno.EIO, "a file of it is cut short")
    except OSError:
      # A reader that failed would fail for ever: a copy has none, and opens
      # what it needs.
      self._records = copy.copy(records)
      raise
    return found

  def content_digest(self) -> str:
    """That of an `ArraySource` of the same examples, however they are stored.

    Raises:
      ValueError: records differ in shape.
    """
    if self._manifest is None:
      columns = sorted(self._spec.items())
      header = [
        [name, dtype.str, [len(self), *shape]]
        for name, (shape, dtype) in columns
      ]
      digest = hashlib.sha256(json.dumps(header).encode() + b"\n")
      for block in self._columns():
        digest.update(block.tobytes())
      self._manifest = digest.hexdigest()
    return self._manifest

  def _columns(self) -> Iterator[np.ndarray]:
    """All examples in blocks of rows, one column after the other."""
    sizes = {
      name: dtype.itemsize * math.prod(shape)
      for name, (shape, dtype) in sorted(self._spec.items())
    }
    rows = max(1, _HASH_BLOCK_BYTES // max(1, sum(sizes.values())))
    left = list(sizes)
    while left:
      # All are read at once; what is not this column's turn is held back, as
      # far as there is room for it, and else read again.
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
    """See `changed_files` of the module."""
    return self._stamps.changed(self._is_same)

  def _is_same(self) -> bool:
    if self._manifest is None:
      return True  # Nothing was said of the content yet.
    try:
      # Opened anew, so that nothing comes out of a reader's memory.
      return ArrayRecordSource(self._paths).content_digest() == self._manifest
    except ValueError:  # Records of other shapes, or none at all.
      return False

  def is_touched(self) -> bool:
    """See `is_touched` of the module."""
    return self._stamps.is_touched()

  def earlier_digests(self) -> list[str]:
    """SHA-256 over base names, sizes and bytes of the files, in order."""
    header = [[os.path.basename(p), os.path.getsize(p)] for p in self._paths]
    digest = hashlib.sha256(json.dumps(header).encode() + b"\n")
    for path in self._paths:
      with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
          digest.update(block)
    return [digest.hexdigest()]


def write_array_record(
  path: Path, examples: Iterable[Mapping[str, np.ndarray]]
) -> None:
  """Writes examples as a file that `ArrayRecordSource` reads.

  Args:
    path: where; an existing file is replaced.
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


def load_npz(file: Path | BinaryIO, what: str = "") -> dict[str, np.ndarray]:
  """Reads every array of an .npz archive.

  Args:
    file: a path, or the archive itself.
    what: it is, for messages; "": the path.

  Raises:
    ValueError: it is none, or damaged.
  """
  if isinstance(file, str | os.PathLike):
    # Given a path, NumPy leaves a damaged file open.
    with open(file, "rb") as opened:
      return load_npz(opened, os.fspath(file))
  with reading(what), np.load(file, allow_pickle=False) as archive:
    return {name: archive[name] for name in archive.files}


def load_npy(path: Path) -> np.ndarray:
  """Reads an .npy file.

  Raises:
    ValueError: it is none, or damaged.
  """
  with reading(path):
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
      raise TypeError("an archive")
    return array


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
  """Makes one ValueError of all that readers of formats raise.

  Of a damaged file NumPy, zipfile and Arrow may raise nearly anything. Errors
  of the operating system come through.
  """
  try:
    yield
  except Exception as error:
    # A place before a file's beginning is what a damaged one asks for.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
      raise
    raise ValueError(
      f"{what} cannot be read, as it is damaged or of another format:"
      f" {type(error).__name__}"
    ) from error


def check_indices(indices: np.ndarray, num_examples: int) -> np.ndarray:
  """Indices as int64. Negative ones are refused: they would wrap around."""
  indices = np.asarray(indices)
  if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
    raise ValueError(
      f"indices must be integers (k,), got {indices.dtype} {indices.shape}"
    )
  if indices.size and not 0 <= indices.min() <= indices.max() < num_examples:
    # No value in the message: which examples are read is private.
    raise ValueError(f"indices must be in [0, {num_examples})")
  return indices.astype(np.int64)


def _is_mapped(array: np.ndarray) -> bool:
  """Whether an array, or what it is a view of, is a file's content."""
  return _map_of(array) is not None


def _mapped_file(array: np.ndarray) -> str | None:
  """The file that an array is the content of, where its name is known."""
  owner = _map_of(array)
  name = None if owner is None else owner.filename
  return None if name is None else os.fspath(name)


def _map_of(array: np.ndarray) -> np.memmap | None:
  owner: Any = array
  while isinstance(owner, np.ndarray):
    if isinstance(owner, np.memmap):
      return owner
    owner = owner.base
  return None


def _check_paths(paths: Path | Sequence[Path]) -> list[str]:
  paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
  names = [os.fspath(path) for path in paths]
  missing = [name for name in names if not os.path.isfile(name)]
  if missing or not names:
    raise ValueError(
      f"paths must name files, got {names} of which {missing} are missing"
    )
  return names


@contextlib.contextmanager
def _array_record_errors() -> Iterator[None]:
  """Makes OSErrors of the RuntimeErrors that ArrayRecord raises for them."""
  try:
    yield
  except (EOFError, RuntimeError) as error:
    # What follows the reason tells the file, and the place in it.
    reason = re.split(r"; | \(|, ", str(error))[0]
    raise OSError(errno.EIO, reason) from error


def _decode_record(record: bytes) -> dict[str, np.ndarray]:
  try:
    return load_npz(io.BytesIO(record), "a record")
  except ValueError as error:
    raise ValueError(
      "paths must hold records that are .npz archives, got one that is not"
    ) from error


def _spec(
  example: Mapping[str, np.ndarray],
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  return {name: (a.shape, a.dtype) for name, a in example.items()}


def _arrow_to_numpy(array: Any, where: str) -> np.ndarray:
  """An Arrow array as NumPy; lists become axes. `where` is for the error."""
  from pyarrow import compute
  from pyarrow import types

  kind = array.type
  if array.null_count:
    raise ValueError(f"column {where} must hold no nulls")
  if (
    types.is_list(kind)
    or types.is_large_list(kind)
    or types.is_fixed_size_list(kind)
  ):
    lengths = compute.list_value_length(array).unique().to_pylist()
    if len(lengths) != 1:
      raise ValueError(
        f"column {where} must hold lists of one length, got lengths"
        f" {sorted(lengths)}"
      )
    flat = _arrow_to_numpy(array.flatten(), where)
    return flat.reshape(len(array), lengths[0], *flat.shape[1:])
  if not (
    types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
  ):
    raise ValueError(f"column {where} must hold numbers, got {kind}")
  return array.to_numpy(zero_copy_only=False)
