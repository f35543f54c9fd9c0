"""Runs private training from start to end, in a fixed order.

Promises of that order:
  * Every check that can fail on bad settings comes before a step is charged, so
    that a mistake costs no budget.
  * The ledger has charged a step before the step is computed, and the data
    set's budget, if there is one, has recorded it. What was charged and never
    begun is given back; see `dpdist.workdir.session`.
  * A checkpoint is saved only when all steps in it are charged, and recorded in
    the ledger only when it is durable.
  * Only released values reach a writer or the screen; see
    `dpdist.reporting.metrics`.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import ml_collections
import numpy as np
import optax

from dpdist import config as config_lib
from dpdist import errors
from dpdist.data import sources
from dpdist.distributed import collectives
from dpdist.distributed import preemption
from dpdist.distributed import progress as progress_lib
from dpdist.distributed import watchdog
from dpdist.files import places
from dpdist.ledger import epsilon_recorder
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import stores
from dpdist.privacy import composition
from dpdist.reporting import console
from dpdist.reporting import report
from dpdist.reporting import run_reporter
from dpdist.reporting import telemetry
from dpdist.tasks import parts as parts_lib
from dpdist.training import data_checks
from dpdist.training import dry_run
from dpdist.training import job as job_lib
from dpdist.training import loop as loop_lib
from dpdist.training import setup
from dpdist.training import step_sentinel
from dpdist.training import summary
from dpdist.workdir import checkpoints as checkpoints_lib
from dpdist.workdir import fingerprint
from dpdist.workdir import manifest
from dpdist.workdir import resume
from dpdist.workdir import session as session_lib
from dpdist.workdir import statistics as statistics_lib

# Errors that each process reaches by itself, about its settings or its run.
_OWN_ERRORS = (
  errors.SettingsError,
  errors.MismatchError,
  errors.LedgerError,
  errors.SensitivityError,
)


def train(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  *,
  task: Any = None,
  dataset: Any = None,
  optimizer: optax.GradientTransformation | None = None,
) -> dict[str, Any]:
  """Trains, or goes on training, under the config's privacy budget.

  Called again with the same arguments after any interruption, it goes on from
  the last checkpoint and ends with the same parameters, bit for bit.

  Args:
    config: settings; see `dpdist.config.default`.
    workdir: a local directory for everything the run writes; made if missing.
    task: what is trained: a `dpdist.Task`, or an object with its attributes;
      None: what the config names.
    dataset: what it is trained on: a `dpdist.Dataset`, or an object with its
      attributes; None: what the config names.
    optimizer: what turns noisy means into updates; None: what the config names.

  Returns:
    The contents of `result.json`.

  Raises:
    dpdist.errors.SettingsError: a ValueError; a setting is wrong, or differs
      from the run that workdir holds.
    dpdist.errors.MismatchError: a ValueError; the model or optimizer differs.
    dpdist.errors.LedgerError: the ledger is damaged or has another writer.
    dpdist.errors.PeerError: another of the job's processes raised one of these,
      failed or was lost. If this process cannot raise, because it hangs in a
      collective, it ends.
    dpdist.errors.ReadError: the data could not be read for a long time. A new
      start goes on from what is saved and charged so far.
    dpdist.errors.ChangedError: files of the data were changed meanwhile.
    dpdist.errors.Preempted: a signal asked to stop; everything is saved.
    dpdist.errors.SensitivityError: clipping does not bound what an example can
      do; raised before a step is charged, or after one that is saved.
  """
  config, workdir, parts = _checked(config, workdir, task, dataset, optimizer)
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(preemption.Notice())
    stack.enter_context(stores.patience(config.store_timeout))
    phases = stack.enter_context(console.Phases())
    is_shown = collectives.is_primary()
    progress = progress_lib.Progress(phases.enter if is_shown else None)
    stack.enter_context(
      watchdog.Watchdog(progress, config.stuck_after, own=_OWN_ERRORS)
    )
    ledger: ledger_lib.Ledger | None = None

    def open_ledger() -> None:
      nonlocal ledger
      # The ledger's plans may name code of these settings, and no other.
      job_lib.load_code(config.privacy)
      ledger = stack.enter_context(resume.open_ledger(config, workdir))
      resume.fetch_checkpoint(config, workdir, ledger)

    collectives.run_on_primary(open_ledger)
    job = job_lib.prepare(
      config,
      workdir,
      ledger,
      parts,
      progress=progress,
      try_out=functools.partial(dry_run.run, config, progress),
    )
    stack.callback(job.close)
    checkpoints = stack.enter_context(
      checkpoints_lib.Checkpoints(
        workdir / "checkpoints",
        writer=job.writer,
        max_to_keep=config.max_checkpoints,
        frozen_sha256=job.made_of.get("frozen_sha256", ""),
        copies=resume.open_copies(config, job.ledger),
      )
    )
    return _run(config, workdir, job, checkpoints, stop, progress)


def _checked(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  task: Any,
  dataset: Any,
  optimizer: optax.GradientTransformation | None,
) -> tuple[ml_collections.ConfigDict, pathlib.Path, parts_lib.Parts]:
  """Returns the settings, complete, the path, and the parts that were given."""
  try:
    path = places.directory(workdir)
    config_lib.check(config)
    parts = parts_lib.of(task, dataset, optimizer)
    return parts.settings(config_lib.resolve(config)), path, parts
  except ValueError as error:
    raise errors.SettingsError(
      str(error), hint=getattr(error, "hint", None)
    ) from error


def _run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  job: job_lib.Job,
  checkpoints: checkpoints_lib.Checkpoints,
  stop: preemption.Notice,
  progress: progress_lib.Progress,
) -> dict[str, Any]:
  """Makes the steps that are left, and writes the results."""
  environment = fingerprint.environment(job.mesh)
  state, ledger_head = job.init(), ""
  if job.found.saved is not None:
    state, ledger_head = checkpoints.restore(state, job.found.saved)
  start = int(state.step)
  position, epsilon_planned = _resume(
    config, workdir, job, start, ledger_head, environment
  )
  last = position.last_step
  if collectives.any_process(stop.received) and start < last:
    raise errors.Preempted(start, stop.reason)
  if start < last:
    progress.enter(start, "checking")
    step_sentinel.check_step(
      job.step,
      state.params,
      job.frozen,
      row=job.row,
      largest=setup.largest_integers(job.task, job.row, lambda: job.test),
      chunk_size=job.chunk_size,
      is_watched=config.sentinel.every > 0,
    )
  progress.enter(start, "starting")
  rows = _show_start(config, job, start, last, epsilon_planned)
  with contextlib.ExitStack() as stack:
    observers: list[loop_lib.Observer] = []
    if job.ledger is not None:
      reporter = run_reporter.RunReporter(
        config,
        workdir,
        start,
        last,
        epsilon_planned,
        held_out=job.evaluate.names,
      )
      recorder = epsilon_recorder.EpsilonRecorder(job.ledger)
      observers += [stack.enter_context(reporter)]
      observers += [stack.enter_context(recorder)]
    session = session_lib.Session(
      job.ledger,
      checkpoints,
      job.secret,
      position,
      start_step=start,
      budget=job.budget,
    )
    stack.enter_context(session)
    if job.statistics is not None:
      job, released = _release_statistics(
        workdir, job, session, start, last, progress
      )
      checkpoints.statistics = released
      rows += statistics_lib.rows(released)
    loop = loop_lib.Loop(
      config,
      job,
      session,
      state,
      progress=progress,
      stop=stop,
      observers=observers,
    )
    # Only the loop holds the state: otherwise a device that did not donate its
    # part would keep the first state to the end.
    del state
    loop.run()
    progress.enter(last, "finishing")
    if job.ledger is not None:
      recorder.poll(wait=True)
  return _finish(config, workdir, job, epsilon_planned, loop, environment, rows)


def _release_statistics(
  workdir: pathlib.Path,
  job: job_lib.Job,
  session: session_lib.Session,
  start: int,
  last: int,
  progress: progress_lib.Progress,
) -> tuple[job_lib.Job, dict[str, Any]]:
  """Releases the data's private statistics, which a charged step pays for.

  Returns the job with data that they are applied to, and what was released; in
  all processes the same.
  """
  statistics = job.statistics
  assert statistics is not None
  if start < last:
    progress.enter(start, "charging")
    session.charge(start + 1)
    # From here on the step's charge is not given back.
    session.begin(start)
  progress.enter(start, "loading")
  saved, folder = job.found.saved, workdir / "checkpoints"

  def release() -> dict[str, Any]:
    assert job.ledger is not None
    return statistics_lib.release(
      job.ledger,
      job.secret,
      statistics=statistics,
      source=job.train_source,
      plan=job.plan,
      data=job.train_digest,
      earlier=saved and manifest.statistics(manifest.location(folder, saved)),
    )

  released = dict(collectives.run_on_primary(release))
  # Before anything is written or shown of rows that may have changed.
  session.check_data(lambda: sources.changed_files(job.train_source))

  def show() -> None:
    statistics_lib.write(workdir, released)
    console.show_table("Released", statistics_lib.rows(released))

  collectives.run_on_primary(show)
  columns = released["columns"]
  test = collectives.run_on_all(
    lambda: _all_of(sources.with_statistics(job.test_source, columns))
  )
  job = dataclasses.replace(
    job,
    train_source=sources.with_statistics(job.train_source, columns),
    test=test,
    evaluate=job.evaluate.on(test),
  )
  return job, released


def _all_of(source: sources.Source) -> dict[str, np.ndarray]:
  return source.read(np.arange(len(source)))


def _resume(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  job: job_lib.Job,
  start: int,
  ledger_head: str,
  environment: dict[str, Any],
) -> tuple[session_lib.Position, float]:
  """Returns the position of the ledger's branch, or a new one, and epsilon."""
  environments = collectives.gather(json.dumps(environment))
  saved, rejected = job.found

  def resume_branch() -> tuple[session_lib.Position, float]:
    ledger = job.ledger
    assert ledger is not None
    # From here on nothing can fail on settings that do not fit.
    if job.changes:
      ledger.open_segment(
        config=job.settings,
        plan=job.plan,
        data=job.train_digest,
        start_step=start,
      )
    ledger.resume(
      step=start,
      digest=saved.digest if saved else "",
      ledger_head=ledger_head,
      fingerprint=job_lib.fingerprint_of(
        config, job, [json.loads(text) for text in environments]
      ),
    )
    if rejected and ledger.last_step == 0:
      # Going on would end with the initial parameters.
      raise errors.LedgerError(
        "no checkpoint can be restored, and the plan is spent; "
        + "; ".join(rejected)
      )
    config_lib.save(workdir, config)
    epsilon = composition.guaranteed([*ledger.bounds, ledger.planned])
    return session_lib.Position.of(ledger), epsilon

  position, epsilon = collectives.run_on_primary(resume_branch)
  return session_lib.Position(*position), epsilon


def _notices(job: job_lib.Job) -> list[str]:
  """Returns what must be shown with any figure from this run."""
  notices = [*job.notices, *job.found.rejected]
  if job.changes:
    notices.append("settings changed: " + "; ".join(job.changes))
  return notices


def _show_start(
  config: ml_collections.ConfigDict,
  job: job_lib.Job,
  start: int,
  last: int,
  epsilon_planned: float,
) -> list[tuple[str, str]]:
  """Shows what will run; returns the rows in the primary process."""
  if job.ledger is None:
    return []
  rows = summary.start_rows(
    job,
    job.ledger.planned,
    epsilon=epsilon_planned,
    start_step=start,
    sentinel_every=config.sentinel.every,
  )
  console.show_start(rows, _notices(job))
  if job.found.saved is None and start < last:
    # Not among the notices, which are in the report as well.
    shared = data_checks.shared_rows(job.train_source, job.test)
    if shared:
      console.warn(shared)
  return rows


def _finish(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  job: job_lib.Job,
  epsilon_planned: float,
  loop: loop_lib.Loop,
  environment: dict[str, Any],
  rows: list[tuple[str, str]],
) -> dict[str, Any]:
  """Writes and shows the result; returns it in all processes."""
  scores, tables = loop.measured_scores(), loop.tables()
  # In all processes: each may have only a part of the parameters.
  params_sha256 = fingerprint.params_sha256(loop.state.params)

  def finish() -> dict[str, Any]:
    ledger = job.ledger
    assert ledger is not None
    result = summary.result(
      job,
      ledger,
      num_steps=int(loop.state.step),
      sentinel_every=config.sentinel.every,
      scores=scores,
      tables=tables,
      params_sha256=params_sha256,
      environment=fingerprint.public(environment),
    )
    summary.write_result(workdir / "result.json", result)
    statement = composition.statement(ledger.planned, result["epsilon"])
    report.write(
      workdir,
      result=result,
      statement=statement,
      rows=rows,
      notices=_notices(job),
      epsilon_budget=epsilon_planned,
      about=summary.about(config),
    )
    report.write_speed(workdir / telemetry.FOLDER)
    console.show_table("Finished", summary.end_rows(result, workdir))
    console.show_text(summary.in_short(result, job.plan, workdir))
    return result

  return dict(collectives.run_on_primary(finish))
