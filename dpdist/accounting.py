"""What a run of DP-SGD spends, and the settings that spend a given budget.

Every function here is about one mechanism: `num_steps` times, each of the
examples is drawn with `sampling_probability`, apart from the others (Poisson
sampling), and Gaussian noise whose standard deviation is `noise_multiplier`
times the l2 sensitivity is added to the sum of the clipped gradients. Two data
sets are neighbours when one has exactly one example more than the other.

Two accountants are offered, both of them dp_accounting's:

* `"rdp"` composes Renyi divergences (Mironov, Talwar & Zhang 2019,
  arXiv:1908.10530) and converts them with Proposition 12 of Canonne, Kamath &
  Steinke 2020 (arXiv:2004.00010). A query takes tens of milliseconds, and a
  tenth of one at another number of steps.
* `"pld"` convolves privacy loss distributions (Koskela, Jalko & Honkela 2020,
  arXiv:1906.03049), discretised pessimistically by connecting the dots
  (Doroshenko et al. 2022, arXiv:2207.04380). It is the tighter of the two, and
  a query takes tenths of a second. Where the grid is too coarse to be the
  tighter bound - delta of 1e-15 or less, or epsilon beyond 500 - it answers
  with the RDP bound, which is as valid.

This module never imports jax, so that a budget can be read without it.
"""

from collections.abc import Callable
import functools
import math
import numbers
from typing import Any

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import rdp_privacy_accountant
import numpy as np

from dpdist import renyi
from dpdist import search

_MOST_STEPS = 10**9

# Beyond it e^-epsilon nears the smallest double, and no longer matters.
_LARGEST_PLD_EPSILON = 500.0
# Below it rounding in the convolutions, which differs by processor, moved
# epsilon by five percent, downwards too.
_SMALLEST_PLD_DELTA = 1e-12
# More steps than this are composed in two stages, because the bound that sizes
# the convolution grows with the steps where their square root would do.
_LONG_RUN = 10**5
_TAIL_MASS = 1e-15


def training_event(
  *, noise_multiplier: float, sampling_probability: float, num_steps: int
) -> dp_accounting.DpEvent:
  """Returns the event that dp_accounting's own accountants understand.

  Args:
    noise_multiplier: noise standard deviation over l2 sensitivity, at least 0.
    sampling_probability: of each example at each step, in (0, 1].
    num_steps: number of noisy updates, at least 0.

  Returns:
    A `NoOpDpEvent` for no step at all, otherwise a `SelfComposedDpEvent` of a
    (Poisson sampled, unless the probability is 1) `GaussianDpEvent`.

  Raises:
    ValueError: if an argument is out of its range.
  """
  sigma = _check("noise_multiplier", noise_multiplier)
  q = _check("sampling_probability", sampling_probability)
  count = _check("num_steps", num_steps)
  if count == 0:
    return dp_accounting.NoOpDpEvent()
  return dp_accounting.SelfComposedDpEvent(renyi.step_event(sigma, q), count)


def epsilon(
  *,
  noise_multiplier: float,
  sampling_probability: float,
  num_steps: int,
  delta: float,
  accountant: str = "pld",
) -> float:
  """Returns an upper bound on the epsilon that a run spends at `delta`.

  Args:
    noise_multiplier: noise standard deviation over l2 sensitivity, at least 0.
    sampling_probability: of each example at each step, in (0, 1].
    num_steps: number of noisy updates, at least 0.
    delta: in (0, 1).
    accountant: "pld" or "rdp".

  Returns:
    Epsilon, at least 0: 0.0 for no step at all, infinity for steps without
    noise.

  Raises:
    ValueError: if an argument is out of its range.
  """
  return _epsilon(
    _check("noise_multiplier", noise_multiplier),
    _check("sampling_probability", sampling_probability),
    _check("num_steps", num_steps),
    _check("delta", delta),
    _check("accountant", accountant),
  )


def calibrate_noise_multiplier(
  *,
  target_epsilon: float,
  delta: float,
  sampling_probability: float,
  num_steps: int,
  accountant: str = "pld",
) -> float:
  """Returns the least noise multiplier that spends at most `target_epsilon`.

  Args:
    target_epsilon: the budget, above 0.
    delta: as in `epsilon`, and so are the others.
    sampling_probability: in (0, 1].
    num_steps: at least 0.
    accountant: "pld" or "rdp".

  Returns:
    The smallest number of six significant digits for which `epsilon` is at most
    `target_epsilon`, so that the last bits of one machine's arithmetic do not
    change it on another. 0.0 if there is no step.

  Raises:
    ValueError: if an argument is out of its range, or no noise is enough.
  """
  target = _check("target_epsilon", target_epsilon)
  q = _check("sampling_probability", sampling_probability)
  count = _check("num_steps", num_steps)
  delta = _check("delta", delta)
  accountant = _check("accountant", accountant)
  if count == 0:
    return 0.0

  spent = lambda n, kind: _epsilon(search.six_digits(-n), q, count, delta, kind)
  index = search.calibrate(
    search.NOISE_MULTIPLIERS, spent, target, accountant, slope=1.0
  )
  if index is None:
    raise ValueError(
      f"target_epsilon must be within reach of noise_multiplier="
      f"{search.MOST_NOISE:g}, got {target_epsilon} for num_steps={num_steps}, "
      f"delta={delta}"
    )
  return search.six_digits(-index)


def calibrate_num_steps(
  *,
  target_epsilon: float,
  delta: float,
  noise_multiplier: float,
  sampling_probability: float,
  accountant: str = "pld",
) -> int:
  """Returns the largest number of steps that spends at most `target_epsilon`.

  Args:
    target_epsilon: the budget, above 0.
    delta: as in `epsilon`, and so are the others.
    noise_multiplier: at least 0.
    sampling_probability: in (0, 1].
    accountant: "pld" or "rdp".

  Raises:
    ValueError: if an argument is out of its range, if a single step already
      overspends, or if more than 10^9 steps would fit.
  """
  target = _check("target_epsilon", target_epsilon)
  sigma = _check("noise_multiplier", noise_multiplier)
  q = _check("sampling_probability", sampling_probability)
  delta = _check("delta", delta)
  accountant = _check("accountant", accountant)

  spent = lambda count, kind: _epsilon(sigma, q, count, delta, kind)
  grid = search.Grid(1, _MOST_STEPS + 1)
  count = search.calibrate(grid, spent, target, accountant, slope=0.5)
  if count is None:
    least = _epsilon(sigma, q, 1, delta, accountant)
    raise ValueError(
      f"target_epsilon must be at least {least:.6g}, which one step spends at "
      f"noise_multiplier={noise_multiplier}, got {target_epsilon}"
    )
  if count > _MOST_STEPS:
    raise ValueError(
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
) -> int:
  """Returns the largest expected batch that spends at most `target_epsilon`.

  Args:
    target_epsilon: the budget, above 0.
    delta: as in `epsilon`, and so are the others.
    noise_multiplier: at least 0.
    num_steps: at least 0.
    num_examples: size of the training set, at least 1.
    accountant: "pld" or "rdp".

  Returns:
    An integer in [1, num_examples]; the sampling probability is that integer
    over `num_examples`.

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

  spent = lambda batch, kind: _epsilon(sigma, batch / size, count, delta, kind)
  batch = search.calibrate(
    search.Grid(1, size), spent, target, accountant, slope=1.0
  )
  if batch is None:
    least = _epsilon(sigma, 1 / size, count, delta, accountant)
    raise ValueError(
      f"target_epsilon must be at least {least:.6g}, which an expected batch "
      f"of 1 spends at noise_multiplier={noise_multiplier}, "
      f"got {target_epsilon}"
    )
  return batch


# --- The two accountants ------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _epsilon(
  sigma: float, q: float, count: int, delta: float, kind: str
) -> float:
  if count == 0:
    return 0.0
  if sigma < search.NO_NOISE:
    return math.inf
  orders, divergences = renyi.step_divergences(sigma, q)
  rdp, _ = rdp_privacy_accountant.compute_epsilon(
    orders, count * divergences, delta
  )
  rdp = float(rdp)
  if kind == "rdp" or rdp > _LARGEST_PLD_EPSILON or delta < _SMALLEST_PLD_DELTA:
    return rdp
  pld = float(_pld_epsilon(sigma, q, count, delta, rdp))
  return pld if pld < rdp else rdp  # Also where PLD is not a number.


def _pld_epsilon(
  sigma: float, q: float, count: int, delta: float, rdp: float
) -> float:
  if q == 1.0:  # Gaussians compose exactly, with no convolution.
    sigma, count = sigma / math.sqrt(count), 1
  # With many steps, rounding can make a total mass above 1 overflow; the NaN
  # that follows is the caller's to replace.
  with np.errstate(over="ignore", invalid="ignore"):
    step = _step_pld(sigma, q, _grid_interval(sigma, q, rdp))
    if count <= _LONG_RUN:
      return step.self_compose(count, _TAIL_MASS).get_epsilon_for_delta(delta)
    inner = math.isqrt(count)
    outer, rest = divmod(count, inner)
    # Each of the outer copies brings its own truncated tail.
    loss = step.self_compose(inner, _TAIL_MASS / outer).self_compose(outer)
    if rest:
      loss = loss.compose(step.self_compose(rest))
    return loss.get_epsilon_for_delta(delta)


@functools.lru_cache(maxsize=8)
def _step_pld(
  sigma: float, q: float, interval: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
  return privacy_loss_distribution.from_gaussian_mechanism(
    sigma, value_discretization_interval=interval, sampling_prob=q
  )


def _grid_interval(sigma: float, q: float, rdp: float) -> float:
  """Returns the spacing of the grid of privacy losses.

  Rounding a loss to a grid of spacing h adds about h^2 / 6 to its variance,
  which is about (q / sigma)^2 or more, and epsilon grows as the root of the
  variance. A fortieth of q / sigma therefore costs about one part in twenty
  thousand, whatever the number of steps; 1e-4 alone costs ten at q=.001.
  Coarser grids are as valid. They are used where a finer one would lose mass
  to rounding (1e-5) or would not fit: a step's losses in 200,000 points, a
  run's in a few million.
  """
  exponent = 0.5 / sigma**2 + 10 / sigma  # The loss ten deviations out.
  largest_loss = float(np.logaddexp(0.0, exponent + math.log(q)))
  return max(min(1e-4, q / sigma / 40), 1e-5, largest_loss / 200_000, rdp / 1e6)


# --- Arguments ----------------------------------------------------------------

_REAL, _WHOLE = (float, numbers.Real), (int, numbers.Integral)

# What an argument is turned into and from, what holds of it, and how to say so.
# Nothing holds of NaN.
_RULES: dict[str, tuple[tuple[Any, Any], Callable[[Any], bool], str]] = {
  "noise_multiplier": (_REAL, lambda x: 0 <= x < math.inf, "finite and >= 0"),
  "sampling_probability": (_REAL, lambda x: 0 < x <= 1, "in (0, 1]"),
  "num_steps": (_WHOLE, lambda x: x >= 0, "an integer >= 0"),
  "num_examples": (_WHOLE, lambda x: x >= 1, "an integer >= 1"),
  "delta": (_REAL, lambda x: 0 < x < 1, "in (0, 1)"),
  "target_epsilon": (_REAL, lambda x: 0 < x < math.inf, "finite and > 0"),
  "accountant": ((str, str), lambda x: x in ("pld", "rdp"), "'pld' or 'rdp'"),
}


def _check(name: str, value: Any) -> Any:
  """Returns the value as a plain float, int or str."""
  (plain, kind), holds, right = _RULES[name]
  if isinstance(value, kind) and not isinstance(value, bool):
    checked = plain(value)
    if holds(checked):
      return checked
  raise ValueError(f"{name} must be {right}, got {value!r}")
