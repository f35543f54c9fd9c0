"""The loop of a run: each step is charged, computed, shown and saved.

It keeps the order that `dpdist.training.train` promises. What only observes, as
the reporter and the recorder of epsilon, is an `Observer`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import ml_collections
import numpy as np

from dpdist import errors
from dpdist.data import pipeline
from dpdist.data import sources
from dpdist.data import users
from dpdist.distributed import collectives
from dpdist.distributed import mesh as mesh_lib
from dpdist.distributed import preemption
from dpdist.distributed import progress as progress_lib
from dpdist.keys import keys
from dpdist.ledger import history
from dpdist.mechanism import stats as stats_lib
from dpdist.reporting import run_reporter
from dpdist.reporting import telemetry
from dpdist.sensitivity import sentinel as sentinel_lib
from dpdist.training import job as job_lib
from dpdist.training import step as step_lib
from dpdist.training import step_sentinel
from dpdist.workdir import session as session_lib

Chunks = Iterator[tuple[int, Any, jax.Array]]


class Observer(Protocol):
  """Observes the loop in its process; it decides nothing."""

  def on_step(self, done: int) -> None:
    """Is called when `done` steps were made."""

  def on_row(self, row: run_reporter.Row) -> None:
    """Is called with what was measured after a step."""


class _Made(NamedTuple):
  """The results of a step; all but `released` is private."""

  accumulator: step_lib.Accumulator
  released: dict[str, jax.Array]


class Loop:
  """Runs a session's steps; all processes must make and run it together."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    job: job_lib.Job,
    session: session_lib.Session,
    state: step_lib.TrainState,
    *,
    progress: progress_lib.Progress,
    stop: preemption.Notice,
    observers: Sequence[Observer] = (),
  ):
    """Stores the arguments; makes no step yet.

    The session charges the steps and saves them, `state` is where they begin,
    and `stop` says when to stop early. Progress and observers are of this
    process.
    """
    self.state = state  # After the last step that was made.
    # Held-out metrics when they were last measured.
    self.scores: dict[str, float] = {}
    self._config, self._job, self._session = config, job, session
    self._progress, self._stop, self._observers = progress, stop, observers
    self._noise_key = session.streams.key("noise")
    self._clock = run_reporter.Clock(job.plan.expected_batch_size)
    self._measured = int(state.step)
    self._sentinel = step_sentinel.Sentinel(
      job.step,
      job.frozen,
      session.streams,
      every=config.sentinel.every,
      first_step=session.position.first_step,
    )

  def run(self) -> None:
    """Makes all steps that are left.

    Raises Preempted if a request to stop came, once the steps so far are saved;
    ChangedError if files of the data were changed; and SensitivityError if an
    example's gradient in the last step, which is saved, was longer than its
    computed norm.
    """
    start, last = int(self.state.step), self._session.position.last_step
    eval_every, save_every, charge_every = self._intervals()
    self._progress.enter(start, "reading")
    for t, chunks in self._steps(start, last):
      # All processes wait for the charge: the others might reduce a sum before
      # the primary process takes part.
      if t == start or t % charge_every == 0:
        self._progress.enter(t, "charging")
        self._session.charge(min(last, t - t % charge_every + charge_every))
      made = self._make(t, chunks)
      done = t + 1
      self._progress.enter(t, "agreeing")
      is_stopped = collectives.any_process(self._stop.received)
      found = self._sentinel.end()
      if found:
        self._session.notice(history.TOO_LONG)
      self._clock.tick()
      for observer in self._observers:
        observer.on_step(done)
      if done % eval_every == 0 or done == last:
        self._measure(t, made)
      # The next step then needs no memory for two sums; the dry run had only
      # one.
      del made
      if done % save_every == 0 or done == last or is_stopped or found:
        self._save(t)
        # A signal during the save then needs no second save.
        is_stopped = collectives.any_process(self._stop.received)
      if found:
        raise errors.SensitivityError(self._fault(found))
      if is_stopped and done < last:
        raise errors.Preempted(done, self._stop.reason)
      self._progress.enter(done, "reading")

  def measured_scores(self) -> dict[str, float]:
    """Returns held-out metrics of the last state, and of its average."""
    return self.scores or self._scores()

  def tables(self) -> dict[str, dict[str, Any]]:
    """Returns held-out metrics that are no numbers; {} if there are none."""
    job, state = self._job, self.state
    found = {}
    for group, params in (
      ("test_tables", state.params),
      ("test_ema_tables", state.ema_params),
    ):
      if params is not None:
        whole = step_lib.whole(params, job.frozen)
        found[group] = job.evaluate.tables(whole)
    return {group: tables for group, tables in found.items() if tables}

  def _intervals(self) -> tuple[int, int, int]:
    """Returns after how many steps to evaluate, to save and to charge."""
    config, num_steps = self._config, self._config.privacy.num_steps
    eval_every = config.eval_every or max(1, num_steps // 20)
    save_every = config.checkpoint_every or max(1, num_steps // 10)
    # Steps are kept or lost together with a checkpoint, so one charge covers
    # all that come before it; and no run needs more than a hundred charges.
    charge_every = max(save_every, history.most_steps(self._job.plan))
    return eval_every, save_every, charge_every

  def _make(self, t: int, chunks: Chunks) -> _Made:
    """Makes a step from the chunks that were drawn for it."""
    step, state, streams = self._job.step, self.state, self._session.streams
    self._progress.enter(t, "computing")
    accumulator = step.begin(state)
    self._sentinel.begin(t, state.params)
    step_key = streams.key("model_rng", t)
    self._session.begin(t)
    for first_row, batch, is_padding_example in chunks:
      accumulator = self._sentinel.accumulate(
        state.params,
        accumulator,
        batch,
        is_padding_example,
        step_key,
        first_row,
      )
    if jax.process_count() > 1:
      # So that a slow process can be told from one that waits.
      jax.block_until_ready(accumulator.stats)
      self._progress.enter(t, "reducing")
    # Passed only where it is used, so that other programs stay the same.
    release_index: list[np.int32] = []
    if len(self._job.plan.phases) > 1:
      release_index = [np.int32(self._session.position.first_release + t)]
    self.state, released = step.apply(
      state, accumulator, self._noise_key, *release_index
    )
    # One step in flight: more would only pile up their inputs.
    jax.block_until_ready(released)
    return _Made(accumulator, released)

  def _measure(self, t: int, made: _Made) -> None:
    """Evaluates the state, and passes a row to the observers."""
    done, job = t + 1, self._job
    self._progress.enter(t, "evaluating")
    machines = collectives.gather(
      telemetry.measure(self._progress, done - self._measured)
    )
    self._measured = done
    self._check_data()
    with self._clock.paused():
      self.scores = self._scores()
      sensitive: dict[str, float] = {}
      if self._config.unsafe_metrics:
        sensitive = _sensitive(job.step.stats(made.accumulator))
      if not self._observers:
        return
      num_entries = sum(leaf.size for leaf in jax.tree.leaves(job.params))
      release_index = self._session.position.first_release + t
      values = {
        "epsilon": self._session.epsilon(done),
        **self._learning_rate(t),
        "noisy_gradient_norm": float(made.released["noisy_gradient_norm"]),
        "noise_norm": job.step.mechanism.noise_norm(num_entries, release_index),
        "examples_per_second": self._clock.examples_per_second(),
      }
      row = run_reporter.Row(done, values, self.scores, sensitive, machines)
      for observer in self._observers:
        observer.on_row(row)

  def _learning_rate(self, t: int) -> dict[str, float]:
    rate = self._job.learning_rate
    return {} if rate is None else {"learning_rate": float(rate(t))}

  def _save(self, t: int) -> None:
    self._progress.enter(t, "saving")
    self._check_data()
    with self._clock.paused():
      self._session.save(self.state, t + 1)

  def _check_data(self) -> None:
    source = self._job.train_source
    self._session.check_data(lambda: sources.changed_files(source))

  def _scores(self) -> dict[str, float]:
    job, state = self._job, self.state
    params = step_lib.whole(state.params, job.frozen)
    scores = {f"test/{k}": v for k, v in job.evaluate(params).items()}
    if state.ema_params is not None:
      average = job.evaluate(step_lib.whole(state.ema_params, job.frozen))
      scores |= {f"test_ema/{k}": v for k, v in average.items()}
    return scores

  def _fault(self, found: list[int]) -> str:
    whole = step_lib.whole(self.state.params, self._job.frozen)
    clipped_grad = self._job.step.mechanism.clipped_grad
    return sentinel_lib.fault(clipped_grad, whole, self._job.row, found)

  def _steps(self, start: int, last: int) -> Iterator[tuple[int, Chunks]]:
    """Yields each step and its chunks, on the mesh."""
    job, streams, data = self._job, self._session.streams, self._config.data

    def put(x: np.ndarray) -> jax.Array:
      return mesh_lib.put_rows(x, job.chunk_size, job.mesh)

    def on_mesh(chunks: Sequence[pipeline.Chunk]) -> Chunks:
      for i, chunk in enumerate(chunks):
        batch, is_padding_example = jax.tree.map(put, tuple(chunk))
        yield i * job.chunk_size, batch, is_padding_example

    source: pipeline.Rows = job.train_source
    if isinstance(source, users.UserSource):
      key = keys.derive(job.secret, "unit_examples", branch=streams.branch)
      source = source.drawing(key)
    for t, chunks in pipeline.steps(
      source,
      streams.sampler(job.plan, self._session.position.first_release),
      start_step=start,
      num_steps=last,
      chunk_size=job.chunk_size,
      rows=mesh_lib.local_rows(job.mesh, job.chunk_size),
      num_threads=data.num_threads,
      prefetch=data.prefetch,
    ):
      yield t, on_mesh(chunks)


def _sensitive(stats: stats_lib.Stats) -> dict[str, float]:
  examples = max(1, int(stats.num_examples))
  return {
    "train_loss": float(stats.loss) / examples,
    "batch_size": int(stats.num_examples),
    "clip_fraction": int(stats.num_clipped) / examples,
    "num_nonfinite": int(stats.num_nonfinite),
  }
