"""Decides whether a run may start or go on, and under which plan.

The decisions depend on the ledger, the data set's budget and the checkpoints
that exist. `open_or_resume` writes; `resolve_plan` only leaves a note, in the
directory of a new run, that no run has begun there yet.
"""

from collections.abc import Callable, Sequence
import pathlib
import secrets
from typing import Any, NamedTuple

import ml_collections

from dpdist import config as config_lib
from dpdist import errors
from dpdist.distributed import collectives
from dpdist.keys import keys
from dpdist.ledger import budgets
from dpdist.ledger import data_budget
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.reporting import console
from dpdist.workdir import copies
from dpdist.workdir import manifest

NOT_BEGUN = "not_begun"
"""In the directory of a run that was started and has not begun: it was refused
for its data or for what a step on zeros showed, or is about to begin."""

_NOTE = "No run has begun here, and nothing is spent.\n"


def open_ledger(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> ledger_lib.Ledger:
  """Opens the ledger of a run for reading."""
  # Before the ledger, which another process may be writing.
  heads = manifest.ledger_heads(workdir / "checkpoints")
  try:
    ledger = ledger_lib.Ledger(config.ledger or workdir / "ledger")
  except ValueError as error:
    raise errors.SettingsError(f"ledger: {error}") from error
  for path, head in heads.items():
    if not ledger.has_been_at(head):
      raise errors.LedgerError(
        f"{path} was saved under ledger head {head[:12]}, which this ledger"
        " does not hold: it was removed or rolled back, or is another run's"
      )
  return ledger


def open_copies(
  config: ml_collections.ConfigDict, ledger: ledger_lib.Ledger | None
) -> copies.Copies | None:
  """Returns where the checkpoints of a run are copied to, if anywhere.

  Without a ledger, as in the processes that do not write it, nowhere.
  """
  if ledger is None or not config.checkpoint_copies:
    return None
  try:
    return copies.Copies(
      config.checkpoint_copies, "" if ledger.is_new else ledger.name
    )
  except ValueError as error:
    raise errors.SettingsError(f"checkpoint_copies: {error}") from error


def fetch_checkpoint(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger,
) -> None:
  """Fetches what a run goes on from, if its disk lacks it and a copy is there.

  Raises SaveError if no copy could be written there.
  """
  found = open_copies(config, ledger)
  if found is not None:
    found.check()
    if not ledger.is_new:
      found.fetch(workdir / "checkpoints", ledger.checkpoints)


def recorded_digest(
  ledger: ledger_lib.Ledger | None,
  train_digest: str,
  earlier: Callable[[], Sequence[str]],
) -> str:
  """Returns the digest that names a run's data, in every process.

  A run that began under an earlier release keeps the digest it has, which is
  among those that `earlier` returns; it is called only if it matters.
  """

  def look() -> str:
    assert ledger is not None
    if ledger.is_new or ledger.segment.data == train_digest:
      return train_digest
    known = ledger.segment.data
    return known if known in earlier() else train_digest

  return str(collectives.run_on_primary(look))


def resolve_plan(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger | None,
  train_digest: str,
) -> tuple[plan_lib.PrivacyPlan, list[str], manifest.ResumePoint]:
  """Returns the plan, what changed, and the checkpoint, in all processes."""

  def look() -> dict[str, Any]:
    assert ledger is not None
    if ledger.is_ended:
      raise errors.RefusedError(
        "workdir must not hold a run that was ended, and what it had left given"
        f" back, got {str(workdir)!r}: start a new run in a new directory"
      )
    if history.TOO_LONG in ledger.notices:
      raise errors.RefusedError(
        "workdir must not hold a run that the sentinel stopped, whose guarantee"
        f" is void for good, got {str(workdir)!r}: see what dpdist check says"
        " of the settings, and start a new run in a new directory"
      )
    found = manifest.newest(workdir / "checkpoints", ledger.checkpoints)
    plan, changes = _plan(config, workdir, ledger, found, train_digest)
    if ledger.is_new:
      workdir.mkdir(parents=True, exist_ok=True)
      (workdir / NOT_BEGUN).write_text(_NOTE)
    return {"plan": plan.to_dict(), "changes": changes, "found": found}

  resolved = collectives.run_on_primary(look)
  saved, rejected = resolved["found"]
  found = manifest.ResumePoint(
    history.CheckpointRef(*saved) if saved else None, rejected
  )
  plan = plan_lib.PrivacyPlan.from_dict(resolved["plan"])
  return plan, resolved["changes"], found


class Begun(NamedTuple):
  """What a process has of a run that may begin or go on."""

  # In the primary process, with an allocation that covers the plan.
  budget: data_budget.DataBudget | None
  secret: bytes
  writer: int  # The number of the process that writes.
  notices: list[str]  # To be shown with any figure of this run.

  def __repr__(self) -> str:
    return f"Begun(writer={self.writer!r}, ...)"  # Leaves out the secret.


def begin(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger | None,
  *,
  plan: plan_lib.PrivacyPlan,
  settings: dict[str, Any],
  data: str,
  own_digest: str,
  earlier: Callable[[], Sequence[str]],
  is_changed: bool,
) -> Begun:
  """Begins a run or goes on with it; must be called in all processes.

  The primary process loads the secret, becomes the ledger's writer, and
  allocates the data set's budget. Everything that can fail on settings must
  come before. For own_digest and earlier see `shared_budget`, for the rest
  `open_or_resume`.
  """
  budget: data_budget.DataBudget | None = None

  def agree_on_secret() -> str:
    nonlocal budget
    assert ledger is not None
    budget = shared_budget(config, ledger, own_digest, earlier)
    if budget is not None and ledger.is_new:
      # Checked here too, so that a run that does not fit leaves nothing behind.
      whole = plan_lib.PlanUse(plan, plan.num_steps)
      budget.check(budget.cost([whole]), config.data_budget.reservation)
    return keys.secret_hash(secret(config, workdir, is_new=ledger.is_new))

  secret_hash = collectives.run_on_primary(agree_on_secret)
  own_secret = collectives.run_on_all(
    lambda: secret(config, workdir, is_new=False)
  )
  collectives.assert_equal(secret_file=keys.secret_hash(own_secret))

  def open_or_go_on() -> dict[str, Any]:
    assert ledger is not None
    open_or_resume(
      config,
      workdir,
      ledger,
      budget,
      plan=plan,
      settings=settings,
      data=data,
      secret_hash=secret_hash,
      is_changed=is_changed,
    )
    return {"writer": ledger.writer, "notices": ledger.notices}

  begun = collectives.run_on_primary(open_or_go_on)
  return Begun(budget, own_secret, begun["writer"], begun["notices"])


def open_or_resume(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger,
  budget: data_budget.DataBudget | None,
  *,
  plan: plan_lib.PrivacyPlan,
  settings: dict[str, Any],
  data: str,
  secret_hash: str,
  is_changed: bool,
) -> None:
  """Makes this process the writer, opens a new run, and allocates its budget.

  A run has a random name, which its keys depend on; only one that is to be
  repeatable has none.
  """
  is_void = config.insecure_seed is not None or config.unsafe_metrics
  if budget is not None and is_void:
    raise errors.ArgumentError(
      "data_budget.location must be '' for a run without a guarantee, which no"
      " budget can cover (insecure_seed or unsafe_metrics), got"
      f" {budget.root!r}"
    )
  ledger.acquire()
  if ledger.is_new:
    ledger.open(
      config=settings,
      plan=plan,
      data=data,
      secret_hash=secret_hash,
      run="" if config.insecure_seed is not None else secrets.token_hex(16),
    )
  (workdir / NOT_BEGUN).unlink(missing_ok=True)
  if budget is not None:
    # Recorded before the allocation is made, so that none exists without a run
    # that knows of it.
    ledger.record_allocation(root=budget.root, data=budget.data, allocation="")
    ended = ledger.spent if is_changed else ledger.spent[:-1]
    allocation = budget.allocate(
      ledger,
      [*ended, plan_lib.PlanUse(plan, plan.num_steps)],
      label=str(workdir.absolute()),
      reservation=config.data_budget.reservation,
    )
    ledger.record_allocation(
      root=budget.root, data=budget.data, allocation=allocation
    )
  if config.insecure_seed is not None:
    ledger.notice(
      "insecure_seed fixes every random stream, so anyone can subtract the"
      " noise"
    )
  if config.unsafe_metrics:
    ledger.notice(
      "unsafe_metrics shows training loss, batch size and clip fraction, which"
      " no noise covers"
    )


def _plan(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger,
  found: manifest.ResumePoint,
  train_digest: str,
) -> tuple[plan_lib.PrivacyPlan, list[str]]:
  """Returns the plan to go on under, and what changed since the last one."""
  privacy = config_lib.privacy_config(config)
  if ledger.is_new:
    return plan_lib.make_plan(privacy), []
  changes = ledger.changes(
    config=config_lib.privacy_dict(config),
    data=train_digest,
    secret_hash=keys.secret_hash(secret(config, workdir, is_new=False)),
  )
  declared = config.data.changed_to
  if "data" in changes and not (
    len(declared) >= 12 and train_digest.startswith(declared)
  ):
    raise errors.RefusedError(
      f"{changes['data']}: a run sees one data set. To go on with another,"
      " which the guarantee then covers too, declare it with"
      f" --config.data.changed_to={train_digest[:12]}; got {declared!r}"
    )
  if not changes:
    # The recorded plan, unchanged: another machine could calibrate the last
    # digit differently.
    return ledger.plan, []
  plan = composition.plan_after(
    privacy,
    before=ledger.segment.config,
    spent=ledger.spent,
    start_step=found.saved.step if found.saved else 0,
  )
  return plan, list(changes.values())


def shared_budget(
  config: ml_collections.ConfigDict,
  ledger: ledger_lib.Ledger,
  train_digest: str,
  earlier: Callable[[], Sequence[str]],
) -> data_budget.DataBudget | None:
  """Returns the data set's budget; makes it if it is missing."""
  settings = config.data_budget
  if not settings.location:
    if ledger.allocations:
      raise errors.RefusedError(
        "data_budget.location must be that of the budget in which this run has"
        f" its allocation, {ledger.allocations[-1]['root']!r}, got ''"
      )
    return None
  budget = budgets.open_or_make(
    settings.location,
    train_digest,
    epsilon=settings.epsilon,
    delta=settings.delta,
    neighboring_relation=config.privacy.neighboring_relation,
    earlier=earlier,
    tell=console.warn,
  )
  for allocation in ledger.allocations:
    if (
      allocation["data"] == budget.data
      and allocation["stake"] not in budget.allocations
    ):
      raise errors.RefusedError(
        "data_budget.location must be that of the budget in which this run has"
        f" its allocation, {allocation['root']!r}, got {settings.location!r},"
        " which does not know of it: it is another one, or was rolled back"
      )
  return budget


def secret(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, *, is_new: bool
) -> bytes:
  """Returns the run's secret; makes it if the run is new and there is none."""
  if config.insecure_seed is not None:
    return keys.insecure_secret(config.insecure_seed)
  path = pathlib.Path(config.secret_file or workdir / "secret")
  if not is_new and not path.exists():
    raise errors.ArgumentError(
      "secret_file must be the secret that this run began with, but there is"
      f" no {path}: without it the run cannot go on"
    )
  workdir.mkdir(parents=True, exist_ok=True)
  return keys.load_or_create_secret(path)
