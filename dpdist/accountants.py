"""The two accountants, for steps that were all fixed before the first of them.

See `dpdist.accounting`, which checks what people write; here it is taken as
checked. Imports no jax.
"""

from collections.abc import Sequence
import functools
import math

import dp_accounting
from dp_accounting.rdp import rdp_privacy_accountant
import numpy as np

from dpdist import loss_distributions
from dpdist import pairs as pairs_lib
from dpdist import renyi
from dpdist import search

# Beyond it e^-epsilon nears the smallest double, and no longer matters.
_LARGEST_PLD_EPSILON = 500.0
# Below it rounding in the convolutions, which differs by processor, moved
# epsilon by five percent, downwards too. That of many steps is more: see
# `loss_distributions.rounding`.
_SMALLEST_PLD_DELTA = 1e-12
# Beyond it what dp_accounting counts with grows until it ends in no time.
_MOST_PLD_STEPS = 10**12

# Pairs, and how often each is composed.
Steps = Sequence[tuple[pairs_lib.Pair, int]]
_Merged = tuple[tuple[pairs_lib.Pair, int], ...]


def event(steps: Steps) -> dp_accounting.DpEvent:
  """Returns the event of steps that were all fixed before the first."""
  events = [
    dp_accounting.SelfComposedDpEvent(renyi.step_event(pair), count)
    for pair, count in steps
    if count
  ]
  if not events:
    return dp_accounting.NoOpDpEvent()
  return (
    events[0] if len(events) == 1 else dp_accounting.ComposedDpEvent(events)
  )


def epsilon(steps: Steps, delta: float, kind: str) -> float:
  """Returns an upper bound on the epsilon that steps spend.

  Args:
    steps: pairs, and how often each is composed.
    delta: in (0, 1).
    kind: "pld" or "rdp".

  Raises:
    ValueError: there is no bound by that accountant.
  """
  return _epsilon(_merged(steps), delta, kind)


def delta(steps: Steps, epsilon: float, kind: str) -> float:
  """Returns an upper bound on the delta at which steps spend epsilon.

  Args:
    steps: pairs, and how often each is composed.
    epsilon: finite and at least 0.
    kind: "pld" or "rdp".

  Raises:
    ValueError: there is no bound by that accountant.
  """
  merged = _merged(steps)
  if not merged:
    return 0.0
  has_renyi(merged, kind)
  if any(pair.sigma < search.NO_NOISE for pair, _ in merged):
    return 1.0
  orders, divergences = _divergences(merged)
  # e^-r of what is smaller is 1, of which dp_accounting takes no logarithm.
  divergences = np.maximum(divergences, 2.0**-52)
  rdp, _ = rdp_privacy_accountant.compute_delta(orders, divergences, epsilon)
  bound = min(1.0, float(rdp))
  if kind == "rdp" or bound < _SMALLEST_PLD_DELTA or _is_too_long(merged):
    return bound
  pld = float(_loss(merged).get_delta_for_epsilon(epsilon))
  # What is below it is rounding, in the sum too.
  pld = max(pld, _SMALLEST_PLD_DELTA) + loss_distributions.rounding(merged)
  return pld if pld < bound else bound  # Also where PLD is not a number.


@functools.lru_cache(maxsize=4096)
def _epsilon(
  steps: tuple[tuple[pairs_lib.Pair, int], ...], delta: float, kind: str
) -> float:
  if not steps:
    return 0.0
  has_renyi(steps, kind)
  if any(pair.sigma < search.NO_NOISE for pair, _ in steps):
    return math.inf
  orders, divergences = _divergences(steps)
  rdp, _ = rdp_privacy_accountant.compute_epsilon(orders, divergences, delta)
  rdp = float(rdp)
  if kind == "rdp" or rdp > _LARGEST_PLD_EPSILON or delta < _SMALLEST_PLD_DELTA:
    return rdp
  delta -= loss_distributions.rounding(steps)
  if delta < _SMALLEST_PLD_DELTA or _is_too_long(steps):
    return rdp
  with np.errstate(over="ignore", invalid="ignore"):
    pld = float(_loss(steps).get_epsilon_for_delta(delta))
  return pld if pld < rdp else rdp  # Also where PLD is not a number.


def in_turn(steps: Steps, kind: str) -> tuple[str, ...]:
  """The accountants to search by; see `dpdist.search.calibrate`.

  Raises:
    ValueError: there is no bound by that accountant.
  """
  if has_renyi(steps, kind) and kind == "pld":
    return "rdp", "pld"
  return (kind,)


def has_renyi(steps: Steps, kind: str) -> bool:
  """Whether there is an RDP bound; raises ValueError if it is all asked for."""
  without = [pair.kind for pair, _ in steps if not pair.has_renyi]
  if without and kind == "rdp":
    what = {
      "truncated": "sampling='truncated_poisson'",
      "binomial": "examples_per_user above 1",
    }[without[0]]
    raise ValueError(f"accountant must be 'pld' with {what}, got 'rdp'")
  return not without


def _is_too_long(steps: Steps) -> bool:
  # Without sampling nothing is convolved.
  return any(count > _MOST_PLD_STEPS and pair.q < 1 for pair, count in steps)


def _divergences(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
  """Renyi orders, and a bound on what the steps come to at each."""
  found = [
    (*renyi.step_divergences(pair.with_renyi), count) for pair, count in steps
  ]
  total = np.sum([count * each for _, each, count in found], axis=0)
  return found[0][0], total


@functools.lru_cache(maxsize=4)
def _loss(
  steps: tuple[tuple[pairs_lib.Pair, int], ...],
) -> loss_distributions.Loss:
  orders, divergences = _divergences(steps)
  near, _ = rdp_privacy_accountant.compute_epsilon(orders, divergences, 1e-5)
  return loss_distributions.composed(steps, float(near))


def _merged(steps: Steps) -> tuple[tuple[pairs_lib.Pair, int], ...]:
  """The same steps, each pair once and those without a step left out."""
  counts: dict[pairs_lib.Pair, int] = {}
  for pair, count in steps:
    if count:
      counts[pair] = counts.get(pair, 0) + count
  return tuple(counts.items())
