"""A part of a table as a source of examples."""

from collections.abc import Mapping
import dataclasses
import functools

import numpy as np

from dpdist.data import queries
from dpdist.data import sources
from dpdist.data import statistics as statistics_lib
from dpdist.data.builders import encoding as encoding_lib
from dpdist.data.builders import table as table_lib
from dpdist.files import stamps


class TableSource:
  """Rows of a table as examples, made when they are read.

  The content digest is of the rows' values before anything is made of them. So
  a budget of the data goes on under another scale, tokenizer or map.
  `functions` are the caller's, which examples are made with.
  """

  def __init__(
    self,
    table: table_lib.Table,
    encoding: encoding_lib.Encoding,
    *,
    file_stamps: stamps.FileStamps,
    rows: np.ndarray | None = None,
    digest: str = "",
  ):
    """Initializes the source.

    The stamps are of the table's files, from before anything was read, and the
    digest is of the content, if it is known. `rows` of the table are in the
    order of the examples; None takes all.
    """
    self._table = table
    self._encoding = encoding
    self._stamps = file_stamps
    self._rows = np.arange(len(table)) if rows is None else rows
    self._digest = digest
    self.functions = encoding.functions()

  def __len__(self) -> int:
    return len(self._rows)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """See `dpdist.data.sources.Source.read`.

    Raises ValueError also if examples differ in their arrays.
    """
    indices = sources.check_indices(indices, len(self))
    if not len(indices):
      return {
        name: np.zeros((0, *shape), dtype)
        for name, (shape, dtype) in self._spec.items()
      }
    batch = self._read(indices)
    if _spec(batch) != self._spec:
      raise ValueError(
        "examples must all have the names, shapes and dtypes of the first,"
        f" {self._spec}, got {_spec(batch)}"
      )
    return batch

  def _read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    columns = self._encoding.columns
    return self._encoding.encode(self._table.read(self._rows[indices], columns))

  @functools.cached_property
  def _spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return _spec(self._read(np.zeros(1, np.int64)))

  def content_digest(self) -> str:
    """Returns the SHA-256 of the rows' values in their order."""
    if not self._digest:
      self._digest = self._hashed(self._table)
    return self._digest

  def encoding_digest(self) -> str:
    """See `dpdist.data.sources.encoding_digest`."""
    first = self._table.read(self._rows[:1], self._encoding.columns)
    has_images = any(isinstance(x[0], bytes) for x in first.values())
    return self._encoding.digest(has_images=has_images)

  def private_statistics(self) -> statistics_lib.Statistics | None:
    """See `dpdist.data.sources.private_statistics`."""
    first = self._table.read(self._rows[:1], self._encoding.columns)
    return self._encoding.statistics(first)

  def measured(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns of rows what private statistics are of; none is scaled."""
    indices = sources.check_indices(indices, len(self))
    columns = self._encoding.columns
    return self._encoding.measured(
      self._table.read(self._rows[indices], columns)
    )

  def with_statistics(
    self, released: Mapping[str, queries.Released]
  ) -> "TableSource":
    """See `dpdist.data.sources.with_statistics`."""
    return TableSource(
      self._table,
      dataclasses.replace(self._encoding, released=released),
      file_stamps=self._stamps,
      rows=self._rows,
      digest=self._digest,
    )

  def changed_files(self) -> list[str]:
    """See `dpdist.data.sources.changed_files`."""
    return self._stamps.changed(self._is_same)

  def is_touched(self) -> bool:
    """See `dpdist.data.sources.is_touched`."""
    return self._stamps.is_touched()

  def _is_same(self) -> bool:
    if not self._digest:
      return True  # There is no digest yet that could have changed.
    try:
      return self._hashed(self._table.reopened()) == self._digest
    except ValueError:
      return False

  def _hashed(self, table: table_lib.Table) -> str:
    digest = table_lib.RowsDigest()
    for start in range(0, len(self), table.block_rows):
      rows = self._rows[start : start + table.block_rows]
      if rows[-1] >= len(table):
        raise ValueError("the table has fewer rows than it had")
      raw = table.read(rows, self._encoding.columns)
      digest.update(table_lib.row_hashes(raw))
    return digest.hexdigest()


def _spec(
  batch: dict[str, np.ndarray],
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  return {name: (x.shape[1:], x.dtype) for name, x in sorted(batch.items())}
