"""The two accountants, for steps that were all fixed before the first of them.

See `dpdist.accounting.calibration`, which checks what people write; here it is
taken as checked. Imports no jax.
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

# Beyond it a grid of losses gains nothing that anyone would use.
_LARGEST_PLD_EPSILON = 1e6
# Beyond so many steps the grid has become so coarse that either may be better.
_MANY_STEPS = 10**7
# Beyond these the losses of a step overflow, or are all but rounding.
_NOISE, _LEAST_PROBABILITY = (0.02, 1e12), 1e-15
_ROUNDING = 1e-12

# Pairs, and how often each is composed.
Steps = Sequence[tuple[step_events.Pair, int]]
_Merged = tuple[tuple[step_events.Pair, int], ...]


def event(steps: Steps) -> dp_accounting.DpEvent:
  """Returns the event of steps that were all fixed before the first."""
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
    kind: "pld" or "rdp"; "rough" is quick, and good for a first look.

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
  most = _total_variation(merged)
  if kind == "pld" and _has_grid(merged):
    return min(most, pld.delta(merged, epsilon))
  orders, divergences = _divergences(merged)
  # e^-r of what is smaller is 1, of which dp_accounting takes no logarithm.
  divergences = np.maximum(divergences, 2.0**-52)
  rdp, _ = rdp_privacy_accountant.compute_delta(orders, divergences, epsilon)
  return min(most, max(float(rdp), sys.float_info.min))  # None is 0.


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
  """The kinds of epsilon to search by; see
  `dpdist.accounting.search.calibrate`.

  Raises:
    ValueError: there is no bound by that accountant.
  """
  has_renyi(steps, kind)
  return ("rough", "pld") if kind == "pld" else (kind,)


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


def _total_variation(steps: Steps) -> float:
  """An upper bound on delta at every epsilon: distances of steps add up.

  A step is told apart only where a row is drawn, and then no better than two
  Gaussians: as far apart as a row can move the sum, or where a sample is cut or
  a row is another one, twice that.
  """
  found = 0.0
  for pair, count in steps:
    reach = 2 if pair.kind in ("opposite", "truncated") else 1
    apart = math.erf(reach / (2 * math.sqrt(2) * pair.sigma))
    found += count * pair.rows * pair.q * apart
  return min(1.0, found * (1 + _ROUNDING))


def _has_grid(steps: Steps) -> bool:
  """Whether losses are within a grid's reach: else the other bound is used."""
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
  """Renyi orders, and a bound on what the steps come to at each."""
  found = [
    (*rdp_lib.step_divergences(pair.with_renyi), count) for pair, count in steps
  ]
  total = np.sum([count * each for _, each, count in found], axis=0)
  return found[0][0], total


def _merged(steps: Steps) -> _Merged:
  """The same steps, each pair once and those without a step left out."""
  counts: dict[step_events.Pair, int] = {}
  for pair, count in steps:
    if count:
      counts[pair] = counts.get(pair, 0) + count
  return tuple(counts.items())
