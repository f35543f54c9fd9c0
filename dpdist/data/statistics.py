"""What is asked about a data set, as one vector of integers for each unit.

Guarantees:
  * Whatever a row holds, its vector has an l2 norm of at most `queries.UNIT`:
    each number of a row has a share of it that adds up in squares, and its part
    of the vector stays within that share; see `dpdist.data.queries`.
  * A user's vector is the mean of the vectors of all of the user's rows, each
    entry rounded towards zero, so its norm is at most that too.
  * Sums of integers are the same in any order, and on any machine.
  * What is made of the noisy sums depends on them and on public numbers alone.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import json
import math
from typing import Any

import numpy as np

from dpdist import errors
from dpdist.data import queries

# The most entries of vectors that are in memory at once.
_BLOCK, _BLOCK_ROWS = 1 << 22, 8192


@dataclasses.dataclass(frozen=True)
class Column:
  """A column that is asked about.

  Attributes:
    name: its name.
    query: what is asked.
    shape: of its numbers in a row.
    declared: the values that are counted.
    made: what else decides what the numbers are, JSON-able.
  """

  name: str
  query: queries.Query
  shape: tuple[int, ...]
  declared: tuple[Any, ...] = ()
  made: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def num_numbers(self) -> int:
    """Returns how many numbers a row has."""
    return math.prod(self.shape)

  @property
  def width(self) -> int:
    """Returns how many entries a number has."""
    return self.query.width(self.declared)

  def to_list(self) -> list[Any]:
    """Returns all that decides what is asked, JSON-able."""
    query = dataclasses.asdict(self.query)
    declared = [*map(str, queries.compared(self.declared))]
    kind = self.query.kind
    return [self.name, kind, query, list(self.shape), declared, dict(self.made)]


@dataclasses.dataclass(frozen=True)
class Statistics:
  """All that is asked about a data set; one vector for each row.

  Attributes:
    columns: in order of their names, at least one.
  """

  columns: tuple[Column, ...]

  @property
  def share(self) -> int:
    """Returns the most norm of a number's entries."""
    count = sum(column.num_numbers for column in self.columns)
    return math.isqrt(queries.UNIT * queries.UNIT // count)

  @property
  def width(self) -> int:
    """Returns the number of entries of a vector."""
    return sum(x.num_numbers * x.width for x in self.columns)

  def digest(self) -> str:
    """Returns the SHA-256 of all that is asked."""
    asked = [
      "dpdist.queries/v1",
      queries.UNIT,
      [x.to_list() for x in self.columns],
    ]
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def vectors(self, measured: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the vector of each row, int64 (k, width).

    Args:
      measured: by column, numbers (k, ...) or places in a declared list.

    Raises:
      ValueError: a column has another shape than the first row has.
    """
    parts = []
    for column in self.columns:
      values = measured[column.name]
      if values.shape[1:] != column.shape:
        raise errors.ArgumentError(
          f"column {column.name!r} must have numbers of one shape in all rows,"
          " of which private statistics are made"
        )
      found = column.query.entries(values, self.share, column.width)
      parts.append(found.astype(np.int64).reshape(len(values), -1))
    return np.concatenate(parts, axis=1)

  def sums(
    self,
    measure: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    num_rows: int,
    unit_of_row: np.ndarray | None = None,
  ) -> list[int]:
    """Returns the exact sum of the vectors of all units. PRIVATE.

    Args:
      measure: reads rows by their numbers; see `vectors`.
      num_rows: how many there are.
      unit_of_row: the user of each row; None: each row is a unit.
    """
    order = np.arange(num_rows)
    if unit_of_row is not None:
      order = np.argsort(unit_of_row, kind="stable")
    size = max(1, min(_BLOCK_ROWS, _BLOCK // self.width))
    total = np.zeros(self.width, object)
    # The user whose rows may go on in the next block: sum and number of rows.
    last, held, count = None, np.zeros(self.width, np.int64), 0
    for start in range(0, num_rows, size):
      rows = order[start : start + size]
      vectors = self.vectors(measure(rows))
      if unit_of_row is None:
        total += vectors.sum(axis=0).astype(object)
        continue
      units = unit_of_row[rows]
      begins = np.flatnonzero(np.append(True, units[1:] != units[:-1]))
      added = np.add.reduceat(vectors, begins, axis=0)
      counts = np.diff(np.append(begins, len(rows)))
      if units[0] == last:
        added[0] += held
        counts[0] += count
      elif count:
        total += _divided(held, count).astype(object)
      total += (
        _divided(added[:-1], counts[:-1, None]).sum(axis=0).astype(object)
      )
      last, held, count = units[-1], added[-1], int(counts[-1])
    if count:
      total += _divided(held, count).astype(object)
    return [int(x) for x in total]

  def answers(
    self, noisy: Sequence[int], *, num_units: int, stddev: float
  ) -> dict[str, queries.Released]:
    """Returns what noisy sums say of each column, JSON-able.

    Args:
      noisy: the sums with noise.
      num_units: how many units there are, a public number.
      stddev: of the noise.
    """
    found: dict[str, queries.Released] = {}
    start = 0
    for column in self.columns:
      stop = start + column.num_numbers * column.width
      sums = np.array(noisy[start:stop], np.float64)
      sums = sums.reshape(*column.shape, column.width)
      start = stop
      said = column.query.answers(sums, self.share, num_units, stddev)
      kind: dict[str, Any] = {"kind": column.query.kind}
      if column.declared:
        kind["values"] = [str(x) for x in column.declared]
      found[column.name] = kind | said
    return found


def _divided(sums: np.ndarray, counts: Any) -> np.ndarray:
  """Returns means of integers, rounded towards zero."""
  return np.sign(sums) * (np.abs(sums) // counts)
