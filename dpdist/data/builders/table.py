"""Tables: rows of named columns, read by index, and what identifies a row.

A row's hash is of its values alone, so it is the same in every format that
holds the same values, in every order and in every release.
"""

from collections.abc import Iterator, Mapping, Sequence
import hashlib
import json
from typing import Any, Protocol

import numpy as np

from dpdist import errors
from dpdist.data import sources

# Wire format: budgets of data sets are kept under digests of these.
_ROW = b"dpdist.data/row/v1\0"
_ROWS = b"dpdist.data/rows/v1\0"


class Table(Protocol):
  """Rows of a format, before anything is made of them.

  `read` is called from several threads at once.
  """

  @property
  def columns(self) -> Sequence[str]:
    """Returns the names of the columns."""
    ...

  @property
  def block_rows(self) -> int:
    """Returns how many rows are read at once where all are read."""
    ...

  @property
  def files(self) -> Sequence[str]:
    """Returns the files that rows are read from later; none if in memory."""
    ...

  def __len__(self) -> int:
    """Returns the number of rows."""
    ...

  def read(
    self, indices: np.ndarray, columns: Sequence[str]
  ) -> dict[str, np.ndarray]:
    """Reads columns of rows.

    Args:
      indices: int64 (k,), k at least 1.
      columns: those to read.

    Returns:
      By column, numbers (k, ...), or objects (k,): texts, bytes of images, or
      arrays and lists of different lengths.

    Raises:
      ValueError, OSError: as `dpdist.data.sources.Source.read`.
    """
    ...

  def reopened(self) -> "Table":
    """Returns the table as its files hold it now, with nothing remembered."""
    ...


def blocks(
  table: Table, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Yields all rows in order: the first one's number, and the columns."""
  for start in range(0, len(table), table.block_rows):
    rows = np.arange(start, min(start + table.block_rows, len(table)))
    yield start, table.read(rows, columns)


def row_hashes(columns: Mapping[str, np.ndarray]) -> list[bytes]:
  """Returns the SHA-256 of each row: names, dtypes, shapes and values."""
  header, parts = [], []
  for name in sorted(columns):
    values = columns[name]
    if values.ndim == 1 and values.dtype.kind in "biuf":
      plain = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
      header.append([name, plain.dtype.str])
      parts.append(plain.view(np.uint8).reshape(len(plain), -1))
    else:
      header.append([name, "sha256"])
      hashed = b"".join(_value_hash(value) for value in values)
      parts.append(np.frombuffer(hashed, np.uint8).reshape(len(values), 32))
  packed = np.concatenate(parts, axis=1)
  begun = hashlib.sha256(_ROW + json.dumps(header).encode() + b"\n")
  width, data = packed.shape[1], packed.tobytes()
  hashes = []
  for start in range(0, len(data), width):
    row = begun.copy()
    row.update(data[start : start + width])
    hashes.append(row.digest())
  return hashes


class RowsDigest:
  """The digest of rows in their order, made as they are seen."""

  def __init__(self) -> None:
    self._rows = hashlib.sha256(_ROWS)

  def update(self, hashes: Sequence[bytes]) -> None:
    """Takes the hashes of the next rows."""
    self._rows.update(b"".join(hashes))

  def hexdigest(self) -> str:
    """Returns the SHA-256, 64 hex digits."""
    return self._rows.hexdigest()


def _value_hash(value: Any) -> bytes:
  if isinstance(value, str):
    return hashlib.sha256(b"text\0" + value.encode()).digest()
  if isinstance(value, bytes):
    return hashlib.sha256(b"bytes\0" + value).digest()
  array = np.asarray(value)
  if array.dtype.kind in "biuf":
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    # An empty list is of no type.
    kind = array.dtype.str if array.size else ""
    header = json.dumps([kind, array.shape]).encode()
    return hashlib.sha256(b"array\0" + header + array.tobytes()).digest()
  if isinstance(value, list | tuple | np.ndarray):
    inner = b"".join(_value_hash(each) for each in value)
    return hashlib.sha256(b"list\0" + inner).digest()
  raise ValueError(
    "columns must hold numbers, texts, images, or arrays and lists of them, got"
    f" a {type(value).__name__}"
  )


def objects(values: Sequence[Any]) -> np.ndarray:
  """Returns values as an array of objects (k,), whatever they are."""
  array = np.empty(len(values), object)
  for place, value in enumerate(values):  # At once, NumPy would stack lists.
    array[place] = value
  return array


def check_one_type(values: Sequence[Any], name: str) -> None:
  """Raises ValueError unless values are of one dtype, or all texts."""
  kinds = set()
  for value in values:
    try:
      array = np.asarray(value)
    except ValueError:  # Lists of different lengths.
      array = np.asarray(value, object)
    if array.size:
      kinds.add(
        array.dtype if array.dtype.kind in "biufc" else array.dtype.kind
      )
  if len(kinds) > 1:
    raise errors.ArgumentError(
      f"column {name!r} must be an array, or a list of values of one type, such"
      " as float; got several"
    )


def stack(values: Sequence[Any], name: str) -> np.ndarray:
  """Returns values of one column as an array, or as objects if they differ.

  Raises ValueError for numbers of different types.
  """
  if not all(isinstance(value, np.ndarray | np.generic) for value in values):
    return objects(values)
  arrays = [np.asarray(value) for value in values]
  if len({array.dtype for array in arrays if array.size}) > 1:
    raise ValueError(f"column {name!r} must hold values of one dtype")
  if len({array.shape for array in arrays}) != 1:
    return objects(arrays)
  return np.stack(arrays)


def columns_of(
  items: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> dict[str, np.ndarray]:
  """Returns columns of rows that were read one by one.

  Raises ValueError if a row lacks a column, or has another type there.
  """
  if any(not {*columns} <= {*item} for item in items):
    raise ValueError("examples must all have the names of the first")
  return {
    name: stack([_plain(item[name]) for item in items], name)
    for name in columns
  }


def _plain(value: Any) -> Any:
  """Returns a text or bytes, or NumPy's array of a tensor, image or number."""
  if isinstance(value, str | bytes):
    return value
  if hasattr(value, "detach"):  # A tensor, which may be part of a graph.
    value = value.detach().cpu()
  array = np.asarray(value)
  is_text = array.ndim == 0 and array.dtype.kind in "US"
  return array.item() if is_text else array


def rows_of(num_bytes: int) -> int:
  """Returns how many rows of a size are read at once."""
  return max(1, min(8192, sources.HASH_BLOCK_BYTES // max(1, num_bytes)))
