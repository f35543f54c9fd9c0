"""Computes Renyi divergences of a step of DP-SGD, and epsilon from them.

They are integrals over both distributions of a pair; those of `AddRemove` are
the sampled Gaussian mechanism's (Mironov, Talwar & Zhang 2019,
arXiv:1908.10530). Arguments are not checked here:
`dpdist.accounting.calibration` and `dpdist.accounting.proofs` do that.

Imports no jax.
"""

import functools
import math

from dp_accounting.rdp import rdp_privacy_accountant
import numpy as np
from scipy import special

from dpdist.accounting import mixtures
from dpdist.accounting import step_events

# Orders that are fixed beforehand are among these. With much noise the best
# ones are above a thousand.
WHOLE_ORDERS = (
  *range(2, 64),
  *(x for k in range(6, 30) for x in (3 * 2 ** (k - 1), 2 ** (k + 1))),
)
ORDERS = np.array([*(1 + x / 10 for x in range(1, 100)), *WHOLE_ORDERS[9:]])
_LOW = 64.0  # Orders up to it are integrated at the same nodes.
# Ratios of orders to the best one, and the share of delta of each.
_LADDER = {
  **{0.25: 0.1, 0.375: 0.1, 0.5: 0.1, 0.75: 0.1},
  **{1.0: 0.4, 1.5: 0.1, 2.5: 0.06, 5.0: 0.04},
}
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
# Where more panels were needed, an unsampled Gaussian is as good a bound.
_MOST_PANELS = 2**15
# Relative part that quadrature may miss of a ratio to a large negative power.
_STEEP = 1e-5


@functools.lru_cache(maxsize=1024)
def step_divergences(
  side: mixtures.Side, mean_shift: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the orders and a bound on the divergence at each, float64.

  The divergence of the side is the larger one of both directions; the means of
  its P and Q are mean_shift apart.
  """
  is_low = ORDERS <= _LOW
  divergences = np.concatenate(
    [
      _integrals(side, ORDERS[is_low]),
      *(_integrals(side, np.array([x])) for x in ORDERS[~is_low]),
    ]
  )
  # Rounding may make the smallest divergences too small. The cost of a mean
  # shift of q alone is their true limit, and below all others.
  least = ORDERS * (mean_shift / side.sigma) ** 2 / 2
  divergences = np.maximum(divergences, least)
  divergences.setflags(write=False)  # Shared by every later query.
  return ORDERS, divergences


def _integrals(side: mixtures.Side, orders: np.ndarray) -> np.ndarray:
  """Computes divergences of P from Q by Gauss-Legendre quadrature."""
  sigma, reach = side.sigma, side.reach
  unsampled = orders * (reach / sigma) ** 2 / 2
  if len(side.p) == 1:  # Not sampled.
    return unsampled
  low = min(m for _, m in side.q) - 10 * sigma
  low = reach / 2 if side.is_folded else low
  # The moment's last peak plus ten standard deviations.
  high = max(m for _, m in side.p) + (max(orders) - 1) * reach + 10 * sigma
  panels = (high - low) / min(sigma, 2 * sigma * (sigma / reach))
  if not panels < _MOST_PANELS:
    return unsampled
  ends = np.linspace(low, high, math.ceil(panels) + 1)[:, np.newaxis]
  half = (ends[1:] - ends[:-1]) / 2
  x = (ends[1:] + ends[:-1]) / 2 + half * _NODES
  losses, logs = mixtures.loss(side, x), mixtures.log_density(side.q, sigma, x)
  logs += np.log(half * _WEIGHTS)
  found = [
    _log_moment(order, losses, logs, side.is_folded) / (order - 1)
    for order in orders
  ]
  return np.minimum(unsampled, found)


def _log_moment(
  order: float, losses: np.ndarray, logs: np.ndarray, is_folded: bool
) -> float:
  """Returns the logarithm of the mean under Q of the ratio to the order."""
  terms = logs + order * losses
  log = float(special.logsumexp(terms))
  if log > 300:  # The rest, at most 2, is negligible.
    return log
  excess = float(np.sum(_excess(order, losses, logs)))
  if is_folded:  # The other direction: P takes the place of Q.
    excess += float(np.sum(_excess(order, -losses, logs + losses)))
    excess *= 1 + _STEEP
  return math.log1p(excess)


def _excess(order: float, losses: np.ndarray, logs: np.ndarray) -> np.ndarray:
  """Returns terms that sum to the moment less 1.

  They are e^logs (e^(order l) - 1 - order (e^l - 1)). The part that is
  subtracted sums to 0, and cancels what is of first order in l.
  """
  weights = np.exp(logs)
  is_near = order * np.abs(losses) < 0.5
  small = np.where(is_near, losses, 0.0)
  near = weights * (_beyond(order * small) - order * _beyond(small))
  far = np.exp(logs + order * losses) - weights
  far -= order * (np.exp(logs + losses) - weights)
  return np.where(is_near, near, far)


def _beyond(x: np.ndarray) -> np.ndarray:
  """Computes e^x - 1 - x."""
  small = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
  return np.where(np.abs(x) < 0.01, small, np.expm1(x) - x)


def divergence(
  event: step_events.StepEvent, num_steps: int, order: int
) -> float:
  """Returns the divergence of steps at one of `WHOLE_ORDERS`.

  At an order that was fixed beforehand, the divergences of parts that were
  chosen one after the other add up; see `dpdist.privacy.composition`.
  """
  if num_steps == 0:
    return 0.0
  if not event.is_noisy:
    return math.inf
  orders, divergences = event.rdp()
  return num_steps * float(divergences[orders == order][0])


def epsilon_at(order: int, divergence: float, delta: float) -> float:
  """Converts a divergence at one order to epsilon (arXiv:2004.00010)."""
  spent, _ = rdp_privacy_accountant.compute_epsilon(
    [order], [divergence], delta
  )
  return float(spent)


def largest_divergence(order: int, epsilon: float, delta: float) -> float:
  """Returns the divergence of epsilon at an order; it may be 0 or less."""
  return (
    epsilon
    - math.log1p(-1 / order)
    + (math.log(delta) + math.log(order)) / (order - 1)
  )


def best_order(steps: step_events.Steps, delta: float) -> int:
  """Returns the order of `WHOLE_ORDERS` at which steps spend the least."""
  return min(
    WHOLE_ORDERS,
    key=lambda order: epsilon_at(
      order,
      math.fsum(divergence(event, count, order) for event, count in steps),
      delta,
    ),
  )


def ladder(steps: step_events.Steps, delta: float) -> dict[int, float]:
  """Returns orders around the best one for steps, each with a share of delta.

  The others serve where other steps follow instead of these. With less noise
  the best order is lower, and a small share of delta costs most at low orders.
  """
  best = best_order(steps, delta)
  found: dict[int, float] = {}
  for factor, share in _LADDER.items():
    wanted = math.log(best * factor)
    order = min(WHOLE_ORDERS, key=lambda x: abs(math.log(x) - wanted))
    found[order] = found.get(order, 0.0) + share * delta
  return found
