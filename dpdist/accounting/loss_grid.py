"""Privacy losses of steps on a grid, and their sum.

Losses of one step (see `dpdist.accounting.mixtures`) are put on a grid,
weighted by e^(order * loss) so that those which delta is made of are the likely
ones, and convolved by Fourier transforms (Koskela, Jalko & Honkela 2020,
arXiv:1906.03049). The weight is taken off again, so that rounding is small
beside delta, however small that is; what it may come to is added. Everything
is rounded towards a larger delta.

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

# Cells of the grid in a deviation of one step's loss, as delta sees it. A cell
# of h adds h^2 / 6 to the variance, so this costs a few millionths of epsilon,
# or, where the grid would be large, fifty.
_FINENESS, _LEAST_FINENESS = 500, 40
_LARGE, _MOST_CELLS = 2**18, 2**22
# Of the weighted mass, what may lie off the grid: e^-40.
_LOG_OFF = -40.0
# Rounding of one step's masses, relative, and of one factor of a transform.
_STEP_ROUNDING, _FACTOR_ROUNDING = 2.0**-42, 2.0**-49
# Of delta, what may have an infinite loss.
_INFINITE = 1e-7
# Where rounding is more than such a part of delta, other orders may be better.
_HIDDEN = 1e-3
# Shifts of the order to bound what lies off a grid by.
_DEVIATIONS = np.array([0.5, 1, 2, 4, 6, 8, 10, 15, 20, 40, 80])
_PARTS = np.array([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2])


class Sum(NamedTuple):
  """Weighted losses of all steps.

  Attributes:
    order: of the weight.
    cell: of the grid of losses.
    start: index of the first loss.
    masses: [n] weighted, of sum 1 or a little more.
    log_total: of the weighted mass before it was made 1.
    infinite: mass of an infinite loss.
    slack: what rounding may have hidden of delta, weighted.
    growth: by which rounding may have made all of it too small.
  """

  order: float
  cell: float
  start: int
  masses: np.ndarray
  log_total: float
  infinite: float
  slack: float
  growth: float

  def log_delta(self, epsilon: float) -> float:
    """The logarithm of an upper bound on delta."""
    log = self.log_total - self.order * epsilon
    log += gaussian.ROUNDING * (abs(self.log_total) + self.order * epsilon)
    log += self.growth + math.log(self._above(epsilon) + self.slack)
    if self.infinite:
      log = float(np.logaddexp(log, math.log(self.infinite)))
    return min(log, 0.0)

  def is_seen(self, epsilon: float) -> bool:
    """Whether delta is not mostly what rounding may have hidden."""
    return self.slack <= _HIDDEN * self._above(epsilon)

  def _above(self, epsilon: float) -> float:
    """The weighted mass that delta is made of."""
    first = max(0, math.floor(epsilon / self.cell) + 1 - self.start)
    # What is further out is less than the slack.
    stop = first + math.ceil(50 / (self.order * self.cell)) + 1
    masses = self.masses[first:stop]
    above = (self.start + first + np.arange(len(masses))) * self.cell - epsilon
    return float(
      np.sum(masses * np.exp(-self.order * above) * -np.expm1(-above))
    )


# Directions, and how often each is composed.
Way: TypeAlias = tuple[tuple[mixtures.Direction, int], ...]


def log_peak(orders: np.ndarray) -> np.ndarray:
  """The logarithm of the most that e^(-order x) (1 - e^(-x)) can be."""
  found: np.ndarray = -orders * np.log1p(1 / orders) - np.log1p(orders)
  return found


def added(terms: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
  found: np.ndarray = np.sum([count * term for count, term in terms], axis=0)
  return found


@functools.lru_cache(maxsize=4)
def summed(way: Way, order: float, log_delta: float) -> Sum | None:
  """What steps add up to, to be asked at a delta of about e^log_delta.

  None where that would take too many cells: moving the losses of very many
  steps to a grid then spreads them further than a grid can be.
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
    # Each factor is off by a little, in its own place: so much in any cell.
    flat = (2 * float(np.sum(np.abs(transform)))) / size
    hidden = num_steps * _FACTOR_ROUNDING * flat
  masses = np.roll(masses, (offset - start) % size)
  # The sum over all cells of what delta is made of.
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
  """Of powers, of which all but few places are as good as 0 for many steps."""
  with np.errstate(divide="ignore"):
    logs = added([(count, np.log(np.abs(x))) for x, count in factors])
  places = np.flatnonzero(logs > 2 * _LOG_OFF)
  turns = added([(count, np.angle(x[places])) for x, count in factors])
  found = np.zeros(len(logs), complex)
  found[places] = np.exp(logs[places] + 1j * turns)
  return found


def _cell(steps: _Losses, order: float, num_steps: int) -> float:
  """How far the losses of the grid are apart."""
  moments, squares = [], []
  for atoms, count in steps:
    (log,) = mixtures.log_moments(atoms, np.array([order]))
    weights = atoms.masses * np.exp(order * atoms.losses - log)
    moments.append(count * float(log))
    squares.append(count * float(np.sum(weights * atoms.losses**2)))
  variance = math.fsum(squares) / num_steps
  by_moment = math.fsum(moments) / num_steps
  if by_moment > 1e-12:  # Else rounding.
    variance = min(variance, 2 * by_moment / (order * (order + 1)))
  cell = math.sqrt(variance) / _FINENESS
  # One of few, so that like steps have the same and compare.
  return 2.0 ** (math.floor(4 * math.log2(cell)) / 4)


def _window(steps: _Losses, order: float, cell: float) -> tuple[float, float]:
  """Between which all but e^-40 of the gridded sum lies (Chernoff)."""
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
  # None at all, where the weight leaves one atom, is no deviation to go by.
  deviation = max(math.sqrt(variance), 1e-9 * (most - least)) or 1.0
  # Also parts of the order: rare large losses are no part of a deviation.
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
  """By how much moving a loss to the grid may raise logarithms of moments."""
  x = orders[:, np.newaxis] * cell
  part = np.linspace(0, 1, 33)[1:-1]
  up = np.expm1(-part * cell) / math.expm1(-cell)
  found = np.logaddexp(np.log1p(-up), np.log(up) + x) - part * x
  return 1.1 * np.maximum(np.max(found, axis=1), 0.0)


def _on_grid(
  atoms: mixtures.Atoms, cell: float, order: float, size: int
) -> tuple[int, np.ndarray, float, float]:
  """Atoms moved to both neighbours, weighted.

  Returns:
    The first of them, their masses, the logarithm of what these were divided
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
