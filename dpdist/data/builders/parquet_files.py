"""Parquet files of any size, read by row group."""

from collections.abc import Sequence
import threading
from typing import Any, Unpack

import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.data import dataset
from dpdist.data import sources
from dpdist.data.builders import arrow
from dpdist.data.builders import options as options_lib
from dpdist.data.builders import split
from dpdist.data.builders import table as table_lib
from dpdist.files import places

_BYTES = _validation.integer(0)


class ParquetTable:
  """Rows of Parquet files, numbered through the files; see `table.Table`.

  A read decodes the row groups that its rows are in. Those that were read first
  stay in memory, up to a number of bytes, and beside them the last one. None is
  pushed out by another: a step's rows are read in order, through all row
  groups, and so each would be pushed out just before it is wanted again.
  `missing` is what nulls among numbers become. Raises ValueError if a file is
  missing or damaged, or has other columns than the first, or if there is no
  row.
  """

  def __init__(
    self,
    paths: sources.Path | Sequence[sources.Path],
    *,
    cache_bytes: int,
    missing: float | None,
  ):
    try:
      from pyarrow import parquet
    except ModuleNotFoundError as error:
      raise errors.missing("Parquet", "pyarrow", "parquet") from error
    self.files = sources.check_paths(paths)
    self._cache_bytes, self._missing = cache_bytes, missing
    self._metadata = []
    schemas = []
    for path in self.files:
      with (
        sources.reading(path),
        places.open_arrow(path) as opened,
        parquet.ParquetFile(opened) as file,
      ):
        self._metadata.append(file.metadata)
        schemas.append(file.schema_arrow.remove_metadata())
      if not schemas[0].equals(schemas[-1]):
        raise errors.ArgumentError(
          "paths must be files of the same columns and types, got another"
          f" schema in {path}"
        )
    self.columns = schemas[0].names
    # By row group: its file, its place there, and the rows before it.
    self._groups = [
      (number, group)
      for number, metadata in enumerate(self._metadata)
      for group in range(metadata.num_row_groups)
    ]
    sizes = [self._metadata[i].row_group(g).num_rows for i, g in self._groups]
    self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if not len(self):
      raise errors.ArgumentError(
        f"paths must hold a row or more, got {paths!r}"
      )
    num_bytes = sum(
      self._metadata[i].row_group(g).total_byte_size for i, g in self._groups
    )
    self.block_rows = table_lib.rows_of(num_bytes // len(self))
    self._lock = threading.Lock()
    self._kept: dict[Any, Any] = {}
    self._room = cache_bytes
    self._last: tuple[Any, Any] = (None, None)

  def __len__(self) -> int:
    return int(self._starts[-1])

  def read(
    self, indices: np.ndarray, columns: Sequence[str]
  ) -> dict[str, np.ndarray]:
    """See `table.Table.read`."""
    groups = np.searchsorted(self._starts, indices, side="right") - 1
    read: dict[str, np.ndarray] = {}
    for group in np.unique(groups).tolist():
      mine = np.flatnonzero(groups == group)
      rows = self._group(group, tuple(columns))
      taken = rows.take(indices[mine] - self._starts[group])
      found = arrow.to_columns(taken, columns, self._missing)
      for name, values in found.items():
        if name not in read:
          shape = (len(indices), *values.shape[1:])
          read[name] = np.empty(shape, values.dtype)
        read[name][mine] = values
    return read

  def _group(self, group: int, columns: tuple[str, ...]) -> Any:
    """Returns a row group's columns as an Arrow table."""
    from pyarrow import parquet

    key = (group, columns)
    with self._lock:
      if key in self._kept:
        return self._kept[key]
      if key == self._last[0]:
        return self._last[1]
      self._last = (None, None)  # No third row group is in memory meanwhile.
      number, place = self._groups[group]
      # Opened each time, since a reader that failed once may always fail.
      with (
        sources.reading("a Parquet file"),
        places.open_arrow(self.files[number]) as opened,
        parquet.ParquetFile(opened, metadata=self._metadata[number]) as file,
      ):
        rows = file.read_row_group(place, columns=list(columns))
        # Otherwise pyarrow checks the contents only when they are used.
        rows.validate(full=True)
      if rows.nbytes <= self._room:
        self._room -= rows.nbytes
        self._kept[key] = rows
      else:
        self._last = (key, rows)
      return rows

  def reopened(self) -> "ParquetTable":
    """See `table.Table.reopened`."""
    return ParquetTable(
      self.files, cache_bytes=self._cache_bytes, missing=self._missing
    )


def from_parquet(
  paths: sources.Path | Sequence[sources.Path],
  *,
  test: sources.Path | Sequence[sources.Path] | None = None,
  cache_bytes: int = 1 << 30,
  **options: Unpack[options_lib.Options],
) -> dataset.Dataset:
  """Returns a data set of Parquet files, which may be larger than memory.

  All rows are read once, for the digest and the split. Afterwards, memory holds
  `cache_bytes` of row groups, two more, and 8 bytes for each row and the names
  of users. A step's rows are in nearly all row groups: where these do not fit
  into `cache_bytes`, each step decodes the others anew. Row groups of a
  thousand rows are then read faster than large ones, and ArrayRecord, which
  reads single records, faster still.

  Args:
    paths: one path or several. Columns hold numbers, booleans, texts, encoded
      images as bytes, or lists of these.
    test: the same of the held-out rows; None: see `test_fraction`.
    cache_bytes: of row groups that stay in memory.
    **options: see `dpdist.data.Options`.

  Raises:
    ModuleNotFoundError: pyarrow is not installed.
    ValueError: an option is wrong or does not fit the data, or a file is
      missing or damaged.
  """
  options_lib.check(options, test)
  _validation.check("cache_bytes", cache_bytes, _BYTES)

  def table(files: sources.Path | Sequence[sources.Path]) -> ParquetTable:
    missing = options.get("missing")
    return ParquetTable(files, cache_bytes=cache_bytes, missing=missing)

  held_out = None if test is None else table(test)
  return split.build(table(paths), held_out, options)
