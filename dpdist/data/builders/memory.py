"""Tables in memory, or in arrays that are mapped from files."""

from collections.abc import Mapping, Sequence
import csv
import gzip
import io
from typing import Any, BinaryIO, TextIO, Unpack

import numpy as np

from dpdist import errors
from dpdist.data import arrays as arrays_lib
from dpdist.data import dataset
from dpdist.data import sources
from dpdist.data.builders import options as options_lib
from dpdist.data.builders import split
from dpdist.data.builders import table as table_lib
from dpdist.files import places


class MemoryTable:
  """Columns that are arrays of equal leading length; see `table.Table`.

  Arrays are numbers of any shape, or texts. Raises ValueError for others, for
  no column and for unequal lengths, naming the argument.
  """

  def __init__(self, columns: Mapping[str, Any], name: str):
    self._columns = {key: _as_column(x, key) for key, x in columns.items()}
    shapes = {key: array.shape for key, array in self._columns.items()}
    if len({shape[:1] for shape in shapes.values()}) != 1 or (
      () in shapes.values()
    ):
      raise errors.ArgumentError(
        f"{name} must be arrays of one leading length, one or more, got shapes"
        f" {shapes}"
      )
    self.columns = list(self._columns)
    self.block_rows = table_lib.rows_of(
      sum(array[:1].nbytes for array in self._columns.values())
    )
    numbers = {k: x for k, x in self._columns.items() if not x.dtype.hasobject}
    self.files = arrays_lib.ArraySource(numbers).files if numbers else []

  def __len__(self) -> int:
    return len(self._columns[self.columns[0]])

  def read(
    self, indices: np.ndarray, columns: Sequence[str]
  ) -> dict[str, np.ndarray]:
    """See `table.Table.read`."""
    return {name: np.asarray(self._columns[name][indices]) for name in columns}

  def reopened(self) -> "MemoryTable":
    """Returns this table: what is mapped is read from the file each time."""
    return self


def _as_column(values: Any, name: str) -> np.ndarray:
  """Returns a column as an array.

  Raises ValueError for a list of several types: one row would then decide how
  all others are read, and which part of the data they are in.
  """
  if isinstance(values, list | tuple):
    table_lib.check_one_type(values, name)
  try:
    return np.asarray(values)
  except ValueError:  # Lists of different lengths.
    return table_lib.objects(values)


def from_arrays(
  arrays: Mapping[str, Any],
  *,
  test: Mapping[str, Any] | None = None,
  **options: Unpack[options_lib.Options],
) -> dataset.Dataset:
  """Returns a data set of arrays in memory, or of `np.load(mmap_mode="r")`.

  Args:
    arrays: by name of a column, an array or a list with a number, an array of
      numbers or a text for each example. They must not be changed afterwards.
    test: the same of the held-out examples; None: see `test_fraction`.
    **options: see `dpdist.data.Options`.

  Raises:
    ValueError: an option is wrong or does not fit the arrays.
  """
  options_lib.check(options, test)
  table = MemoryTable(arrays, "arrays")
  held_out = None if test is None else MemoryTable(test, "test")
  return split.build(table, held_out, options)


def from_csv(
  paths: sources.Path | Sequence[sources.Path],
  *,
  test: sources.Path | Sequence[sources.Path] | None = None,
  delimiter: str = ",",
  header: Sequence[str] | None = None,
  text: Sequence[str] = (),
  **options: Unpack[options_lib.Options],
) -> dataset.Dataset:
  """Returns a data set of CSV files, read into memory once.

  Columns that `users`, `split_by`, `categories`, `tokenizers` or `classes` of
  texts speak of hold texts; all others hold numbers. No type is guessed from
  the rows, since one row would then decide how all others are read.

  Args:
    paths: one path or several, of UTF-8, with .gz gzipped. Space around cells
      is dropped.
    test: the same of the held-out rows; None: see `test_fraction`.
    delimiter: between cells.
    header: the names of the columns; None: they are each file's first line.
    text: more columns of texts, for `map`.
    **options: see `dpdist.data.Options`.

  Raises:
    ValueError: an option is wrong, a file is missing or damaged, or a cell is
      no number. The message repeats no cell.
  """
  options_lib.check(options, test)

  def table(files: sources.Path | Sequence[sources.Path]) -> MemoryTable:
    cells = read_cells(files, delimiter=delimiter, header=header)
    return MemoryTable(parse(cells, options, text), "paths")

  held_out = None if test is None else table(test)
  return split.build(table(paths), held_out, options)


def parse(
  cells: Mapping[str, Sequence[str]],
  options: options_lib.Options,
  text: Sequence[str] = (),
) -> dict[str, np.ndarray]:
  """Returns the columns that options speak of, as texts or as numbers.

  The options are checked, and `text` names more columns of texts. Raises
  ValueError if a cell of a column of numbers is none.
  """
  roles = options_lib.roles(options, list(cells))
  names = {str(options.get(name)) for name in ("users", "split_by")}
  texts = {*text, *names, *(options.get("categories") or {})}
  texts |= {*(options.get("tokenizers") or {})}
  if not options_lib.is_numbers(options.get("classes") or (0,)):
    texts |= {*options_lib.flat({"targets": roles.get("targets", ())})}
  return {
    name: table_lib.objects(column)
    if name in texts
    else _numbers(column, name, options.get("missing"))
    for name, column in cells.items()
    if name in {*options_lib.flat(roles), *names}
  }


def read_cells(
  paths: sources.Path | Sequence[sources.Path],
  *,
  delimiter: str = ",",
  header: Sequence[str] | None = None,
) -> dict[str, list[str]]:
  """Reads CSV files: by column, the text of each cell.

  Raises ValueError if a file is missing, has no rows, other columns than the
  first, or rows of several lengths.
  """
  names: list[str] = []
  columns: list[list[str]] = []
  for path in sources.check_paths(paths):
    with (
      sources.reading(path),
      places.open_binary(path) as opened,
      _text(opened, is_zipped=path.endswith(".gz")) as file,
    ):
      rows = csv.reader(
        file, delimiter=delimiter, skipinitialspace=True, strict=True
      )
      found = list(header or [name.strip() for name in next(rows, [])])
      lengths = set()
      if not names:
        names, columns = found, [[] for _ in found]
      for row in rows:
        if row:  # A blank line is no row.
          lengths.add(len(row))
          for column, cell in zip(columns, row, strict=False):
            column.append(cell.strip())
    if found != names or len({*found}) != len(found) or not found:
      raise errors.ArgumentError(
        f"paths must be files with one header of different names, got {found}"
        f" in {path} after {names}"
      )
    if lengths - {len(names)}:
      raise errors.ArgumentError(
        f"{path} must have {len(names)} cells in each row, for {names}, got"
        f" rows of {sorted(lengths)}"
      )
  if not columns[0]:
    raise errors.ArgumentError(f"paths must hold a row or more, got {paths!r}")
  return dict(zip(names, columns, strict=True))


def _text(file: BinaryIO, *, is_zipped: bool) -> TextIO:
  # utf-8-sig drops the mark that spreadsheets put at the beginning.
  if is_zipped:
    return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
  return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _numbers(
  cells: Sequence[str], name: str, missing: float | None
) -> np.ndarray:
  try:
    # float64 for whole numbers too: one cell more must change no other's type.
    numbers = np.array([float(cell or "nan") for cell in cells])
  except ValueError:
    # Neither the cell nor its row: it is a person's record.
    raise errors.ArgumentError(
      f"column {name!r} must hold numbers; give categories, classes or"
      " tokenizers for texts"
    ) from None
  if missing is None and np.isnan(numbers).any():
    raise errors.ArgumentError(
      f"column {name!r} must hold a number in each row; missing=NUMBER puts one"
      " into empty cells"
    )
  return numbers
