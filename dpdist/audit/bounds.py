"""Lower bounds on epsilon from what was observed.

An audit plays a game: a unit, the canary, is or is not in the data, and someone
who sees what was released says which. Whoever wins more often than (epsilon,
delta)-differential privacy allows has shown that it does not hold. Each bound
here is above the true epsilon with a probability of at most 1 - confidence,
over the trials.

Knows nothing of mechanisms and imports no jax.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import numpy as np
from scipy import special

# Beyond it no number of trials that anyone runs could show a difference.
_LARGEST_EPSILON = 64.0
# Places at which a privacy profile is looked at, and thresholds that are tried.
_NUM_PLACES = 20
_NUM_THRESHOLDS = 64


class Errors(NamedTuple):
  """How often someone was wrong, in independent trials.

  Attributes:
    false_positives: canaries that were out, and said to be in.
    num_out: canaries that were out.
    false_negatives: canaries that were in, and said to be out.
    num_in: canaries that were in.
  """

  false_positives: int
  num_out: int
  false_negatives: int
  num_in: int


def count(scores: np.ndarray, is_in: np.ndarray, threshold: float) -> Errors:
  """Errors of saying that a canary is in where its score is above a threshold.

  Args:
    scores: [n] float; larger where "in" is likelier.
    is_in: [n] bool.
    threshold: must not depend on these scores.
  """
  says_in = scores > threshold
  return Errors(
    false_positives=int(np.sum(says_in & ~is_in)),
    num_out=int(np.sum(~is_in)),
    false_negatives=int(np.sum(~says_in & is_in)),
    num_in=int(np.sum(is_in)),
  )


def largest_rates(errors: Errors, confidence: float) -> tuple[float, float]:
  """Upper bounds on both error rates that hold together.

  Of Clopper & Pearson 1934, one-sided, each at half of 1 - confidence.

  Returns:
    Of false positives, and of false negatives; 1 without a trial.
  """
  _check_confidence(confidence)
  level = 1 - (1 - confidence) / 2
  return (
    _largest_rate(errors.false_positives, errors.num_out, level),
    _largest_rate(errors.false_negatives, errors.num_in, level),
  )


def _largest_rate(count: int, trials: int, level: float) -> float:
  if not 0 <= count <= trials:
    raise ValueError(f"errors must be in [0, {trials}], got {count}")
  if count == trials:
    return 1.0
  return float(special.betaincinv(count + 1, trials - count, level))


def clopper_pearson(
  errors: Errors, *, delta: float, confidence: float
) -> float:
  """Epsilon from two error rates alone, whatever the mechanism.

  Kairouz, Oh & Viswanath 2015 (arXiv:1311.0776): with error rates a and b, 1 -
  delta <= b + e^epsilon a, and the same with a and b exchanged. At best about
  the logarithm of the number of trials.

  Args:
    errors: of independent trials.
    delta: in [0, 1).
    confidence: in (0, 1), as 0.95.
  """
  _check_delta(delta)
  rates = largest_rates(errors, confidence)
  return max(
    0.0,
    *(
      math.log((1 - delta - b) / a) if 1 - delta - b > 0 else 0.0
      for a, b in (rates, rates[::-1])
    ),
  )


def gaussian_mu(errors: Errors, *, confidence: float) -> float:
  """The mu of Gaussian differential privacy from two error rates.

  Under mu-GDP (Dong, Roth & Su 2022, arXiv:1905.02383, definition 3) b >=
  Phi(Phi^-1(1 - a) - mu), and so mu >= Phi^-1(1 - a) - Phi^-1(b) (Nasr et al.
  2023, arXiv:2302.07956, section 4). At least 0.
  """
  a, b = largest_rates(errors, confidence)
  if a >= 1 or b >= 1:
    return 0.0
  return max(0.0, float(-special.ndtri(a) - special.ndtri(b)))


def gaussian_delta(mu: float, epsilon: float) -> float:
  """The delta of mu-GDP at epsilon; Dong, Roth & Su 2022, corollary 1."""
  if mu <= 0:
    return 0.0
  # In logarithms, since e^epsilon overflows where the other factor underflows.
  second = epsilon + special.log_ndtr(-epsilon / mu - mu / 2)
  return float(special.ndtr(-epsilon / mu + mu / 2) - math.exp(second))


def gaussian_epsilon(mu: float, delta: float) -> float:
  """The epsilon of mu-GDP at delta in (0, 1); the same with the two
  exchanged."""
  _check_delta(delta, above=0)
  if gaussian_delta(mu, 0.0) <= delta:
    return 0.0
  low, high = 0.0, 1.0
  while gaussian_delta(mu, high) > delta:
    low, high = high, 2 * high
  return _bisect(lambda epsilon: gaussian_delta(mu, epsilon) > delta, low, high)


def contradicts(
  errors: Errors, profile: Callable[[float], float], *, confidence: float
) -> bool:
  """Whether errors are too few for a mechanism with a privacy profile.

  It must be (epsilon, profile(epsilon))-private at every epsilon, and so its
  error rates at or above all those lines: the dual of its trade-off function
  (Dong, Roth & Su 2022, proposition 6). What the lines between those looked at
  would say is left out, which can only let errors pass.

  Args:
    errors: of independent trials.
    profile: from epsilon >= 0 to a delta, an upper bound.
    confidence: with which it is not said of a mechanism that has the profile.
  """
  rates = largest_rates(errors, confidence)
  if max(rates) >= 1:
    return False
  # With the two exchanged the lines are lower, and say less.
  furthest = math.log(max(1.0, (1 - max(rates)) / min(rates)))
  for epsilon in np.linspace(furthest, 0.0, _NUM_PLACES):
    least = 1 - max(rates) - math.exp(epsilon) * min(rates)
    if least > 0 and profile(float(epsilon)) < least:
      return True
  return False


def best_threshold(
  scores: np.ndarray,
  is_in: np.ndarray,
  bound: Callable[[Errors], float],
) -> float:
  """The threshold at which a bound is largest; not for the same scores."""
  places = np.quantile(
    scores, np.linspace(0, 1, _NUM_THRESHOLDS), method="lower"
  )
  tried = np.unique(places)
  bounds = [bound(count(scores, is_in, threshold)) for threshold in tried]
  return float(tried[int(np.argmax(bounds))])


def one_run_p_value(
  *,
  num_canaries: int,
  num_guesses: int,
  num_correct: int,
  epsilon: float,
  delta: float,
) -> float:
  """How likely so many right guesses are under (epsilon, delta)-DP, at most.

  The main theorem of Steinke, Nasr & Jagielski 2023 (arXiv:2305.08846) for
  approximate differential privacy: with F(v) the probability that a Binomial(r,
  e^epsilon / (1 + e^epsilon)) is at least v, the chance of v right guesses
  among r is at most F(v) + 2 m delta max over i of (F(v - i) - F(v)) / i.

  Args:
    num_canaries: m, each included by a fair coin of its own.
    num_guesses: r, said to be in or out; of the others nothing is said.
    num_correct: v, those that were right.
    epsilon: at least 0.
    delta: in [0, 1).

  Raises:
    ValueError: the counts do not fit.
  """
  if not 0 <= num_correct <= num_guesses <= num_canaries:
    raise ValueError(
      "num_correct, num_guesses and num_canaries must rise from 0, got"
      f" {num_correct}, {num_guesses} and {num_canaries}"
    )
  _check_delta(delta)
  rate = 1 / (1 + math.exp(-epsilon))
  tail, steepest = 1.0, 0.0
  if num_correct:
    # F(v - i) for i from 0; F(0) = 1, and further ones only divide by more.
    places = np.arange(num_correct, 0, -1)
    above = special.betainc(places, num_guesses - places + 1, rate)
    above = np.append(above, 1.0)
    tail = float(above[0])
    rises = (above[1:] - tail) / np.arange(1, num_correct + 1)
    steepest = float(np.max(rises))
  return min(1.0, tail + 2 * num_canaries * delta * steepest)


def one_run(
  *,
  num_canaries: int,
  num_guesses: int,
  num_correct: int,
  delta: float,
  confidence: float,
) -> float:
  """Epsilon from the guesses about the canaries of a single run.

  The canaries may depend on one another in every way but their coins. See
  `one_run_p_value`, which says what the arguments are.
  """
  _check_confidence(confidence)

  def is_refuted(epsilon: float) -> bool:
    value = one_run_p_value(
      num_canaries=num_canaries,
      num_guesses=num_guesses,
      num_correct=num_correct,
      epsilon=epsilon,
      delta=delta,
    )
    return value <= 1 - confidence

  if not is_refuted(0.0):
    return 0.0
  return _bisect(is_refuted, 0.0, _LARGEST_EPSILON)


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
  """Where a condition that holds at first ends, from below."""
  for _ in range(50):
    middle = (low + high) / 2
    if holds(middle):
      low = middle
    else:
      high = middle
  return low


def _check_confidence(confidence: float) -> None:
  if not 0 < confidence < 1:
    raise ValueError(f"confidence must be in (0, 1), got {confidence}")


def _check_delta(delta: float, above: float | None = None) -> None:
  if not 0 <= delta < 1 or delta == above:
    start = "[" if above is None else "("
    raise ValueError(f"delta must be in {start}0, 1), got {delta}")
