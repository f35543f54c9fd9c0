"""Computes what a run of DP-SGD spends, and settings that spend a budget.

Every function here is about `num_steps` noisy sums of clipped gradients. By
default each example is drawn at each step with `sampling_probability`,
independently of the others (Poisson sampling). The noise's standard deviation
is `noise_multiplier` times the l2 sensitivity. Two data sets are neighbours
when one has exactly one example more than the other.

Further keyword arguments choose another way of sampling, another neighboring
relation, several examples a user, or groups that are clipped as one:
`sampling`, `noise`, `clipping`, `neighboring_relation`, `num_examples`,
`truncated_batch_size`, `cycle_length`, `examples_per_user`, `group_size`. They
are described at `dpdist.accounting.step_events.Numbers`. `sampling`, `noise`
and `clipping` must have a proof together, see `dpdist.accounting.proofs`.

There are two accountants:

* `"rdp"` composes Renyi divergences (see `dpdist.accounting.rdp`) and converts
  them with Proposition 12 of Canonne, Kamath & Steinke 2020 (arXiv:2004.00010).
  It is not offered for truncated samples or several examples a user, where it
  is loose.
* `"pld"` convolves privacy loss distributions (see
  `dpdist.accounting.pld`), is the tighter of the two, and takes tenths of a
  second. Where it has no bound - more than 10^11 steps, or a delta below 1e-250
  - it returns the RDP bound, which is as valid.

This module never imports jax, so that a budget can be read without it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dpdist import _validation
from dpdist import errors
from dpdist.accounting import accountants
from dpdist.accounting import proofs as proofs
from dpdist.accounting import search
from dpdist.accounting import step_events

_MOST_STEPS = 10**9
_LARGEST_WHOLE = 2**1000  # Larger ones are too large for a float.


def epsilon(
  *,
  noise_multiplier: float,
  sampling_probability: float,
  num_steps: int,
  delta: float,
  accountant: str = "pld",
  **settings: Any,
) -> float:
  """Returns an upper bound on the epsilon that a run spends at `delta`.

  Args:
    noise_multiplier: noise standard deviation over l2 sensitivity, at least 0.
    sampling_probability: probability of each example at each step, in (0, 1].
    num_steps: number of noisy updates, at least 0.
    delta: in (0, 1).
    accountant: "pld" or "rdp".
    **settings: see `dpdist.accounting.step_events.Numbers`.

  Returns:
    Epsilon, at least 0: 0.0 for no step at all, infinity for steps without
    noise.

  Raises:
    ValueError: if an argument is out of its range, or that accountant has no
      bound for these settings.
  """
  return accountants.epsilon(
    _steps(noise_multiplier, sampling_probability, num_steps, settings),
    _check("delta", delta),
    _check("accountant", accountant),
  )


def delta(
  *,
  epsilon: float,
  noise_multiplier: float,
  sampling_probability: float,
  num_steps: int,
  accountant: str = "pld",
  **settings: Any,
) -> float:
  """Returns an upper bound on the delta at which a run spends `epsilon`.

  Args:
    epsilon: finite and at least 0.
    noise_multiplier: noise standard deviation over l2 sensitivity, at least 0.
    sampling_probability: probability of each example at each step, in (0, 1].
    num_steps: number of noisy updates, at least 0.
    accountant: "pld" or "rdp".
    **settings: see `dpdist.accounting.step_events.Numbers`.

  Returns:
    Delta, in [0, 1].

  Raises:
    ValueError: if an argument is out of its range, or that accountant has no
      bound for these settings.
  """
  steps = _steps(noise_multiplier, sampling_probability, num_steps, settings)
  kind = _check("accountant", accountant)
  return accountants.delta(steps, _check("epsilon", epsilon), kind)


def calibrate_noise_multiplier(
  *,
  target_epsilon: float,
  delta: float,
  sampling_probability: float,
  num_steps: int,
  accountant: str = "pld",
  **settings: Any,
) -> float:
  """Returns the least noise multiplier that spends at most `target_epsilon`.

  Args:
    target_epsilon: the budget, above 0.
    delta: in (0, 1).
    sampling_probability: probability of each example at each step, in (0, 1].
    num_steps: number of noisy updates, at least 0.
    accountant: "pld" or "rdp".
    **settings: see `dpdist.accounting.step_events.Numbers`.

  Returns:
    The smallest number of six significant digits for which `epsilon` is at most
    `target_epsilon`; 0.0 if there is no step. It has six digits so that two
    machines whose arithmetic differs in the last bits return the same number.

  Raises:
    ValueError: if an argument is out of its range, or no amount of noise is
      enough.
  """
  target = _check("target_epsilon", target_epsilon)
  q = _check("sampling_probability", sampling_probability)
  count = _check("num_steps", num_steps)
  delta = _check("delta", delta)
  accountant = _check("accountant", accountant)
  _steps(1.0, q, count, settings)  # Raises for settings of no mechanism.
  if count == 0:
    return 0.0
  return least_noise_multiplier(
    lambda sigma: _steps(sigma, q, count, settings),
    target_epsilon=target,
    delta=delta,
    accountant=accountant,
  )


def least_noise_multiplier(
  steps: Callable[[float], accountants.Steps],
  *,
  target_epsilon: float,
  delta: float,
  accountant: str,
) -> float:
  """Calibrates noise for steps that differ, a function of the multiplier."""

  def spent(n: int, kind: str) -> float:
    return accountants.epsilon(steps(search.six_digits(-n)), delta, kind)

  index = search.calibrate(
    search.NOISE_MULTIPLIERS,
    spent,
    target_epsilon,
    accountants.in_turn(steps(1.0), accountant),
    slope=1.0,
  )
  if index is None:
    raise errors.ArgumentError(
      "target_epsilon must be within reach of noise_multiplier="
      f"{search.MOST_NOISE:g}, got {target_epsilon} for delta={delta}"
    )
  return search.six_digits(-index)


def calibrate_num_steps(
  *,
  target_epsilon: float,
  delta: float,
  noise_multiplier: float,
  sampling_probability: float,
  accountant: str = "pld",
  **settings: Any,
) -> int:
  """Returns the largest number of steps that spends at most `target_epsilon`.

  Args:
    target_epsilon: the budget, above 0.
    delta: in (0, 1).
    noise_multiplier: noise standard deviation over l2 sensitivity, at least 0.
    sampling_probability: probability of each example at each step, in (0, 1].
    accountant: "pld" or "rdp".
    **settings: see `dpdist.accounting.step_events.Numbers`.

  Raises:
    ValueError: if an argument is out of its range, if a single step already
      overspends, or if more than 10^9 steps would fit.
  """
  target = _check("target_epsilon", target_epsilon)
  sigma = _check("noise_multiplier", noise_multiplier)
  q = _check("sampling_probability", sampling_probability)
  delta = _check("delta", delta)
  accountant = _check("accountant", accountant)

  def spent(count: int, kind: str) -> float:
    return accountants.epsilon(_steps(sigma, q, count, settings), delta, kind)

  grid = search.Grid(1, _MOST_STEPS + 1)
  count = search.calibrate(
    grid,
    spent,
    target,
    accountants.in_turn(_steps(sigma, q, 1, settings), accountant),
    slope=0.5,
  )
  if count is None:
    least = spent(1, accountant)
    raise errors.ArgumentError(
      f"target_epsilon must be at least {least:.6g}, which one step spends at "
      f"noise_multiplier={noise_multiplier}, got {target_epsilon}"
    )
  if count > _MOST_STEPS:
    raise errors.ArgumentError(
      f"target_epsilon must be small enough to be spent in {_MOST_STEPS} "
      f"steps at noise_multiplier={noise_multiplier}, got {target_epsilon}"
    )
  return count


def calibrate_batch_size(
  *,
  target_epsilon: float,
  delta: float,
  noise_multiplier: float,
  num_steps: int,
  num_examples: int,
  accountant: str = "pld",
  **settings: Any,
) -> int:
  """Returns the largest expected batch that spends at most `target_epsilon`.

  Args:
    target_epsilon: the budget, above 0.
    delta: in (0, 1).
    noise_multiplier: noise standard deviation over l2 sensitivity, at least 0.
    num_steps: number of noisy updates, at least 0.
    num_examples: size of the training set, at least 1.
    accountant: "pld" or "rdp".
    **settings: see `dpdist.accounting.step_events.Numbers`; without
      `num_examples`.

  Returns:
    An integer in [1, num_examples]; the sampling probability is that integer
    over `num_examples` (times `cycle_length`).

  Raises:
    ValueError: if an argument is out of its range, or an expected batch of one
      example already overspends.
  """
  target = _check("target_epsilon", target_epsilon)
  sigma = _check("noise_multiplier", noise_multiplier)
  count = _check("num_steps", num_steps)
  size = _check("num_examples", num_examples)
  delta = _check("delta", delta)
  accountant = _check("accountant", accountant)

  # A neighbour has one row more or one less.
  relation = settings.get("neighboring_relation", "add_or_remove_one")
  may_grow = relation == "add_or_remove_one"
  settings |= {"num_examples": size + may_grow, "may_grow": may_grow}
  in_turn = accountants.in_turn(_steps(sigma, 1.0, 1, settings), accountant)
  turns = settings.get("cycle_length", 1)
  if turns > size:
    raise errors.ArgumentError(
      f"cycle_length must be at most num_examples={size}, got {turns}"
    )

  def spent(batch: int, kind: str) -> float:
    steps = _steps(sigma, min(1.0, batch * turns / size), count, settings)
    return accountants.epsilon(steps, delta, kind)

  batch = search.calibrate(
    search.Grid(1, size // turns),
    spent,
    target,
    in_turn,
    slope=1.0,
  )
  if batch is None:
    least = spent(1, accountant)
    raise errors.ArgumentError(
      f"target_epsilon must be at least {least:.6g}, which an expected batch "
      f"of 1 spends at noise_multiplier={noise_multiplier}, "
      f"got {target_epsilon}"
    )
  return batch


def _steps(
  noise_multiplier: float,
  sampling_probability: float,
  num_steps: int,
  settings: Mapping[str, Any],
) -> step_events.Steps:
  """Returns what the accountants compose."""
  names = ("sampling", "noise", "clipping")
  mechanism = {name: settings[name] for name in names if name in settings}
  phase = step_events.Phase(
    0,
    _check("noise_multiplier", noise_multiplier),
    _check("sampling_probability", sampling_probability),
  )
  numbers = step_events.Numbers(
    phases=(phase,),
    num_steps=_check("num_steps", num_steps),
    **{k: v for k, v in settings.items() if k not in names},
  )
  return step_events.steps(numbers, **mechanism)


_RULES = {
  "noise_multiplier": _validation.real(at_least=0, at_most=search.MOST_NOISE),
  "sampling_probability": _validation.PROBABILITY,
  "num_steps": _validation.integer(0, _LARGEST_WHOLE),
  "num_examples": _validation.COUNT,
  "delta": _validation.DELTA,
  "epsilon": _validation.real(at_least=0),
  "target_epsilon": _validation.POSITIVE,
  "accountant": _validation.one_of(("pld", "rdp")),
}


def _check(name: str, value: Any) -> Any:
  """Returns the value as a plain float, int or str."""
  return _validation.check(name, value, _RULES[name])
