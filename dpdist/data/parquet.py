"""Examples from the columns of Parquet files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpdist import errors
from dpdist.data import arrays as arrays_lib
from dpdist.data import sources
from dpdist.files import places


class ParquetSource(arrays_lib.ArraySource):
  """Columns of Parquet files, read into memory once.

  Rows are numbered through the files in the order given. Columns are given by
  example name, as {"inputs": "x", "targets": "label"}. A column of lists of one
  length becomes an array with that axis (nested lists, one axis a level).
  Raises ValueError if a column is missing, holds nulls, lists of unequal
  lengths, or values that are neither numbers nor booleans, or if there are no
  rows.
  """

  def __init__(
    self,
    paths: sources.Path | Sequence[sources.Path],
    columns: Mapping[str, str],
  ):
    try:
      from pyarrow import parquet
    except ModuleNotFoundError as error:
      raise errors.missing("Parquet", "pyarrow", "parquet") from error
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    for path in sources.check_paths(paths):
      with (
        sources.reading(path),
        places.open_arrow(path) as opened,
        parquet.ParquetFile(opened) as file,
      ):
        available = file.schema_arrow.names
      for name, column in columns.items():
        if column not in available:
          raise ValueError(
            f"columns[{name!r}] must be one of {available} of {path},"
            f" got {column!r}"
          )
      with (
        sources.reading(path),
        places.unchanged(path),
        places.open_arrow(path) as opened,
        parquet.ParquetFile(opened) as file,
      ):
        table = file.read(columns=list(columns.values()))
        # Otherwise pyarrow checks the contents only when they are used.
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


def _arrow_to_numpy(array: Any, where: str) -> np.ndarray:
  """Converts an Arrow array to NumPy; lists become axes."""
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
