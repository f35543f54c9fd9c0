"""The privacy ledger: a write-ahead record of what may have been released.

Guarantees:
  * Charge before release. `reserve_through(step)` returns only when the record
    of those steps is durable; the training loop calls it before it computes a
    step, so that at every instant the ledger covers at least what has left the
    process.
  * A replay is free only if it is the same release. Steps after the last
    checkpoint run again under the same keys only on the same branch: same
    checkpoint, same numbers, same code, same devices. Otherwise `resume` opens
    a new branch, whose keys are new, and its steps are charged again.
  * Changes open a segment. A run whose privacy settings or data set changed
    goes on under another plan; what was charged under the plans before stays
    charged, and is composed with it by `dpdist.privacy.composition`. A changed
    secret, delta or neighboring relation is refused.
  * Forks add up. What a run charges after it went back to an older checkpoint,
    or to a copy of one, comes on top of what it had charged.
  * Only what was never begun is given back. A writer that ends in an orderly
    way takes back the charge of steps that it charged itself and that neither
    it nor anyone else began; see `refund`. A writer that dies takes back
    nothing.
  * Never past the plan. The steps charged in a segment, on all its branches,
    are at most its plan's num_steps.
  * A record that was altered, removed or reordered is detected. So is a ledger
    that was rolled back, unless its head was rolled back too and no checkpoint
    is newer; each checkpoint carries the head that it was saved under.
  * The newest record, if it was only half written, counts as the most that one
    record can charge.
  * One writer; see `dpdist.ledger.records`, which holds the records.

This module imports no jax, so that a budget can be read anywhere.
"""

from collections.abc import Mapping
import os
from typing import Any, Self

from dpdist import errors
from dpdist.ledger import history
from dpdist.ledger import records
from dpdist.privacy import plan as plan_lib

# Among the settings of a run whose data set has private statistics: what they
# ask, as a digest.
STATISTICS = "private_statistics"
# Settings that cannot change: every guarantee of a run depends on them.
_IMMUTABLE_FIELDS = ("neighboring_relation", "target_delta")


class Ledger(history.History):
  """An open ledger. One process writes, any may read.

  A context manager; the writer calls `acquire` before it writes. The attributes
  of `dpdist.ledger.history.History` hold what its records say.
  """

  def __init__(self, location: str | os.PathLike[str]):
    """Reads and checks every record; see `dpdist.ledger.records.Log`."""
    super().__init__()
    self._log = records.Log(location, self.apply)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the ledger, so that another process may write."""
    self._log.close()

  def acquire(self) -> None:
    """Makes this process the writer; no other one may be writing."""
    self._log.acquire()

  def confirm(self) -> None:
    """Raises LedgerError if another process has begun to write."""
    self._log.confirm()

  @property
  def head(self) -> str:
    """Returns the SHA-256 of the last record, hex."""
    return self._log.head

  @property
  def name(self) -> str:
    """Returns the SHA-256 of the first record, hex, which names the run."""
    return self._log.heads[1]

  @property
  def note(self) -> str:
    """Returns what a writer last noted; "" for nothing."""
    return self._log.note

  def put_note(self, text: str) -> None:
    """Notes a text, durably, in the place of the one before.

    It is no record, and is kept where the ledger's head is. Raises LedgerError
    if this process is not the writer.
    """
    self._log.put_note(text)

  def has_been_at(self, head: str) -> bool:
    """Returns whether a head is the ledger's, now or at an earlier record."""
    return head in self._log.heads

  def open(
    self,
    *,
    config: Mapping[str, Any],
    plan: plan_lib.PrivacyPlan,
    data: str,
    secret_hash: str,
    run: str,
  ) -> None:
    """Opens the run, and its first segment.

    `config` is the settings as the user gave them, JSON-able, and `data` the
    content digest of the training set, hex. `run` is a random name, so that
    runs with one secret do not share keys; "" for a run that must be
    repeatable, and has no guarantee.
    """
    self._append(
      "open",
      format=history.FORMAT,
      config=dict(config),
      plan=plan.to_dict(),
      data=data,
      start_step=0,
      secret_hash=secret_hash,
      run=run,
    )

  def changes(
    self, *, config: Mapping[str, Any], data: str, secret_hash: str
  ) -> dict[str, str]:
    """Returns what changed since `open`, a line for each name, as "data".

    If anything did, a segment must be opened. Raises RefusedError for what must
    stay the same in a run.
    """
    before = self.segment
    changes = {
      name: f"{name}: {before.config.get(name)!r} -> {config.get(name)!r}"
      for name in sorted({*before.config, *config})
      if before.config.get(name) != config.get(name)
    }
    if data != before.data:
      changes["data"] = (
        f"training data: digest {before.data[:12]} -> {data[:12]}"
      )
    forbidden = [changes[name] for name in _IMMUTABLE_FIELDS if name in changes]
    if secret_hash != self.secret_hash:
      forbidden.append(
        f"secret: hash {self.secret_hash[:12]} -> {secret_hash[:12]}"
      )
    if forbidden:
      raise errors.RefusedError(
        "this working directory holds a run that began with other settings,"
        " which cannot change on the way; go on with those, or start a new run"
        " in a new directory. Changed: " + "; ".join(forbidden)
      )
    return changes

  def open_segment(
    self,
    *,
    config: Mapping[str, Any],
    plan: plan_lib.PrivacyPlan,
    data: str,
    start_step: int,
  ) -> None:
    """Opens a segment under another plan; `resume` must then open a branch.

    The plan is of what remains after start_step updates.
    """
    self._append(
      "segment",
      config=dict(config),
      plan=plan.to_dict(),
      data=data,
      start_step=start_step,
    )

  def resume(
    self, *, step: int, digest: str, ledger_head: str, fingerprint: str
  ) -> history.Branch:
    """Chooses the branch on which a run goes on from a checkpoint.

    The checkpoint has `step` updates, a digest and the head that it was saved
    under; 0 and "" stand for initial parameters. The fingerprint is of all that
    decides the bits of a step. Returns the current branch if the steps after
    the checkpoint, should they run again, are the same release, else a new one.
    Raises LedgerError if the checkpoint was saved under records that this
    ledger lacks, or the sentinel stopped the run for good.
    """
    if history.TOO_LONG in self.notices:
      raise errors.LedgerError(
        "workdir must not hold a run that the sentinel stopped, whose guarantee"
        " is void for good: start a new run in a new directory"
      )
    if ledger_head and not self.has_been_at(ledger_head):
      raise errors.LedgerError(
        f"the checkpoint of step {step} was saved under ledger head"
        f" {ledger_head[:12]}, which this ledger does not hold: records were"
        " removed, or the ledger belongs to another run"
      )
    if self.goes_on(digest=digest, fingerprint=fingerprint):
      return self.branches[-1]
    self._append(
      "branch",
      branch=len(self.branches),
      start_step=step,
      fingerprint=fingerprint,
      base=digest,
      identity=history.IDENTITY_VERSION,
    )
    return self.branches[-1]

  def goes_on(self, *, digest: str, fingerprint: str) -> bool:
    """Returns whether `resume` goes on with the current branch."""
    if not self.branches:
      return False
    branch = self.branches[-1]
    return (
      branch.segment == len(self.segments) - 1
      and branch.version == history.IDENTITY_VERSION
      and branch.fingerprint == fingerprint
      and digest in branch.bases
      # Else it is unknown whether the data is what its steps were computed on.
      and not self.unsound
    )

  def reserve_through(self, stop_step: int) -> bool:
    """Charges the current branch's steps before stop_step, durably.

    Returns whether a step was charged; steps already charged cost nothing.
    Raises RefusedError, and charges nothing, if the plan would be exceeded.
    """
    branch = self.branches[-1]
    if stop_step <= branch.stop_step:
      return False
    if stop_step > self.last_step:
      raise errors.RefusedError(
        f"stop_step must be at most {self.last_step}, where the plan of"
        f" {self.plan.num_steps} steps is spent, got {stop_step}"
      )
    while branch.stop_step < stop_step:
      most = branch.stop_step + history.most_steps(self.plan)
      self._append(
        "reserve", branch=branch.number, stop_step=min(stop_step, most)
      )
      branch = self.branches[-1]
    return True

  def refund(self, begun: int) -> int:
    """Takes back the charge of the current branch's steps that nobody began.

    Must be called at this process's end, or where it must charge them again.
    This process, and any that it shares its charges with, has begun no
    computation on data of a step from `begun` on. What was charged before it
    became the writer is never given back: an earlier process may have begun
    those steps, and may go on with them when it wakes. Returns how many steps
    were given back.
    """
    if not self.branches or self.branches[-1].segment != len(self.segments) - 1:
      return 0
    branch = self.branches[-1]
    stop_step = max(begun, self._kept)
    if stop_step >= branch.stop_step:
      return 0
    self._append("unstarted", branch=branch.number, stop_step=stop_step)
    return branch.stop_step - stop_step

  def record_checkpoint(self, step: int, digest: str) -> None:
    """Records a checkpoint that the current branch may go on from."""
    self._append(
      "checkpoint",
      branch=self.branches[-1].number,
      step=step,
      digest=digest,
      writer=self.writer,
    )

  def notice(self, text: str, *, unsound: bool = False) -> None:
    """Records, once, what weakens or voids the guarantee, or the record too."""
    if text not in (self.unsound if unsound else self.notices):
      self._append(
        "notice", text=text, **({"unsound": True} if unsound else {})
      )

  def end(self) -> None:
    """Ends the run for good: nothing can be charged any more."""
    if not self.is_ended:
      self._append("end")

  def record_allocation(self, *, root: str, data: str, allocation: str) -> None:
    """Records the run's allocation in a budget; "": it is about to get one."""
    body = {"root": root, "data": data, "stake": allocation}
    about_to = not allocation and any(
      (place["root"], place["data"]) == (root, data) for place in self.places
    )
    if body not in self.places and not about_to:
      self._append("stake", **body)

  def record_epsilons(
    self,
    *,
    spent: Mapping[str, float | None],
    planned: Mapping[str, float | None],
  ) -> None:
    """Records epsilons of `spent` and `planned` by accountant, for readers."""
    self._append("epsilons", spent=dict(spent), planned=dict(planned))

  def _append(self, kind: str, **body: Any) -> None:
    # A record that could not be read again must not be written.
    self.check({"kind": kind, **body})
    self._log.append(kind, **body)
