"""Attacks the step that runs, and bounds epsilon from below.

`dpdist.audit.canaries` runs the step on canaries, and `dpdist.audit.bounds`
derives the bounds. A canary is scored by the likelihood ratio of its
observations, which is the best that an attacker can do.

The result is about keys that are thrown away, and about no data: an audit
spends no budget.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from dpdist import _validation
from dpdist.accounting import accountants
from dpdist.accounting import gaussian_events
from dpdist.audit import bounds as bounds_lib
from dpdist.audit import canaries
from dpdist.audit import games
from dpdist.privacy import plan as plan_lib

_TRIALS = 4000
# The least and the most multiple of the plan's noise that is tried, and into
# how many parts a doubling is divided, as a power of 2.
_SCALES = (1 / 4, 16.0)
_HALVINGS = 5


class Result(NamedTuple):
  """The result of an audit."""

  mode: str  # "worst_case" or "one_run".
  epsilon_claimed: float  # The plan's epsilon after so many steps.
  delta: float  # Of both epsilons.
  # By name, lower bounds on epsilon; with the confidence all of them hold
  # together, if the assumptions do.
  bounds: dict[str, float]
  confidence: float
  num_steps: int  # Of each run.
  num_runs: int
  num_canaries: int  # In each run.
  sampling_probability: float  # Of a canary, at step 0.
  assumed: list[str]  # The assumptions, as lines to show with the bounds.
  scores: np.ndarray  # [n] float64, larger where a canary is likelier to be in.
  is_in: np.ndarray  # [n] bool.

  @property
  def epsilon_lower_bound(self) -> float:
    """Returns the largest of the bounds."""
    return max(self.bounds.values())

  @property
  def is_refuted(self) -> bool:
    """Returns whether the claim cannot hold, with the confidence."""
    return self.epsilon_lower_bound > self.epsilon_claimed

  def facts(self) -> dict[str, Any]:
    """Returns all but the scores, JSON-able, with the conclusion."""
    facts = self._asdict()
    del facts["scores"], facts["is_in"]
    facts["epsilon_lower_bound"] = self.epsilon_lower_bound
    facts["verdict"] = (
      "the claim is wrong: more was shown than it allows"
      if self.is_refuted
      else "nothing was shown against the claim"
    )
    return facts


def audit(
  program: canaries.Program,
  *,
  mode: str = "worst_case",
  num_trials: int = 0,
  canaries_per_run: int = 0,
  num_steps: int = 0,
  confidence: float = 0.95,
  seed: int | None = None,
) -> Result:
  """Audits a step.

  Args:
    program: from `dpdist.audit.canaries.prepare`.
    mode: "worst_case": independent trials; or "one_run": one run for all
      canaries, and a bound that holds however they depend on one another
      (Steinke, Nasr & Jagielski 2023, arXiv:2305.08846).
    num_trials: canaries in all; in "worst_case" rounded up, so that all runs
      have the same number. 0: 4,000; in "one_run" no more than a run can take.
    canaries_per_run: canaries in one run, in "worst_case"; 0: as many as
      allowed. With 1, each canary has a run of its own.
    num_steps: of each run; 0: the plan's.
    confidence: in (0, 1).
    seed: fixes all randomness, for tests; None: nothing is fixed.
  """
  # Canaries see sums of gradients alone, and no private statistics: what those
  # cost would hide as much of a fault.
  plan = dataclasses.replace(program.plan, statistics_noise_multiplier=0.0)
  num_steps = num_steps or plan.num_steps
  most = min(plan.num_units, program.num_entries)
  if program.direction is not None:
    most = 1
  if mode == "one_run":
    num_trials = num_trials or min(most, _TRIALS)
    canaries_per_run = num_trials
  else:
    num_trials = num_trials or _TRIALS
    canaries_per_run = canaries_per_run or min(most, num_trials)
  _check(plan, mode, num_trials, canaries_per_run, num_steps, most, confidence)
  num_runs = -(-num_trials // canaries_per_run)
  observed = canaries.observe(
    program,
    num_runs=num_runs,
    num_canaries=canaries_per_run,
    num_steps=num_steps,
    seed=seed,
  )
  scores = log_likelihood_ratios(plan, observed.sums)
  bound = {"worst_case": _worst_case, "one_run": _one_run}[mode]
  bounds = bound(plan, num_steps, scores, observed.is_in, confidence)
  return Result(
    mode=mode,
    epsilon_claimed=plan.curve([plan.delta], num_steps)[0],
    delta=plan.delta,
    bounds=bounds,
    confidence=confidence,
    num_steps=num_steps,
    num_runs=num_runs,
    num_canaries=canaries_per_run,
    sampling_probability=plan.sampling_probability,
    assumed=_assumed(mode, canaries_per_run),
    scores=scores,
    is_in=observed.is_in,
  )


def _check(
  plan: plan_lib.PrivacyPlan,
  mode: str,
  num_trials: int,
  canaries_per_run: int,
  num_steps: int,
  most: int,
  confidence: float,
) -> None:
  _validation.check("mode", mode, _validation.one_of(games.MODES))
  _validation.check("num_trials", num_trials, _validation.integer(2))
  _validation.require(
    1 <= canaries_per_run <= most,
    "num_trials" if mode == "one_run" else "canaries_per_run",
    f"at most {most}, the least of units, entries of the parameters, and 1 with"
    " canary='example', and at least 1",
    canaries_per_run,
  )
  steps = _validation.integer(1, plan.num_steps)
  _validation.check("num_steps", num_steps, steps)
  _validation.check("confidence", confidence, bounds_lib.CONFIDENCE)


def _assumed(mode: str, canaries_per_run: int) -> list[str]:
  lines = [
    "the attacker chooses the other units' gradients and the parameters, and"
    " sees every release",
    "of the secret, which is thrown away, nothing but its releases is seen",
  ]
  if mode == "worst_case":
    lines.append(
      "trade_off: the mechanism is the plan's, but for the scale of its noise"
    )
    if canaries_per_run > 1:
      lines.append("the noise of different parameters is independent")
  return lines


# The scores.


def log_likelihood_ratios(
  plan: plan_lib.PrivacyPlan, sums: np.ndarray
) -> np.ndarray:
  """Returns how much likelier a canary's observations are if it is in.

  This is the most powerful test of a mechanism that follows the plan. `sums`
  are those of `dpdist.audit.canaries.Observed`. Returns logarithms, [n]
  float64, infinite where an observation is not a number.
  """
  total = np.zeros(len(sums))
  for seen, (sigma, q) in zip(sums.T, _steps(plan, sums.shape[1]), strict=True):
    out, into = (
      np.logaddexp(
        np.log1p(-q) if q < 1 else -np.inf,
        np.log(q) + (seen**2 - (seen - place) ** 2) / (2 * sigma**2),
      )
      for place in canaries.worlds(plan)
    )
    total += into - out
  return np.where(np.isnan(total), np.inf, total)


def _steps(
  plan: plan_lib.PrivacyPlan, num_steps: int
) -> Iterator[tuple[float, float]]:
  """Yields each step's noise, in sensitivities, and chance to draw a canary."""
  for t in range(num_steps):
    phase = plan.phase(t)
    # If parts take turns, the test does not distinguish a canary's own steps.
    yield phase.noise_multiplier, plan.probability(phase) / plan.cycle_length


# The bounds.


def _worst_case(
  plan: plan_lib.PrivacyPlan,
  num_steps: int,
  scores: np.ndarray,
  is_in: np.ndarray,
  confidence: float,
) -> dict[str, float]:
  # Two bounds that hold together.
  confidence = 1 - (1 - confidence) / 2

  def by_rates(errors: bounds_lib.Errors) -> float:
    return bounds_lib.clopper_pearson(
      errors, delta=plan.delta, confidence=confidence
    )

  half = len(scores) // 2
  threshold = bounds_lib.best_threshold(scores[:half], is_in[:half], by_rates)
  held_back = bounds_lib.count(scores[half:], is_in[half:], threshold)
  # The threshold where both cases are equally likely: chosen before any
  # observation.
  errors = bounds_lib.count(scores, is_in, 0.0)
  return {
    "clopper_pearson": by_rates(held_back),
    "trade_off": trade_off(plan, num_steps, errors, confidence),
  }


def trade_off(
  plan: plan_lib.PrivacyPlan,
  num_steps: int,
  errors: bounds_lib.Errors,
  confidence: float,
) -> float:
  """Returns epsilon of the plan with the least noise that errors contradict.

  If every unit takes part in every step, that plan is mu-GDP; otherwise it is
  the composition of the plan's own pairs (Nasr et al. 2023, arXiv:2302.07956,
  section 5). The result is above the plan's own epsilon only if the plan's
  noise is contradicted; then it says what that much less noise would spend,
  whatever the actual fault is.

  It is epsilon at the plan's delta; at most that of a quarter of its noise, and
  0 if not even 16 times its noise is contradicted.
  """

  def is_contradicted(scale: float) -> bool:
    profile = _profile(_scaled(plan, scale), num_steps)
    return bounds_lib.contradicts(errors, profile, confidence=confidence)

  scale = 1.0  # At the end, the smallest that is known to be contradicted.
  if is_contradicted(scale):
    while scale > _SCALES[0] and is_contradicted(scale / 2):
      scale /= 2
  else:
    scale *= 2
    while not is_contradicted(scale):
      if scale >= _SCALES[1]:
        return 0.0
      scale *= 2
  if scale > _SCALES[0]:
    for halving in range(1, _HALVINGS + 1):
      less = scale / 2 ** (0.5**halving)
      if is_contradicted(less):
        scale = less
  return _scaled(plan, scale).curve([plan.delta], num_steps)[0]


def _profile(
  plan: plan_lib.PrivacyPlan, num_steps: int
) -> Callable[[float], float]:
  """Returns a function from epsilon to the plan's delta after so many steps."""
  steps = plan.steps(num_steps)
  plain = [
    (event.sigma, count)
    for event, count in steps
    if isinstance(event, gaussian_events.AddRemove) and event.q == 1
  ]
  if len(plain) == len(steps):
    # Gaussians that are not mixed compose to one (Dong, Roth & Su 2022,
    # corollary 2).
    mu = math.sqrt(sum(count / sigma**2 for sigma, count in plain))
    return lambda epsilon: bounds_lib.gaussian_delta(mu, epsilon)
  return lambda epsilon: accountants.delta(steps, epsilon, plan.accountant)


def _scaled(plan: plan_lib.PrivacyPlan, scale: float) -> plan_lib.PrivacyPlan:
  """Returns the plan with its noise multiplied by scale."""
  return dataclasses.replace(
    plan,
    noise_multiplier=scale * plan.noise_multiplier,
    noise_schedule=tuple((t, scale * x) for t, x in plan.noise_schedule),
  )


def _one_run(
  plan: plan_lib.PrivacyPlan,
  num_steps: int,
  scores: np.ndarray,
  is_in: np.ndarray,
  confidence: float,
) -> dict[str, float]:
  num_guesses = _num_guesses(plan, num_steps, len(scores), confidence)
  return {
    "one_run": _bound_of_guesses(plan, scores, is_in, num_guesses, confidence)
  }


def _bound_of_guesses(
  plan: plan_lib.PrivacyPlan,
  scores: np.ndarray,
  is_in: np.ndarray,
  num_guesses: int,
  confidence: float,
) -> float:
  surest = np.argsort(np.abs(scores), kind="stable")[
    len(scores) - num_guesses :
  ]
  return bounds_lib.one_run(
    num_canaries=len(scores),
    num_guesses=num_guesses,
    num_correct=int(np.sum((scores > 0)[surest] == is_in[surest])),
    delta=plan.delta,
    confidence=confidence,
  )


def _num_guesses(
  plan: plan_lib.PrivacyPlan,
  num_steps: int,
  num_canaries: int,
  confidence: float,
) -> int:
  """Returns the best number of guesses against a mechanism like the plan.

  It is found on simulated scores, and does not depend on the observed ones.
  """
  rng = np.random.default_rng(0)
  is_in = rng.integers(0, 2, num_canaries).astype(bool)
  sums = np.zeros((num_canaries, num_steps))
  place = np.where(is_in, *canaries.worlds(plan)[::-1])
  for t, (sigma, q) in enumerate(_steps(plan, num_steps)):
    drawn = rng.random(num_canaries) < q
    sums[:, t] = place * drawn + sigma * rng.normal(size=num_canaries)
  scores = log_likelihood_ratios(plan, sums)
  tried = np.unique(np.geomspace(1, num_canaries, 24).astype(int))
  bounds = [
    _bound_of_guesses(plan, scores, is_in, int(k), confidence) for k in tried
  ]
  return int(tried[int(np.argmax(bounds))])
