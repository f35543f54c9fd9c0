"""ArrayRecord files of any size, read by record."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from dpdist.data import array_record
from dpdist.data import dataset
from dpdist.data import sources
from dpdist.data.builders import options as options_lib
from dpdist.data.builders import split
from dpdist.data.builders import table as table_lib

Decode = Callable[[bytes], Mapping[str, Any]]


class ArrayRecordTable:
  """Rows that are records of one example each; see `table.Table`."""

  def __init__(
    self, paths: sources.Path | Sequence[sources.Path], decode: Decode | None
  ):
    self._source = array_record.ArrayRecordSource(paths, decode=decode)
    self._decode = decode
    self.files = sources.check_paths(paths)
    (first,) = self._source.read_each(np.zeros(1, np.int64))
    self.columns = list(first)
    self.block_rows = table_lib.rows_of(sum(x.nbytes for x in first.values()))

  def __len__(self) -> int:
    return len(self._source)

  def read(
    self, indices: np.ndarray, columns: Sequence[str]
  ) -> dict[str, np.ndarray]:
    """See `table.Table.read`."""
    return table_lib.columns_of(self._source.read_each(indices), columns)

  def reopened(self) -> "ArrayRecordTable":
    """See `table.Table.reopened`."""
    return ArrayRecordTable(self.files, self._decode)


def from_array_record(
  paths: sources.Path | Sequence[sources.Path],
  *,
  test: sources.Path | Sequence[sources.Path] | None = None,
  decode: Decode | None = None,
  **options: Unpack[options_lib.Options],
) -> dataset.Dataset:
  """Returns a data set of ArrayRecord files, which may be larger than memory.

  All records are read once, for the digest and the split. Afterwards, memory
  holds 8 bytes for each record, the names of users, and what a step draws.

  Args:
    paths: one path or several. Columns are the arrays of a record's example.
    test: the same of the held-out examples; None: see `test_fraction`.
    decode: from a record's bytes to its example: numbers, arrays and texts by
      name. None: it is an .npz, as `write_array_record` of
      `dpdist.data.array_record` makes it. It must be pure; the content digest
      is of what it returns.
    **options: see `dpdist.data.Options`.

  Raises:
    ValueError: an option is wrong or does not fit the data, or a file is
      missing or holds other records.
    OSError: a file cannot be read, or is no ArrayRecord file.
  """
  options_lib.check(options, test)
  table = ArrayRecordTable(paths, decode)
  held_out = None if test is None else ArrayRecordTable(test, decode)
  return split.build(table, held_out, options)
