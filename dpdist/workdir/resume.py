"""Decides whether a run may start or go on, and under which plan.

The decisions depend on the ledger, the data set's budget and the checkpoints
that exist. Only `begin` and `open_or_resume` write: a run that is refused
before that leaves nothing behind.
"""

from collections.abc import Callable, Mapping, Sequence
import errno
import os
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
from dpdist.ledger import stores
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.reporting import console
from dpdist.workdir import copies
from dpdist.workdir import manifest


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
    stores.check_apart(
      config.checkpoint_copies,
      {"ledger": config.ledger, "data_budget": config.data_budget.location},
    )
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
  settings: Mapping[str, Any] | None = None,
) -> tuple[plan_lib.PrivacyPlan, list[str], manifest.ResumePoint]:
  """Returns the plan, what changed, and the checkpoint, in all processes.

  The settings are those that the ledger compares; None: the config's.
  """

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
    plan, changes = _plan(
      config, workdir, ledger, found, train_digest, settings
    )
    _check_place(workdir)
    return {"plan": plan.to_dict(), "changes": changes, "found": found}

  resolved = collectives.run_on_primary(look)
  saved, rejected = resolved["found"]
  found = manifest.ResumePoint(
    history.CheckpointRef(*saved) if saved else None, rejected
  )
  plan = plan_lib.PrivacyPlan.from_dict(resolved["plan"])
  return plan, resolved["changes"], found


def _check_place(workdir: pathlib.Path) -> None:
  """Raises OSError unless a directory is there and can be written, or made."""
  place = workdir.absolute()
  while not os.path.lexists(place):
    place = place.parent
  code = 0 if place.is_dir() else errno.ENOTDIR
  if not code and not os.access(place, os.W_OK | os.X_OK):
    code = errno.EACCES
  if code:
    raise OSError(code, os.strerror(code), str(workdir))


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
    if ledger.is_new:
      # So that a run that does not fit leaves nothing behind.
      look_at_budget(
        config,
        workdir,
        ledger,
        plan=plan,
        own_digest=own_digest,
        earlier=earlier,
        is_changed=is_changed,
      )
    budget = shared_budget(config, ledger, own_digest, earlier)
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
  workdir.mkdir(parents=True, exist_ok=True)
  ledger.acquire()
  if ledger.is_new:
    ledger.open(
      config=settings,
      plan=plan,
      data=data,
      secret_hash=secret_hash,
      run="" if config.insecure_seed is not None else secrets.token_hex(16),
    )
  if budget is not None:
    # Recorded before the allocation is made, so that none exists without a run
    # that knows of it.
    ledger.record_allocation(root=budget.root, data=budget.data, allocation="")
    allocation = budget.allocate(
      ledger,
      _parts(ledger, plan, is_changed=is_changed),
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


def _parts(
  ledger: ledger_lib.Ledger | None,
  plan: plan_lib.PrivacyPlan,
  *,
  is_changed: bool,
) -> list[plan_lib.PlanUse]:
  """Returns what a run will have spent at the end of its plan."""
  spent = [] if ledger is None or ledger.is_new else ledger.spent
  ended = spent if is_changed else spent[:-1]
  return [*ended, plan_lib.PlanUse(plan, plan.num_steps)]


def look_at_budget(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger | None,
  *,
  plan: plan_lib.PrivacyPlan,
  own_digest: str,
  earlier: Callable[[], Sequence[str]],
  is_changed: bool,
) -> tuple[data_budget.DataBudget, float] | None:
  """Returns the data set's budget, and what the run would take of it.

  Writes nothing: a budget that is missing is only supposed. Without a ledger,
  the run is new. None if the config names no budget. Raises RefusedError if the
  run would not be admitted.
  """
  budget = shared_budget(config, ledger, own_digest, earlier, is_looked_at=True)
  if budget is None:
    return None
  taken = budget.would_take(
    ledger,
    _parts(ledger, plan, is_changed=is_changed),
    label=str(workdir.absolute()),
    reservation=config.data_budget.reservation,
  )
  return budget, taken


def _plan(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger,
  found: manifest.ResumePoint,
  train_digest: str,
  settings: Mapping[str, Any] | None,
) -> tuple[plan_lib.PrivacyPlan, list[str]]:
  """Returns the plan to go on under, and what changed since the last one."""
  privacy = config_lib.privacy_config(config)
  if ledger.is_new:
    return plan_lib.make_plan(privacy), []
  changes = ledger.changes(
    config=settings or config_lib.privacy_dict(config),
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
    before={
      name: value
      for name, value in ledger.segment.config.items()
      if name != ledger_lib.STATISTICS
    },
    spent=ledger.spent,
    start_step=found.saved.step if found.saved else 0,
  )
  return plan, list(changes.values())


def refuse_void(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for a run without a guarantee on a shared budget."""
  place = config.data_budget.location
  if place and (config.insecure_seed is not None or config.unsafe_metrics):
    raise errors.ArgumentError(
      "data_budget.location must be '' for a run without a guarantee, which no"
      " budget can cover (insecure_seed or unsafe_metrics), got"
      f" {place!r}"
    )


def shared_budget(
  config: ml_collections.ConfigDict,
  ledger: ledger_lib.Ledger | None,
  train_digest: str,
  earlier: Callable[[], Sequence[str]],
  *,
  is_looked_at: bool = False,
) -> data_budget.DataBudget | None:
  """Returns the data set's budget; makes it if it is missing.

  For `earlier` see `recorded_digest`, for is_looked_at `budgets.open_or_make`.
  """
  settings = config.data_budget
  allocations = [] if ledger is None else ledger.allocations
  if not settings.location:
    if allocations:
      raise errors.RefusedError(
        "data_budget.location must be that of the budget in which this run has"
        f" its allocation, {allocations[-1]['root']!r}, got ''"
      )
    return None
  refuse_void(config)
  budget = budgets.open_or_make(
    settings.location,
    train_digest,
    epsilon=settings.epsilon,
    delta=settings.delta,
    neighboring_relation=config.privacy.neighboring_relation,
    earlier=earlier,
    tell=console.warn,
    is_looked_at=is_looked_at,
  )
  for allocation in allocations:
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
