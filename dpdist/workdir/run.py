"""A run directory for a training loop that is not `dpdist.train`.

    run = Run(workdir, config)
    state = run.restore(state)
    with run.session(data) as session:
      while step < last:
        session.charge(step + 1)
        session.begin(step)
        ... sample and add noise by session.streams ...
        step += 1
      session.check_data(source.changed_files)
      session.save(state, step)

It keeps the secret, the ledger and the checkpoints where `dpdist.train` keeps
them, so that `launch.budget` and `launch.verify` read them too.

Nothing can prove that a user's own loop computes the same bits again. So every
session opens a branch of its own, with new keys: what was charged but not saved
when a process died is spent, and the steps are charged again. A loop that knows
what decides its bits gives their fingerprint, and repeats such steps for free.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import os
import pathlib
import secrets
from typing import Any
import warnings

import jax
import ml_collections

from dpdist import errors
from dpdist.files import places
from dpdist.keys import keys
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.workdir import checkpoints as checkpoints_lib
from dpdist.workdir import manifest
from dpdist.workdir import resume
from dpdist.workdir import session as session_lib

PyTree = Any


class Run:
  """A run directory with a privacy budget."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    config: plan_lib.PrivacyConfig | plan_lib.PrivacyPlan,
    *,
    insecure_seed: int | None = None,
    secret: bytes | None = None,
    notices: tuple[str, ...] = (),
  ):
    """Reads what the directory holds, and changes nothing.

    The directory is local, and is made when the run begins. The config must
    equal the one that the run began with, or ValueError is raised. The
    insecure_seed fixes every random stream, for tests; it voids the guarantee,
    and the ledger says so. A secret that is given is kept in memory alone; see
    `dpdist.keys`. Notices tell the ledger what else voids it. Raises
    LedgerError if the ledger is damaged, or was rolled back.
    """
    if not isinstance(config, plan_lib.PrivacyConfig | plan_lib.PrivacyPlan):
      raise errors.ArgumentError(
        "config must be a dpdist.PrivacyConfig or a dpdist.PrivacyPlan, got"
        f" {config!r}"
      )
    for name, right in (
      *(("noise", "gaussian"), ("clipping", "fixed")),
      ("statistics_noise_multiplier", 0),
    ):
      if getattr(config, name) != right:
        raise errors.ArgumentError(
          f"{name} must be {right!r} here, got {getattr(config, name)!r}:"
          " dpdist.train knows of more"
        )
    if jax.process_count() > 1:
      raise errors.ArgumentError(
        "workdir must be of one process here, got a job of"
        f" {jax.process_count()}: dpdist.train takes several"
      )
    self.workdir = places.directory(workdir)
    self.plan: plan_lib.PrivacyPlan  # The numbers that the run is bound to.
    # The newest whole checkpoint; None if there is none.
    self.saved: history.CheckpointRef | None = None
    # The ledger's head that it was saved under, once restored.
    self.saved_head = ""
    # What of a config `resume` reads.
    self._config = ml_collections.ConfigDict(
      {
        "insecure_seed": insecure_seed,
        "ledger": "",
        "secret_file": "",
        "unsafe_metrics": False,
      }
    )
    self._notices, self._secret = notices, secret
    self._settings = config.to_dict()
    if isinstance(config, plan_lib.PrivacyPlan):
      self._settings["target_delta"] = config.delta
    with self._open() as ledger:
      if ledger.is_new:
        if isinstance(config, plan_lib.PrivacyConfig):
          self.plan = plan_lib.make_plan(config)
        else:
          self.plan = config
      else:
        self._refuse_changes(ledger, ledger.segment.data, ledger.secret_hash)
        # The recorded plan: another machine might calibrate the last digit
        # differently.
        self.plan = ledger.plan
        found = manifest.newest(self._directory, ledger.checkpoints)
        self.saved = found.saved
        for text in found.rejected:
          warnings.warn(text, stacklevel=3)
      self._head = ledger.head

  @property
  def spent_steps(self) -> int:
    """Returns the number of steps that may have been released."""
    with self._open() as ledger:
      return 0 if ledger.is_new else ledger.spent_steps

  @property
  def step(self) -> int:
    """Returns the number of updates made in what `restore` returns."""
    return self.saved.step if self.saved else 0

  def epsilon(self) -> float:
    """Returns the epsilon of the run wherever it stops, at the plan's delta."""
    with self._open() as ledger:
      return composition.guaranteed(ledger.bounds)

  def epsilon_spent(self) -> float:
    """Returns the odometer's epsilon; no guarantee once someone has looked."""
    with self._open() as ledger:
      return 0.0 if ledger.is_new else composition.epsilon(ledger.spent)

  def restore(self, like: PyTree) -> PyTree:
    """Returns the newest checkpoint's state; `like` itself if there is none."""
    if self.saved is None:
      return like
    state, self.saved_head = checkpoints_lib.restore(
      self._directory, like, self.saved
    )
    return state

  def left(self, fingerprint: str | None = None, state: str = "") -> int:
    """Returns how many steps, also repeated for free, a session may make."""
    with self._open() as ledger:
      if ledger.is_new:
        return self.plan.num_steps
      left = ledger.plan.num_steps - ledger.spent_steps
      if ledger.goes_on(
        digest=self._base(state), fingerprint=fingerprint or ""
      ):
        left += ledger.branches[-1].stop_step - self.step
      return left

  def check(self, num_steps: int, left: int) -> None:
    """Raises ValueError for more steps than are `left`."""
    if num_steps > left:
      raise errors.ArgumentError(
        f"num_steps must be at most {left}, the updates that the budget has"
        f" left ({self.spent_steps} of the plan's {self.plan.num_steps} are"
        f" spent), got {num_steps}"
      )

  @contextlib.contextmanager
  def session(
    self, data: str, *, fingerprint: str | None = None, state: str = ""
  ) -> Iterator[session_lib.Session]:
    """Opens a session for the steps after the newest checkpoint.

    `data` is a hex digest of the training set. The fingerprint, hex, is of
    everything that decides the bits of a step, beside the state before it: if
    it is that of the newest branch, the session goes on with it, and charged
    steps after the newest checkpoint are repeated for free. None is equal to no
    other. `state` is a hex digest of the state that steps go on from, if that
    is not the newest checkpoint's: the session opens a new branch, and the
    state must be saved before a step is computed. Raises RefusedError for other
    data or another secret, and LedgerError if another process has gone on with
    the run.
    """
    with self._open() as ledger:
      if ledger.head != self._head:
        raise errors.LedgerError(
          f"the run in {self.workdir} has gone on since this object looked at"
          " it: open it anew"
        )
      secret = self._secret or resume.secret(
        self._config, self.workdir, is_new=ledger.is_new
      )
      secret_hash = keys.secret_hash(secret)
      if not ledger.is_new:
        self._refuse_changes(ledger, data, secret_hash)
      resume.open_or_resume(
        self._config,
        self.workdir,
        ledger,
        None,
        plan=self.plan,
        settings=self._settings,
        data=data,
        secret_hash=secret_hash,
        is_changed=False,
      )
      for text in self._notices:
        ledger.notice(text)
      ledger.resume(
        step=self.step,
        digest=self._base(state),
        ledger_head=self.saved_head,
        # One that is equal to no other opens a new branch too.
        fingerprint=fingerprint or secrets.token_hex(32),
      )
      with checkpoints_lib.Checkpoints(
        self._directory, writer=ledger.writer
      ) as checkpoints:

        def note(saved: history.CheckpointRef, head: str) -> None:
          # The state in memory is the newest checkpoint now.
          self.saved, self.saved_head = saved, head

        session = session_lib.Session(
          ledger,
          checkpoints,
          secret,
          session_lib.Position.of(ledger),
          start_step=None,
          on_save=note,
          warn=lambda text: warnings.warn(text, stacklevel=4),
        )
        try:
          with session:
            yield session
        finally:
          # Nobody else has written since, or the ledger is found to differ.
          self._head = ledger.head

  def _base(self, state: str) -> str:
    """Returns what steps go on from: a checkpoint, or a state of its digest."""
    if state:
      # A state that comes back at a later step is not where it was before.
      return hashlib.sha256(f"{self.step} {state}".encode()).hexdigest()
    return self.saved.digest if self.saved else ""

  @property
  def _directory(self) -> pathlib.Path:
    return self.workdir / "checkpoints"

  def _open(self) -> ledger_lib.Ledger:
    return resume.open_ledger(self._config, self.workdir)

  def _refuse_changes(
    self, ledger: ledger_lib.Ledger, data: str, secret_hash: str
  ) -> None:
    changes = ledger.changes(
      config=self._settings, data=data, secret_hash=secret_hash
    )
    if changes:
      raise errors.RefusedError(
        f"workdir {str(self.workdir)!r} holds a run that began with other"
        " settings or data; go on with those, or start a new run in a new"
        " directory. Changed: " + "; ".join(changes.values())
      )
