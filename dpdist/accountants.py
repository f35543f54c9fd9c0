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
# epsilon by five percent, downwards too.
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
  bounds = [1.0]
  has_bound = has_renyi(merged, kind)
  if any(pair.sigma < search.NO_NOISE for pair, _ in merged):
    return 1.0
  if has_bound:
    orders, divergences = _divergences(merged)
    bounds.append(
      rdp_privacy_accountant.compute_delta(orders, divergences, epsilon)[0]
    )
  if kind == "pld" and not _is_too_long(merged):
    bounds.append(_loss(merged).get_delta_for_epsilon(epsilon))
  return float(min(x for x in bounds if not math.isnan(x)))


@functools.lru_cache(maxsize=4096)
def _epsilon(
  steps: tuple[tuple[pairs_lib.Pair, int], ...], delta: float, kind: str
) -> float:
  if not steps:
    return 0.0
  has_bound = has_renyi(steps, kind)
  if any(pair.sigma < search.NO_NOISE for pair, _ in steps):
    return math.inf
  if not has_bound:
    if delta < _SMALLEST_PLD_DELTA:
      raise ValueError(
        f"delta must be at least {_SMALLEST_PLD_DELTA:g} for truncated samples"
        f" and several examples a user, got {delta}"
      )
    if _is_too_long(steps):
      raise ValueError(
        f"num_steps must be at most {_MOST_PLD_STEPS:g} for truncated samples"
        f" and several examples a user, got {max(n for _, n in steps)}"
      )
    return float(_loss(steps).get_epsilon_for_delta(delta))
  orders, divergences = _divergences(steps)
  rdp, _ = rdp_privacy_accountant.compute_epsilon(orders, divergences, delta)
  rdp = float(rdp)
  if kind == "rdp" or rdp > _LARGEST_PLD_EPSILON or delta < _SMALLEST_PLD_DELTA:
    return rdp
  if _is_too_long(steps):
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
  """Renyi orders, and what the steps come to at each."""
  found = [(*renyi.step_divergences(pair), count) for pair, count in steps]
  total = np.sum([count * each for _, each, count in found], axis=0)
  return found[0][0], total


@functools.lru_cache(maxsize=4)
def _loss(
  steps: tuple[tuple[pairs_lib.Pair, int], ...],
) -> loss_distributions.Loss:
  orders, divergences = _divergences(
    [(_with_renyi(pair), count) for pair, count in steps]
  )
  near, _ = rdp_privacy_accountant.compute_epsilon(orders, divergences, 1e-5)
  return loss_distributions.composed(steps, float(near))


def _with_renyi(pair: pairs_lib.Pair) -> pairs_lib.Pair:
  """A pair that says about how large the losses are; no bound is made of it."""
  if pair.kind == "truncated":
    return pairs_lib.Pair("exchange", pair.sigma / 2, pair.q)
  if pair.kind == "binomial":
    q = min(1.0, pair.rows * pair.q)
    return pairs_lib.Pair("presence", pair.sigma / pair.rows, q)
  return pair


def _merged(steps: Steps) -> tuple[tuple[pairs_lib.Pair, int], ...]:
  """The same steps, each pair once and those without a step left out."""
  counts: dict[pairs_lib.Pair, int] = {}
  for pair, count in steps:
    if count:
      counts[pair] = counts.get(pair, 0) + count
  return tuple(counts.items())
