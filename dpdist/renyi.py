"""Renyi divergences of a step of DP-SGD, and what they come to.

One step draws each example with a probability, apart from the others, and adds
Gaussian noise to a sum of sensitivity 1 (Mironov, Talwar & Zhang 2019,
arXiv:1908.10530). Arguments are taken as checked; see `dpdist.accounting`.

Imports no jax.
"""

from collections.abc import Iterator
import contextlib
import functools
import logging
import math

import dp_accounting
from dp_accounting.rdp import rdp_privacy_accountant
import numpy as np

from dpdist import search

# At whole orders a step's divergence is a finite sum, whatever its numbers.
WHOLE_ORDERS = (*range(2, 64), 128, 256, 512, 1024)


def step_event(sigma: float, q: float) -> dp_accounting.DpEvent:
  """One step as dp_accounting's accountants understand it."""
  event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(sigma)
  return event if q == 1.0 else dp_accounting.PoissonSampledDpEvent(q, event)


@functools.lru_cache(maxsize=1024)
def step_divergences(sigma: float, q: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns the Renyi orders and one step's divergence at each, float64."""
  accountant = dp_accounting.rdp.RdpAccountant()
  with _no_word_of_orders_left_out():
    accountant.compose(step_event(sigma, q))
  orders = accountant.orders
  # Rounding leaves divergences near 1e-16 at zero or below, which would count
  # as no loss at all. What a mean shift of q alone costs is the true limit
  # there, and below the computed values everywhere else.
  divergences = np.maximum(accountant.rdp, orders * (q / sigma) ** 2 / 2)
  for array in (orders, divergences):
    array.setflags(write=False)  # Shared by every later query.
  return orders, divergences


def divergence(sigma: float, q: float, num_steps: int, order: int) -> float:
  """Returns the divergence of steps at one of `WHOLE_ORDERS`.

  At an order that was fixed beforehand those of parts that were chosen one
  after the other add up; see `dpdist.composition`.
  """
  if num_steps == 0:
    return 0.0
  if sigma < search.NO_NOISE:
    return math.inf
  orders, divergences = step_divergences(sigma, q)
  return num_steps * float(divergences[orders == order][0])


def epsilon_at(order: int, divergence: float, delta: float) -> float:
  """Returns the epsilon that a divergence at one order comes to.

  By Proposition 12 of Canonne, Kamath & Steinke 2020 (arXiv:2004.00010).
  """
  spent, _ = rdp_privacy_accountant.compute_epsilon(
    [order], [divergence], delta
  )
  return float(spent)


def largest_divergence(order: int, epsilon: float, delta: float) -> float:
  """Returns the divergence for which `epsilon_at` gives epsilon.

  Not above 0 if the order alone costs more.
  """
  return (
    epsilon
    - math.log1p(-1 / order)
    + (math.log(delta) + math.log(order)) / (order - 1)
  )


def best_order(sigma: float, q: float, num_steps: int, delta: float) -> int:
  """Returns the one of `WHOLE_ORDERS` at which steps spend the least."""
  return min(
    WHOLE_ORDERS,
    key=lambda order: epsilon_at(
      order, divergence(sigma, q, num_steps, order), delta
    ),
  )


@contextlib.contextmanager
def _no_word_of_orders_left_out() -> Iterator[None]:
  """Keeps dp_accounting from logging each order whose series did not converge.

  Such an order is left out of the minimum over orders, which loses tightness
  at most, and a search would log it hundreds of times.
  """
  logger = logging.getLogger("absl")
  keep = lambda record: "failed to converge" not in str(record.msg)
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)
