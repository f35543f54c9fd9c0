"""Computes what parts of a run with different numbers spend together.

A run whose settings change goes on with another plan. Whoever chose that plan
may have looked at what was released before. Then not every accountant is valid:

* Parts whose steps are the same mechanism (the same noise multiplier and
  sampling probability, whatever the clip norms) count as that many steps of it.
  Each step is dominated by the same pair of distributions, whatever was
  released before, and dominating pairs compose adaptively (Zhu, Dong & Wang
  2022, arXiv:2106.08567, Theorem 10). Both accountants are valid.
* Otherwise only Renyi divergences at orders that were fixed beforehand add up,
  by the filter of Feldman & Zrnic 2021 (arXiv:2008.11193, section 4). There are
  several orders here, those of `dpdist.accounting.rdp.ladder` for the first
  part's plan, each with a share of delta. A run that goes on while any of its
  filters allows it loses no more than all of them together
  (docs/accounting.md). Composing privacy loss distributions, or taking the best
  of several orders afterwards at the whole of delta, is valid only for numbers
  that were chosen beforehand. For trade-off curves, another form of these
  distributions, Dong et al. 2026 (arXiv:2602.06756) give counterexamples.

A filter bounds a procedure by a sum that was fixed before looking. `epsilon` is
the sum of the steps that were taken, the reading of an odometer. The procedure
is bounded by `guaranteed`, the largest sum that the run was planned for at any
time. If the target is raised after a look, the raised one is guaranteed; if the
run stops early, that of the whole plan is.

Imports no jax.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

from dpdist.accounting import accountants
from dpdist.accounting import rdp
from dpdist.accounting import search
from dpdist.accounting import step_events
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import statement as statement_lib


def valid_accountants(parts: Sequence[plan_lib.PlanUse]) -> tuple[str, ...]:
  """Returns the accountants, maybe none, valid for parts chosen in turn."""
  valid = []
  if not _was_chosen_on_the_way(parts):
    valid.append("pld")
  if not any(event.loose_rdp for event in _events(parts)):
    valid.append("rdp")
  return tuple(valid)


def accountant_of(parts: Sequence[plan_lib.PlanUse]) -> str:
  """Returns the last part's accountant if it is valid for all, else another."""
  wanted, valid = parts[-1].plan.accountant, valid_accountants(parts)
  return wanted if wanted in valid or not valid else valid[0]


def epsilons(
  parts: Sequence[plan_lib.PlanUse], *, by_one_order: bool = False
) -> dict[str, float | None]:
  """Returns what the parts spend by each accountant, None if it is invalid."""
  valid = valid_accountants(parts)
  return {
    name: epsilon(parts, name, by_one_order=by_one_order)
    if name in valid
    else None
    for name in ("pld", "rdp")
  }


def epsilon(
  parts: Sequence[plan_lib.PlanUse],
  accountant: str | None = None,
  *,
  by_one_order: bool = False,
) -> float:
  """Returns what the parts spend together, at the delta of the first.

  They are in order, at least one, and the first has steps if any has. An
  accountant of None is that of `accountant_of`. With by_one_order only the
  filter of the first plan's best order is used, as ledgers once did.
  """
  first = parts[0].plan
  for name in plan_lib.IMMUTABLE_FIELDS:
    if any(getattr(part.plan, name) != getattr(first, name) for part in parts):
      raise ValueError(f"parts must have one {name}")
  valid = valid_accountants(parts)
  if accountant is None:
    accountant = accountant_of(parts)
  if accountant not in valid:
    raise ValueError(
      f"accountant must be one of {valid} for numbers that changed on the way,"
      f" got {accountant!r}"
    )
  if _was_chosen_on_the_way(parts):
    return _filtered(parts, by_one_order)
  return accountants.epsilon([*_events(parts).items()], first.delta, accountant)


def guaranteed(bounds: Sequence[Sequence[plan_lib.PlanUse]]) -> float:
  """Returns the epsilon that a run guarantees by its bounds, wherever it stops.

  A privacy loss at a time that was chosen by looking is not bounded by the
  epsilon of as many steps (Rogers et al. 2016, arXiv:1605.08294). It is bounded
  by that of all steps that might have followed: what was released until then is
  a function of what the whole run would have released.

  Someone who looks, and then either goes on with a plan or changes it, might
  have done either, so both bounds count. Where one of them needs the filters,
  all do, since a bound of another kind would have a delta of its own
  (docs/accounting.md).
  """
  bound: Callable[[Sequence[plan_lib.PlanUse]], float] = epsilon
  if any(map(_was_chosen_on_the_way, bounds)):
    bound = _filtered
  return max((bound(parts) for parts in bounds), default=0.0)


def plan_after(
  config: plan_lib.PrivacyConfig,
  *,
  before: Mapping[str, Any],
  spent: Sequence[plan_lib.PlanUse],
  start_step: int,
) -> plan_lib.PrivacyPlan:
  """Returns the plan with which a run goes on after its settings change.

  `num_steps` of these settings counts all updates of the run, and
  `target_epsilon` is for the whole run; that of the plan is the number that may
  still be charged. `before` is the settings so far, `spent` the parts, that of
  the current plan last, and start_step the updates made.
  """
  left = config.num_steps - start_step
  if left < 1:
    raise ValueError(
      f"num_steps must be more than the {start_step} updates that were made,"
      f" got {config.num_steps}"
    )
  current, charged = spent[-1]
  for plan in (config, current):
    for name in ("noise_schedule", "batch_size_schedule"):
      if getattr(plan, name):
        raise ValueError(
          f"{name} must be empty in a run whose settings change on the way, got"
          f" {getattr(plan, name)}"
        )
  earlier = plan_lib.PrivacyConfig(**before)
  names = [field.name for field in dataclasses.fields(config)]
  changed = {x for x in names if getattr(config, x) != getattr(earlier, x)}
  if any(x.statistics_noise_multiplier for x in (config, current)):
    changed.add("private_statistics")  # A plan's rest has no room for them.
  if changed <= {"l2_clip_norm"}:
    return _with_clip_norm(config.l2_clip_norm, current, charged, left)
  config = dataclasses.replace(config, num_steps=left)
  spent = [part for part in spent if part.num_steps]
  if not spent:
    return plan_lib.make_plan(config)
  if config.target_epsilon is None:
    plan = plan_lib.make_plan(config)
    _check_can_follow(spent, plan)
    return plan
  # The draft's noise multiplier does not matter.
  draft = plan_lib.make_plan(
    dataclasses.replace(config, target_epsilon=None, noise_multiplier=1.0)
  )

  _check_can_follow(spent, draft)

  def total(index: int, accountant: str) -> float:
    plan = dataclasses.replace(
      draft, noise_multiplier=search.six_digits(-index)
    )
    del accountant  # It is always "rdp", at orders that are fixed.
    return _filtered([*spent, plan_lib.PlanUse(plan, left)])

  index = search.calibrate(
    search.NOISE_MULTIPLIERS, total, config.target_epsilon, ["rdp"], slope=1.0
  )
  if index is None:
    raise ValueError(
      f"target_epsilon must be more than {_filtered(spent):.6g}, which is spent"
      " by Renyi divergences at orders fixed before, got"
      f" {config.target_epsilon}"
    )
  return dataclasses.replace(
    draft,
    noise_multiplier=search.six_digits(-index),
    target_epsilon=config.target_epsilon,
  )


def _with_clip_norm(
  l2_clip_norm: float, current: plan_lib.PrivacyPlan, charged: int, left: int
) -> plan_lib.PrivacyPlan:
  """Returns the rest of a plan, or `left` steps of it, with a new clip norm."""
  # In units of its sensitivity the mechanism is unchanged, so the rest of its
  # steps may still be taken.
  left = min(left, current.num_steps - charged)
  if current.cycle_length > 1:
    # The cycle begins anew, so a unit that has had its turn gets another one.
    # Allow no more whole cycles than were planned.
    turns = step_events.num_turns(current.num_steps, current.cycle_length)
    turns -= step_events.num_turns(charged, current.cycle_length)
    left = min(left, turns * current.cycle_length)
  if left < 1:
    raise ValueError("the plan is spent: no step is left to be changed")
  return dataclasses.replace(current, l2_clip_norm=l2_clip_norm, num_steps=left)


def _check_can_follow(
  spent: Sequence[plan_lib.PlanUse], plan: plan_lib.PrivacyPlan
) -> None:
  """Raises ValueError where no accountant is valid with the new plan."""
  if not valid_accountants([*spent, plan_lib.PlanUse(plan, plan.num_steps)]):
    raise ValueError(
      "the settings of a run can change on the way only where there are Renyi"
      " divergences, so not with sampling='truncated_poisson' or"
      " examples_per_user above 1"
    )


def statement(
  parts: Sequence[plan_lib.PlanUse], guarantee: float | None = None
) -> str:
  """States in plain words what the parts guarantee together, and when.

  The last part has all of its planned steps. The guarantee is that of
  `guaranteed`; None means what the parts spend.
  """
  if guarantee is None:
    guarantee = epsilon(parts)
  if len(parts) == 1:
    return statement_lib.of_plan(parts[0].plan)
  first, last = parts[0].plan, parts[-1].plan
  listed = "; ".join(
    f"{num_steps:,} steps that draw each of {plan.num_examples:,} rows with"
    f" probability {plan.sampling_probability:.6g}"
    f" ({statement_lib.sampling(plan)}), clip to l2 norm"
    f" {plan.l2_clip_norm} and add noise of {plan.noise_multiplier} times the"
    f" sensitivity{statement_lib.statistics(plan, ' (and ', ')')}"
    for plan, num_steps in parts
  )
  how = accountant_of(parts).upper()
  if _was_chosen_on_the_way(parts):
    how += (
      " at the best of several orders that the first settings fixed, each with"
      " a share of delta, since later settings may have been chosen by looking"
      " at what was released. The number is the largest that the run was"
      " planned for at any time"
    )
  return (
    f"{statement_lib.unit(last)} The settings of this run changed on the"
    f" way. It consists of {listed}. Together they are (epsilon,"
    " delta)-differentially private with epsilon ="
    f" {statement_lib.rounded_up(guarantee)} and delta = {first.delta:g}, by"
    f" {how}. {statement_lib.assumptions(last)}"
  )


def _filtered(
  parts: Sequence[plan_lib.PlanUse], by_one_order: bool = False
) -> float:
  """Returns the least epsilon of the filters."""
  first, events = parts[0].plan, _events(parts).items()
  shares = rdp.ladder(first.steps(), first.delta)
  if by_one_order:
    shares = {rdp.best_order(first.steps(), first.delta): first.delta}
  return min(
    rdp.epsilon_at(
      order,
      math.fsum(rdp.divergence(event, count, order) for event, count in events),
      delta,
    )
    for order, delta in shares.items()
  )


def _was_chosen_on_the_way(parts: Sequence[plan_lib.PlanUse]) -> bool:
  """Returns whether later steps may depend on what earlier ones released.

  They do not where there is one plan, with or without a schedule, or one event.
  """
  taken = [part for part in parts if part.num_steps]
  return len(taken) > 1 and len(_events(parts)) > 1


def _events(
  parts: Sequence[plan_lib.PlanUse],
) -> dict[step_events.StepEvent, int]:
  """Returns how often each event is composed."""
  counts: dict[step_events.StepEvent, int] = {}
  for plan, num_steps in parts:
    for event, count in plan.steps(num_steps):
      counts[event] = counts.get(event, 0) + count
  return counts
