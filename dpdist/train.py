"""A private training run, in the order in which things happen.

Promises of that order:
  * Every check that can fail on bad settings comes before a step is charged, so
    that a mistake costs no budget.
  * The ledger has charged a step before the step is computed, and the budget
    that the data set's runs share, if there is one, has been told.
  * A checkpoint is saved when all steps in it are charged, and recorded in the
    ledger when it is durable.
  * Only released values reach a writer or the screen; see `dpdist.metrics`.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from dpdist import checkpoint
from dpdist import composition
from dpdist import data
from dpdist import history
from dpdist import job as job_lib
from dpdist import ledger as ledger_lib
from dpdist import losses
from dpdist import mechanism
from dpdist import mesh as mesh_lib
from dpdist import metrics
from dpdist import preemption
from dpdist import provenance
from dpdist import report
from dpdist import screen
from dpdist import step as step_lib
from dpdist import summary

_Evaluate = Callable[[Any], dict[str, float]]


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
    dpdist.job.SettingsError: a ValueError; a setting is wrong, or differs from
      the run that workdir holds.
    dpdist.checkpoint.MismatchError: likewise; the model or optimizer differs.
    dpdist.ledger.LedgerError: the ledger is damaged or has another writer.
    dpdist.preemption.Preempted: a signal asked to stop; all is saved.
  """
  workdir = pathlib.Path(workdir)
  with (
    preemption.Notice() as stop,
    job_lib.open_ledger(config, workdir) as ledger,
  ):
    job = job_lib.prepare(config, workdir, ledger)
    with checkpoint.Checkpoints(
      workdir / "checkpoints",
      writer=ledger.writer,
      max_to_keep=config.max_checkpoints,
    ) as checkpoints:
      return _run(config, workdir, job, checkpoints, stop)


def _run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  job: job_lib.Job,
  checkpoints: checkpoint.Checkpoints,
  stop: preemption.Notice,
) -> dict[str, Any]:
  plan, step, ledger = job.plan, job.step, job.ledger
  environment = provenance.environment(job.mesh)

  state = step.init(job.params)
  saved, rejected = job.found
  ledger_head = ""
  if saved is not None:
    state, ledger_head = checkpoints.restore(state, saved)
  start = int(state.step)
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
    fingerprint=provenance.fingerprint(
      config.to_dict(), plan.fingerprint(), job.train_manifest, environment
    ),
  )
  last = ledger.last_step
  if rejected and last == 0:
    # Going on would end with the initial parameters.
    raise ledger_lib.LedgerError(
      "no checkpoint can be restored, and the plan is spent; "
      + "; ".join(rejected)
    )
  streams = mechanism.Streams(job.secret, branch.identity)
  noise_key = streams.key("noise")

  if stop.received and start < last:
    raise preemption.Preempted(start)
  rows = summary.start_rows(job, start_step=start)
  notices = [*ledger.notices, *rejected]
  if job.changes:
    notices.append("settings changed: " + "; ".join(job.changes))
  screen.show_start(rows, notices)

  evaluate = losses.evaluator(job.model, job.test, job.mesh)
  scores: dict[str, float] = {}
  num_steps = config.privacy.num_steps
  eval_every = config.eval_every or max(1, num_steps // 20)
  save_every = config.checkpoint_every or max(1, num_steps // 10)
  # Steps are kept or lost together with a checkpoint, so one charge serves all
  # that come before it; but a run is charged in a hundred parts at most, since
  # each wants its epsilon.
  charge_every = max(save_every, history.most_steps(plan))
  epsilon_planned = composition.epsilon(ledger.planned)
  with (
    metrics.Writer(
      workdir, unsafe_metrics=config.unsafe_metrics, start_step=start
    ) as writer,
    screen.Progress(last, start, epsilon_planned) as progress,
  ):
    clock = _Clock(plan.expected_batch_size)
    for t, chunks in _steps(config, job, streams, start, last):
      if ledger.reserve_through(min(last, t - t % charge_every + charge_every)):
        if job.budget is not None:
          job.budget.follow(ledger)
        ledger.record_epsilons(
          spent=composition.epsilons(ledger.spent),
          planned=composition.epsilons(ledger.planned),
        )

      accumulator = step.zeros(state.params)
      step_key = streams.key("model_rng", t)
      for first_row, batch, is_padding_example in chunks:
        accumulator = step.accumulate(
          state.params,
          accumulator,
          batch,
          is_padding_example,
          step_key,
          first_row,
        )
      state, released = step.apply(state, accumulator, noise_key)
      # One step in flight: more would only pile up their inputs.
      jax.block_until_ready(released)

      done = t + 1
      clock.tick()
      progress.update(done)
      if done % eval_every == 0 or done == last:
        with clock.paused():
          scores = _scores(evaluate, state)
          values = {
            "epsilon": composition.epsilon(ledger.spent_through(done)),
            "learning_rate": float(job.learning_rate(t)),
            "noisy_gradient_norm": float(released["noisy_gradient_norm"]),
            "examples_per_second": clock.examples_per_second(),
          }
          writer.write(done, values | scores)
          if config.unsafe_metrics:
            writer.write_sensitive(done, _sensitive(step.stats(accumulator)))
          progress.update(
            done,
            epsilon=values["epsilon"],
            examples_per_second=values["examples_per_second"],
            metrics=scores,
          )
      if done % save_every == 0 or done == last or stop.received:
        with clock.paused():
          ledger.confirm()
          digest = checkpoints.save(state, step=done, ledger_head=ledger.head)
          ledger.record_checkpoint(done, digest)
          checkpoints.delete_old(ledger.checkpoints)
      if stop.received and done < last:
        raise preemption.Preempted(done)

  result = summary.result(
    job,
    num_steps=int(state.step),
    scores=scores or _scores(evaluate, state),
    params_sha256=provenance.params_sha256(state.params),
    environment=environment,
  )
  summary.write_result(workdir / "result.json", result)
  report.write(
    workdir,
    result=result,
    statement=composition.statement(ledger.planned),
    rows=rows,
    notices=notices,
    epsilon_budget=epsilon_planned,
  )
  screen.show_end(summary.end_rows(result, workdir))
  return result


def _steps(
  config: ml_collections.ConfigDict,
  job: job_lib.Job,
  streams: mechanism.Streams,
  start: int,
  last: int,
) -> Iterator[tuple[int, Iterator[tuple[int, Any, jax.Array]]]]:
  """Yields each step and its chunks, on the mesh."""
  sharding = mesh_lib.examples(job.mesh)

  def put(x: np.ndarray) -> jax.Array:
    shape = (job.chunk_size, *x.shape[1:])
    return jax.make_array_from_process_local_data(sharding, x, shape)

  def on_mesh(
    chunks: Sequence[data.Chunk],
  ) -> Iterator[tuple[int, Any, jax.Array]]:
    for i, chunk in enumerate(chunks):
      batch, is_padding_example = jax.tree.map(put, tuple(chunk))
      yield i * job.chunk_size, batch, is_padding_example

  for t, chunks in data.steps(
    job.train_source,
    streams.sampler(job.plan),
    start_step=start,
    num_steps=last,
    chunk_size=job.chunk_size,
    rows=mesh_lib.local_rows(job.mesh, job.chunk_size),
    num_threads=config.data.num_threads,
    prefetch=config.data.prefetch,
  ):
    yield t, on_mesh(chunks)


def _scores(
  evaluate: _Evaluate, state: step_lib.TrainState
) -> dict[str, float]:
  """Held-out metrics of the parameters and of their average."""
  scores = {f"test/{k}": v for k, v in evaluate(state.params).items()}
  if state.ema_params is not None:
    average = evaluate(state.ema_params)
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


class _Clock:
  """Training speed since the last look, without evaluation and saving.

  Counted in expected examples: how many were really drawn is private.
  """

  def __init__(self, expected_batch_size: float):
    self._expected_batch_size = expected_batch_size
    self._steps = 0
    self._seconds = 0.0
    self._since: float | None = None

  def tick(self) -> None:
    """Counts a step; the first one compiles, and only starts the clock."""
    if self._since is None:
      self._since = time.monotonic()
    else:
      self._steps += 1

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out the time of its block."""
    now = time.monotonic()
    self._seconds += now - (now if self._since is None else self._since)
    yield
    self._since = time.monotonic()

  def examples_per_second(self) -> float:
    """The speed while paused; starts anew."""
    speed = self._steps * self._expected_batch_size / (self._seconds or 1.0)
    self._steps, self._seconds = 0, 0.0
    return speed
