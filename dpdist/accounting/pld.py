"""Computes epsilon and delta from the sum of the steps' privacy losses.

The losses are added up on a grid, at an order that is chosen here; see
`dpdist.accounting.loss_grid`. Everything is rounded towards a larger delta.
Arguments are not checked here: `dpdist.accounting.calibration` does that.

Imports no jax.
"""

from collections.abc import Callable
import functools
import math
import sys
from typing import TypeAlias

import numpy as np
from scipy import optimize

from dpdist.accounting import gaussian
from dpdist.accounting import loss_grid
from dpdist.accounting import mixtures
from dpdist.accounting import step_events

Steps: TypeAlias = tuple[tuple[step_events.StepEvent, int], ...]
# If log delta is found to be so far below the guess, too much of it may come
# from infinite losses.
_FAR_BELOW = 4.0
# Smaller deltas are near the least double.
SMALLEST_DELTA = 1e-250
# A rough bound at this order is enough to choose the order.
_ROUGH_ORDER = 2.0
# Where rounding hides delta, other orders may be better: the factor from one to
# the next, and how many are tried.
_NEXT_ORDER, _MOST_ORDERS = 0.6, 4
_ORDERS = 2.0 ** np.arange(-12, 100, 2)


def epsilon(steps: Steps, delta: float) -> float:
  """Returns an upper bound on the epsilon that steps, at least one, spend."""
  log = math.log(delta)
  return max(_epsilon_one_way(way, log) for way in _ways(steps))


def _epsilon_one_way(way: loss_grid.Way, log: float) -> float:
  mu = _mu_of_gaussians(way)
  if mu is not None:
    return _inverse(lambda e: gaussian.log_delta(mu, e), log, mu * mu)
  order, near = _best_order(way, lambda k, x: (k - log) / x)
  if near <= 0:
    return 0.0

  def at(order: float) -> tuple[float, bool]:
    total = loss_grid.summed(way, order, _rounded_log(log))
    if total is None:
      return math.inf, True
    found = _inverse(total.log_delta, log, near)
    return found, total.is_seen(found)

  return min(near, _over_orders(at, order))


def delta(steps: Steps, epsilon: float) -> float:
  """Returns an upper bound on the delta at which steps spend epsilon."""
  log = max(_log_delta_one_way(way, epsilon) for way in _ways(steps))
  return max(math.exp(log), sys.float_info.min)  # Never 0.


def _log_delta_one_way(way: loss_grid.Way, epsilon: float) -> float:
  mu = _mu_of_gaussians(way)
  if mu is not None:
    return gaussian.log_delta(mu, epsilon)
  least = math.log(SMALLEST_DELTA)
  order, found = _best_order(way, lambda k, x: max(k - x * epsilon, least))
  log = min(found, 0.0) + 2 * _FAR_BELOW

  def at(order: float) -> tuple[float, bool]:
    total = loss_grid.summed(way, order, _rounded_log(log))
    if total is None:
      return 0.0, True
    return total.log_delta(epsilon), total.is_seen(epsilon)

  while found < log - _FAR_BELOW and log > least:
    log = max(min(found, 0.0), least)  # It also bounds the infinite losses.
    found = min(log, _over_orders(at, order))
  return found


def _over_orders(
  at: Callable[[float], tuple[float, bool]], order: float
) -> float:
  """Returns the least bound over several orders; each of them gives a bound.

  `at` maps an order to a bound, and whether rounding is negligible in it.
  """
  best, is_seen = at(order)
  for ratio in (_NEXT_ORDER, 1 / _NEXT_ORDER):
    for i in range(1, _MOST_ORDERS):
      if is_seen or best == 0:
        return best
      found, is_seen = at(order * ratio**i)
      if not found < best:
        break
      best = found
  return best


def rough_epsilon(steps: Steps, delta: float) -> float:
  """Returns an upper bound on epsilon that is quick to find but loose."""
  log = math.log(delta)
  found = []
  for way in _ways(steps):
    mu = _mu_of_gaussians(way)
    if mu is not None:
      found.append(_epsilon_one_way(way, log))
    else:
      found.append(_best_order(way, lambda k, x: (k - log) / x)[1])
  return max(0.0, *found)


def _inverse(
  log_delta: Callable[[float], float], log: float, near: float
) -> float:
  """Returns the least epsilon, or a little more, with so small a delta."""
  if log_delta(0.0) <= log:
    return 0.0
  high = max(near, 1e-300)
  while log_delta(high) > log:
    high *= 1.5
    if not high < math.inf:
      return math.inf
  found = optimize.brentq(
    lambda e: log_delta(e) - log, 0.0, high, xtol=1e-12 * high, rtol=1e-12
  )
  step = 1e-12 * high
  while log_delta(found) > log:  # The root may be missed on the wrong side.
    found, step = found + step, 2 * step
  return float(found)


# --- One way ------------------------------------------------------------------


def _ways(steps: Steps) -> list[loss_grid.Way]:
  """Returns the directions that a run may have; all of its steps share one.

  Steps of several kinds have one or more directions in common, as those of
  truncated samples do.
  """
  found = [(event.pld(), count) for event, count in steps]
  most = max(len(directions) for directions, _ in found)
  return [
    _gaussians_as_one([(x[i % len(x)], count) for x, count in found])
    for i in range(most)
  ]


def _gaussians_as_one(
  way: list[tuple[mixtures.Direction, int]],
) -> loss_grid.Way:
  """Composes all unmixed Gaussians into one, wherever they are in the order."""
  counts: dict[mixtures.Direction, int] = {}
  squares = []
  for direction, count in way:
    (side, *more) = direction
    if not more and len(side.p) == len(side.q) == 1:
      squares.append(count * (side.reach / side.sigma) ** 2)
    else:
      counts[direction] = counts.get(direction, 0) + count
  if squares:
    sigma = 1 / math.sqrt(math.fsum(squares))
    side = mixtures.Side(1.0, ((1.0, 1.0),), ((1.0, 0.0),), sigma)
    counts[(side,)] = 1
  return tuple(counts.items())


def _mu_of_gaussians(way: loss_grid.Way) -> float | None:
  ((side, *more), _), *others = way
  if others or more or len(side.p) > 1 or len(side.q) > 1:
    return None
  return (1 + gaussian.ROUNDING) / side.sigma


@functools.lru_cache(maxsize=256)
def _roughly(direction: mixtures.Direction) -> mixtures.Atoms:
  return mixtures.atoms(direction, 1e-300, _ROUGH_ORDER, fineness=20)


@functools.lru_cache(maxsize=64)
def _rough_moments(direction: mixtures.Direction) -> np.ndarray:
  return mixtures.log_moments(_roughly(direction), _ORDERS)


def _best_order(
  way: loss_grid.Way, bound: Callable[[float, float], float]
) -> tuple[float, float]:
  """Returns the order at which a bound by moments is least, and that bound.

  `bound` maps the logarithm of the moment, with `loss_grid.log_peak` added, and
  the order to a bound (Canonne, Kamath & Steinke 2020, arXiv:2004.00010).
  """
  logs = loss_grid.added([(count, _rough_moments(side)) for side, count in way])
  logs += loss_grid.log_peak(_ORDERS)
  values = [bound(k, x) for k, x in zip(logs, _ORDERS, strict=True)]
  coarse = _least(values)
  orders = _ORDERS[coarse] * 2.0 ** np.arange(-1.75, 2, 0.25)
  logs = loss_grid.added(
    [(n, mixtures.log_moments(_roughly(side), orders)) for side, n in way]
  )
  logs += loss_grid.log_peak(orders)
  values = [bound(k, x) for k, x in zip(logs, orders, strict=True)]
  best = _least(values)
  return float(orders[best]), float(values[best])


def _least(values: list[float]) -> int:
  """Returns the index of the first nearly least value, so of a small order."""
  least = min(values)
  return next(i for i, x in enumerate(values) if x <= least + 1e-3 * abs(least))


def _rounded_log(log: float) -> float:
  """Rounds log delta, so that queries at similar deltas share a cached sum."""
  return 8.0 * math.floor(log / 8)
