"""Data sets in files of a user's own: .npz, ArrayRecord and Parquet."""

from collections.abc import Callable
import glob
import os

import ml_collections
import numpy as np

from dpdist import errors
from dpdist import registry
from dpdist.data import array_record
from dpdist.data import arrays as arrays_lib
from dpdist.data import dataset as dataset_lib
from dpdist.data import parquet
from dpdist.data import sources
from dpdist.data import users
from dpdist.data.datasets import settings

# Examples, and the user of each.
_Part = tuple[sources.Source, np.ndarray | None]


@registry.register("dataset", "npz")
def _npz(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  def split(prefix: str) -> _Part:
    (path,) = _files(config.path, f"{prefix}.npz")
    if not settings.slots(config):
      return (arrays_lib.ArraySource.from_npz(path), None)
    arrays = arrays_lib.load_npz(path)
    ids = arrays.pop(config.unit_column, None)
    if ids is None:
      raise ValueError(
        f"data.unit_column must be one of {sorted(arrays)} of {path}, got"
        f" {config.unit_column!r}"
      )
    return (arrays_lib.ArraySource(arrays), ids)

  return _parts(split)


@registry.register("dataset", "array_record")
def _array_record(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  def split(prefix: str) -> _Part:
    paths = _files(config.path, f"{prefix}*.array_record")
    source = array_record.ArrayRecordSource(paths)
    if not settings.slots(config):
      return (source, None)
    (path,) = _files(config.path, f"{prefix}_{config.unit_column}.npy")
    return (source, arrays_lib.load_npy(path))

  return _parts(split)


@registry.register("dataset", "parquet")
def _parquet(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  columns = {"inputs": config.inputs_column, "targets": config.targets_column}

  def split(prefix: str) -> _Part:
    paths = _files(config.path, f"{prefix}*.parquet")
    source = parquet.ParquetSource(paths, columns)
    if not settings.slots(config):
      return (source, None)
    return (source, users.parquet_ids(paths, config.unit_column))

  return _parts(split)


def _parts(split: Callable[[str], _Part]) -> dataset_lib.Dataset:
  """Returns the data set of two parts, with their users if they count."""
  (train, train_users), (test, test_users) = split("train"), split("test")
  return dataset_lib.Dataset(train, test, train_users, test_users)


def _files(directory: str, pattern: str) -> list[str]:
  """Returns files in order of name, which fixes the order of the examples."""
  paths = sorted(glob.glob(os.path.join(glob.escape(directory), pattern)))
  if not paths:
    raise errors.ArgumentError(
      f"data.path must be a directory with {pattern}, got {directory!r}",
      hint=errors.Hint(flags=("--config.data.path=DIRECTORY",)),
    )
  return paths
