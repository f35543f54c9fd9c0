"""Charges and saves the steps of a run, for `dpdist.train` and other loops.

A `Session` is a range of a run's steps: the keys that they are drawn with,
their charges, and the checkpoints that they end in.

Steps are charged several at a time, before the first of them is computed. A
session that ends early but in an orderly way, by a request to stop or by an
error, has charged steps of which it computed nothing on data. It gives their
charge back at its end.

It never counts too few steps as begun: a step counts as begun from just before
its first computation on data. A step whose computation failed counts as begun,
since how much of it was computed cannot be known. Nothing is given back

  * that was charged before this process wrote the ledger, which another process
    may have begun (see `dpdist.ledger.ledger.Ledger.refund`);
  * by a job of several processes, of which one may be further on than another;
  * by a process that dies: it has no time to.

A copy of a whole process with its memory, such as a snapshot of a virtual
machine, takes the charges for its own, and may compute what the other copy gave
back; it is stopped as soon as it saves or charges. Nothing here detects it
earlier.

The ledger is written first and the data set's budget second. A process that
dies between the two leaves a budget that has too much reserved.
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax

from dpdist import errors
from dpdist.data import sources
from dpdist.distributed import collectives
from dpdist.ledger import data_budget
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.privacy import composition
from dpdist.reporting import console
from dpdist.workdir import checkpoints as checkpoints_lib

PyTree = Any


class Position(NamedTuple):
  """Where a run's newest branch begins and must end; equal in all processes."""

  branch: str  # The identity of its keys.
  first_step: int  # Of the branch.
  # The number of step 0; see `dpdist.ledger.history.Branch.release_index`.
  first_release: int
  last_step: int  # Where the steps must end for the plan to hold.

  @classmethod
  def of(cls, ledger: ledger_lib.Ledger) -> Self:
    """Reads the position of the newest branch from a ledger."""
    branch = ledger.branches[-1]
    return cls(
      branch.identity,
      branch.start_step,
      branch.release_index(0),
      ledger.last_step,
    )


class Session:
  """A range of a run's steps; a context manager.

  All processes of a job must enter it and call its methods together. What needs
  the ledger happens in the primary process, and the others wait.
  """

  def __init__(
    self,
    ledger: ledger_lib.Ledger | None,
    checkpoints: checkpoints_lib.Checkpoints,
    secret: bytes,
    position: Position,
    *,
    start_step: int | None,
    budget: data_budget.DataBudget | None = None,
    on_save: Callable[[history.CheckpointRef, str], None] | None = None,
    warn: Callable[[str], None] = console.warn,
  ):
    """Stores the arguments; charges nothing yet.

    The ledger is None in the processes that do not write it, and was resumed on
    the branch at `position`. The first step to be computed is start_step; None
    is for a loop of unknown code, and nothing is given back before it has
    called `begin`. The run has an allocation in the budget. `on_save` is called
    with each new checkpoint and the ledger's head that it was saved under, and
    `warn` with a sentence to show.
    """
    # All randomness of the steps.
    self.streams = mechanism.Streams(secret, position.branch)
    self.position = position  # Of their branch.
    self._ledger = ledger
    self._checkpoints = checkpoints
    self._budget = budget
    self._begun = start_step
    self._on_save = on_save
    self._warn = warn

  def __repr__(self) -> str:
    # Leaves out the secret.
    return f"Session(position={self.position!r})"

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._ledger is None or jax.process_count() > 1 or self._begun is None:
      return
    try:
      if self._ledger.refund(self._begun):
        self._advance_budget()
    except errors.LedgerError as problem:
      # For example, another process went on with the run. Too much stays
      # charged.
      self._warn(f"what was charged ahead stays charged: {problem}")

  def charge(self, stop_step: int) -> None:
    """Charges the steps before stop_step, durably, unless they are charged.

    Must be called before the first of them is computed. Raises RefusedError if
    the plan would be exceeded, and LedgerError if another process wrote to the
    ledger.
    """
    collectives.run_on_primary(lambda: self._charge(stop_step))

  def _charge(self, stop_step: int) -> None:
    if self._primary_ledger.reserve_through(stop_step):
      self._advance_budget()

  def begin(self, step: int) -> None:
    """Marks a step, which is charged, as begun; before it computes on data."""
    if self._ledger is not None:
      charged = self._ledger.branches[-1].stop_step
      first = self.position.first_step
      if not first <= step < charged:
        raise errors.LedgerError(
          "step must be charged before it begins, at least"
          f" {first} on this branch and below {charged}, got {step}"
        )
    self._begun = max(self._begun or 0, step + 1)

  def check_data(self, changed: Callable[[], list[str]]) -> None:
    """Stops the run if files of its data were changed while it read them.

    Must be called before anything is saved or shown of steps that may have read
    them. Whether their noise still hides what it should is unknown then, so the
    record says so, and is void and not sound.
    `dpdist.data.sources.changed_files` returns the files, and ChangedError
    names them.
    """
    files = collectives.run_on_all(changed)
    if collectives.any_process(bool(files)):
      self.notice(sources.CHANGED, unsound=True)
      raise sources.changed_error(files)

  def notice(self, text: str, *, unsound: bool = False) -> None:
    """Records what voids the guarantee."""
    collectives.run_on_primary(
      lambda: self._primary_ledger.notice(text, unsound=unsound)
    )

  def save(
    self,
    state: PyTree,
    step: int,
    facts: Mapping[str, Any] | None = None,
  ) -> None:
    """Saves a checkpoint of charged steps, and records it.

    For facts see `dpdist.workdir.checkpoints.Checkpoints.save`.

    Saves nothing and raises LedgerError if a step of it is not charged, or
    another process wrote to the ledger.
    """
    if self._begun is not None:
      self._begun = max(self._begun, step)
    head = str(collectives.run_on_primary(lambda: self._confirm(step)))
    digest = self._checkpoints.save(
      state, step=step, ledger_head=head, facts=facts
    )
    if self._ledger is None:
      return
    self._ledger.record_checkpoint(step, digest)
    self._checkpoints.delete_old(self._ledger.checkpoints)
    if self._on_save is not None:
      self._on_save(self._ledger.checkpoints[-1], head)

  def _confirm(self, step: int) -> str:
    """Returns the ledger's head; the steps before `step` must be charged."""
    ledger = self._primary_ledger
    ledger.confirm()
    charged = ledger.branches[-1].stop_step
    if step > charged:
      raise errors.LedgerError(
        f"step must be at most {charged}, which is charged, got {step}"
      )
    return ledger.head

  def epsilon(self, step: int) -> float:
    """Returns what the steps before `step` spent; primary process only."""
    return composition.epsilon(self._primary_ledger.spent_through(step))

  @property
  def _primary_ledger(self) -> ledger_lib.Ledger:
    """Returns the ledger; may be asked for in the primary process alone."""
    assert self._ledger is not None
    return self._ledger

  def _advance_budget(self) -> None:
    if self._budget is not None:
      self._budget.advance(self._primary_ledger)
