"""Lower bounds on epsilon from observed guesses.

In an audit a unit, the canary, is or is not in the data, and an attacker who
sees the releases guesses which. An attacker who is right more often than
(epsilon, delta)-differential privacy allows has shown that it does not hold.
Each bound here is above the true epsilon with a probability of at most 1 -
confidence, over the trials.

Independent of mechanisms; imports no jax.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import numpy as np
from scipy import special

from dpdist import _validation

CONFIDENCE = _validation.real(above=0, below=1)
_DELTA = _validation.real(at_least=0, below=1)
# Beyond it, no feasible number of trials could show a difference.
_LARGEST_EPSILON = 64.0
# The number of places at which a privacy profile is evaluated, and of
# thresholds that are tried.
_NUM_PLACES = 20
_NUM_THRESHOLDS = 64


class Errors(NamedTuple):
  """Numbers of wrong guesses, in independent trials."""

  false_positives: int  # Canaries that were out, and guessed to be in.
  num_out: int  # Canaries that were out.
  false_negatives: int  # Canaries that were in, and guessed to be out.
  num_in: int  # Canaries that were in.


def count(scores: np.ndarray, is_in: np.ndarray, threshold: float) -> Errors:
  """Counts errors of guessing "in" where a score is above a threshold.

  Scores are larger where "in" is likelier; the threshold must not depend on
  them.
  """
  says_in = scores > threshold
  return Errors(
    false_positives=int(np.sum(says_in & ~is_in)),
    num_out=int(np.sum(~is_in)),
    false_negatives=int(np.sum(~says_in & is_in)),
    num_in=int(np.sum(is_in)),
  )


def largest_rates(errors: Errors, confidence: float) -> tuple[float, float]:
  """Returns upper bounds on both error rates that hold together.

  They are those of Clopper & Pearson 1934, one-sided, each at half of 1 -
  confidence: for false positives, and for false negatives; 1 without a trial.
  """
  _validation.check("confidence", confidence, CONFIDENCE)
  level = 1 - (1 - confidence) / 2
  return (
    _largest_rate(errors.false_positives, errors.num_out, level),
    _largest_rate(errors.false_negatives, errors.num_in, level),
  )


def _largest_rate(count: int, trials: int, level: float) -> float:
  _validation.check("errors", count, _validation.integer(0, trials))
  if count == trials:
    return 1.0
  return float(special.betaincinv(count + 1, trials - count, level))


def clopper_pearson(
  errors: Errors, *, delta: float, confidence: float
) -> float:
  """Bounds epsilon by two error rates alone, whatever the mechanism.

  Kairouz, Oh & Viswanath 2015 (arXiv:1311.0776): with error rates a and b of
  independent trials, 1 - delta <= b + e^epsilon a, and the same with a and b
  exchanged. The bound is at best about the logarithm of the number of trials.
  """
  _validation.check("delta", delta, _DELTA)
  rates = largest_rates(errors, confidence)
  return max(
    0.0,
    *(
      math.log((1 - delta - b) / a) if 1 - delta - b > 0 else 0.0
      for a, b in (rates, rates[::-1])
    ),
  )


def gaussian_delta(mu: float, epsilon: float) -> float:
  """Returns mu-GDP's delta at epsilon; Dong, Roth & Su 2022, corollary 1."""
  if mu <= 0:
    return 0.0
  # In logarithms, since e^epsilon overflows where the other factor underflows.
  second = epsilon + special.log_ndtr(-epsilon / mu - mu / 2)
  return float(special.ndtr(-epsilon / mu + mu / 2) - math.exp(second))


def contradicts(
  errors: Errors, profile: Callable[[float], float], *, confidence: float
) -> bool:
  """Returns whether errors are too few for a mechanism with a privacy profile.

  Such a mechanism is (epsilon, profile(epsilon))-private at every epsilon >= 0,
  so its error rates in independent trials lie on or above all those lines: the
  dual of its trade-off function (Dong, Roth & Su 2022, proposition 6). Only
  some of the lines are checked, which can only let errors pass. A profile maps
  epsilon to an upper bound on delta. If the mechanism has it, the answer is no
  with at least the probability `confidence`.
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
  """Returns the threshold that maximizes a bound; use it on other scores."""
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
  """Bounds the chance of so many right guesses under (epsilon, delta)-DP.

  By the main theorem of Steinke, Nasr & Jagielski 2023 (arXiv:2305.08846) for
  approximate differential privacy: with F(v) the probability that a Binomial(r,
  e^epsilon / (1 + e^epsilon)) is at least v, the chance of v right guesses
  among r is at most F(v) + 2 m delta max over i of (F(v - i) - F(v)) / i.

  Here m is num_canaries, each included by a fair coin of its own; r is
  num_guesses, canaries guessed to be in or out, while nothing is guessed about
  the others; and v is num_correct.
  """
  if not 0 <= num_correct <= num_guesses <= num_canaries:
    raise ValueError(
      "num_correct, num_guesses and num_canaries must rise from 0, got"
      f" {num_correct}, {num_guesses} and {num_canaries}"
    )
  _validation.check("delta", delta, _DELTA)
  rate = 1 / (1 + math.exp(-epsilon))
  tail, steepest = 1.0, 0.0
  if num_correct:
    # F(v - i) for i from 0. F(0) = 1, and further terms only divide by more.
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
  """Bounds epsilon by the guesses of `one_run_p_value`, with a confidence."""
  _validation.check("confidence", confidence, CONFIDENCE)

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


def _bisect(
  predicate: Callable[[float], bool], low: float, high: float
) -> float:
  """Returns where a condition that holds at first ends, from below."""
  for _ in range(50):
    middle = (low + high) / 2
    if predicate(middle):
      low = middle
    else:
      high = middle
  return low
