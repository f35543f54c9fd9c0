"""Puts the privacy losses of steps on a grid and computes their sum.

The losses of one step (see `dpdist.accounting.mixtures`) are put on a grid and
convolved by Fourier transforms (Koskela, Jalko & Honkela 2020,
arXiv:1906.03049). Before, they are weighted by e^(order * loss), which makes
the losses that delta is made of the likely ones; the weight is divided out at
the end. So rounding is small beside delta, however small delta is, and a bound
on it is added. Everything is rounded towards a larger delta.

Imports no jax.
"""

from collections.abc import Sequence
import functools
import math
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy import fft

from dpdist.accounting import gaussian
from dpdist.accounting import mixtures

_Losses: TypeAlias = list[tuple[mixtures.Atoms, int]]

# Grid cells in one standard deviation of a step's weighted loss. A cell of
# width h adds h^2 / 6 to the variance, so this costs a few millionths of
# epsilon, or fifty where the grid would be large.
_FINENESS, _LEAST_FINENESS = 500, 40
_LARGE, _MOST_CELLS = 2**18, 2**22
# Logarithm of the weighted mass that may lie off the grid.
_LOG_OFF = -40.0
# Relative rounding of one step's masses, and of one factor of a transform.
_STEP_ROUNDING, _FACTOR_ROUNDING = 2.0**-42, 2.0**-49
# The part of delta that may come from infinite losses.
_INFINITE = 1e-7
# If rounding is a larger part of delta than this, other orders may be better.
_HIDDEN = 1e-3
# Shifts of the order, for the bounds on the mass off the grid.
_DEVIATIONS = np.array([0.5, 1, 2, 4, 6, 8, 10, 15, 20, 40, 80])
_PARTS = np.array([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2])


class Sum(NamedTuple):
  """The distribution of the sum of all steps' losses, weighted."""

  order: float  # The order of the weight e^(order * loss).
  cell: float  # The width of a grid cell.
  start: int  # The grid index of the first loss.
  masses: np.ndarray  # [n] weighted masses, whose sum is 1 or a little more.
  log_total: float  # Logarithm of the weighted mass before it was scaled to 1.
  infinite: float  # Mass of an infinite loss.
  slack: float  # The weighted part of delta that rounding may have hidden.
  # Logarithm of the factor by which rounding may have shrunk delta.
  growth: float

  def log_delta(self, epsilon: float) -> float:
    """Returns the logarithm of an upper bound on delta."""
    log = self.log_total - self.order * epsilon
    log += gaussian.ROUNDING * (abs(self.log_total) + self.order * epsilon)
    log += self.growth + math.log(self._above(epsilon) + self.slack)
    if self.infinite:
      log = float(np.logaddexp(log, math.log(self.infinite)))
    return min(log, 0.0)

  def is_seen(self, epsilon: float) -> bool:
    """Returns whether rounding has hidden only a negligible part of delta."""
    return self.slack <= _HIDDEN * self._above(epsilon)

  def _above(self, epsilon: float) -> float:
    """Returns the weighted mass that delta is made of."""
    first = max(0, math.floor(epsilon / self.cell) + 1 - self.start)
    # The mass beyond is less than the slack.
    stop = first + math.ceil(50 / (self.order * self.cell)) + 1
    masses = self.masses[first:stop]
    above = (self.start + first + np.arange(len(masses))) * self.cell - epsilon
    return float(
      np.sum(masses * np.exp(-self.order * above) * -np.expm1(-above))
    )


# Directions of pairs, and how often each is composed.
Way: TypeAlias = tuple[tuple[mixtures.Direction, int], ...]


def log_peak(orders: np.ndarray) -> np.ndarray:
  """Returns the logarithm of the maximum of e^(-order x) (1 - e^(-x))."""
  found: np.ndarray = -orders * np.log1p(1 / orders) - np.log1p(orders)
  return found


def added(terms: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
  found: np.ndarray = np.sum([count * term for count, term in terms], axis=0)
  return found


@functools.lru_cache(maxsize=4)
def summed(way: Way, order: float, log_delta: float) -> Sum | None:
  """Returns the sum of the steps' losses, for deltas of about e^log_delta.

  Returns None where that would take too many cells: moving the losses of very
  many steps to the grid spreads them further than the largest grid.
  """
  num_steps = sum(count for _, count in way)
  tiny = max(math.exp(log_delta) * _INFINITE / num_steps, 1e-305)
  steps = [(mixtures.atoms(side, tiny, order), count) for side, count in way]
  cell = _cell(steps, order, num_steps)
  low, high = _window(steps, order, cell)
  least = cell * _FINENESS / _LEAST_FINENESS
  cell = max(cell, min(least, (high - low) / _LARGE))
  cell = max(cell, (high - low) / _MOST_CELLS)
  low, high = _window(steps, order, cell)
  size = math.ceil((high - low) / cell) + 8
  if size > 2 * _MOST_CELLS:
    return None
  size = fft.next_fast_len(size, real=True)
  start = math.floor(low / cell) - 4
  factors, offset, log_total, growth = [], 0, 0.0, 0.0
  for atoms, count in steps:
    first, masses, log, rounding = _on_grid(atoms, cell, order, size)
    factors.append((masses, count))
    offset += first * count
    log_total += log * count
    growth += rounding * count
  hidden = 0.0
  if num_steps > 1:
    transform = _product([(fft.rfft(x), count) for x, count in factors])
    masses = fft.irfft(transform, size)
    # Each factor has a small error at each frequency: at most this in a cell.
    flat = (2 * float(np.sum(np.abs(transform)))) / size
    hidden = num_steps * _FACTOR_ROUNDING * flat
  masses = np.roll(masses, (offset - start) % size)
  # The sum over all cells of each one's weight in delta.
  cells = math.expm1(-cell) / math.expm1(-order * cell)
  cells = min(size, cells / -math.expm1(-(order + 1) * cell))
  peak = math.exp(float(log_peak(np.array(order))))
  return Sum(
    order=order,
    cell=cell,
    start=start,
    masses=np.maximum(masses, 0.0),
    log_total=log_total,
    infinite=-math.expm1(
      math.fsum(
        n * math.log1p(-min(a.infinite, 1 - 2.0**-53)) for a, n in steps
      )
    ),
    slack=hidden * cells + 2 * math.exp(_LOG_OFF) * peak,
    growth=growth,
  )


def _product(factors: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
  """Multiplies powers; with many steps, nearly all entries are about 0."""
  with np.errstate(divide="ignore"):
    logs = added([(count, np.log(np.abs(x))) for x, count in factors])
  places = np.flatnonzero(logs > 2 * _LOG_OFF)
  turns = added([(count, np.angle(x[places])) for x, count in factors])
  found = np.zeros(len(logs), complex)
  found[places] = np.exp(logs[places] + 1j * turns)
  return found


def _cell(steps: _Losses, order: float, num_steps: int) -> float:
  """Returns the distance of neighboring losses on the grid."""
  moments, squares = [], []
  for atoms, count in steps:
    (log,) = mixtures.log_moments(atoms, np.array([order]))
    weights = atoms.masses * np.exp(order * atoms.losses - log)
    moments.append(count * float(log))
    squares.append(count * float(np.sum(weights * atoms.losses**2)))
  variance = math.fsum(squares) / num_steps
  by_moment = math.fsum(moments) / num_steps
  if by_moment > 1e-12:  # A smaller one is mostly rounding.
    variance = min(variance, 2 * by_moment / (order * (order + 1)))
  cell = math.sqrt(variance) / _FINENESS
  # Rounded to a coarse scale, so that similar steps share a cell width and
  # their results compare.
  return 2.0 ** (math.floor(4 * math.log2(cell)) / 4)


def _window(steps: _Losses, order: float, cell: float) -> tuple[float, float]:
  """Returns an interval with all but e^-40 of the gridded sum (Chernoff)."""
  num_steps = sum(count for _, count in steps)
  mean, variance, least, most, base = 0.0, 0.0, 0.0, 0.0, 0.0
  for atoms, count in steps:
    (log,) = mixtures.log_moments(atoms, np.array([order]))
    weights = atoms.masses * np.exp(order * atoms.losses - log)
    middle = float(np.sum(weights * atoms.losses))
    mean += count * middle
    variance += count * float(np.sum(weights * (atoms.losses - middle) ** 2))
    least += count * float(np.min(atoms.losses))
    most += count * float(np.max(atoms.losses))
    base += count * float(log)
  # Where the weight leaves one atom, the deviation is 0 and cannot be used.
  deviation = max(math.sqrt(variance), 1e-9 * (most - least)) or 1.0
  # Also try parts of the order: the deviation misses rare large losses.
  shifts = np.concatenate([_DEVIATIONS / deviation, _PARTS * order])
  room = 1 - _LOG_OFF
  above, below = (
    added([(n, mixtures.log_moments(atoms, order + x)) for atoms, n in steps])
    + num_steps * _spread(order + x, cell)
    - base
    for x in (shifts, -shifts)
  )
  ends = num_steps * cell
  high = min(most + ends, float(np.min((above + room) / shifts)))
  low = max(least - ends, float(np.max((below + room) / -shifts)))
  return min(low, mean), max(high, mean)


def _spread(orders: np.ndarray, cell: float) -> np.ndarray:
  """Bounds how much moving a loss to the grid raises logarithms of moments."""
  x = orders[:, np.newaxis] * cell
  part = np.linspace(0, 1, 33)[1:-1]
  up = np.expm1(-part * cell) / math.expm1(-cell)
  found = np.logaddexp(np.log1p(-up), np.log(up) + x) - part * x
  return 1.1 * np.maximum(np.max(found, axis=1), 0.0)


def _on_grid(
  atoms: mixtures.Atoms, cell: float, order: float, size: int
) -> tuple[int, np.ndarray, float, float]:
  """Splits each atom between its two neighbors on the grid, and weights it.

  Returns the first index, the masses, the logarithm of what they were divided
  by, and by how much, relative, rounding may have made them too small.
  """
  below = np.floor(atoms.losses / cell)
  up = np.expm1(below * cell - atoms.losses) / math.expm1(-cell)
  up = np.clip(up, 0.0, 1.0)
  exponents = order * cell * below
  top = float(np.max(exponents[atoms.masses > 0]))
  weights = atoms.masses * np.exp(np.minimum(exponents - top, 0.0))
  first = int(np.min(below))
  places = (below - first).astype(np.int64)
  masses = np.bincount(
    places % size, weights=weights * (1 - up), minlength=size
  ) + np.bincount(
    (places + 1) % size,
    weights=weights * up * math.exp(order * cell),
    minlength=size,
  )
  total = float(np.sum(masses))
  rounding = _STEP_ROUNDING + 2 * gaussian.ROUNDING * abs(top)
  return first, masses / total, top + math.log(total), rounding
