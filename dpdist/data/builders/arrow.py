"""From Arrow's columns to NumPy, by their declared types and no row's value."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpdist import errors
from dpdist.data.builders import table as table_lib


def to_columns(
  table: Any, columns: Sequence[str], missing: float | None
) -> dict[str, np.ndarray]:
  """Returns columns of a pyarrow.Table as `table.Table.read` does.

  `missing` is what nulls among numbers become. Raises ValueError for other
  nulls, and for types that cannot be read.
  """
  return {
    name: _to_numpy(table[name].combine_chunks(), name, missing)
    for name in columns
  }


def _to_numpy(array: Any, name: str, missing: float | None) -> np.ndarray:
  from pyarrow import types

  if types.is_dictionary(array.type):
    array = array.dictionary_decode()
  kind = array.type
  is_number = types.is_integer(kind) or types.is_floating(kind)
  if array.null_count and types.is_integer(kind) and missing is not None:
    array = _filled(array, name, missing)
  # Nulls among floats become NaN here, and what is given for them later.
  has_filler = types.is_floating(kind) and missing is not None
  if array.null_count and not has_filler:
    raise errors.ArgumentError(
      f"column {name!r} must hold no nulls; missing=NUMBER puts one into those"
      " of numbers"
    )
  if is_number or types.is_boolean(kind):
    return array.to_numpy(zero_copy_only=False)
  if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
    # How Hugging Face stores an image: its file's contents and its name.
    return _to_numpy(array.field("bytes"), name, None)
  if types.is_fixed_size_list(kind):
    flat = _to_numpy(array.flatten(), name, missing)
    return flat.reshape(len(array), kind.list_size, *flat.shape[1:])
  if types.is_list(kind) or types.is_large_list(kind):
    # Objects even where all are of one length, as a row cannot know of others.
    inner = _to_numpy(array.flatten(), name, missing)
    ends = np.cumsum(array.value_lengths().to_numpy(zero_copy_only=False))
    return table_lib.objects([_dense(x) for x in np.split(inner, ends[:-1])])
  if (
    types.is_string(kind)
    or types.is_large_string(kind)
    or types.is_binary(kind)
    or types.is_large_binary(kind)
  ):
    return table_lib.objects(array.to_pylist())
  raise errors.ArgumentError(
    f"column {name!r} must hold numbers, booleans, texts, bytes of images or"
    f" lists of them, got {kind}"
  )


def _filled(array: Any, name: str, missing: float) -> Any:
  import pyarrow

  try:
    return array.fill_null(pyarrow.scalar(missing).cast(array.type))
  except pyarrow.ArrowInvalid as error:
    raise errors.ArgumentError(
      f"missing must be a number of column {name!r}, which is of {array.type},"
      f" got {missing!r}"
    ) from error


def _dense(values: np.ndarray) -> Any:
  """Returns a list of lists as an array where it is one."""
  is_nested = values.dtype == object and len(values)
  if not is_nested or not isinstance(values[0], np.ndarray):
    return values
  shapes = {inner.shape for inner in values}
  return np.stack(list(values)) if len(shapes) == 1 else values
