"""From settings to everything that a run is made of, checked.

All that can be wrong with settings is found here, before the ledger charges
anything.
"""

import math
import pathlib
import secrets
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from dpdist import composition
from dpdist import config as config_lib
from dpdist import data_budget
from dpdist import datasets
from dpdist import exact_step
from dpdist import history
from dpdist import hosts
from dpdist import keys
from dpdist import ledger as ledger_lib
from dpdist import losses
from dpdist import manifest
from dpdist import mechanism
from dpdist import mesh as mesh_lib
from dpdist import models
from dpdist import optimizers
from dpdist import plan as plan_lib
from dpdist import provenance
from dpdist import sources
from dpdist import step as step_lib

PyTree = Any


class SettingsError(ValueError):
  """A setting is wrong, or contradicts the run that the directory holds."""


class Job(NamedTuple):
  """A run that is ready to start or to go on.

  Attributes:
    plan: the numbers it is bound to from now on.
    changes: what changed since the run's segment began, a line each; a segment
      with `plan` is to be opened if there is any.
    settings: the privacy settings, as the ledger records them.
    ledger: in agreement with the settings, and this process's to write; None
      in the processes that are not the leader.
    budget: the data set's, in which the run's stake covers `plan`; or None.
    writer: the number of the process that writes.
    notices: what a reader of any figure from this run has to be told.
    found: the checkpoint to go on from.
    secret: what all its randomness comes from.
    mesh: all devices.
    train_source: the private examples.
    train_manifest: names their content, hex.
    test: all held-out examples, arrays "inputs" and "targets".
    model: maps inputs to logits.
    params: initial parameters.
    step: the two halves of a step.
    learning_rate: as a function of the step.
    chunk_size: examples over the mesh at once.
  """

  plan: plan_lib.PrivacyPlan
  changes: list[str]
  settings: dict[str, Any]
  ledger: ledger_lib.Ledger | None
  budget: data_budget.DataBudget | None
  writer: int
  notices: list[str]
  found: manifest.Found
  secret: bytes
  mesh: Mesh
  train_source: sources.Source
  train_manifest: str
  test: dict[str, np.ndarray]
  model: nn.Module
  params: PyTree
  step: step_lib.Step
  learning_rate: optax.Schedule
  chunk_size: int


def open_ledger(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> ledger_lib.Ledger:
  """Opens the ledger of a run, to be read.

  Raises:
    SettingsError: config.ledger is no place for one.
    dpdist.ledger.LedgerError: it is damaged, or older than a checkpoint.
  """
  # Before the ledger, which another process may be writing.
  heads = manifest.ledger_heads(workdir / "checkpoints")
  try:
    ledger = ledger_lib.Ledger(config.ledger or workdir / "ledger")
  except ValueError as error:
    raise SettingsError(f"ledger: {error}") from error
  for path, head in heads.items():
    if not ledger.has_been_at(head):
      raise ledger_lib.LedgerError(
        f"{path} was saved under ledger head {head[:12]}, which this ledger"
        " does not hold: it was removed or rolled back, or is another run's"
      )
  return ledger


def prepare(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger | None,
) -> Job:
  """Makes a job, and the leader its ledger's writer.

  Args:
    config: settings; see `dpdist.config.default`.
    workdir: the run's directory; made if missing.
    ledger: of the run; opened if it is new, else held against the settings.
      None in the processes that are not the leader.

  Returns:
    The job.

  Raises:
    SettingsError: names the setting, its value and what would be right.
    dpdist.ledger.LedgerError: another process writes the ledger.
    dpdist.hosts.LeaderError: the leader raised one of these.
  """
  try:
    return _prepare(config, workdir, ledger)
  except ValueError as error:
    # So that a door can tell a user's mistake from a fault further on.
    raise SettingsError(str(error)) from error


def _prepare(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger | None,
) -> Job:
  settings = config_lib.privacy_dict(config)
  mesh = mesh_lib.make(config.mesh)
  splits = datasets.load(config.data)
  if len(splits.train) != config.privacy.num_examples:
    raise ValueError(
      "privacy.num_examples must be the number of training examples,"
      f" {len(splits.train)}, got {config.privacy.num_examples}"
    )
  train_manifest = splits.train.manifest()
  hosts.agree(
    settings=config.to_dict(),
    code=provenance.code_digest(),
    training_data=train_manifest,
  )
  plan, changes, found = _agreed_plan(config, workdir, ledger, train_manifest)
  model = models.make(config.model)
  optimizer, learning_rate = optimizers.make(
    config.optimizer, config.privacy.num_steps
  )
  chunk_size = _chunk_size(config, plan, mesh)
  _check(config)
  step = _step(config, plan, model, optimizer, mesh)

  budget: data_budget.DataBudget | None = None

  def agree_on_secret() -> str:
    nonlocal budget
    assert ledger is not None
    budget = _budget(config, ledger, train_manifest)
    if budget is not None and ledger.is_new:
      # Here too, so that a run that does not fit leaves nothing behind.
      whole = plan_lib.Part(plan, plan.num_steps)
      budget.check(budget.cost([whole]), config.data_budget.reservation)
    return keys.secret_hash(_secret(config, workdir, is_new=ledger.is_new))

  secret_hash = hosts.from_leader(agree_on_secret)
  secret = _secret(config, workdir, is_new=False)
  if keys.secret_hash(secret) != secret_hash:
    raise ValueError(
      "secret_file must be the same file for all processes, and is another"
      f" than process 0's in process {jax.process_index()}"
    )
  example = splits.train.read(np.zeros(1, np.int64))["inputs"][0]
  init_key = mechanism.Streams(secret, "").key("init")
  params = jax.jit(model.init)(init_key, example)["params"]

  def begin() -> dict[str, Any]:
    assert ledger is not None
    _begin(
      config,
      workdir,
      ledger,
      budget,
      plan=plan,
      settings=settings,
      data=train_manifest,
      secret_hash=secret_hash,
      is_changed=bool(changes),
    )
    return {"writer": ledger.writer, "notices": ledger.notices}

  begun = hosts.from_leader(begin)
  return Job(
    plan,
    changes,
    settings,
    ledger,
    budget,
    begun["writer"],
    begun["notices"],
    found,
    secret,
    mesh,
    splits.train,
    train_manifest,
    splits.test.read(np.arange(len(splits.test))),
    model,
    params,
    step,
    learning_rate,
    chunk_size,
  )


def _agreed_plan(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger | None,
  train_manifest: str,
) -> tuple[plan_lib.PrivacyPlan, list[str], manifest.Found]:
  """What the leader decides on: plan, changes, and where to go on from."""

  def decide() -> dict[str, Any]:
    assert ledger is not None
    if ledger.is_ended:
      raise ValueError(
        "workdir must not hold a run that was ended, and what it had left given"
        f" back, got {str(workdir)!r}: start a new run in a new directory"
      )
    found = manifest.newest(workdir / "checkpoints", ledger.checkpoints)
    plan, changes = _plan(config, workdir, ledger, found, train_manifest)
    return {"plan": plan.to_dict(), "changes": changes, "found": found}

  told = hosts.from_leader(decide)
  saved, rejected = told["found"]
  found = manifest.Found(history.Saved(*saved) if saved else None, rejected)
  return plan_lib.PrivacyPlan.from_dict(told["plan"]), told["changes"], found


def _begin(
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
  """Makes this process the writer, and the run one that is paid for."""
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
    ended = ledger.spent if is_changed else ledger.spent[:-1]
    stake = budget.admit(
      ledger,
      [*ended, plan_lib.Part(plan, plan.num_steps)],
      label=str(workdir.absolute()),
      reservation=config.data_budget.reservation,
    )
    ledger.record_stake(root=budget.root, data=data, stake=stake)
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


def _step(
  config: ml_collections.ConfigDict,
  plan: plan_lib.PrivacyPlan,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
) -> step_lib.Step:
  exact = config.clipping.exact_sum
  make_step = exact_step.ExactStep if exact else step_lib.Step
  return make_step(
    mechanism.make(
      plan,
      losses.cross_entropy(model),
      method=config.clipping.method,
      microbatch_size=config.clipping.microbatch_size or None,
      exact_group_size=config.clipping.exact_group_size if exact else None,
    ),
    optimizer,
    mesh,
    config.ema_decay,
  )


def _check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for a setting that nothing else looks at so early."""
  if not 0 <= config.ema_decay < 1:
    raise ValueError(
      f"ema_decay must be at least 0 and below 1, got {config.ema_decay}"
    )
  if config.max_checkpoints < 2:
    raise ValueError(
      "max_checkpoints must be at least 2, so that one is whole while the next"
      f" is written, got {config.max_checkpoints}"
    )
  for name in ("eval_every", "checkpoint_every"):
    if config[name] < 0:
      raise ValueError(f"{name} must be at least 0, got {config[name]}")


def _plan(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger,
  found: manifest.Found,
  train_manifest: str,
) -> tuple[plan_lib.PrivacyPlan, list[str]]:
  """The plan to go on by, and what changed since the last one was made."""
  privacy = config_lib.privacy_config(config)
  if ledger.is_new:
    return plan_lib.make_plan(privacy), []
  changes = ledger.changes(
    config=config_lib.privacy_dict(config),
    data=train_manifest,
    secret_hash=keys.secret_hash(_secret(config, workdir, is_new=False)),
  )
  declared = config.data.changed_to
  if "data" in changes and not (
    len(declared) >= 12 and train_manifest.startswith(declared)
  ):
    raise ValueError(
      f"{changes['data']}: a run sees one data set. To go on with another,"
      " which the guarantee then covers too, declare it with"
      f" --config.data.changed_to={train_manifest[:12]}; got {declared!r}"
    )
  if not changes:
    # Taken as it stands: another machine could calibrate the last digit
    # differently.
    return ledger.plan, []
  plan = composition.plan_after(
    privacy,
    before=ledger.segment.config,
    spent=ledger.spent,
    start_step=found.saved.step if found.saved else 0,
  )
  return plan, list(changes.values())


def _budget(
  config: ml_collections.ConfigDict,
  ledger: ledger_lib.Ledger,
  train_manifest: str,
) -> data_budget.DataBudget | None:
  """The data set's budget, made if it is missing."""
  settings = config.data_budget
  if not settings.location:
    if ledger.stake is not None:
      raise ValueError(
        "data_budget.location must be that of the budget in which this run has"
        f" its stake, {ledger.stake['root']!r}, got ''"
      )
    return None
  return data_budget.open_or_make(
    settings.location,
    train_manifest,
    epsilon=settings.epsilon,
    delta=settings.delta,
    neighboring_relation=config.privacy.neighboring_relation,
  )


def _chunk_size(
  config: ml_collections.ConfigDict, plan: plan_lib.PrivacyPlan, mesh: Mesh
) -> int:
  shards = mesh_lib.num_example_shards(mesh)
  size, name = config.clipping.microbatch_size, "microbatch_size"
  if config.clipping.exact_sum:
    # A group is worked on at once, or in microbatches that divide it.
    size, name = config.clipping.exact_group_size, "exact_group_size"
  multiple = shards * max(1, size)
  if config.chunk_size:
    if config.chunk_size < 0 or config.chunk_size % multiple:
      raise ValueError(
        f"chunk_size must be 0 or a multiple of {multiple} (devices that divide"
        f" the examples times clipping.{name}), got {config.chunk_size}"
      )
    return config.chunk_size
  # Three standard deviations above the mean, so that about one step in a
  # thousand needs a second chunk.
  batch = plan.expected_batch_size
  size = math.ceil(batch + 3 * math.sqrt(batch))
  size = min(size, plan.num_examples)
  return size + -size % multiple


def _secret(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, *, is_new: bool
) -> bytes:
  if config.insecure_seed is not None:
    return keys.insecure_secret(config.insecure_seed)
  path = pathlib.Path(config.secret_file or workdir / "secret")
  if not is_new and not path.exists():
    raise ValueError(
      "secret_file must be the secret that this run began with, but there is"
      f" no {path}: without it the run cannot go on"
    )
  workdir.mkdir(parents=True, exist_ok=True)
  return keys.load_or_create_secret(path)
