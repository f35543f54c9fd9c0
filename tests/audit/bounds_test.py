"""Lower bounds on epsilon: known numbers, and how often they are wrong.

Seeds are fixed, so that nothing here is left to chance. Over seeds, a right
bound fails one of the coverage tests with probability below 1e-6: of N
repetitions it is allowed 5 % and five standard errors more.
"""

import functools
import math

import dp_accounting
import numpy as np
import pytest
from scipy import optimize
from scipy import special
from scipy import stats

from dpdist.audit import bounds as bounds_lib

_CONFIDENCE = 0.95


def _errors(rng, mu, trials, threshold):
  scores, is_in = _game(rng, mu, trials)
  return bounds_lib.count(scores, is_in, threshold)


def _game(rng, mu, trials):
  is_in = rng.integers(0, 2, trials).astype(bool)
  return rng.normal(size=trials) + mu * is_in, is_in


def _gaussian_mu(errors):
  """Bounds mu by two error rates: Nasr et al. 2023, section 4."""
  a, b = bounds_lib.largest_rates(errors, _CONFIDENCE)
  return max(0.0, -special.ndtri(a) - special.ndtri(b))


def _gaussian_epsilon(mu, delta):
  excess = lambda epsilon: bounds_lib.gaussian_delta(mu, epsilon) - delta
  return optimize.brentq(excess, 0, 1000) if excess(0) > 0 else 0.0


def _most_failures(repetitions):
  rate = 1 - _CONFIDENCE
  return repetitions * rate + 5 * math.sqrt(repetitions * rate * (1 - rate))


# Known numbers.


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("delta", [1e-10, 1e-5, 1e-2])
def test_gaussian_delta_is_that_of_an_accountant(mu, delta):
  theirs = dp_accounting.get_epsilon_gaussian(1 / mu, delta)
  assert _gaussian_epsilon(mu, delta) == pytest.approx(
    theirs, rel=1e-6, abs=1e-9
  )


def test_rates_are_those_of_clopper_and_pearson():
  for wrong, trials in ((0, 30), (3, 200), (8, 20), (200, 200)):
    high, _ = bounds_lib.largest_rates(
      bounds_lib.Errors(wrong, trials, 1, 1), _CONFIDENCE
    )
    # One side of a two-sided interval at the same confidence.
    theirs = stats.binomtest(wrong, trials).proportion_ci(_CONFIDENCE, "exact")
    assert high == pytest.approx(theirs.high, rel=1e-9)
  # In the open: no error in n trials leaves rates up to 1 - 0.025^(1 / n).
  high = 1 - 0.025 ** (1 / 500)
  assert bounds_lib.clopper_pearson(
    bounds_lib.Errors(0, 500, 0, 500), delta=1e-3, confidence=_CONFIDENCE
  ) == pytest.approx(math.log((1 - 1e-3 - high) / high))


def test_guesses_of_one_run_without_delta_are_binomial():
  # All of r right: e^epsilon / (1 + e^epsilon) = 0.05^(1 / r).
  rate = 0.05 ** (1 / 200)
  assert bounds_lib.one_run(
    num_canaries=10**6,
    num_guesses=200,
    num_correct=200,
    delta=0.0,
    confidence=_CONFIDENCE,
  ) == pytest.approx(math.log(rate / (1 - rate)))


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("delta", [1e-4, 1e-2])
def test_p_values_of_one_run_cover_mechanisms_that_are_known(epsilon, delta):
  canaries, guesses = 600, 20
  right = 1 / (1 + math.exp(-epsilon))
  # Private for each bit: all are told at once, or each by a chance of its own;
  # else each is answered at random. Who is told a bit guesses that one.
  told = np.arange(guesses + 1)
  law = stats.binom.pmf(told, canaries, delta)
  law[-1] = stats.binom.sf(guesses - 1, canaries, delta)
  for correct in range(guesses + 1):
    p_value = bounds_lib.one_run_p_value(
      num_canaries=canaries,
      num_guesses=guesses,
      num_correct=correct,
      epsilon=epsilon,
      delta=delta,
    )
    at_once = delta + (1 - delta) * stats.binom.sf(correct - 1, guesses, right)
    assert p_value >= at_once - 1e-12
    rest = stats.binom.sf(correct - told - 1, guesses - told, right)
    assert p_value >= law @ rest - 1e-12


# How often they are wrong.


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_bounds_exceed_a_gaussian_mechanism_in_at_most_five_percent(mu):
  rng, delta, repetitions = np.random.default_rng(0), 1e-3, 1000
  truth = _gaussian_epsilon(mu, delta)
  too_high, found = np.zeros(2), np.zeros(2)
  for _ in range(repetitions):
    errors = _errors(rng, mu, 400, mu / 2)
    bounds = (
      bounds_lib.clopper_pearson(errors, delta=delta, confidence=_CONFIDENCE),
      _gaussian_epsilon(_gaussian_mu(errors), delta),
    )
    too_high += np.array(bounds) > truth
    found += np.array(bounds) / truth / repetitions
  assert np.all(too_high <= _most_failures(repetitions)), too_high
  # And are no empty words where there is something to be seen.
  if mu >= 1:
    assert found[1] > 0.5, found


def test_a_threshold_is_chosen_on_other_scores_than_it_is_used_on():
  rng, mu, delta, repetitions = np.random.default_rng(1), 2.0, 0.0, 100

  def bound(errors):
    return bounds_lib.clopper_pearson(
      errors, delta=delta, confidence=_CONFIDENCE
    )

  # Of randomised response, the largest epsilon there is with its error rates.
  rate, held_back, same = 0.15, 0, 0
  truth = math.log((1 - rate) / rate)
  for _ in range(repetitions):
    is_in = rng.integers(0, 2, 200).astype(bool)
    scores = (is_in ^ (rng.random(200) < rate)) + rng.random(200) / mu
    first = slice(0, 100), slice(100, 200)
    threshold = bounds_lib.best_threshold(
      scores[first[0]], is_in[first[0]], bound
    )
    other = bounds_lib.count(scores[first[1]], is_in[first[1]], threshold)
    held_back += bound(other) > truth
    threshold = bounds_lib.best_threshold(scores, is_in, bound)
    same += bound(bounds_lib.count(scores, is_in, threshold)) > truth
  assert held_back <= _most_failures(repetitions)
  assert held_back <= same


@pytest.mark.parametrize(("mu", "guesses"), [(0.5, 1000), (2.0, 300)])
def test_one_run_exceeds_the_truth_in_at_most_five_percent(mu, guesses):
  rng, delta, repetitions = np.random.default_rng(2), 1e-5, 1000
  truth = _gaussian_epsilon(mu, delta)

  @functools.cache
  def bound(correct):
    return bounds_lib.one_run(
      num_canaries=1000,
      num_guesses=guesses,
      num_correct=correct,
      delta=delta,
      confidence=_CONFIDENCE,
    )

  found = []
  for _ in range(repetitions):
    scores, is_in = _game(rng, mu, 1000)
    surest = np.argsort(np.abs(scores - mu / 2))[1000 - guesses :]
    correct = np.sum((scores > mu / 2)[surest] == is_in[surest])
    found.append(bound(int(correct)))
  assert np.sum(np.array(found) > truth) <= _most_failures(repetitions)
  assert np.median(found) > 0.1 * truth


# What a mechanism with a known profile cannot do.


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_a_profile_is_contradicted_where_its_mu_is(mu):
  errors = _errors(np.random.default_rng(3), mu, 2000, mu / 2)
  bound = _gaussian_mu(errors)
  assert 0.7 * mu < bound < mu

  def is_contradicted(mu):
    return bounds_lib.contradicts(
      errors,
      lambda epsilon: bounds_lib.gaussian_delta(mu, epsilon),
      confidence=_CONFIDENCE,
    )

  assert is_contradicted(0.97 * bound)
  assert not is_contradicted(bound * (1 + 1e-9))


def test_what_cannot_be_is_refused():
  with pytest.raises(ValueError, match="must rise from 0, got 6, 5 and 10"):
    bounds_lib.one_run(
      num_canaries=10, num_guesses=5, num_correct=6, delta=0, confidence=0.9
    )
  errors = bounds_lib.Errors(0, 10, 0, 10)
  for delta, confidence, message in (
    (-1e-9, 0.9, r"delta must be in \[0, 1\), got -1e-09"),
    (1.0, 0.9, r"delta must be in \[0, 1\), got 1.0"),
    (0.0, 1.0, r"confidence must be in \(0, 1\), got 1.0"),
  ):
    with pytest.raises(ValueError, match=message):
      bounds_lib.clopper_pearson(errors, delta=delta, confidence=confidence)
