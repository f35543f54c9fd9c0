"""Units of privacy that hold several examples: a user with all of theirs.

The mechanism draws units, and a unit is one row of a chunk. Its examples are
read into a fixed number of slots. If a unit has more examples than slots, some
are chosen anew at each step, so that all are used over time; if it has fewer,
the remaining slots stay empty. The loss of a unit is the mean over its slots
that are not empty (see `dpdist.tasks.per_unit.mean_over_unit`), and its
gradient is clipped as one.

How many examples a unit has, and which of them are chosen, costs no privacy:
whatever it holds, its one clipped gradient moves the sum by no more than the
clip norm. Two conditions must hold: the choice within a unit depends on no
other unit, and no example belongs to two units.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
from typing import Any

import numpy as np

from dpdist import _validation
from dpdist.data import sources
from dpdist.data import statistics as statistics_lib

# Among a unit's arrays: bool (num_units, slots), True for an empty slot.
SLOT_IS_EMPTY = "is_empty_slot"

_CHOICE = b"dpdist.units/choice/v1\0"


@dataclasses.dataclass(frozen=True, eq=False)
class UserSource:
  """A source whose rows are units, made from a source of examples.

  Guarantees:
    Each example is in at most one slot of a step, in the row of its own unit.

  Raises:
    ValueError: an attribute is out of its range, or an array of the examples
      is already named as `SLOT_IS_EMPTY`.
  """

  examples: sources.Source
  # Integers (len(examples),) in [0, num_units), the unit of each example.
  unit_of_example: np.ndarray
  num_units: int  # A unit may have no example.
  # Slots of a unit: at most as many of its examples are used at a step.
  examples_per_unit: int

  def __post_init__(self) -> None:
    for name in ("examples_per_unit", "num_units"):
      _validation.check(name, getattr(self, name), _validation.COUNT)
    owners = np.asarray(self.unit_of_example)
    if owners.shape != (len(self.examples),) or owners.dtype.kind not in "iu":
      raise ValueError(
        "unit_of_example must be one integer for each of the"
        f" {len(self.examples)} examples, got {owners.dtype} {owners.shape}"
      )
    if owners.size and not 0 <= owners.min() <= owners.max() < self.num_units:
      raise ValueError(
        f"unit_of_example must be in [0, num_units={self.num_units}), got"
        f" {owners.min()} to {owners.max()}"
      )

  def __len__(self) -> int:
    """Returns the number of units."""
    return self.num_units

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Reads units, with the first examples of each that its slots can hold.

    Returns, by name, arrays (k, examples_per_unit, ...), zeros in empty slots,
    which come last; and `SLOT_IS_EMPTY`, bool (k, examples_per_unit). See
    `dpdist.data.sources.Source.read` for the rest.
    """
    return self._read(indices, lambda unit, count: np.arange(self._used(count)))

  def drawing(self, key: bytes) -> Callable[[int], sources.Source]:
    """Returns a function from a step to a source of these units.

    It chooses examples anew at each step, by the key: every set of a unit's
    examples that fills its slots is equally likely, independently of all other
    units and steps.
    """
    # No functools.partial, which would show the key where it is printed.
    return lambda step: _Drawn(self, key, step)

  def content_digest(self) -> str:
    """Returns the SHA-256 of the examples and of their units, not of slots."""
    return self._digest_of(self.examples.content_digest())

  def earlier_digests(self) -> list[str]:
    """See `dpdist.data.sources.earlier_digests`."""
    earlier = sources.earlier_digests(self.examples)
    return [self._digest_of(digest) for digest in earlier]

  def encoding_digest(self) -> str:
    """See `dpdist.data.sources.encoding_digest`."""
    return sources.encoding_digest(self.examples)

  def private_statistics(self) -> statistics_lib.Statistics | None:
    """See `dpdist.data.sources.private_statistics`."""
    return sources.private_statistics(self.examples)

  def with_statistics(self, released: Mapping[str, Any]) -> "UserSource":
    """See `dpdist.data.sources.with_statistics`."""
    examples = sources.with_statistics(self.examples, released)
    return dataclasses.replace(self, examples=examples)

  def changed_files(self) -> list[str]:
    """See `dpdist.data.sources.changed_files`."""
    return sources.changed_files(self.examples)

  def is_touched(self) -> bool:
    """See `dpdist.data.sources.is_touched`."""
    return sources.is_touched(self.examples)

  def _digest_of(self, examples: str) -> str:
    header = ["dpdist.units/v1", self.num_units, examples]
    digest = hashlib.sha256(json.dumps(header).encode() + b"\n")
    digest.update(self.unit_of_example.astype("<i8").tobytes())
    return digest.hexdigest()

  @functools.cached_property
  def _groups(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples in order of units, and where each unit begins."""
    order = np.argsort(self.unit_of_example, kind="stable")
    counts = np.bincount(self.unit_of_example, minlength=self.num_units)
    return order, np.concatenate([[0], np.cumsum(counts)])

  def _used(self, count: int) -> int:
    return min(count, self.examples_per_unit)

  def _read(
    self, indices: np.ndarray, choose: Callable[[int, int], np.ndarray]
  ) -> dict[str, np.ndarray]:
    """Reads units; `choose` maps (unit, its number of examples) to places."""
    indices = sources.check_indices(indices, len(self))
    order, starts = self._groups
    is_empty = np.ones((len(indices), self.examples_per_unit), np.bool_)
    rows = [np.zeros(0, np.int64)]
    for row, unit in enumerate(indices.tolist()):
      start, stop = starts[unit : unit + 2].tolist()
      chosen = choose(unit, stop - start)
      is_empty[row, : len(chosen)] = False
      rows.append(order[start:stop][chosen])
    units = {}
    for name, array in self.examples.read(np.concatenate(rows)).items():
      if name == SLOT_IS_EMPTY:
        raise ValueError(f"examples must have no array named {SLOT_IS_EMPTY!r}")
      filled = np.zeros((*is_empty.shape, *array.shape[1:]), array.dtype)
      filled[~is_empty] = array
      units[name] = filled
    return units | {SLOT_IS_EMPTY: is_empty}


class _Drawn:
  """A source of units at one step of a run."""

  def __init__(self, source: UserSource, key: bytes, step: int):
    self._source = source
    self._key = key
    self._step = step

  def __len__(self) -> int:
    return len(self._source)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """See `UserSource.read`."""
    return self._source._read(indices, self._choose)

  def content_digest(self) -> str:
    """See `UserSource.content_digest`."""
    return self._source.content_digest()

  def _choose(self, unit: int, count: int) -> np.ndarray:
    used = self._source._used(count)
    if used == count:
      return np.arange(count)
    # A hash of (key, step, unit): the same on every host and after a resume.
    message = self._step.to_bytes(8, "big") + unit.to_bytes(8, "big")
    stream = hashlib.shake_256(_CHOICE + self._key + message)
    words = np.frombuffer(stream.digest(8 * used), ">u8").tolist()
    # The first `used` swaps of a Fisher-Yates shuffle; only places that a swap
    # has touched are stored.
    moved: dict[int, int] = {}
    for i, word in enumerate(words):
      j = i + word % (count - i)
      moved[i], moved[j] = moved.get(j, j), moved.get(i, i)
    return np.sort([moved[i] for i in range(used)])


def in_groups(examples: sources.Source, size: int) -> UserSource:
  """Returns a source whose rows are groups of `size` consecutive examples.

  The last group may be smaller. Groups are the same at every step, whatever is
  drawn. If they were cut from what was drawn, one more example would move all
  that follow it into other groups, and so change many gradients instead of one.
  """
  _validation.check("size", size, _validation.COUNT)
  group_of_example = np.arange(len(examples), dtype=np.int64) // size
  return UserSource(examples, group_of_example, -(-len(examples) // size), size)


def number(ids: np.ndarray, *, name: str) -> tuple[np.ndarray, int]:
  """Numbers the units that a column of identities names, in their order.

  Returns for each example its unit, int64 (num_examples,), in [0, count), and
  the count. Raises ValueError if there are no rows, or identities are neither
  integers nor strings.
  """
  ids = np.asarray(ids)
  if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iuUS":
    raise ValueError(
      f"{name} must hold an integer or a string for each example, got"
      f" {ids.dtype} {ids.shape}"
    )
  unique, unit_of_example = np.unique(ids, return_inverse=True)
  return unit_of_example.astype(np.int64), len(unique)


def parquet_ids(paths: Sequence[sources.Path], column: str) -> np.ndarray:
  """Reads a column of identities, integers or strings, of Parquet files."""
  from pyarrow import parquet
  from pyarrow import types

  pieces = []
  for path in paths:
    with sources.reading(path), parquet.ParquetFile(path) as file:
      available = file.schema_arrow.names
    if column not in available:
      raise ValueError(
        f"data.unit_column must be one of {available} of {path}, got {column!r}"
      )
    with sources.reading(path), parquet.ParquetFile(path) as file:
      table = file.read(columns=[column])
      table.validate(full=True)
      ids = table[column].combine_chunks()
    if types.is_dictionary(ids.type):
      ids = ids.dictionary_decode()
    is_text = types.is_string(ids.type) or types.is_large_string(ids.type)
    if ids.null_count or not (is_text or types.is_integer(ids.type)):
      raise ValueError(
        f"data.unit_column={column!r} of {path} must hold integers or strings"
        f" and no nulls, got {ids.type} with {ids.null_count} nulls"
      )
    column_ids = ids.to_numpy(zero_copy_only=False)
    pieces.append(column_ids.astype(np.str_) if is_text else column_ids)
  return np.concatenate(pieces)
