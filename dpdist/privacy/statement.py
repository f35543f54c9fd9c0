"""States in plain words what a plan guarantees, and when.

A statement names the unit of privacy, the neighboring relation, how steps
sample, their total epsilon, and what the guarantee assumes.

Imports no jax.
"""

import decimal
import math

from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rules

_MANY = 6  # The most settings of a schedule that are listed.


def of_plan(plan: plan_lib.PrivacyPlan) -> str:
  """Returns the statement of all steps of a plan."""
  drawn = rules.sampling_of(plan).describe(plan)
  return (
    f"{unit(plan)} {drawn} Gradients are clipped to l2 norm"
    f" {plan.l2_clip_norm}, and {_noise(plan)}{_parts(plan)}"
    f"{statistics(plan, ' Before that, ', '.')}"
    f" All {plan.num_steps:,} steps together are (epsilon, delta)-"
    f"differentially private with epsilon = {rounded_up(plan.epsilon())} and"
    f" delta = {plan.delta:g}, by the {plan.accountant.upper()} accountant."
    f" {assumptions(plan)} "
    "It does not cover choices made by looking at the data, such as trying "
    "several settings and keeping the best."
  )


def unit(plan: plan_lib.PrivacyPlan) -> str:
  """States who or what is protected, and from what."""
  relation = {
    "add_or_remove_one": "whether any one of them was there",
    "replace_one": "any one of them from any other in its place",
    "zero_out": "any one of them from one that contributes nothing",
  }[plan.neighboring_relation]
  what, count = plan.unit, f"{plan.num_examples:,}"
  if plan.examples_per_user > 1:
    what = f"whoever has at most {plan.examples_per_user}"
    one = f"{what} of the {count} rows in the training set"
  else:
    one = f"one {what} of the {count} in the training set"
  return (
    f"The unit of privacy is {one}: whoever sees everything that training"
    f" releases can hardly tell {relation} (neighboring relation"
    f" {plan.neighboring_relation})."
  )


def assumptions(plan: plan_lib.PrivacyPlan) -> str:
  """States what the guarantee assumes."""
  whose = {
    "example": "nobody's data is in more than"
    + (
      f" {plan.examples_per_user} examples"
      if plan.examples_per_user > 1
      else " one example"
    ),
    "user": "all that is anyone's is one user's, and nobody else's",
  }[plan.unit]
  return (
    f"This holds if {whose}, if the draws and the noise stay secret, and if"
    " nothing else that was computed from the data is released."
  )


def stopped_early(reading: str) -> str:
  """Explains why a run that stops early has the epsilon of the whole plan."""
  return (
    "The run has not come to its plan's end. Its odometer reads epsilon ="
    f" {reading}, which is no guarantee: whoever stops a run may have looked at"
    " what it released, and then only the epsilon of the whole plan holds."
  )


def rounded_up(epsilon: float, decimals: int | None = None) -> str:
  """Returns an epsilon rounded up, as text; None: four significant digits."""
  if decimals is not None and math.isfinite(epsilon):
    # Round the shortest text of the float, so that 0.001 stays 0.001.
    exact = decimal.Decimal(repr(float(epsilon)))
    last = decimal.Decimal(1).scaleb(-decimals)
    return str(exact.quantize(last, decimal.ROUND_CEILING))
  if epsilon == 0 or math.isinf(epsilon):
    return f"{epsilon:g}"
  unit = 10.0 ** (math.floor(math.log10(epsilon)) - 3)
  return f"{math.ceil(epsilon / unit) * unit:.4g}"


def sampling(plan: plan_lib.PrivacyPlan) -> str:
  """Says how steps sample, in a word or two."""
  return rules.sampling_of(plan).summary(plan)


def statistics(plan: plan_lib.PrivacyPlan, before: str, after: str) -> str:
  """States what else a plan releases, between two texts; "" if nothing."""
  sigma = plan.statistics_noise_multiplier
  if not sigma:
    return ""
  return (
    f"{before}statistics of the training data are released once, with Gaussian"
    f" noise of {sigma:g} times their l2 sensitivity, which epsilon covers"
    f"{after}"
  )


def _parts(plan: plan_lib.PrivacyPlan) -> str:
  """Names the noise and the clipping, unless both are the usual ones."""
  if plan.noise == "gaussian" and plan.clipping == "fixed":
    return ""
  return (
    f" Noise is drawn by {plan.noise!r} {dict(plan.noise_options)}, and"
    f" gradients are clipped by {plan.clipping!r}"
    f" {dict(plan.clipping_options)}; epsilon is by their proof."
  )


def _noise(plan: plan_lib.PrivacyPlan) -> str:
  if not plan.noise_schedule:
    return (
      f"Gaussian noise of {plan.noise_multiplier} times the l2 sensitivity is"
      " added to their sum."
    )
  changes = plan.noise_schedule
  listed = ", ".join(f"{x:g} from step {start:,}" for start, x in changes)
  if len(changes) > _MANY:
    listed = f"and then {len(changes)} other numbers of times"
  return (
    f"Gaussian noise of {plan.noise_multiplier} times the l2 sensitivity,"
    f" {listed}, is added to their sum. The schedule was fixed before the first"
    " step."
  )
