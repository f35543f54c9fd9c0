"""Private statistics of a column: what a number adds, and what sums say.

A query asks for the mean and the deviation of a column, for quantiles, or for
counts.

Guarantees:
  Whatever a number is, its entries have an l2 norm of at most its share. What
  is not a number counts as the middle of the bounds, and what is out of bounds
  as the nearest bound.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from dpdist import _validation

# The bound of a unit's vector. Sums of less than 2**31 rows fit 64 bits.
UNIT = 2**32
# The least deviation and width that a column is divided by, over half of what
# its bounds are apart: noise may leave less.
_LEAST = 2.0**-10

Released = Mapping[str, Any]


def is_numbers(values: Sequence[Any] | None) -> bool:
  """Returns whether a list of classes or categories is one of numbers."""
  numbers = (int, float, np.integer, np.floating)
  return bool(values) and all(
    isinstance(value, numbers) for value in values or ()
  )


def compared(values: Sequence[Any]) -> tuple[Any, ...]:
  """Returns a list of declared values as those of rows are compared with."""
  kind = float if is_numbers(values) else str
  return tuple(map(kind, values))


@dataclasses.dataclass(frozen=True)
class _Bounded:
  """A query about numbers within public bounds.

  Attributes:
    low: the lower bound.
    high: the upper bound.
  """

  low: float
  high: float

  def __post_init__(self) -> None:
    rule = _validation.real()
    _validation.check_fields(self, {"low": rule, "high": rule})
    half = self._half
    _validation.require(
      2.0**-1000 < half < 2.0**1000,
      "high",
      f"more than low={self.low:g}, and neither nearly equal nor too far",
      self.high,
    )

  @property
  def _middle(self) -> float:
    return self.low / 2 + self.high / 2

  @property
  def _half(self) -> float:
    return self.high / 2 - self.low / 2

  def places(self, values: np.ndarray) -> np.ndarray:
    """Returns where numbers are between the bounds, in [-1, 1], never NaN."""
    with np.errstate(all="ignore"):
      found = (np.asarray(values, np.float64) - self._middle) / self._half
    return np.clip(np.where(np.isnan(found), 0.0, found), -1.0, 1.0)

  def _scaled(
    self, values: np.ndarray, middle: Any, half: Any, low: Any, high: Any
  ) -> np.ndarray:
    # As in the sums, one number far out must not outweigh all others.
    kept = np.clip(np.asarray(values, np.float64), low, high)
    return ((kept - middle) / half).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Standardized(_Bounded):
  """Centres a column of numbers by a noisy mean, and divides by a deviation.

  The mean and the standard deviation are made of noisy first and second moments
  of the numbers, clipped to the bounds, as the column itself is.

  Attributes:
    low: a public lower bound.
    high: a public upper bound. Noise is in proportion to high - low.
  """

  kind: ClassVar[str] = "standardized"

  def width(self, declared: Sequence[Any]) -> int:
    """Returns how many entries a number has."""
    return 2

  def entries(self, values: np.ndarray, share: int, width: int) -> np.ndarray:
    """Returns the entries of numbers, int64 (..., width), of norm <= share."""
    place = self.places(values)
    most = math.isqrt(share * share // 2)
    both = np.stack([place, 2 * place * place - 1], axis=-1)
    # Towards zero, so that no entry grows.
    return np.trunc(both * most).astype(np.int64)

  def start(self, shape: Sequence[int]) -> dict[str, Any]:
    """Returns what stands for the answers before they are released."""
    one = np.ones(shape)
    return {
      "mean": (self._middle * one).tolist(),
      "deviation": (self._half * one).tolist(),
    }

  def answers(
    self, sums: np.ndarray, share: int, num_units: int, stddev: float
  ) -> dict[str, Any]:
    """Returns what noisy sums (..., width) say, with their standard errors."""
    most = math.isqrt(share * share // 2)
    over = float(num_units) * most
    mean = np.clip(sums[..., 0] / over, -1.0, 1.0)
    square = np.clip((sums[..., 1] / over + 1) / 2, 0.0, 1.0)
    # Below what noise can make of nothing, a deviation says nothing.
    least = max(stddev / over / 2, _LEAST * _LEAST)
    deviation = np.sqrt(np.maximum(square - mean * mean, min(least, 1.0)))
    return {
      "mean": (self._middle + self._half * mean).tolist(),
      "deviation": (self._half * deviation).tolist(),
      "standard_error_of_mean": self._half * stddev / over,
      "standard_error_of_square": self._half * self._half * stddev / over / 2,
    }

  def encode(self, values: np.ndarray, answers: Released) -> np.ndarray:
    """Returns a column as the answers scale it, float32."""
    mean = np.asarray(answers["mean"], np.float64)
    deviation = np.asarray(answers["deviation"], np.float64)
    return self._scaled(values, mean, deviation, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Quantiles(_Bounded):
  """Clips a column of numbers to noisy quantiles, and scales it to [-1, 1].

  The quantiles are read off a noisy histogram of bins of one width.

  Attributes:
    low: a public lower bound.
    high: a public upper bound.
    keep: the shares of the rows, between 0 and 1, at the lower and the upper
      quantile.
    bins: how many bins there are between the bounds, at least 2.
  """

  keep: tuple[float, float] = (0.05, 0.95)
  bins: int = 64

  kind: ClassVar[str] = "quantiles"

  def __post_init__(self) -> None:
    super().__post_init__()
    rule = _validation.integer(2, 1 << 20)
    _validation.check_fields(self, {"bins": rule})
    try:
      low, high = (float(x) for x in self.keep)
    except (TypeError, ValueError):
      low, high = math.nan, math.nan
    _validation.require(
      0 <= low < high <= 1, "keep", "two rising shares in [0, 1]", self.keep
    )
    object.__setattr__(self, "keep", (low, high))

  def width(self, declared: Sequence[Any]) -> int:
    """Returns how many entries a number has."""
    return self.bins

  def entries(self, values: np.ndarray, share: int, width: int) -> np.ndarray:
    """Returns the entries of numbers, int64 (..., width), of norm <= share."""
    places = np.floor((self.places(values) + 1) / 2 * self.bins)
    bins = np.clip(places, 0, self.bins - 1).astype(np.int64)
    return np.where(bins[..., None] == np.arange(self.bins), share, 0)

  def start(self, shape: Sequence[int]) -> dict[str, Any]:
    """Returns what stands for the answers before they are released."""
    one = np.ones(shape)
    return {
      "lower": (self.low * one).tolist(),
      "upper": (self.high * one).tolist(),
    }

  def answers(
    self, sums: np.ndarray, share: int, num_units: int, stddev: float
  ) -> dict[str, Any]:
    """Returns what noisy sums (..., width) say, with their standard errors."""
    counts = sums / float(share)
    flat = counts.reshape(-1, self.bins)
    found = np.array([self._between(row) for row in flat])
    lower, upper = found.reshape(*counts.shape[:-1], 2).transpose(
      counts.ndim - 1, *range(counts.ndim - 1)
    )
    return {
      "lower": lower.tolist(),
      "upper": upper.tolist(),
      "counts": counts.tolist(),
      "standard_error_of_count": stddev / share,
    }

  def _between(self, counts: np.ndarray) -> tuple[float, float]:
    edges = np.linspace(-1.0, 1.0, self.bins + 1)
    below = np.concatenate([[0.0], np.cumsum(np.maximum(counts, 0.0))])
    if not below[-1] > 0:
      return self.low, self.high
    low, high = (
      float(np.interp(share * below[-1], below, edges)) for share in self.keep
    )
    # At least a bin apart: within one bin nothing is known.
    more = max(0.0, 2 / self.bins - (high - low)) / 2
    ends = (low - more, high + more)
    lower, upper = (self._middle + self._half * x for x in ends)
    return lower, upper

  def encode(self, values: np.ndarray, answers: Released) -> np.ndarray:
    """Returns a column as the answers scale it, float32."""
    lower = np.asarray(answers["lower"], np.float64)
    upper = np.asarray(answers["upper"], np.float64)
    middle, half = lower / 2 + upper / 2, upper / 2 - lower / 2
    return self._scaled(values, middle, half, lower, upper)


@dataclasses.dataclass(frozen=True)
class Counts:
  """Counts how often each declared value of a column occurs.

  Of a column of `categories`, or of targets with `classes`, of one value a row.

  Attributes:
    at_least: a category with a smaller noisy count is left out: it gets no 1,
      as if it had not been declared. The shape of examples stays. Only for
      `categories`. None: none is left out.
  """

  at_least: float | None = None

  kind: ClassVar[str] = "counts"

  def __post_init__(self) -> None:
    rule = _validation.real(at_least=0)
    _validation.check_fields(self, {"at_least": rule})

  def width(self, declared: Sequence[Any]) -> int:
    """Returns how many entries a value has; the last is for all others."""
    return len(declared) + 1

  def entries(self, values: np.ndarray, share: int, width: int) -> np.ndarray:
    """Returns the entries of places in a list, -1 for none; norm <= share."""
    is_listed = (values >= 0) & (values < width - 1)
    places = np.where(is_listed, values, width - 1)
    return np.where(places[..., None] == np.arange(width), share, 0)

  def start(self, shape: Sequence[int]) -> dict[str, Any]:
    """Returns what stands for the answers before they are released."""
    return {}

  def answers(
    self, sums: np.ndarray, share: int, num_units: int, stddev: float
  ) -> dict[str, Any]:
    """Returns what noisy sums (..., width) say, with their standard errors."""
    counts = (sums / float(share)).tolist()
    return {
      "counts": counts[:-1],
      "count_of_others": counts[-1],
      "standard_error_of_count": stddev / share,
    }

  def encode(self, values: np.ndarray, answers: Released) -> np.ndarray:
    """Returns the places, with -1 for those that are left out."""
    if self.at_least is None or "counts" not in answers:
      return values
    is_kept = np.asarray(answers["counts"]) >= self.at_least
    # Place -1 finds the last entry.
    kept = np.append(is_kept, False)[values]
    return np.where(kept, values, -1).astype(values.dtype)


Query = Standardized | Quantiles | Counts
KINDS = (Standardized, Quantiles, Counts)
