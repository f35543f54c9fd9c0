"""A private training run, in the order in which things happen.

Promises of that order:
  * Every check that can fail on bad settings comes before a step is charged, so
    that a mistake costs no budget.
  * The ledger has charged a step before the step is computed, and the budget
    that the data set's runs share, if there is one, has been told. What was
    charged and never begun is given back; see `dpdist.workdir.charging`.
  * A checkpoint is saved when all steps in it are charged, and recorded in the
    ledger when it is durable.
  * Only released values reach a writer or the screen; see
    `dpdist.reporting.metrics`.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from dpdist import config as config_lib
from dpdist.data import pipeline
from dpdist.data import sources
from dpdist.data import users
from dpdist.distributed import collectives
from dpdist.distributed import mesh as mesh_lib
from dpdist.distributed import preemption
from dpdist.distributed import progress as progress_lib
from dpdist.distributed import watchdog
from dpdist.keys import keys
from dpdist.ledger import epsilon_recorder
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.privacy import composition
from dpdist.reporting import console
from dpdist.reporting import report
from dpdist.reporting import run_reporter
from dpdist.reporting import telemetry
from dpdist.sensitivity import sentinel as sentinel_lib
from dpdist.training import data_checks
from dpdist.training import dry_run
from dpdist.training import setup
from dpdist.training import step as step_lib
from dpdist.training import step_sentinel
from dpdist.training import summary
from dpdist.workdir import charging as charging_lib
from dpdist.workdir import checkpoints as checkpoints_lib
from dpdist.workdir import fingerprint
from dpdist.workdir import resume

# What each process of a job comes to by itself, about its settings or its run.
_OWN_ERRORS = (
  resume.SettingsError,
  checkpoints_lib.MismatchError,
  ledger_lib.LedgerError,
  sentinel_lib.SensitivityError,
)


def train(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
  """Trains, or goes on training, under the config's privacy budget.

  Called again with the same arguments after any interruption, it goes on from
  the last checkpoint and ends with the same parameters, bit for bit.

  Args:
    config: settings; see `dpdist.config.default`.
    workdir: a local directory for everything the run writes; made if missing.

  Returns:
    What `result.json` holds.

  Raises:
    dpdist.workdir.resume.SettingsError: a ValueError; a setting is wrong, or
      differs from the run that workdir holds.
    dpdist.workdir.checkpoints.MismatchError: likewise; the model or optimizer
      differs.
    dpdist.ledger.ledger.LedgerError: the ledger is damaged or has another
      writer.
    dpdist.distributed.collectives.PeerError: another of the job's processes
      raised one of these,
      failed or was lost. Where this one cannot raise, because it hangs in a
      collective, it ends.
    dpdist.data.sources.ReadError: the data could not be read, for long; what is
      saved and charged so far is gone on with.
    dpdist.data.sources.ChangedError: files of the data were changed meanwhile.
    dpdist.distributed.preemption.Preempted: a signal asked to stop; all is
      saved.
    dpdist.sensitivity.sentinel.SensitivityError: clipping does not bound what
      an example
      can do; before a step is charged, or after one that is saved.
  """
  try:
    config_lib.check(config)
  except ValueError as error:
    raise resume.SettingsError(str(error)) from error
  workdir = pathlib.Path(workdir)
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(preemption.Notice())
    progress = progress_lib.Progress()
    stack.enter_context(
      watchdog.Watch(progress, config.stuck_after, own=_OWN_ERRORS)
    )
    ledger: ledger_lib.Ledger | None = None

    def open_ledger() -> None:
      nonlocal ledger
      ledger = stack.enter_context(resume.open_ledger(config, workdir))

    collectives.from_leader(open_ledger)
    job = setup.prepare(
      config,
      workdir,
      ledger,
      try_out=functools.partial(dry_run.run, config, progress),
    )
    stack.callback(job.close)
    checkpoints = stack.enter_context(
      checkpoints_lib.Checkpoints(
        workdir / "checkpoints",
        writer=job.writer,
        max_to_keep=config.max_checkpoints,
        frozen_sha256=job.frozen_sha256,
      )
    )
    return _run(config, workdir, job, checkpoints, stop, progress)


class _Line(NamedTuple):
  """The line of steps that a run goes on with.

  Attributes:
    branch: the identity of its keys.
    first_step: of the branch.
    first_release: that of step 0; see `dpdist.ledger.history.Branch.release`.
    last: where it must end.
    epsilon_planned: of the run, by then.
  """

  branch: str
  first_step: int
  first_release: int
  last: int
  epsilon_planned: float


def _run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  job: setup.Job,
  checkpoints: checkpoints_lib.Checkpoints,
  stop: preemption.Notice,
  progress: progress_lib.Progress,
) -> dict[str, Any]:
  plan, step, ledger = job.plan, job.step, job.ledger
  environment = fingerprint.environment(job.mesh)
  environments = collectives.gather(json.dumps(environment))

  state = job.init()
  saved, rejected = job.found
  ledger_head = ""
  if saved is not None:
    state, ledger_head = checkpoints.restore(state, saved)
  start = int(state.step)

  def go_on() -> _Line:
    assert ledger is not None
    # Now that nothing can fail any more on settings that do not fit.
    if job.changes:
      ledger.open_segment(
        config=job.settings,
        plan=plan,
        data=job.train_manifest,
        start_step=start,
      )
    branch = ledger.resume(
      step=start,
      digest=saved.digest if saved else "",
      ledger_head=ledger_head,
      fingerprint=fingerprint.fingerprint(
        # As it was chosen: sums of other chunks round otherwise.
        config.to_dict() | {"chunk_size": job.chunk_size},
        plan.fingerprint(),
        job.train_manifest,
        [json.loads(text) for text in environments],
        job.made_of,
      ),
    )
    if rejected and ledger.last_step == 0:
      # Going on would end with the initial parameters.
      raise ledger_lib.LedgerError(
        "no checkpoint can be restored, and the plan is spent; "
        + "; ".join(rejected)
      )
    config_lib.save(workdir, config)
    epsilon_planned = composition.guaranteed([*ledger.bounds, ledger.planned])
    return _Line(
      branch.identity,
      branch.start_step,
      branch.release(0),
      ledger.last_step,
      epsilon_planned,
    )

  line = _Line(*collectives.from_leader(go_on))
  first_release, last, epsilon_planned = line[2:]
  streams = mechanism.Streams(job.secret, line.branch)
  noise_key = streams.key("noise")

  if collectives.any_process(stop.received) and start < last:
    raise preemption.Preempted(start, stop.reason)
  sentinel = _sentinel(config, job, streams, line.first_step)
  if start < last:
    progress.enter(start, "compiling")
    step_sentinel.check_step(
      step,
      state.params,
      job.frozen,
      row=job.row,
      largest=setup.largest_integers(config, job.row),
      chunk_size=job.chunk_size,
      is_watched=config.sentinel.every > 0,
    )
  notices = [*job.notices, *rejected]
  if job.changes:
    notices.append("settings changed: " + "; ".join(job.changes))
  rows: list[tuple[str, str]] = []
  if ledger is not None:
    rows = summary.start_rows(
      job,
      ledger.planned,
      epsilon=epsilon_planned,
      start_step=start,
      sentinel_every=config.sentinel.every,
    )
    console.show_start(rows, notices)
    if saved is None and start < last:
      # Among no notices, which are in the report as well.
      shared = data_checks.shared_rows(job.train_source, job.test)
      if shared:
        console.warn(shared)

  num_entries = sum(leaf.size for leaf in jax.tree.leaves(job.params))
  scores: dict[str, float] = {}
  num_steps = config.privacy.num_steps
  eval_every = config.eval_every or max(1, num_steps // 20)
  save_every = config.checkpoint_every or max(1, num_steps // 10)
  # Steps are kept or lost together with a checkpoint, so one charge serves all
  # that come before it; and no run needs more than a hundred.
  charge_every = max(save_every, history.most_steps(plan))
  shown: contextlib.AbstractContextManager[run_reporter.Display | None] = (
    contextlib.nullcontext()
    if ledger is None
    else run_reporter.Display(config, workdir, start, last, epsilon_planned)
  )
  told: contextlib.AbstractContextManager[epsilon_recorder.Odometer | None] = (
    contextlib.nullcontext()
    if ledger is None
    else epsilon_recorder.Odometer(ledger)
  )
  charging = charging_lib.Charges(ledger, job.budget, start)
  with shown as display, told as odometer, charging as charges:
    clock = run_reporter.Clock(plan.expected_batch_size)
    measured = start
    progress.enter(start, "reading")
    for t, chunks in _steps(config, job, streams, first_release, start, last):
      # All wait for it: a sum may pass between the others before the leader
      # takes part in it.
      if t == start or t % charge_every == 0:
        progress.enter(t, "charging")
        stop_step = min(last, t - t % charge_every + charge_every)
        charges.through(stop_step)

      progress.enter(t, "computing")
      accumulator = step.zeros(state.params)
      sentinel.begin(t, state.params)
      step_key = streams.key("model_rng", t)
      charges.begin(t)
      for first_row, batch, is_padding_example in chunks:
        accumulator = sentinel.accumulate(
          state.params,
          accumulator,
          batch,
          is_padding_example,
          step_key,
          first_row,
        )
      if jax.process_count() > 1:
        # So that who is slow can be told from who waits.
        jax.block_until_ready(accumulator.stats)
        progress.enter(t, "reducing")
      # Given only where it is used, so that other programs stay as they are.
      release = [np.int32(first_release + t)] if len(plan.settings) > 1 else []
      state, released = step.apply(state, accumulator, noise_key, *release)
      # One step in flight: more would only pile up their inputs.
      jax.block_until_ready(released)

      done = t + 1
      progress.enter(t, "agreeing")
      if odometer is not None:
        odometer.poll()
      is_stopped = collectives.any_process(stop.received)
      found = sentinel.end()
      if found:
        collectives.from_leader(functools.partial(_record_void, job))
      clock.tick()
      if display is not None:
        display.update(done)
      if done % eval_every == 0 or done == last:
        progress.enter(t, "evaluating")
        machines = collectives.gather(
          telemetry.measure(progress, done - measured)
        )
        measured = done
        _check_data(job)
        with clock.paused():
          scores = _scores(job, state)
          sensitive: dict[str, float] = {}
          if config.unsafe_metrics:
            sensitive = _sensitive(step.stats(accumulator))
          if ledger is not None and display is not None:
            values = {
              "epsilon": composition.epsilon(ledger.spent_through(done)),
              "learning_rate": float(job.learning_rate(t)),
              "noisy_gradient_norm": float(released["noisy_gradient_norm"]),
              "noise_norm": step.mechanism.noise_norm(
                num_entries, first_release + t
              ),
              "examples_per_second": clock.examples_per_second(),
            }
            display.tell(done, values, scores, sensitive, machines)
      if done % save_every == 0 or done == last or is_stopped or found:
        progress.enter(t, "saving")
        _check_data(job)
        with clock.paused():
          _save(job, checkpoints, state, done)
        # A signal during the save need not cost another one.
        is_stopped = collectives.any_process(stop.received)
      if found:
        whole = step_lib.whole(state.params, job.frozen)
        raise sentinel_lib.SensitivityError(
          sentinel_lib.fault(step.mechanism.clipped_grad, whole, job.row, found)
        )
      if is_stopped and done < last:
        raise preemption.Preempted(done, stop.reason)
      progress.enter(done, "reading")
    progress.enter(last, "finishing")
    if odometer is not None:
      odometer.poll(wait=True)

  scores = scores or _scores(job, state)
  # In all processes, each of which may have a part alone.
  params_sha256 = fingerprint.params_sha256(state.params)

  def finish() -> dict[str, Any]:
    assert ledger is not None
    result = summary.result(
      job,
      ledger,
      num_steps=int(state.step),
      sentinel_every=config.sentinel.every,
      scores=scores,
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
      notices=notices,
      epsilon_budget=epsilon_planned,
    )
    report.write_speed(workdir / telemetry.FOLDER)
    console.show_end(summary.end_rows(result, workdir))
    console.show_text(statement)
    return result

  return dict(collectives.from_leader(finish))


def _sentinel(
  config: ml_collections.ConfigDict,
  job: setup.Job,
  streams: mechanism.Streams,
  first_step: int,
) -> step_sentinel.Sentinel:
  return step_sentinel.Sentinel(
    job.step,
    job.frozen,
    streams,
    every=config.sentinel.every,
    first_step=first_step,
  )


def _record_void(job: setup.Job) -> None:
  """Records that clipping did not bound what an example can do."""
  assert job.ledger is not None
  job.ledger.notice(history.TOO_LONG)


def _check_data(job: setup.Job) -> None:
  """Stops the run, in all processes, if files of its data were changed.

  Before anything is shown or saved of steps that may have read them. That their
  noise hides what it should cannot be said any more, so the record says so.
  """
  changed = collectives.in_all(lambda: sources.changed_files(job.train_source))
  if not collectives.any_process(bool(changed)):
    return

  def record() -> None:
    assert job.ledger is not None
    job.ledger.notice(sources.CHANGED, unsound=True)

  collectives.from_leader(record)
  raise sources.changed_error(changed)


def _save(
  job: setup.Job,
  checkpoints: checkpoints_lib.Checkpoints,
  state: step_lib.TrainState,
  done: int,
) -> None:
  """Saves a checkpoint in all processes, and records it."""
  ledger = job.ledger

  def confirm() -> str:
    assert ledger is not None
    ledger.confirm()
    return ledger.head

  head = collectives.from_leader(confirm)
  digest = checkpoints.save(state, step=done, ledger_head=head)
  if ledger is not None:
    ledger.record_checkpoint(done, digest)
    checkpoints.delete_old(ledger.checkpoints)


def _steps(
  config: ml_collections.ConfigDict,
  job: setup.Job,
  streams: mechanism.Streams,
  first_release: int,
  start: int,
  last: int,
) -> Iterator[tuple[int, Iterator[tuple[int, Any, jax.Array]]]]:
  """Yields each step and its chunks, on the mesh."""

  def put(x: np.ndarray) -> jax.Array:
    return mesh_lib.put_rows(x, job.chunk_size, job.mesh)

  def on_mesh(
    chunks: Sequence[pipeline.Chunk],
  ) -> Iterator[tuple[int, Any, jax.Array]]:
    for i, chunk in enumerate(chunks):
      batch, is_padding_example = jax.tree.map(put, tuple(chunk))
      yield i * job.chunk_size, batch, is_padding_example

  source: pipeline.Rows = job.train_source
  if isinstance(source, users.UnitSource):
    key = keys.derive(job.secret, "unit_examples", branch=streams.branch)
    source = source.drawing(key)
  for t, chunks in pipeline.steps(
    source,
    streams.sampler(job.plan, first_release),
    start_step=start,
    num_steps=last,
    chunk_size=job.chunk_size,
    rows=mesh_lib.local_rows(job.mesh, job.chunk_size),
    num_threads=config.data.num_threads,
    prefetch=config.data.prefetch,
  ):
    yield t, on_mesh(chunks)


def _scores(job: setup.Job, state: step_lib.TrainState) -> dict[str, float]:
  """Held-out metrics of the parameters and of their average."""
  params = step_lib.whole(state.params, job.frozen)
  scores = {f"test/{k}": v for k, v in job.evaluate(params).items()}
  if state.ema_params is not None:
    average = job.evaluate(step_lib.whole(state.ema_params, job.frozen))
    scores |= {f"test_ema/{k}": v for k, v in average.items()}
  return scores


def _sensitive(stats: step_lib.Stats) -> dict[str, float]:
  examples = max(1, int(stats.num_examples))
  return {
    "train_loss": float(stats.loss) / examples,
    "batch_size": int(stats.num_examples),
    "clip_fraction": int(stats.num_clipped) / examples,
    "num_nonfinite": int(stats.num_nonfinite),
  }
