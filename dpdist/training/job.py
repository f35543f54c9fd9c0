"""Prepares a run to start or to go on, and checks it before any charge."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from dpdist import config as config_lib
from dpdist import errors
from dpdist import registry
from dpdist.data import retry
from dpdist.data import sources
from dpdist.data import users
from dpdist.data.datasets import datasets
from dpdist.data.features import features
from dpdist.distributed import collectives
from dpdist.distributed import mesh as mesh_lib
from dpdist.keys import keys
from dpdist.ledger import data_budget
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.privacy import plan as plan_lib
from dpdist.reporting import console
from dpdist.tasks import classification
from dpdist.training import data_checks
from dpdist.training import parameters
from dpdist.training import setup
from dpdist.training import step as step_lib
from dpdist.workdir import fingerprint
from dpdist.workdir import manifest
from dpdist.workdir import resume

PyTree = Any


class Job(NamedTuple):
  """A run that is ready to start or to go on.

  Attributes:
    plan: the numbers it is bound to from now on.
    changes: what changed since the run's segment began, a line each; if
      anything did, a segment with `plan` must be opened.
    settings: the privacy settings, as the ledger records them.
    ledger: in agreement with the settings, and written by this process; None in
      the processes that are not the primary process.
    budget: the data set's, with an allocation that covers `plan`; or None.
    writer: the number of the process that writes.
    notices: what must be shown with any figure from this run.
    found: the checkpoint to go on from.
    secret: the source of all its randomness.
    mesh: all devices.
    train_source: the private examples or users; call its `close` at the end.
    train_digest: SHA-256 that names their content, hex.
    own_digest: this release's name of it, if the run began under another.
    earlier: returns its other names; see `resume.recorded_digest`.
    features_sha256: of the features that replace inputs; "" without any.
    outside_sha256: of the data set's code, if it is not ours; else "".
    test: all held-out examples, arrays "inputs" and "targets".
    evaluate: from parameters to held-out metrics; see `losses.evaluator`.
    model: maps inputs to logits.
    row: shapes and dtypes of what is clipped as one: example, user, group.
    params: the trained parameters' shapes.
    init: makes the state before the first step, on the mesh; before a run
      begins, with `dpdist.training.setup.PUBLIC_KEY_DATA`.
    frozen: the frozen parameters, on the mesh, None where one is trained; None
      if there are none.
    frozen_sha256: of the frozen parameters; "" if there are none.
    weights_sha256: of the parameters that were read from disk; "" if none.
    step: the two halves of a step.
    learning_rate: as a function of the step.
    chunk_size: examples, or users, that the whole mesh computes at once.
    close: stops waiting for data that does not come.
  """

  plan: plan_lib.PrivacyPlan
  changes: list[str]
  settings: dict[str, Any]
  ledger: ledger_lib.Ledger | None
  budget: data_budget.DataBudget | None
  writer: int
  notices: list[str]
  found: manifest.ResumePoint
  secret: bytes
  mesh: Mesh
  train_source: sources.Source
  train_digest: str
  own_digest: str
  earlier: Callable[[], list[str]]
  features_sha256: str
  outside_sha256: str
  test: dict[str, np.ndarray]
  evaluate: Callable[..., dict[str, float]]
  model: nn.Module
  row: dict[str, jax.ShapeDtypeStruct]
  params: PyTree
  init: functools.partial[step_lib.TrainState]
  frozen: PyTree | None
  frozen_sha256: str
  weights_sha256: str
  step: step_lib.Step
  learning_rate: optax.Schedule
  chunk_size: int
  close: Callable[[], None]

  @property
  def made_of(self) -> dict[str, str]:
    """Returns, by name, the SHA-256 of weights, features, outside code."""
    facts = self._asdict().items()
    return {k: v for k, v in facts if k.endswith("_sha256") and v}

  def __repr__(self) -> str:
    # The repr may end up in a log, and the secret must not.
    return f"Job(plan={self.plan!r}, writer={self.writer!r}, ...)"


def prepare(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger | None,
  *,
  try_out: Callable[[Job], int] | None = None,
) -> Job:
  """Makes a job, and makes the primary process the writer of its ledger.

  Everything that can fail on settings or data comes before any write.

  Args:
    config: settings; see `dpdist.config.default`.
    workdir: the run's directory; made if missing.
    ledger: of the run; opened if it is new, else compared with the settings.
      None in the processes that are not the primary process.
    try_out: maps the job, not begun, to its chunk size; see
      `dpdist.training.dry_run`.

  Returns:
    The job.

  Raises:
    SettingsError: names the setting, its value and what would be right.
    dpdist.errors.LedgerError: another process writes the ledger.
    dpdist.errors.PeerError: the primary process raised one of these.
  """
  try:
    job = _prepared(config, workdir, ledger)
    if try_out is not None:
      job = job._replace(chunk_size=try_out(job))
    return _begun(config, workdir, job)
  except ValueError as error:
    # So that a command can tell a user's mistake from a later failure.
    raise errors.SettingsError(
      str(error), hint=getattr(error, "hint", None)
    ) from error


def _prepared(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger | None,
) -> Job:
  """Returns the job, not begun; writes nothing."""
  mesh, splits, train_digest, earlier, features_sha256, close = (
    collectives.run_on_all(lambda: _load(config))
  )
  outside_sha256 = collectives.run_on_all(
    lambda: registry.code_sha256(
      "dataset", config.data.name, setting="data.name"
    )
  )
  fingerprint.check_code()
  environment = fingerprint.environment(mesh)
  collectives.assert_equal(
    settings=config.to_dict(),
    code=environment["code_sha256"],
    packages=environment["packages"],
    jax_config=environment["jax_config"],
    training_data=train_digest,
    training_features=features_sha256,
    code_outside=outside_sha256,
  )
  own_digest = train_digest
  train_digest = resume.recorded_digest(ledger, own_digest, earlier)
  plan, changes, found = resume.resolve_plan(
    config, workdir, ledger, train_digest
  )
  collectives.assert_equal(plan=plan.fingerprint())
  experiment = setup.build(config, mesh, plan=plan)
  model, step = experiment.model, experiment.step
  size = experiment.chunk_size
  test, row, start = collectives.run_on_all(
    lambda: data_checks.fit(config, splits, model, setup.PUBLIC_KEY_DATA)
  )
  collectives.assert_equal(model_weights=start.weights_sha256)
  for shapes in (start.shapes, start.frozen_shapes):
    step.specs(shapes)  # Raises if the mesh does not fit them.
  frozen = start.frozen(step)
  return Job(
    plan,
    changes,
    config_lib.privacy_dict(config),
    ledger,
    None,
    0,
    [],
    found,
    b"",
    mesh,
    splits.train,
    train_digest,
    own_digest,
    earlier,
    features_sha256,
    outside_sha256,
    test,
    classification.evaluator(model, test, mesh),
    model,
    row,
    start.shapes,
    functools.partial(start.initializer(step), setup.PUBLIC_KEY_DATA),
    frozen,
    parameters.frozen_sha256(frozen),
    start.weights_sha256,
    step,
    experiment.learning_rate,
    size,
    close,
  )


def _begun(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, job: Job
) -> Job:
  """Begins a job: reserves its budget, and loads the run's secret."""
  ledger, plan = job.ledger, job.plan
  budget: data_budget.DataBudget | None = None

  def agree_on_secret() -> str:
    nonlocal budget
    assert ledger is not None
    budget = resume.shared_budget(config, ledger, job.own_digest, job.earlier)
    if budget is not None and ledger.is_new:
      # Checked here too, so that a run that does not fit leaves nothing behind.
      whole = plan_lib.PlanUse(plan, plan.num_steps)
      budget.check(budget.cost([whole]), config.data_budget.reservation)
    return keys.secret_hash(
      resume.secret(config, workdir, is_new=ledger.is_new)
    )

  secret_hash = collectives.run_on_primary(agree_on_secret)
  secret = collectives.run_on_all(
    lambda: resume.secret(config, workdir, is_new=False)
  )
  collectives.assert_equal(secret_file=keys.secret_hash(secret))

  def begin() -> dict[str, Any]:
    assert ledger is not None
    resume.open_or_resume(
      config,
      workdir,
      ledger,
      budget,
      plan=plan,
      settings=job.settings,
      data=job.train_digest,
      secret_hash=secret_hash,
      is_changed=bool(job.changes),
    )
    return {"writer": ledger.writer, "notices": ledger.notices}

  begun = collectives.run_on_primary(begin)
  key_data = mechanism.Streams(secret, "").key_data("init")
  return job._replace(
    budget=budget,
    writer=begun["writer"],
    notices=begun["notices"],
    secret=secret,
    init=functools.partial(job.init.func, key_data),
  )


def _load(
  config: ml_collections.ConfigDict,
) -> tuple[
  Mesh, datasets.Splits, str, Callable[[], list[str]], str, Callable[[], None]
]:
  """Loads what any single process may fail to find: devices and data."""
  setup.check(config)  # Before features are computed, which may take long.
  mesh = mesh_lib.make(config.mesh)
  name, path = config.data.name, config.data.path

  def retried(source: sources.Source) -> retry.RetryingSource:
    return retry.RetryingSource(
      source,
      name=f"data set {name!r}" + (f" in {path!r}" if path else ""),
      retry_seconds=config.data.retry_seconds,
      stall_seconds=config.data.stall_seconds,
      tell=console.warn,
    )

  train, test = datasets.load(config.data)
  features_sha256 = ""
  if isinstance(train, features.FeatureSource):
    features_sha256 = train.sha256
  unit, group_size = "example", config.privacy.group_size
  if isinstance(train, users.UserSource):
    unit, examples = "user", retried(train.examples)
    train = dataclasses.replace(train, examples=examples)
  else:
    train = examples = retried(train)
  num_rows, manifest = len(train), train.content_digest()
  earlier = functools.partial(sources.earlier_digests, train)
  if group_size > 1:
    if unit == "user":
      raise ValueError(
        "privacy.group_size must be 1 where users are the unit, got"
        f" {group_size}"
      )
    train = users.in_groups(train, group_size)
  if config.privacy.unit != unit:
    raise ValueError(
      f"privacy.unit must be {unit!r} with data.examples_per_unit="
      f"{config.data.examples_per_unit}, which makes that the unit, got"
      f" {config.privacy.unit!r}"
    )
  if num_rows != config.privacy.num_examples:
    what = {"example": "training examples", "user": "users to train on"}[unit]
    raise errors.ArgumentError(
      f"privacy.num_examples must be the number of {what}, {num_rows}, got"
      f" {config.privacy.num_examples}",
      hint=errors.Hint(flags=(f"--config.privacy.num_examples={num_rows}",)),
    )
  splits = datasets.Splits(train, retried(test))
  return mesh, splits, manifest, earlier, features_sha256, examples.close
