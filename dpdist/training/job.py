"""Prepares a run to start or to go on, and checks it before any charge."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from dpdist import config as config_lib
from dpdist import errors
from dpdist import registry
from dpdist.data import dataset as dataset_lib
from dpdist.data import retry
from dpdist.data import sources
from dpdist.data import statistics as asked_lib
from dpdist.data import users
from dpdist.data.features import features
from dpdist.distributed import collectives
from dpdist.distributed import mesh as mesh_lib
from dpdist.distributed import progress as progress_lib
from dpdist.ledger import data_budget
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.mechanism import outside_code
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rules
from dpdist.reporting import console
from dpdist.tasks import held_out
from dpdist.tasks import optimizers
from dpdist.tasks import parts as parts_lib
from dpdist.tasks import task as task_lib
from dpdist.training import abstract_step
from dpdist.training import data_checks
from dpdist.training import parameters
from dpdist.training import setup
from dpdist.training import step as step_lib
from dpdist.workdir import fingerprint
from dpdist.workdir import manifest
from dpdist.workdir import resume
from dpdist.workdir import statistics as statistics_lib

PyTree = Any


# Its repr may end up in a log, and the secret must not.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Job:
  """A run that is ready to start or to go on."""

  plan: plan_lib.PrivacyPlan  # The numbers that it is bound to from now on.
  # What changed since the run's segment began, a line each; if anything did, a
  # segment with `plan` must be opened.
  changes: list[str]
  settings: dict[str, Any]  # The privacy settings, as the ledger records them.
  # In agreement with the settings, and written by this process; None in the
  # processes that are not the primary process.
  ledger: ledger_lib.Ledger | None
  # The data set's, with an allocation that covers `plan`.
  budget: data_budget.DataBudget | None
  writer: int  # The number of the process that writes.
  notices: list[str]  # To be shown with any figure of this run.
  found: manifest.ResumePoint  # The checkpoint to go on from.
  secret: bytes  # The source of all its randomness.
  mesh: Mesh
  train_source: sources.Source  # Private; call its `close` at the end.
  train_digest: str  # SHA-256 that names their content, hex.
  own_digest: str  # This release's name of it, if the run began under another.
  # Its other names; see `resume.recorded_digest`.
  earlier: Callable[[], list[str]]
  test_source: sources.Source  # What `test` is read from.
  test: dict[str, np.ndarray]  # All held-out examples, by name.
  # Private statistics of the training part that the run releases; None: none.
  statistics: asked_lib.Statistics | None
  evaluate: held_out.Evaluator  # Maps parameters to held-out metrics.
  task: task_lib.Task
  # Shapes and dtypes of what is clipped as one: example, user, group.
  row: dict[str, jax.ShapeDtypeStruct]
  params: PyTree  # The trained parameters' shapes.
  # Makes the state before the first step, on the mesh, from a key.
  initial: parameters.Initializer
  # `initial` with the run's key; before a run begins, with
  # `dpdist.training.setup.PUBLIC_KEY_DATA`.
  init: functools.partial[step_lib.TrainState]
  # On the mesh, None where a parameter is trained; None if none is frozen.
  frozen: PyTree | None
  # By name, the SHA-256 of what decides a step besides settings and data, where
  # there is any: "weights_sha256" of the parameters that were read from disk,
  # "frozen_sha256" of the frozen ones, "features_sha256" of features that
  # replace inputs, "KIND_code_sha256" of code from outside, and
  # "lowered_sha256" of what such code computes.
  made_of: dict[str, str]
  step: step_lib.Step
  learning_rate: optax.Schedule | None  # Of a step; None if it is unknown.
  chunk_size: int  # Examples, or users, that the whole mesh computes at once.
  close: Callable[[], None]  # Stops waiting for data that does not come.

  def __repr__(self) -> str:
    return f"Job(plan={self.plan!r}, writer={self.writer!r}, ...)"


def prepare(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger | None,
  parts: parts_lib.Parts = parts_lib.NAMED,
  *,
  progress: progress_lib.Progress | None = None,
  try_out: Callable[[Job], int] | None = None,
) -> Job:
  """Makes a job, and makes the primary process the writer of its ledger.

  Everything that can fail on settings or data comes before any write, and
  raises SettingsError. The ledger is opened if it is new, else compared with
  the settings; it is None in the processes that are not the primary process,
  where PeerError says that the primary process failed. Raises LedgerError if
  another process writes the ledger. `try_out` maps the job, not begun, to its
  chunk size; see `dpdist.training.dry_run`.
  """
  try:
    progress = progress or progress_lib.Progress()
    job = _prepared(config, workdir, ledger, parts, progress)
    if try_out is not None:
      job = dataclasses.replace(job, chunk_size=try_out(job))
    is_watched = config.sentinel.every > 0
    job = _with_lowered(job, parts, is_watched=is_watched)
    return _begun(config, workdir, job)
  except ValueError as error:
    # So that a command can tell a user's mistake from a later failure.
    raise errors.SettingsError(
      str(error), hint=getattr(error, "hint", None)
    ) from error


def look(
  config: ml_collections.ConfigDict,
  parts: parts_lib.Parts = parts_lib.NAMED,
  *,
  workdir: pathlib.Path | None = None,
  ledger: ledger_lib.Ledger | None = None,
  progress: progress_lib.Progress | None = None,
  try_out: Callable[[Job], int] | None = None,
) -> Job:
  """Makes a job as `prepare` does, of this process alone, and writes nothing.

  It cannot begin: it has no secret. Without a workdir and its ledger, opened
  for reading, it is of a new run.
  """
  config_lib.check(config)
  config = parts.settings(config_lib.resolve(config))
  progress = progress or progress_lib.Progress()
  job = _prepared(config, workdir, ledger, parts, progress)
  if try_out is not None:
    job = dataclasses.replace(job, chunk_size=try_out(job))
  return _with_lowered(job, parts, is_watched=config.sentinel.every > 0)


def load_code(privacy: ml_collections.ConfigDict) -> None:
  """Imports the code from outside that the settings of the mechanism name."""
  names = (privacy.sampling, privacy.noise, privacy.clipping)
  if all(isinstance(name, str) for name in names):  # Others are refused later.
    try:
      rules.load_code(*names)
    except ValueError as error:
      raise errors.SettingsError(f"privacy.{error}") from error


def fingerprint_of(
  config: ml_collections.ConfigDict,
  job: Job,
  environments: Sequence[Mapping[str, Any]],
) -> str:
  """Returns a digest of everything that decides the bits of a job's steps."""
  return fingerprint.fingerprint(
    # The chosen size: sums over chunks of another size round differently.
    config.to_dict() | {"chunk_size": job.chunk_size},
    job.plan.fingerprint(),
    job.train_digest,
    environments,
    job.made_of,
  )


def _prepared(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path | None,
  ledger: ledger_lib.Ledger | None,
  parts: parts_lib.Parts,
  progress: progress_lib.Progress,
) -> Job:
  """Returns the job, not begun; writes nothing. No workdir: as of a new run."""
  mesh, dataset, own_digest, earlier, features_sha256, close = (
    collectives.run_on_all(lambda: _load(config, parts, progress))
  )
  code = collectives.run_on_all(lambda: _outside_code(config, parts))
  statistics, settings = collectives.run_on_all(
    lambda: statistics_lib.asked(config, dataset.train)
  )
  fingerprint.check_code()
  environment = fingerprint.environment(mesh)
  collectives.assert_equal(
    settings=config.to_dict(),
    code=environment["code_sha256"],
    packages=environment["packages"],
    jax_config=environment["jax_config"],
    training_data=own_digest,
    training_features=features_sha256,
    code_outside=code,
  )
  progress.enter(-1, "planning")
  train_digest, plan, changes, found = _planned(
    config, workdir, ledger, own_digest, earlier, settings
  )
  collectives.assert_equal(plan=plan.fingerprint())
  experiment = setup.build(config, mesh, plan=plan, parts=parts)
  rules_code = collectives.run_on_all(_rules_code)
  task, step = experiment.task, experiment.step
  fit = lambda: data_checks.fit(config, dataset, task, setup.PUBLIC_KEY_DATA)
  test, row, start, notices = collectives.run_on_all(fit)
  collectives.assert_equal(
    model_weights=start.weights_sha256, layer_rules=rules_code
  )
  _check_step(step, start)
  whole = step_lib.whole(start.shapes, start.frozen_shapes)
  make_evaluator = lambda: held_out.Evaluator(
    task, test, mesh, whole, tell=_tell
  )
  evaluate = collectives.run_on_all(make_evaluator)
  frozen, initial = start.frozen(step), start.initializer(step)
  made_of = {"features_sha256": features_sha256, **code, **rules_code}
  made_of["frozen_sha256"] = parameters.frozen_sha256(frozen)
  made_of["weights_sha256"] = start.weights_sha256
  return Job(
    plan=plan,
    changes=changes,
    settings=settings,
    ledger=ledger,
    budget=None,
    writer=0,
    notices=notices,
    found=found,
    secret=b"",
    mesh=mesh,
    train_source=dataset.train,
    train_digest=train_digest,
    own_digest=own_digest,
    earlier=earlier,
    test_source=dataset.test,
    test=test,
    statistics=statistics,
    evaluate=evaluate,
    task=task,
    row=row,
    params=start.shapes,
    initial=initial,
    init=functools.partial(initial, setup.PUBLIC_KEY_DATA),
    frozen=frozen,
    made_of={name: value for name, value in made_of.items() if value},
    step=step,
    learning_rate=experiment.learning_rate,
    chunk_size=experiment.chunk_size,
    close=close,
  )


def _check_step(step: step_lib.Step, start: parameters.Parameters) -> None:
  """Raises ValueError unless optimizer and mesh fit the parameters."""
  optimizers.try_out(step.optimizer, start.shapes)
  for shapes in (start.shapes, start.frozen_shapes):
    step.specs(shapes)


def _tell(text: str) -> None:
  if collectives.is_primary():
    console.warn(text)


def _planned(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path | None,
  ledger: ledger_lib.Ledger | None,
  own_digest: str,
  earlier: Callable[[], list[str]],
  settings: dict[str, Any],
) -> tuple[str, plan_lib.PrivacyPlan, list[str], manifest.ResumePoint]:
  """Returns the data's recorded digest, plan, changes and checkpoint."""
  if workdir is None:
    plan = plan_lib.make_plan(config_lib.privacy_config(config))
    return own_digest, plan, [], manifest.ResumePoint(None, [])
  digest = resume.recorded_digest(ledger, own_digest, earlier)
  return digest, *resume.resolve_plan(config, workdir, ledger, digest, settings)


def _outside_code(
  config: ml_collections.ConfigDict, parts: parts_lib.Parts
) -> dict[str, str]:
  """Returns the digests of all code of the settings that is not ours."""
  mechanism_code = outside_code.sha256(config_lib.privacy_config(config))
  return parts.code_sha256(config) | {"mechanism_code_sha256": mechanism_code}


def _rules_code() -> dict[str, str]:
  # The step has the rules that were registered when it was built.
  return {"layer_rules_code_sha256": registry.outside_sha256("layer_rule")}


def _with_lowered(job: Job, parts: parts_lib.Parts, *, is_watched: bool) -> Job:
  """Adds the digest of what a run with code from outside computes."""
  if not parts.is_any_given and not any("_code_" in x for x in job.made_of):
    return job
  digest = str(
    collectives.run_on_all(
      lambda: abstract_step.lowered_sha256(
        abstract_step.programs(
          job.step,
          job.initial,
          row=job.row,
          chunk_size=job.chunk_size,
          frozen=job.frozen,
          has_schedule=len(job.plan.phases) > 1,
          is_watched=is_watched,
        )
      )
    )
  )
  collectives.assert_equal(lowered_step=digest)
  return dataclasses.replace(
    job, made_of=job.made_of | {"lowered_sha256": digest}
  )


def _begun(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, job: Job
) -> Job:
  """Begins a job: reserves its budget, and loads the run's secret."""
  begun = resume.begin(
    config,
    workdir,
    job.ledger,
    plan=job.plan,
    settings=job.settings,
    data=job.train_digest,
    own_digest=job.own_digest,
    earlier=job.earlier,
    is_changed=bool(job.changes),
  )
  key_data = mechanism.Streams(begun.secret, "").key_data("init")
  return dataclasses.replace(
    job,
    budget=begun.budget,
    writer=begun.writer,
    notices=[*begun.notices, *job.notices],
    secret=begun.secret,
    init=functools.partial(job.initial, key_data),
  )


def _load(
  config: ml_collections.ConfigDict,
  parts: parts_lib.Parts,
  progress: progress_lib.Progress,
) -> tuple[
  Mesh,
  dataset_lib.Dataset,
  str,
  Callable[[], list[str]],
  str,
  Callable[[], None],
]:
  """Loads what any single process may fail to find: devices and data."""
  progress.enter(-1, "loading")
  # Before features are computed, which may take long.
  setup.check(config)
  resume.refuse_void(config)
  if config.privacy.num_examples:  # 0: not said, and the data says how many.
    config_lib.privacy_config(config)
  parts.make_task(config)
  parts.make_optimizer(config)
  mesh = mesh_lib.make(config.mesh)

  def retried(source: sources.Source) -> retry.RetryingSource:
    return retry.RetryingSource(
      source,
      name=parts_lib.name_of_data(config),
      retry_seconds=config.data.retry_seconds,
      stall_seconds=config.data.stall_seconds,
      tell=console.warn,
    )

  dataset = parts.load_dataset(config)
  train, test = dataset.train, dataset.test
  features_sha256 = sources.encoding_digest(train)
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
  if not num_rows:
    raise errors.ArgumentError(
      f"{parts_lib.name_of_data(config)} must have a row or more to train on,"
      " got 0"
    )
  if num_rows != config.privacy.num_examples:
    what = {"example": "training examples", "user": "users to train on"}[unit]
    raise errors.ArgumentError(
      f"privacy.num_examples must be the number of {what}, {num_rows}, got"
      f" {config.privacy.num_examples}",
      hint=errors.Hint(flags=(f"--config.privacy.num_examples={num_rows}",)),
    )
  dataset = dataset_lib.Dataset(train, retried(test))
  return mesh, dataset, manifest, earlier, features_sha256, examples.close
