"""Data sets that the library `datasets` of Hugging Face has put on disk."""

from collections.abc import Sequence
import os
from typing import Any, Unpack

import numpy as np

from dpdist import errors
from dpdist.data import dataset
from dpdist.data import sources
from dpdist.data.builders import arrow
from dpdist.data.builders import options as options_lib
from dpdist.data.builders import split as split_lib
from dpdist.data.builders import table as table_lib


class HuggingFaceTable:
  """Rows of a `datasets.Dataset`, which stays on disk; see `table.Table`."""

  def __init__(self, data: Any, *, missing: float | None):
    if not len(data):
      raise errors.ArgumentError("data must have a row or more, got 0")
    self._missing = missing
    # Rows as they are stored: no transform of the library's is applied.
    self._data = data.with_format("arrow")
    self.columns = list(data.column_names)
    self.files = sorted({file["filename"] for file in data.cache_files})
    self.block_rows = table_lib.rows_of(data.data.nbytes // len(data))

  def __len__(self) -> int:
    return len(self._data)

  def read(
    self, indices: np.ndarray, columns: Sequence[str]
  ) -> dict[str, np.ndarray]:
    """See `table.Table.read`."""
    rows = self._data.select_columns(list(columns))[indices.tolist()]
    return arrow.to_columns(rows, columns, self._missing)

  def reopened(self) -> "HuggingFaceTable":
    """Returns this table: its files are mapped, and nothing is remembered."""
    return self


def from_huggingface(
  data: Any,
  *,
  split: str = "train",
  test: Any = None,
  **options: Unpack[options_lib.Options],
) -> dataset.Dataset:
  """Returns a data set that Hugging Face's `datasets` has on disk.

  Nothing is fetched: save a set with `save_to_disk` first. Where the library
  decodes an image, its bytes are read and decoded here.

  Args:
    data: a `datasets.Dataset` or `DatasetDict`, or the folder of one.
    split: the training split's name in a `DatasetDict`.
    test: the held-out split's name there, or another set or folder; None: see
      `test_fraction`.
    **options: see `dpdist.data.Options`.

  Raises:
    ModuleNotFoundError: datasets is not installed.
    ValueError: an option is wrong or does not fit the data.
  """
  options_lib.check(options, test)
  opened = _opened("data", data)
  train = _chosen("split", opened, split)
  missing = options.get("missing")
  table = HuggingFaceTable(train, missing=missing)
  if test is None:
    return split_lib.build(table, None, options)
  is_name = isinstance(test, str) and hasattr(opened, "keys")
  if is_name and test not in opened and not os.path.exists(test):
    raise errors.ArgumentError(
      f"test must be one of {sorted(opened)}, or a folder, got {test!r}"
    )
  if is_name and test in opened:
    held_out = opened[test]
  else:
    held_out = _chosen("test", _opened("test", test), "test")
  held_out_table = HuggingFaceTable(held_out, missing=missing)
  return split_lib.build(table, held_out_table, options)


def _opened(name: str, data: Any) -> Any:
  try:
    import datasets
  except ModuleNotFoundError as error:
    raise errors.missing(
      "from_huggingface", "datasets", "huggingface"
    ) from error
  if isinstance(data, str | os.PathLike):
    if not os.path.isdir(data):
      raise errors.ArgumentError(
        f"{name} must be a folder that save_to_disk has made, got {data!r}"
      )
    with sources.reading(data):
      return datasets.load_from_disk(os.fspath(data))
  if not isinstance(data, datasets.Dataset | datasets.DatasetDict):
    raise errors.ArgumentError(
      f"{name} must be a datasets.Dataset, a DatasetDict or the folder of one,"
      f" got {type(data).__name__}"
    )
  return data


def _chosen(name: str, data: Any, split: str) -> Any:
  if not hasattr(data, "keys"):
    return data
  if split not in data:
    raise errors.ArgumentError(
      f"{name} must be one of {sorted(data)}, got {split!r}"
    )
  return data[split]
