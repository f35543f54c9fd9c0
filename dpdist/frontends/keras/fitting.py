"""The loop of a Keras fit: sessions of a run, steps, epochs and callbacks."""

from collections.abc import Callable, Iterator
import contextlib
from typing import Any

import jax
import numpy as np

from dpdist import errors
from dpdist.data import pipeline
from dpdist.data import sources
from dpdist.data import users
from dpdist.distributed import mesh as mesh_lib
from dpdist.frontends.keras import callbacks as callbacks_lib
from dpdist.frontends.keras import program as program_lib
from dpdist.keys import keys
from dpdist.ledger import history
from dpdist.sensitivity import sentinel as sentinel_lib
from dpdist.training import step as step_lib
from dpdist.training import step_sentinel
from dpdist.workdir import run as run_lib
from dpdist.workdir import session as session_lib

PyTree = Any


class Fitting:
  """The steps of one `fit`; a context manager.

  Guarantees:
    A step is computed under keys that have met no other computation. Where the
    model is not what the newest checkpoint holds, as after a callback or a user
    changed its weights or the learning rate, the steps after it get keys of
    their own, and the changed state is saved before the first of them.
  """

  def __init__(
    self,
    run: run_lib.Run,
    program: program_lib.Program,
    source: sources.Source,
    kept: program_lib.Kept,
    *,
    sentinel_every: int,
    fingerprint: str | None,
    prefetch: int,
  ):
    """Stores the arguments; nothing is charged yet.

    `kept` is the state of the newest checkpoint. One step in sentinel_every is
    watched. The fingerprint is that of all that decides a step's bits, beside
    the state; None: it is unknown.
    """
    self.kept = kept  # The state that is saved.
    self.program = program
    self._run, self._source = run, source
    self._every, self.fingerprint = sentinel_every, fingerprint
    self._prefetch = prefetch
    self._stack = contextlib.ExitStack()
    self._session: session_lib.Session | None = None
    self._sentinel: step_sentinel.Sentinel | None = None

  def __enter__(self) -> "Fitting":
    return self

  def __exit__(self, *error: Any) -> bool | None:
    return self._stack.__exit__(*error)

  def changed_state(self) -> str:
    """Returns the digest of the model's state if it is not saved, else ""."""
    change = self.kept.change()
    return change if self._run.saved is not None else change or self.kept.digest

  def session(self) -> session_lib.Session:
    """Returns the session that the next steps belong to."""
    state = self.changed_state()
    if self._session is not None and not state:
      return self._session
    self._stack.close()
    session = self._stack.enter_context(
      self._run.session(
        self._source.content_digest(),
        fingerprint=self.fingerprint,
        state=state,
      )
    )
    if state:
      self._save(session, self._run.step)
    self._session = session
    self._sentinel = step_sentinel.Sentinel(
      self.program.bound,
      self.program.frozen(),
      session.streams,
      every=self._every,
      first_step=session.position.first_step,
    )
    return session

  def _save(self, session: session_lib.Session, step: int) -> None:
    model = self.program.model
    session.save(program_lib.values(model), step)
    self.kept = program_lib.Kept(model)

  def steps(
    self,
    stop: int,
    hooks: callbacks_lib.Hooks,
    see: Callable[[Any], None] | None = None,
  ) -> None:
    """Makes the updates before `stop`, and saves them.

    `see` is called with the statistics of each step, which are private.
    """
    session = self.session()
    program, step = self.program, self._run.step
    state = program.state(step)
    try:
      for t, chunks in self._chunks(session, step, stop):
        hooks.before(t - step, state)
        self._charge(session, t, stop)
        accumulator = self._accumulate(session, state, t, chunks)
        state, released = program.bound.apply(
          state,
          accumulator,
          session.streams.key("noise"),
          *self._release_index(session, t),
        )
        jax.block_until_ready(released)
        if see is not None:
          see(program.step.stats(accumulator))
        self._end(session)
        hooks.after(t - step, state)
        if program.model.stop_training:
          break
    finally:
      # Also after an error or Ctrl-C: what was computed is charged.
      session.check_data(lambda: sources.changed_files(self._source))
      # An interrupt may come anywhere: the state itself knows its updates, and
      # one whose memory the next step took is lost.
      is_whole = not any(x.is_deleted() for x in jax.tree.leaves(state))
      if is_whole and int(state.step) > step:
        program.assign(state)
        self._save(session, int(state.step))

  def _charge(self, session: session_lib.Session, t: int, stop: int) -> None:
    # Few durable records, and little charged if the process is killed.
    block = max(1, self._run.plan.num_steps // 100)
    first = session.position.first_step
    if t == self._run.step or not (t - first) % block:
      session.charge(min(stop, t + block - (t - first) % block))

  def _accumulate(
    self,
    session: session_lib.Session,
    state: step_lib.TrainState,
    t: int,
    chunks: list[pipeline.Chunk],
  ) -> Any:
    assert self._sentinel is not None
    program, sentinel = self.program, self._sentinel
    accumulator = program.step.begin(state)
    sentinel.begin(t, state.params)
    key = session.streams.key("model_rng", t)
    session.begin(t)
    for i, chunk in enumerate(chunks):
      batch, is_padding = jax.tree.map(program.put, tuple(chunk))
      accumulator = sentinel.accumulate(
        *(state.params, accumulator, batch, is_padding, key),
        i * program.chunk_size,
      )
    return accumulator

  def _end(self, session: session_lib.Session) -> None:
    """Stops the run if the sentinel found something in the last step."""
    assert self._sentinel is not None
    found = self._sentinel.end()
    if not found:
      return
    session.notice(history.TOO_LONG)
    program = self.program
    whole = step_lib.whole(program.state(0).params, program.frozen())
    clipped_grad = program.step.mechanism.clipped_grad
    raise errors.SensitivityError(
      sentinel_lib.fault(clipped_grad, whole, program.row, found)
    )

  def _release_index(
    self, session: session_lib.Session, t: int
  ) -> list[np.int32]:
    if not self.program.has_schedule:
      return []
    return [np.int32(session.position.first_release + t)]

  def _chunks(
    self, session: session_lib.Session, start: int, stop: int
  ) -> Iterator[tuple[int, list[pipeline.Chunk]]]:
    streams, program = session.streams, self.program
    source: pipeline.Rows = self._source
    if isinstance(source, users.UserSource):
      source = source.drawing(
        keys.derive(streams.secret, "unit_examples", branch=streams.branch)
      )
    return pipeline.steps(
      source,
      streams.sampler(self._run.plan, session.position.first_release),
      start_step=start,
      num_steps=stop,
      chunk_size=program.chunk_size,
      rows=mesh_lib.local_rows(program.mesh, program.chunk_size),
      prefetch=self._prefetch,
    )
