"""What parts of a run with different numbers spend together.

A run whose settings change goes on with another plan, and may have been given
it by someone who had looked at what was released before. Not every accountant
may be asked then:

* Parts whose steps are the same mechanism (the same noise multiplier and
  sampling probability, whatever is clipped where) are together as many steps
  of it. Each of them is dominated by the same pair of distributions, whatever
  was released before, and dominating pairs compose adaptively (Zhu, Dong & Wang
  2022, arXiv:2106.08567, Theorem 10). Both accountants hold.
* Otherwise only Renyi divergences at one order that was fixed beforehand add
  up, by the filter of Feldman & Zrnic 2021 (arXiv:2008.11193, section 4).
  Composing privacy loss distributions, or taking the best of several orders
  afterwards, holds for numbers that were chosen beforehand alone; for curves of
  trade-offs, which these distributions are another form of, Dong et al. 2026
  (arXiv:2602.06756) give counterexamples. The order taken here is the best one
  for the first part's plan.

A filter bounds a procedure by a sum that was fixed before looking. What is
computed here is the sum on the way that was taken; the procedure is bounded by
the largest sum, at that order, that the run was planned for at any time. Who
raises the target after a look has the guarantee of the raised one.

Imports no jax.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from dpdist import accounting
from dpdist import plan as plan_lib
from dpdist import renyi
from dpdist import search


def valid_accountants(parts: Sequence[plan_lib.Part]) -> tuple[str, ...]:
  """Those that hold for parts chosen one after the other."""
  return ("pld", "rdp") if len(_mechanisms(parts)) <= 1 else ("rdp",)


def accountant_of(parts: Sequence[plan_lib.Part]) -> str:
  """The last part's accountant if it is valid for all of them, else "rdp"."""
  wanted = parts[-1].plan.accountant
  return wanted if wanted in valid_accountants(parts) else "rdp"


def epsilons(parts: Sequence[plan_lib.Part]) -> dict[str, float | None]:
  """What the parts spend by each accountant; None where it is not valid."""
  valid = valid_accountants(parts)
  return {
    name: epsilon(parts, name) if name in valid else None
    for name in ("pld", "rdp")
  }


def epsilon(
  parts: Sequence[plan_lib.Part], accountant: str | None = None
) -> float:
  """What the parts spend together, at the delta of the first.

  Args:
    parts: in order, at least one; the first has steps if any has.
    accountant: "pld" or "rdp"; None: see `accountant_of`.

  Returns:
    An upper bound on epsilon.

  Raises:
    ValueError: the accountant is not valid for these parts, or they are about
      different relations.
  """
  first = parts[0].plan
  if any(
    part.plan.neighboring_relation != first.neighboring_relation
    for part in parts
  ):
    raise ValueError("parts must have one neighboring_relation")
  valid = valid_accountants(parts)
  if accountant is None:
    accountant = accountant_of(parts)
  if accountant not in valid:
    raise ValueError(
      f"accountant must be one of {valid} for numbers that changed on the way,"
      f" got {accountant!r}"
    )
  mechanisms = _mechanisms(parts)
  if not mechanisms:
    return 0.0
  if len(mechanisms) == 1:
    ((sigma, q), num_steps) = mechanisms.popitem()
    return accounting.epsilon(
      noise_multiplier=sigma,
      sampling_probability=q,
      num_steps=num_steps,
      delta=first.delta,
      accountant=accountant,
    )
  return _at_fixed_order(parts)


def plan_after(
  config: plan_lib.PrivacyConfig,
  *,
  before: Mapping[str, Any],
  spent: Sequence[plan_lib.Part],
  start_step: int,
) -> plan_lib.PrivacyPlan:
  """The plan by which a run goes on with changed settings.

  Args:
    config: the settings from now on. `num_steps` counts all updates of the
      run, and `target_epsilon` is for the whole of it.
    before: the settings so far, as a dict.
    spent: what is charged, the current plan's part last.
    start_step: updates made in the state that the run goes on from.

  Returns:
    A plan whose `num_steps` are those that may still be charged.

  Raises:
    ValueError: no step is left, or the target is spent.
  """
  left = config.num_steps - start_step
  if left < 1:
    raise ValueError(
      f"num_steps must be more than the {start_step} updates that were made,"
      f" got {config.num_steps}"
    )
  after = dataclasses.asdict(config)
  changed = {k for k in after.keys() | before if after.get(k) != before.get(k)}
  current, charged = spent[-1]
  if changed <= {"l2_clip_norm"}:
    # The mechanism stays as it is in units of its sensitivity, and so does what
    # remains of its steps.
    left = min(left, current.num_steps - charged)
    if left < 1:
      raise ValueError("the plan is spent: no step is left to be changed")
    return dataclasses.replace(
      current, l2_clip_norm=config.l2_clip_norm, num_steps=left
    )
  config = dataclasses.replace(config, num_steps=left)
  spent = [part for part in spent if part.num_steps]
  if not spent or config.target_epsilon is None:
    return plan_lib.make_plan(config)
  # Any noise multiplier will do for a draft.
  draft = plan_lib.make_plan(
    dataclasses.replace(config, target_epsilon=None, noise_multiplier=1.0)
  )

  def total(index: int, accountant: str) -> float:
    plan = dataclasses.replace(
      draft, noise_multiplier=search.six_digits(-index)
    )
    del accountant  # It is "rdp", and of these the order is fixed.
    return _at_fixed_order([*spent, plan_lib.Part(plan, left)])

  index = search.calibrate(
    search.NOISE_MULTIPLIERS, total, config.target_epsilon, "rdp", slope=1.0
  )
  if index is None:
    raise ValueError(
      f"target_epsilon must be more than {_at_fixed_order(spent):.6g}, which"
      " is spent by Renyi divergences of an order fixed before, got"
      f" {config.target_epsilon}"
    )
  return dataclasses.replace(
    draft,
    noise_multiplier=search.six_digits(-index),
    target_epsilon=config.target_epsilon,
  )


def statement(parts: Sequence[plan_lib.Part]) -> str:
  """What the parts together guarantee, and when, in plain words."""
  if len(parts) == 1:
    return plan_lib.statement(parts[0].plan)
  first, last = parts[0].plan, parts[-1].plan
  listed = "; ".join(
    f"{num_steps:,} steps that draw each of {plan.num_examples:,} examples with"
    f" probability {plan.sampling_probability:.6g}, clip to l2 norm"
    f" {plan.l2_clip_norm} and add noise of {plan.noise_multiplier} times the"
    " sensitivity"
    for plan, num_steps in parts
  )
  how = accountant_of(parts).upper()
  if len(_mechanisms(parts)) > 1:
    how += (
      " at an order that the first settings fixed, since later ones may have"
      " been chosen by looking at what was released. The number is that of the"
      " way that was taken; the run as a procedure is bounded by the largest"
      " epsilon, at that order, that it was planned for at any time"
    )
  return (
    "The unit of privacy is one example (neighboring relation"
    f" {last.neighboring_relation}). The settings of this run changed on the"
    f" way. It consists of {listed}. Together they are (epsilon,"
    " delta)-differentially private with epsilon ="
    f" {plan_lib.rounded_up(epsilon(parts))} and delta = {first.delta:g}, by"
    f" {how}. This holds if nobody's data is in more than one example, if the"
    " draws and the noise stay secret, and if nothing else that was computed"
    " from the data is released."
  )


def _at_fixed_order(parts: Sequence[plan_lib.Part]) -> float:
  """The filter's epsilon: at the order that is best for the first plan."""
  first = parts[0].plan
  order = renyi.best_order(
    first.noise_multiplier,
    first.sampling_probability,
    first.num_steps,
    first.delta,
  )
  divergence = sum(
    renyi.divergence(sigma, q, num_steps, order)
    for (sigma, q), num_steps in _mechanisms(parts).items()
  )
  return renyi.epsilon_at(order, divergence, first.delta)


def _mechanisms(
  parts: Sequence[plan_lib.Part],
) -> dict[tuple[float, float], int]:
  """Steps by noise multiplier and sampling probability."""
  found: dict[tuple[float, float], int] = {}
  for plan, num_steps in parts:
    if num_steps:
      key = plan.noise_multiplier, plan.sampling_probability
      found[key] = found.get(key, 0) + num_steps
  return found
