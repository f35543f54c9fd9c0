"""Says what a start would do with the run that a directory holds.

Nothing is written, and nothing is charged: `dpdist.ledger.ledger.Ledger.resume`
would decide as it is said here, if nothing changes until then.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dpdist import errors
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.workdir import manifest

BEGINS = "begins"
ENDED = "has made all its steps"
GOES_ON = "goes on"
BRANCHES = "opens a branch"
CHANGES = "opens a segment"


class Outlook(NamedTuple):
  """What a start would do.

  Attributes:
    action: one of the constants of this module.
    start_step: updates made in the state that it goes on from.
    last_step: updates made at its end.
    steps_spent: steps that are charged so far, over all branches.
    steps_free: charged steps that run again, without a charge.
    steps_to_charge: steps that it would charge.
    epsilon: the whole run's guarantee at its end.
    changes: settings that changed, a line each.
    rejected: why newer checkpoints would be passed over, a line each.
  """

  action: str
  start_step: int
  last_step: int
  steps_spent: int
  steps_free: int
  steps_to_charge: int
  epsilon: float
  changes: list[str]
  rejected: list[str]


def of(
  ledger: ledger_lib.Ledger | None,
  found: manifest.ResumePoint,
  plan: plan_lib.PrivacyPlan,
  changes: Sequence[str],
  fingerprint: str,
) -> Outlook:
  """Returns what a start would do.

  Args:
    ledger: of the run; None, or empty: it is new.
    found: the checkpoint that it would go on from.
    plan: from `dpdist.workdir.resume.resolve_plan`, as the changes are.
    changes: what changed since the run's segment began.
    fingerprint: of everything that decides the bits of a step.

  Raises:
    LedgerError: no checkpoint is whole, and the plan is spent.
  """
  start = found.saved.step if found.saved else 0
  whole = [plan_lib.PlanUse(plan, plan.num_steps)]
  if ledger is None or ledger.is_new:
    return Outlook(
      action=BEGINS,
      start_step=0,
      last_step=plan.num_steps,
      steps_spent=0,
      steps_free=0,
      steps_to_charge=plan.num_steps,
      epsilon=composition.guaranteed([whole]),
      changes=[],
      rejected=[],
    )
  if changes:
    action, free, to_charge = CHANGES, 0, plan.num_steps
    whole = [*(part for part in ledger.spent if part.num_steps), *whole]
  else:
    whole = ledger.planned
    action, free = BRANCHES, 0
    to_charge = plan.num_steps - ledger.segment.charged
    digest = found.saved.digest if found.saved else ""
    if ledger.goes_on(digest=digest, fingerprint=fingerprint):
      action, free = GOES_ON, ledger.branches[-1].stop_step - start
    if not free + to_charge:
      action = ENDED
  last = start + free + to_charge
  if found.rejected and last == 0:
    raise errors.LedgerError(
      "no checkpoint can be restored, and the plan is spent; "
      + "; ".join(found.rejected)
    )
  return Outlook(
    action=action,
    start_step=start,
    last_step=last,
    steps_spent=ledger.spent_steps,
    steps_free=free,
    steps_to_charge=to_charge,
    epsilon=composition.guaranteed([*ledger.bounds, whole]),
    changes=list(changes),
    rejected=list(found.rejected),
  )
