"""A training loop of one's own with the whole record of a run.

    with dpdist.Session(workdir, privacy, loss=loss, dataset=data) as session:
      state = session.restore(state)
      for step in session:
        gradients = step.gradients(state.params)
        state = update(state, gradients)
        session.save(state)

A step is charged before it is yielded. Its gradients are released: the clipped
sum over the examples that the plan's sampler draws, with noise drawn once, over
the expected batch size. Nothing else of the examples leaves a session. What the
loop computes from released gradients, public numbers and held-out data may be
released too.

A session is made and used by all processes of a job together, with the same
parameters in each. Chunks are divided over all their devices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import os
import sys
import threading
from types import TracebackType
from typing import Any, Self, Unpack

from dpdist import errors
from dpdist.data import sources
from dpdist.distributed import collectives
from dpdist.distributed import mesh as mesh_lib
from dpdist.distributed import preemption
from dpdist.distributed import progress as progress_lib
from dpdist.distributed import watchdog
from dpdist.files import places
from dpdist.own_loop import life as life_lib
from dpdist.own_loop import loop_step
from dpdist.own_loop import outcome
from dpdist.own_loop import release
from dpdist.own_loop import releases
from dpdist.own_loop import settings
from dpdist.own_loop import states
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.reporting import console
from dpdist.reporting import metrics as metrics_lib

PyTree = Any


class Session:
  """A range of a run's steps, under a loop of one's own; a context manager.

  Called again on its directory after any interruption, it goes on from the
  newest checkpoint. Steps that run again are free if the same goes into them as
  before, and make the same gradients, bit for bit. Otherwise they are made with
  new noise on newly drawn examples, and charged again. See the guide, "A loop
  of your own".
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    privacy: plan_lib.PrivacyConfig | plan_lib.PrivacyPlan,
    *,
    loss: settings.Loss | Mapping[str, settings.Loss],
    dataset: Any = None,
    data_digest: str = "",
    metrics: Sequence[str] = metrics_lib.HELD_OUT,
    largest_integers: Mapping[str, int] | None = None,
    **options: Unpack[settings.Options],
  ):
    """Checks the arguments; opens nothing yet.

    Args:
      workdir: a directory for all that the run writes; made if missing. It is a
        part of the guarantee: do not delete it to begin again on the same data.
      privacy: the budget. What changes of it from start to start is recorded.
      loss: (params, example, key) -> loss or (loss, aux), of one example, a
        dict of arrays; the key is the example's own. If gradients are given
        something, it is the fourth argument. Several losses are a mapping by
        name, and each takes a step of the plan in every step of the loop.
      dataset: the private examples: a mapping of arrays, a
        `dpdist.data.sources.Source`, a `dpdist.Dataset`, or what
        `dpdist.data.from_*` returns. None: `step.indices` says which examples
        to read.
      data_digest: without a dataset, the SHA-256 of the data's content, hex.
      metrics: the names of the held-out metrics that `log` takes.
      largest_integers: by an array's name, a public upper bound of its integers
        for the check of the sensitivity, such as the number of classes less 1.
        By default that of held-out examples, or 1.
      **options: see `dpdist.own_loop.settings.Options`.

    Raises:
      ValueError: with the argument's name, its value and what would be right.
    """
    self.workdir = places.directory(workdir)
    self._config = settings.config_of(privacy, options)
    self._losses = settings.losses_of(loss, self._config.privacy.num_steps)
    self._names = list(self._losses)
    self._source: sources.Source | None = None
    self._digest = data_digest
    self._earlier: Callable[[], list[str]] = list
    if dataset is not None:
      source = settings.source_of(dataset, self._config.privacy.num_examples)
      self._source = source
      self._earlier = lambda: sources.earlier_digests(source)
    elif len(data_digest) != 64:
      raise errors.ArgumentError(
        "dataset must be given, or data_digest, the SHA-256 of the data in 64"
        f" hex digits, got {data_digest!r}"
      )
    self._dataset, self._largest = dataset, largest_integers or {}
    self._metrics = tuple(metrics)
    self._stack = contextlib.ExitStack()
    # Steps of the loop: made, and in the newest checkpoint.
    self._done = self._saved_at = 0
    self._present: loop_step.Step | None = None
    self._iterated = self._is_void = False
    self._lock = threading.Lock()
    self._pid = 0  # Of the process that entered it.
    self._scores: dict[str, float] = {}
    self._state: PyTree = None  # That was last saved or restored.
    self._writer: metrics_lib.Writer | None = None

  def __enter__(self) -> Self:
    """Opens the run, in all processes together."""
    if self._pid:
      raise errors.ArgumentError(
        "session must be a new one: make another dpdist.Session to go on"
      )
    self._pid = os.getpid()
    with self._stack as stack:
      self._stop = stack.enter_context(preemption.Notice())
      self._progress = progress_lib.Progress()
      stack.enter_context(
        watchdog.Watchdog(
          self._progress, self._config.stuck_after, own=outcome.OWN_ERRORS
        )
      )
      self._mesh = mesh_lib.make(self._config.mesh)
      if self._source is not None:
        retried = settings.retried(self._source, self._config)
        stack.callback(retried.close)
        self._source = retried
        self._digest = collectives.run_on_all(retried.content_digest)
      self._life = life_lib.Life(
        *(self._config, self.workdir, self._mesh, self._digest),
        *(self._earlier, stack),
        ahead=self._save_every * len(self._names),
      )
      self._releases = releases.Releases(
        *(self._config, self._life, self._mesh, self._losses),
        *(self._dataset, self._source, self._largest, self._progress),
      )
      stack.callback(self._releases.close)
      if self._life.found.saved is None:
        self._life.resume(0, "")
      self._stack = stack.pop_all()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    try:
      if self._life.session is not None:
        self._life.session.__exit__(kind, error, trace)
        # The loop may have left its last step by `break`.
        self._done = max(self._done, self._saved_at)
        if error is None and self._is_complete:
          self._finish(self._done)
    except BaseException:
      self._stack.__exit__(*sys.exc_info())
      raise
    self._stack.__exit__(kind, error, trace)

  def _finish(self, num_steps: int) -> None:
    if not self._releases.is_any_made:
      return  # The run was finished before.
    if self._state is None:
      console.warn("no state was saved, so the run can only be made again")
      return
    outcome.write(
      *(self.workdir, self._life),
      config=self._config,
      rounding=self._releases.rounding(),
      num_steps=num_steps,
      scores=self._scores,
      state=self._state,
    )

  @property
  def plan(self) -> plan_lib.PrivacyPlan:
    """Returns the numbers that the run is bound to; each loss takes a step."""
    return self._life.plan

  @property
  def step(self) -> int:
    """Returns how many steps were made so far."""
    return self._done

  @property
  def stop_requested(self) -> bool:
    """Returns whether a signal asked this process to stop."""
    return self._stop.received

  def epsilon(self) -> float:
    """Returns the guarantee's epsilon at plan.delta; 0 before a step.

    It holds wherever the loop stops: whoever stops early may have looked at
    results, and has the whole plan's epsilon.
    """

    def guaranteed() -> float:
      assert self._life.ledger is not None
      return composition.guaranteed(self._life.ledger.bounds)

    return float(collectives.run_on_primary(guaranteed))

  def epsilon_spent(self) -> float:
    """Returns the cost of the steps so far, had their number been fixed."""
    present = self._present
    begun = present is not None and present.has_begun
    through = (self._done + begun) * len(self._names)
    spent = lambda: self._life.present.epsilon(through)
    return float(collectives.run_on_primary(spent))

  def restore(self, state: PyTree) -> PyTree:
    """Returns the newest checkpoint's state, or `state` if there is none.

    Its arrays are on all devices. Raises MismatchError if the checkpoint holds
    arrays of other names, shapes or dtypes.
    """
    if self._iterated:
      raise errors.ArgumentError(
        "restore must be called before the first step, got it after"
      )
    state = release.replicated(state, self._mesh)
    saved = self._life.found.saved
    if saved is not None:
      number, leftover = divmod(saved.step, len(self._names))
      if leftover:
        raise errors.MismatchError(
          "loss must be of as many as those whose checkpoint has"
          f" {saved.step} charged steps, got {len(self._names)} losses"
        )
      packed, head = self._life.checkpoints.restore(states.pack(state), saved)
      state = release.replicated(states.unpack(packed, state), self._mesh)
      if self._life.session is None:
        self._life.resume(saved.step, head)
      self._done = self._saved_at = number
    self._state = state
    return state

  def __iter__(self) -> Iterator[loop_step.Step]:
    """Yields the steps that are left, each charged.

    Raises Preempted if a signal asked to stop before the next one.
    """
    if self._life.session is None:
      raise errors.ArgumentError(
        f"state must be that of the checkpoint in {str(self.workdir)!r}: call"
        " session.restore(state) before the first step"
      )
    if collectives.is_primary() and self._writer is None:
      self._writer = self._stack.enter_context(
        metrics_lib.Writer(
          self.workdir,
          unsafe_metrics=False,
          start_step=self._done,
          held_out=self._metrics,
        )
      )
    self._iterated = True
    while not self._is_complete:
      t = self._done
      self._check_own()
      if collectives.any_process(self._stop.received):
        raise errors.Preempted(self._saved_at, self._stop.reason)
      self._progress.enter(t, "charging")
      self._life.charge((t + 1) * len(self._names))
      self._progress.enter(t, "evaluating")
      self._present = loop_step.Step(self, t)
      yield self._present
      self._done = t + 1
      self._present = None

  @property
  def _is_complete(self) -> bool:
    last = self._life.present.position.last_step
    return (self._done + 1) * len(self._names) > last

  @property
  def _save_every(self) -> int:
    num_steps = self._config.privacy.num_steps // len(self._names)
    return int(self._config.checkpoint_every) or max(1, num_steps // 10)

  def save(self, state: PyTree, *, now: bool = False) -> bool:
    """Saves the state after the present step, if it is time to.

    It is every `checkpoint_every` steps, at the last step, when a signal asked
    to stop, and with `now`. The state is a pytree of arrays, all of which is
    released: it may hold nothing that was computed from the examples otherwise.

    Returns:
      Whether the state was saved.

    Raises:
      dpdist.errors.Preempted: a signal asked to stop, and the state is saved.
      dpdist.errors.ChangedError: files of the data were changed.
    """
    if self._present is None:
      raise errors.ArgumentError(
        "save must be called in a step of the session, got it outside"
      )
    done = self._present.number + 1
    is_last = (done + 1) * len(
      self._names
    ) > self._life.present.position.last_step
    is_stopped = collectives.any_process(self._stop.received)
    is_time = now or is_stopped or is_last or done % self._save_every == 0
    if not is_time or self._saved_at == done:
      return False
    self._progress.enter(done, "saving")
    with self._alone():
      self._releases.check_data()
      self._life.present.save(states.pack(state), done * len(self._names))
      self._state, self._saved_at = state, done
    if is_last:
      # Here too: an error after it would leave a whole run without a result.
      self._finish(done)
    if is_stopped and not is_last:
      raise errors.Preempted(done, self._stop.reason)
    self._progress.enter(done, "evaluating")
    return True

  def log(self, **scores: float) -> None:
    """Writes released metrics of the present step, with epsilon.

    They are the session's `metrics`, which must have been computed from
    held-out examples, and learning_rate and noisy_gradient_norm.

    Raises:
      ValueError: a name is unknown, or private.
    """
    known = metrics_lib.RELEASED | metrics_lib.SENSITIVE
    named = {
      name if name in known else f"test/{name}": float(value)
      for name, value in scores.items()
    }
    metrics_lib.check_released(named, self._metrics)
    if self._present is None:
      raise errors.ArgumentError(
        "log must be called in a step of the session, got it outside"
      )
    self._releases.check_data()
    done = self._present.number + 1
    self._scores |= {k: v for k, v in named.items() if k.startswith("test/")}
    if self._writer is not None:
      epsilon = self._life.present.epsilon(done * len(self._names))
      self._writer.write(done, {"epsilon": epsilon, **named})

  @contextlib.contextmanager
  def _alone(self) -> Iterator[None]:
    """Holds off other threads and processes: a key must meet one input."""
    self._check_own()
    if not self._lock.acquire(blocking=False):
      raise errors.ArgumentError(
        "session must be used by one thread at a time, got a second call while"
        " it computes"
      )
    try:
      yield
    except errors.SensitivityError:
      self._is_void = True
      raise
    finally:
      self._lock.release()

  def _check_own(self) -> None:
    if os.getpid() != self._pid:
      raise errors.ArgumentError(
        "session must be used by the process that entered it, got a fork of it"
      )

  def _charged_step(self, number: int, loss: str) -> int:
    """Returns the number of the charged step of a loss, in the present step."""
    if self._is_void:
      raise errors.SensitivityError(
        "clipping does not bound what an example can do in this run, which the"
        " record says: nothing more is released"
      )
    if self._present is None or self._present.number != number:
      raise errors.ArgumentError(
        f"step must be the present one, got step {number} after its turn"
      )
    if loss not in self._names:
      raise errors.ArgumentError(
        f"loss must be one of {self._names}, got {loss!r}"
      )
    return number * len(self._names) + self._names.index(loss)
