"""Data sets of other libraries that give one item for each index."""

from collections.abc import Mapping, Sequence
import threading
from typing import Any, Unpack

import numpy as np

from dpdist import errors
from dpdist.data import dataset
from dpdist.data.builders import options as options_lib
from dpdist.data.builders import split as split_lib
from dpdist.data.builders import table as table_lib

_NAMES = ("inputs", "targets")
# Items that are read twice, to find out whether they stay the same.
_READ_TWICE = 8


class ItemTable:
  """Rows that are `items[index]`, one at a time; see `table.Table`.

  `items` has a length, and its items are mappings, tuples, whose parts
  `columns` names, or arrays. Raises ValueError if there is no item, or items
  are not the same each time.
  """

  files = ()

  def __init__(self, items: Any, columns: Sequence[str], name: str):
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
      raise errors.ArgumentError(
        f"{name} must have a length and items by index (map-style), got"
        f" {type(items).__name__}"
      )
    if not len(items):
      raise errors.ArgumentError(f"{name} must have an item or more, got 0")
    self._items, self._names = items, tuple(columns)
    # Libraries do not promise that several threads may read at once.
    self._lock = threading.Lock()
    self.columns = list(self._columns(0))
    first = np.arange(min(_READ_TWICE, len(items)))
    rows = self.read(first, self.columns)
    if table_lib.row_hashes(rows) != table_lib.row_hashes(
      self.read(first, self.columns)
    ):
      raise errors.ArgumentError(
        f"{name} must give the same item each time, and gave another: leave"
        " random transforms to config.augmentation, whose draws are private"
      )
    self.block_rows = table_lib.rows_of(
      sum(np.asarray(value[0]).nbytes for value in rows.values())
    )

  def __len__(self) -> int:
    return len(self._items)

  def read(
    self, indices: np.ndarray, columns: Sequence[str]
  ) -> dict[str, np.ndarray]:
    """See `table.Table.read`."""
    with self._lock:
      items = [self._columns(index) for index in indices.tolist()]
    return table_lib.columns_of(items, columns)

  def _columns(self, index: int) -> dict[str, Any]:
    item = self._items[index]
    if not isinstance(item, Mapping):
      parts = item if isinstance(item, tuple | list) else (item,)
      if len(parts) > len(self._names):
        raise errors.ArgumentError(
          f"columns must name all {len(parts)} parts of an item, got"
          f" {self._names}"
        )
      item = dict(zip(self._names, parts, strict=False))
    return dict(item)

  def reopened(self) -> "ItemTable":
    """Returns this table, which remembers nothing."""
    return self


def from_torch(
  items: Any,
  *,
  test: Any = None,
  columns: Sequence[str] = _NAMES,
  **options: Unpack[options_lib.Options],
) -> dataset.Dataset:
  """Returns a data set of a map-style `torch.utils.data.Dataset`.

  Anything will do that has a length and an item for each index. Items are
  mappings, tuples or single values, of tensors, arrays, numbers, texts and
  images of PIL; they have to be the same each time, so random transforms do not
  belong there. All are read once for the digest and the split, and one by one
  later. That they stay as they were cannot be checked, as no file is known.

  Args:
    items: the training items, or all.
    test: the same of the held-out items; None: see `test_fraction`.
    columns: names of the parts of an item that is a tuple.
    **options: see `dpdist.data.Options`.

  Raises:
    ValueError: an option is wrong or does not fit the items.
  """
  options_lib.check(options, test)
  table = ItemTable(items, columns, "items")
  held_out = None if test is None else ItemTable(test, columns, "test")
  return split_lib.build(table, held_out, options)


def from_tfds(
  name: str,
  *,
  split: str = "train",
  test: str | None = None,
  data_dir: str | None = None,
  **options: Unpack[options_lib.Options],
) -> dataset.Dataset:
  """Returns a data set that TensorFlow Datasets has prepared on disk.

  Nothing is fetched. It has to be prepared as ArrayRecord
  (`file_format="array_record"`), which can be read by index.

  Args:
    name: as "mnist" or "mnist:3.0.1".
    split: what is trained on, or all there is.
    test: the split that is held out; None: see `test_fraction`.
    data_dir: where the library keeps its data; None: its own place.
    **options: see `dpdist.data.Options`.

  Raises:
    ModuleNotFoundError: tensorflow_datasets is not installed.
    ValueError: an option is wrong, or there is no such set.
  """
  options_lib.check(options, test)
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise errors.missing("from_tfds", "tensorflow_datasets", "tfds") from error

  def table(part: str) -> ItemTable:
    try:
      found = tfds.data_source(
        name, split=part, data_dir=data_dir, download=False
      )
    except Exception as error:
      # The library raises its own kinds for each way of not being there.
      raise errors.ArgumentError(
        f"name, split and data_dir must be a data set that is prepared on disk"
        f" as array_record, got {name!r}, {part!r} and {data_dir!r}:"
        f" {type(error).__name__}: {str(error).splitlines()[0]}"
      ) from error
    return ItemTable(found, _NAMES, "name")

  return split_lib.build(
    table(split), None if test is None else table(test), options
  )
