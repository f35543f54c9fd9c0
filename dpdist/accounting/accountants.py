"""The two accountants, for steps that were all fixed before the first one.

Arguments are not checked here: `dpdist.accounting.calibration` does that.
Imports no jax.
"""

import functools
import math
import sys

import dp_accounting
from dp_accounting.rdp import rdp_privacy_accountant
import numpy as np

from dpdist import errors
from dpdist.accounting import pld
from dpdist.accounting import step_events

# Above this epsilon, a grid of losses gains nothing that anyone would use.
_LARGEST_PLD_EPSILON = 1e6
# Beyond so many steps the grid is so coarse that the RDP bound may be better.
_MANY_STEPS = 10**7
_ROUNDING = 1e-12

Steps = step_events.Steps
_Merged = tuple[tuple[step_events.StepEvent, int], ...]


def event(steps: Steps) -> dp_accounting.DpEvent:
  """Returns dp_accounting's event for steps fixed before the first one."""
  events = [
    dp_accounting.SelfComposedDpEvent(event.dp_event(), count)
    for event, count in steps
    if count
  ]
  if not events:
    return dp_accounting.NoOpDpEvent()
  return (
    events[0] if len(events) == 1 else dp_accounting.ComposedDpEvent(events)
  )


def epsilon(steps: Steps, delta: float, kind: str) -> float:
  """Returns an upper bound on the epsilon that steps spend.

  The kind may be "rough" too: a quick, loose bound for a first look.
  """
  return _epsilon(_merged(steps), delta, kind)


def delta(steps: Steps, epsilon: float, kind: str) -> float:
  """Returns an upper bound on the delta at which steps spend epsilon."""
  merged = _merged(steps)
  if not merged:
    return 0.0
  _check_kind(merged, kind)
  if not all(event.is_noisy for event, _ in merged):
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
  _check_kind(steps, kind)
  if not all(event.is_noisy for event, _ in steps):
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
  """Returns the kinds of epsilon that `search.calibrate` asks for, in order."""
  _check_kind(steps, kind)
  return ("rough", "pld") if kind == "pld" else (kind,)


def _check_kind(steps: Steps, kind: str) -> None:
  """Raises ValueError where RDP is asked for and too loose to be offered."""
  loose = [event.loose_rdp for event, _ in steps if event.loose_rdp]
  if loose and kind == "rdp":
    raise errors.ArgumentError(
      f"accountant must be 'pld' with {loose[0]}, got 'rdp'"
    )


def _total_variation(steps: Steps) -> float:
  """Bounds delta at every epsilon by adding up the steps' distances."""
  distance = 0.0
  for event, count in steps:
    distance += event.total_variation(count)
  return min(1.0, distance * (1 + _ROUNDING))


def _has_grid(steps: Steps) -> bool:
  """Returns whether a grid can hold the losses; if not, RDP is used."""
  return all(event.has_grid(count) for event, count in steps)


def _divergences(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
  """Returns Renyi orders, and a bound on the steps' divergence at each."""
  bounds = [(*event.rdp(), count) for event, count in steps]
  total = np.sum([count * each for _, each, count in bounds], axis=0)
  return bounds[0][0], total


def _merged(steps: Steps) -> _Merged:
  """Returns the same steps with each event once, without those of no step."""
  counts: dict[step_events.StepEvent, int] = {}
  for event, count in steps:
    if count:
      counts[event] = counts.get(event, 0) + count
  return tuple(counts.items())
