"""What parts of a run with different numbers spend together.

A run whose settings change goes on with another plan, and may have been given
it by someone who had looked at what was released before. Not every accountant
may be asked then:

* Parts whose steps are the same mechanism (the same noise multiplier and
  sampling probability, whatever is clipped where) are together as many steps
  of it. Each of them is dominated by the same pair of distributions, whatever
  was released before, and dominating pairs compose adaptively (Zhu, Dong & Wang
  2022, arXiv:2106.08567, Theorem 10). Both accountants hold.
* Otherwise only Renyi divergences at orders that were fixed beforehand add up,
  by the filter of Feldman & Zrnic 2021 (arXiv:2008.11193, section 4). There are
  several orders here, those of `dpdist.accounting.rdp.ladder` for the first
  part's plan,
  and each has a share of delta: a run that goes on while any of its filters
  lets it has lost no more than all of them together (docs/accounting.md).
  Composing privacy loss distributions, or taking the best of several orders
  afterwards at the whole of delta, holds for numbers that were chosen
  beforehand alone; for curves of trade-offs, which these distributions are
  another form of, Dong et al. 2026 (arXiv:2602.06756) give counterexamples.

A filter bounds a procedure by a sum that was fixed before looking. `epsilon` is
the sum on the way that was taken, an odometer's reading; the procedure is
bounded by the largest sum that the run was planned for at any time,
`guaranteed`. Who raises the target after a look has the guarantee of the raised
one, and who stops early that of the whole plan.

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


def valid_accountants(parts: Sequence[plan_lib.Part]) -> tuple[str, ...]:
  """Those that hold for parts chosen one after the other; there may be none."""
  pairs = _pairs(parts)
  valid = []
  if not _was_chosen_on_the_way(parts):
    valid.append("pld")
  if all(pair.has_renyi for pair in pairs):
    valid.append("rdp")
  return tuple(valid)


def accountant_of(parts: Sequence[plan_lib.Part]) -> str:
  """The last part's accountant if it is valid for all of them, else another."""
  wanted, valid = parts[-1].plan.accountant, valid_accountants(parts)
  return wanted if wanted in valid or not valid else valid[0]


def epsilons(
  parts: Sequence[plan_lib.Part], *, by_one_order: bool = False
) -> dict[str, float | None]:
  """What the parts spend by each accountant; None where it is not valid."""
  valid = valid_accountants(parts)
  return {
    name: epsilon(parts, name, by_one_order=by_one_order)
    if name in valid
    else None
    for name in ("pld", "rdp")
  }


def epsilon(
  parts: Sequence[plan_lib.Part],
  accountant: str | None = None,
  *,
  by_one_order: bool = False,
) -> float:
  """What the parts spend together, at the delta of the first.

  Args:
    parts: in order, at least one; the first has steps if any has.
    accountant: "pld" or "rdp"; None: see `accountant_of`.
    by_one_order: whether the filter is that of the first plan's best order
      alone, which ledgers were written by before there were several.

  Returns:
    An upper bound on epsilon.

  Raises:
    ValueError: the accountant is not valid for these parts, or they are about
      different relations.
  """
  first = parts[0].plan
  for name in plan_lib.KEPT:
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
  return accountants.epsilon([*_pairs(parts).items()], first.delta, accountant)


def guaranteed(bounds: Sequence[Sequence[plan_lib.Part]]) -> float:
  """The epsilon that a run has, wherever it stops.

  A privacy loss at a time that was chosen by looking is not bounded by the
  epsilon of as many steps (Rogers et al. 2016, arXiv:1605.08294). It is by that
  of all steps that might have followed: what was released until then is a
  function of what the whole run would have released.

  Whoever looks, and then either goes on with a plan or changes it, has both
  ways. Where one of them needs the filters they all do, since a bound of
  another kind would have a delta of its own (docs/accounting.md).

  Args:
    bounds: see `dpdist.ledger.history.History.bounds`.

  Returns:
    The largest epsilon of them; 0 where nothing was charged.
  """
  bound: Callable[[Sequence[plan_lib.Part]], float] = epsilon
  if any(map(_was_chosen_on_the_way, bounds)):
    bound = _filtered
  return max((bound(parts) for parts in bounds), default=0.0)


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
  # Any noise multiplier will do for a draft.
  draft = plan_lib.make_plan(
    dataclasses.replace(config, target_epsilon=None, noise_multiplier=1.0)
  )

  _check_can_follow(spent, draft)

  def total(index: int, accountant: str) -> float:
    plan = dataclasses.replace(
      draft, noise_multiplier=search.six_digits(-index)
    )
    del accountant  # It is "rdp", and of these the orders are fixed.
    return _filtered([*spent, plan_lib.Part(plan, left)])

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
  """The rest of a plan, or as many steps of it as are left, clipped otherwise.

  Raises:
    ValueError: no step is left.
  """
  # The mechanism stays as it is in units of its sensitivity, and so does what
  # remains of its steps.
  left = min(left, current.num_steps - charged)
  if current.cycle_length > 1:
    # Turns begin anew, and whoever had one has another: of whole ones no more
    # than were planned.
    turns = step_events.num_turns(current.num_steps, current.cycle_length)
    turns -= step_events.num_turns(charged, current.cycle_length)
    left = min(left, turns * current.cycle_length)
  if left < 1:
    raise ValueError("the plan is spent: no step is left to be changed")
  return dataclasses.replace(current, l2_clip_norm=l2_clip_norm, num_steps=left)


def _check_can_follow(
  spent: Sequence[plan_lib.Part], plan: plan_lib.PrivacyPlan
) -> None:
  """Raises ValueError where no accountant holds for what would be spent."""
  if not valid_accountants([*spent, plan_lib.Part(plan, plan.num_steps)]):
    raise ValueError(
      "the settings of a run can change on the way only where there are Renyi"
      " divergences, so not with sampling='truncated_poisson' or"
      " examples_per_user above 1"
    )


def statement(
  parts: Sequence[plan_lib.Part], guarantee: float | None = None
) -> str:
  """What the parts together guarantee, and when, in plain words.

  Args:
    parts: of a run, the last one whole; see
      `dpdist.ledger.history.History.planned`.
    guarantee: from `guaranteed`; None: what the parts spend.
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
    " sensitivity"
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
  parts: Sequence[plan_lib.Part], by_one_order: bool = False
) -> float:
  """The least of the filters' epsilons."""
  first, pairs = parts[0].plan, _pairs(parts).items()
  shares = rdp.ladder(first.steps(), first.delta)
  if by_one_order:
    shares = {rdp.best_order(first.steps(), first.delta): first.delta}
  return min(
    rdp.epsilon_at(
      order,
      math.fsum(rdp.divergence(pair, count, order) for pair, count in pairs),
      delta,
    )
    for order, delta in shares.items()
  )


def _was_chosen_on_the_way(parts: Sequence[plan_lib.Part]) -> bool:
  """Whether what later steps are may depend on what earlier ones released.

  Not where there is one plan, schedule and all, or one pair.
  """
  taken = [part for part in parts if part.num_steps]
  return len(taken) > 1 and len(_pairs(parts)) > 1


def _pairs(parts: Sequence[plan_lib.Part]) -> dict[step_events.Pair, int]:
  """How often each pair is composed."""
  found: dict[step_events.Pair, int] = {}
  for plan, num_steps in parts:
    for pair, count in plan.steps(num_steps):
      found[pair] = found.get(pair, 0) + count
  return found
