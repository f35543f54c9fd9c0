"""Renyi divergences of a step of DP-SGD, and what they come to.

Those of "presence" are of the sampled Gaussian mechanism (Mironov, Talwar &
Zhang 2019, arXiv:1908.10530), those of "exchange" are bounded as for samples
without replacement (Wang, Balle & Kasiviswanathan 2019, arXiv:1808.00087,
Theorem 27); for other pairs there is no bound here. Arguments are taken as
checked; see `dpdist.accounting` and `dpdist.pairs`.

Imports no jax.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import logging
import math

import dp_accounting
from dp_accounting.rdp import rdp_privacy_accountant
import numpy as np

from dpdist import pairs as pairs_lib
from dpdist import search

# At whole orders a step's divergence is a finite sum, whatever its numbers.
WHOLE_ORDERS = (*range(2, 64), 128, 256, 512, 1024)


def step_event(pair: pairs_lib.Pair) -> dp_accounting.DpEvent:
  """One step as dp_accounting's accountants understand it.

  An "exchange" is meant for one under REPLACE_ONE that takes the noise to be in
  units of the exchange, as its RDP accountant does; its PLD accountant takes it
  in units of half of that.
  """
  event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(pair.sigma)
  if pair.kind == "truncated":
    return dp_accounting.TruncatedSubsampledGaussianDpEvent(
      pair.num_examples, pair.q, pair.limit, pair.sigma
    )
  if pair.kind == "binomial":
    rows = range(pair.rows + 1)
    weights = [
      math.comb(pair.rows, k) * pair.q**k * (1 - pair.q) ** (pair.rows - k)
      for k in rows
    ]
    return dp_accounting.MixtureOfGaussiansDpEvent(
      pair.sigma, [float(k) for k in rows], weights
    )
  if pair.q == 1.0:
    return event
  if pair.kind == "exchange":
    return dp_accounting.SampledWithoutReplacementDpEvent(1, pair.q, event)
  return dp_accounting.PoissonSampledDpEvent(pair.q, event)


@functools.lru_cache(maxsize=1024)
def step_divergences(pair: pairs_lib.Pair) -> tuple[np.ndarray, np.ndarray]:
  """Returns the Renyi orders and one step's divergence at each, float64.

  The pair has a Renyi bound.
  """
  relation = (
    dp_accounting.NeighboringRelation.REPLACE_ONE
    if pair.kind == "exchange"
    else dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
  )
  accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
  with _no_word_of_orders_left_out():
    accountant.compose(step_event(pair))
  orders = accountant.orders
  # Rounding leaves divergences near 1e-16 at zero or below, which would count
  # as no loss at all. What a mean shift of q alone costs is the true limit
  # there, and below the computed values everywhere else.
  divergences = np.maximum(
    accountant.rdp, orders * (pair.q / pair.sigma) ** 2 / 2
  )
  for array in (orders, divergences):
    array.setflags(write=False)  # Shared by every later query.
  return orders, divergences


def divergence(pair: pairs_lib.Pair, num_steps: int, order: int) -> float:
  """Returns the divergence of steps at one of `WHOLE_ORDERS`.

  At an order that was fixed beforehand those of parts that were chosen one
  after the other add up; see `dpdist.composition`.
  """
  if num_steps == 0:
    return 0.0
  if pair.sigma < search.NO_NOISE:
    return math.inf
  orders, divergences = step_divergences(pair)
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


def best_order(
  steps: Sequence[tuple[pairs_lib.Pair, int]], delta: float
) -> int:
  """Returns the one of `WHOLE_ORDERS` at which steps spend the least."""
  return min(
    WHOLE_ORDERS,
    key=lambda order: epsilon_at(
      order,
      math.fsum(divergence(pair, count, order) for pair, count in steps),
      delta,
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
