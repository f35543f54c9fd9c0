"""The two accountants, for steps that were all fixed before the first one.

Arguments are not checked here: `dpdist.accounting.calibration` does that.
Imports no jax.
"""

from collections.abc import Sequence
import functools
import math
import sys

import dp_accounting
from dp_accounting.rdp import rdp_privacy_accountant
import numpy as np

from dpdist.accounting import pld
from dpdist.accounting import rdp as rdp_lib
from dpdist.accounting import search
from dpdist.accounting import step_events

# Above this epsilon, a grid of losses gains nothing that anyone would use.
_LARGEST_PLD_EPSILON = 1e6
# Beyond so many steps the grid is so coarse that the RDP bound may be better.
_MANY_STEPS = 10**7
# Outside these ranges the losses of a step overflow or drown in rounding.
_NOISE, _LEAST_PROBABILITY = (0.02, 1e12), 1e-15
_ROUNDING = 1e-12

# Pairs of distributions, and how often each is composed.
Steps = Sequence[tuple[step_events.Pair, int]]
_Merged = tuple[tuple[step_events.Pair, int], ...]


def event(steps: Steps) -> dp_accounting.DpEvent:
  """Returns dp_accounting's event for steps fixed before the first one."""
  events = [
    dp_accounting.SelfComposedDpEvent(rdp_lib.step_event(pair), count)
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
    kind: "pld", "rdp", or "rough": a quick, loose bound for a first look.

  Raises:
    ValueError: that accountant has no bound for these steps.
  """
  return _epsilon(_merged(steps), delta, kind)


def delta(steps: Steps, epsilon: float, kind: str) -> float:
  """Returns an upper bound on the delta at which steps spend epsilon.

  Args:
    steps: pairs, and how often each is composed.
    epsilon: finite and at least 0.
    kind: "pld" or "rdp".

  Raises:
    ValueError: that accountant has no bound for these steps.
  """
  merged = _merged(steps)
  if not merged:
    return 0.0
  has_renyi(merged, kind)
  if any(pair.sigma < search.NO_NOISE for pair, _ in merged):
    return 1.0
  most = _total_variation(merged)
  if kind == "pld" and _has_grid(merged):
    return min(most, pld.delta(merged, epsilon))
  orders, divergences = _divergences(merged)
  # For a smaller r, e^-r is 1, of which dp_accounting takes no logarithm.
  divergences = np.maximum(divergences, 2.0**-52)
  rdp, _ = rdp_privacy_accountant.compute_delta(orders, divergences, epsilon)
  return min(most, max(float(rdp), sys.float_info.min))  # Never 0.


@functools.lru_cache(maxsize=4096)
def _epsilon(steps: _Merged, delta: float, kind: str) -> float:
  if not steps:
    return 0.0
  has_renyi(steps, kind)
  if any(pair.sigma < search.NO_NOISE for pair, _ in steps):
    return math.inf
  if _total_variation(steps) <= delta:
    return 0.0
  is_pld = kind != "rdp" and _has_grid(steps)
  if is_pld and delta >= pld.SMALLEST_DELTA:
    found = pld.rough_epsilon(steps, delta)
    if kind == "rough" or found > _LARGEST_PLD_EPSILON:
      return found
    found = pld.epsilon(steps, delta)
    if sum(count for _, count in steps) < _MANY_STEPS:
      return found
  else:
    found = math.inf
  orders, divergences = _divergences(steps)
  rdp, _ = rdp_privacy_accountant.compute_epsilon(orders, divergences, delta)
  return min(found, float(rdp))


def in_turn(steps: Steps, kind: str) -> tuple[str, ...]:
  """Returns the kinds of epsilon that `search.calibrate` asks for, in order.

  Raises:
    ValueError: that accountant has no bound for these steps.
  """
  has_renyi(steps, kind)
  return ("rough", "pld") if kind == "pld" else (kind,)


def has_renyi(steps: Steps, kind: str) -> bool:
  """Returns whether RDP has a bound; raises ValueError if `kind` needs it."""
  without = [pair.kind for pair, _ in steps if not pair.has_renyi]
  if without and kind == "rdp":
    what = {
      "truncated": "sampling='truncated_poisson'",
      "binomial": "examples_per_user above 1",
    }[without[0]]
    raise ValueError(f"accountant must be 'pld' with {what}, got 'rdp'")
  return not without


def _total_variation(steps: Steps) -> float:
  """Bounds delta at every epsilon by adding up the steps' distances.

  The two data sets differ in a step only where the row is drawn. They are then
  no easier to tell apart than two Gaussians as far apart as a row can move the
  sum, or twice as far where a sample is cut or a row is replaced.
  """
  found = 0.0
  for pair, count in steps:
    reach = 2 if pair.kind in ("opposite", "truncated") else 1
    apart = math.erf(reach / (2 * math.sqrt(2) * pair.sigma))
    found += count * pair.rows * pair.q * apart
  return min(1.0, found * (1 + _ROUNDING))


def _has_grid(steps: Steps) -> bool:
  """Returns whether a grid can hold the losses; if not, RDP is used."""
  return all(
    (pair.q == 1 and pair.kind != "truncated")  # Nothing is convolved.
    or (
      count <= pld.MOST_STEPS
      and pair.q >= _LEAST_PROBABILITY
      and _NOISE[0] * pair.rows <= pair.sigma <= _NOISE[1]
    )
    for pair, count in steps
  )


def _divergences(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
  """Returns Renyi orders, and a bound on the steps' divergence at each."""
  found = [
    (*rdp_lib.step_divergences(pair.with_renyi), count) for pair, count in steps
  ]
  total = np.sum([count * each for _, each, count in found], axis=0)
  return found[0][0], total


def _merged(steps: Steps) -> _Merged:
  """Returns the same steps with each pair once, without pairs of no step."""
  counts: dict[step_events.Pair, int] = {}
  for pair, count in steps:
    if count:
      counts[pair] = counts.get(pair, 0) + count
  return tuple(counts.items())
