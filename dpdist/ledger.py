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
  * Never past the plan. The steps of all branches together are at most
    plan.num_steps.
  * A changed privacy setting, data set or secret is refused, with a message
    that says what changed.
  * A record that was altered, removed or reordered is found, and so is a ledger
    that was rolled back, unless its head was too and no checkpoint, which
    carries the head it was saved under, is newer.
  * The newest record, if it was torn, counts as spent: as the most that one
    record can charge.
  * One writer; see `dpdist.records`, which holds the records.

This module imports no jax, so that a budget can be read anywhere.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
from typing import Any, NamedTuple, Self

from dpdist import plan as plan_lib
from dpdist import records

_FORMAT = 2
# A record charges at most this part of a plan, and at least one step.
_PARTS = 100

LedgerError = records.RecordError


class RefusedError(ValueError):
  """The record forbids going on with these settings."""


class Saved(NamedTuple):
  """A checkpoint that is on disk.

  Attributes:
    step: updates made in it.
    digest: SHA-256 of its manifest, hex.
    writer: the number of the process that wrote it, in whose folder it is.
  """

  step: int
  digest: str
  writer: int


@dataclasses.dataclass(frozen=True)
class Branch:
  """A line of steps under one set of keys.

  Attributes:
    number: counts from 0.
    identity: what its keys depend on. Of all branches of all runs and copies of
      runs, those with the same secret and identity make the same releases.
    start_step: updates made before its first step.
    stop_step: its steps [start_step, stop_step) are charged.
    fingerprint: of everything that decides the bits of a step.
    bases: digests of the checkpoints it may go on from: the one it started
      from ("" for the initial parameters) and its own.
  """

  number: int
  identity: str
  start_step: int
  stop_step: int
  fingerprint: str
  bases: tuple[str, ...]


class Ledger:
  """An open ledger. One process writes, any may read.

  A context manager; the writer calls `acquire` before it writes.

  Attributes:
    branches: the branches of the run, in order.
    checkpoints: every recorded checkpoint, in order.
  """

  def __init__(self, location: str | os.PathLike[str]):
    """Reads and checks every record.

    Args:
      location: a local path, a URL or a tensorstore spec; see
        `dpdist.records.Log`. It need not exist.

    Raises:
      ValueError: location is none of these.
      LedgerError: a record is missing, altered or out of order.
    """
    self.branches: list[Branch] = []
    self.checkpoints: list[Saved] = []
    self._opened: dict[str, Any] | None = None
    self._lost_steps = 0
    self._num_writers = 0
    self._log = records.Log(location, self._take)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def close(self) -> None:
    """Lets another process write."""
    self._log.close()

  def acquire(self) -> None:
    """Makes this process the one that writes.

    Raises:
      LedgerError: another process does.
    """
    self._log.acquire()

  def confirm(self) -> None:
    """Raises LedgerError if another process has begun to write."""
    self._log.confirm()

  @property
  def records(self) -> list[dict[str, Any]]:
    """The bodies of all records, in order."""
    return self._log.records

  @property
  def is_new(self) -> bool:
    """Whether no run was ever opened."""
    return self._opened is None

  @property
  def head(self) -> str:
    """SHA-256 of the last record, hex."""
    return self._log.head

  def has_been_at(self, head: str) -> bool:
    """Whether a head is that of the ledger, now or before."""
    return head in self._log.heads

  @property
  def writer(self) -> int:
    """The number of the latest process to write, from 1."""
    return self._num_writers

  @property
  def plan(self) -> plan_lib.PrivacyPlan:
    """The plan that the run is bound to."""
    return plan_lib.PrivacyPlan.from_dict(self._open_record["plan"])

  @property
  def spent_steps(self) -> int:
    """Steps that may have been released, over all branches."""
    charged = sum(b.stop_step - b.start_step for b in self.branches)
    return charged + self._lost_steps

  def spent_through(self, step: int) -> int:
    """Steps released when the current branch has just made update `step`."""
    branch = self.branches[-1]
    return self.spent_steps - branch.stop_step + max(step, branch.start_step)

  @property
  def last_step(self) -> int:
    """Where the current branch must end for the plan to hold."""
    remaining = self.plan.num_steps - self.spent_steps
    return self.branches[-1].stop_step + remaining

  @property
  def notices(self) -> list[str]:
    """What a reader of any figure from this run has to be told."""
    found = [r["text"] for r in self.records if r["kind"] == "notice"]
    return list(dict.fromkeys(found))

  @property
  def guarantee(self) -> str:
    """Either "holds", or "void: " and why."""
    return "void: " + "; ".join(self.notices) if self.notices else "holds"

  def open(
    self,
    *,
    config: Mapping[str, Any],
    plan: plan_lib.PrivacyPlan,
    data: str,
    secret_hash: str,
    run: str,
  ) -> None:
    """Opens the run.

    Args:
      config: the privacy settings as the user gave them, JSON-able.
      plan: what they came to.
      data: the manifest of the training set, hex.
      secret_hash: see `dpdist.keys.secret_hash`.
      run: a random name of the run, so that runs with one secret do not share
        keys; "" for a run that is to be repeatable, and has no guarantee.
    """
    self._log.append(
      "open",
      format=_FORMAT,
      config=dict(config),
      plan=plan.to_dict(),
      data=data,
      secret_hash=secret_hash,
      run=run,
    )

  def check(
    self, *, config: Mapping[str, Any], data: str, secret_hash: str
  ) -> None:
    """Holds a restart against the first record.

    Args:
      config: as in `open`.
      data: as in `open`.
      secret_hash: as in `open`.

    Raises:
      RefusedError: says what changed.
    """
    opened = self._open_record
    changes = [
      f"{name}: {opened['config'].get(name)!r} -> {config.get(name)!r}"
      for name in sorted({*opened["config"], *config})
      if opened["config"].get(name) != config.get(name)
    ]
    if data != opened["data"]:
      changes.append(
        f"training data: manifest {opened['data'][:12]} -> {data[:12]}"
      )
    if secret_hash != opened["secret_hash"]:
      changes.append(
        f"secret: hash {opened['secret_hash'][:12]} -> {secret_hash[:12]}"
      )
    if changes:
      raise RefusedError(
        "this working directory holds a run that began with other settings;"
        " go on with those, or start a new run in a new directory. Changed: "
        + "; ".join(changes)
      )

  def resume(
    self, *, step: int, digest: str, ledger_head: str, fingerprint: str
  ) -> Branch:
    """Chooses the branch on which a run goes on from a checkpoint.

    Args:
      step: updates made in the restored state; 0 for initial parameters.
      digest: the checkpoint's; "" for initial parameters.
      ledger_head: the head that the checkpoint was saved under; "" for initial
        parameters.
      fingerprint: of everything that decides the bits of a step.

    Returns:
      The current branch if the steps after the checkpoint, should they run
      again, are the same release; a new one otherwise.

    Raises:
      LedgerError: the checkpoint knows records that this ledger lacks.
    """
    if ledger_head and not self.has_been_at(ledger_head):
      raise LedgerError(
        f"the checkpoint of step {step} was saved under ledger head"
        f" {ledger_head[:12]}, which this ledger does not hold: records were"
        " removed, or the ledger belongs to another run"
      )
    if self.branches:
      branch = self.branches[-1]
      if branch.fingerprint == fingerprint and digest in branch.bases:
        return branch
    self._log.append(
      "branch",
      branch=len(self.branches),
      start_step=step,
      fingerprint=fingerprint,
      base=digest,
    )
    return self.branches[-1]

  def reserve_through(self, stop_step: int) -> None:
    """Charges the current branch's steps before stop_step, durably.

    Args:
      stop_step: exclusive; steps already charged cost nothing.

    Raises:
      RefusedError: the plan would be exceeded; nothing is charged.
      LedgerError: another process wrote to the ledger.
    """
    branch = self.branches[-1]
    if stop_step <= branch.stop_step:
      return
    if stop_step > self.last_step:
      raise RefusedError(
        f"stop_step must be at most {self.last_step}, where the plan of"
        f" {self.plan.num_steps} steps is spent, got {stop_step}"
      )
    while branch.stop_step < stop_step:
      most = branch.stop_step + _most_steps(self.plan)
      self._log.append(
        "reserve", branch=branch.number, stop_step=min(stop_step, most)
      )
      branch = self.branches[-1]

  def record_checkpoint(self, step: int, digest: str) -> None:
    """Makes a checkpoint one that the current branch may go on from."""
    self._log.append(
      "checkpoint",
      branch=self.branches[-1].number,
      step=step,
      digest=digest,
      writer=self.writer,
    )

  def notice(self, text: str) -> None:
    """Records, once, what weakens or voids the run's guarantee."""
    if text not in self.notices:
      self._log.append("notice", text=text)

  @property
  def _open_record(self) -> dict[str, Any]:
    if self._opened is None:
      raise ValueError("no run was opened in this ledger")
    return self._opened

  def _take(self, record: dict[str, Any]) -> None:
    """Takes one record into account; the only way state changes."""
    kind = record["kind"]
    if kind == "writer":
      self._num_writers += 1
      return
    if kind == "lost":
      if not self.is_new:  # Before, nothing can be charged; after, the most.
        remaining = self.plan.num_steps - self.spent_steps
        self._lost_steps += min(_most_steps(self.plan), remaining)
      return
    if (kind == "open") != self.is_new:
      raise ValueError(f"a record of kind {kind!r} in this place")
    if kind == "open":
      if record["format"] != _FORMAT:
        raise ValueError(f"format {record['format']}, expected {_FORMAT}")
      self._opened = record
    elif kind == "branch":
      start = record["start_step"]
      self.branches.append(
        Branch(
          len(self.branches),
          _identity(self._open_record["run"], record),
          start,
          start,
          record["fingerprint"],
          (record["base"],),
        )
      )
    elif kind == "reserve":
      branch = self.branches[-1]
      more = record["stop_step"] - branch.stop_step
      if record["branch"] != branch.number:
        raise ValueError("a reservation for a branch that has ended")
      if not 0 < more <= _most_steps(self.plan):
        raise ValueError(f"a reservation of {more} steps")
      self.branches[-1] = dataclasses.replace(
        branch, stop_step=record["stop_step"]
      )
    elif kind == "checkpoint":
      branch = self.branches[-1]
      self.branches[-1] = dataclasses.replace(
        branch, bases=(*branch.bases, record["digest"])
      )
      self.checkpoints.append(
        Saved(record["step"], record["digest"], record["writer"])
      )
    elif kind == "notice":
      if not isinstance(record["text"], str):
        raise ValueError("a notice without text")
    else:
      raise ValueError(f"kind {kind!r}")


def _most_steps(plan: plan_lib.PrivacyPlan) -> int:
  return -(-plan.num_steps // _PARTS)


def _identity(run: str, record: Mapping[str, Any]) -> str:
  """What the keys of a branch depend on.

  A copy of a run directory could go on with other code from the same record as
  the original, under the same number; hence everything that decides what its
  steps release, and not the number alone.
  """
  if not run:
    return str(record["branch"])
  names = ("branch", "start_step", "fingerprint", "base")
  text = json.dumps([run, *(record[name] for name in names)])
  return hashlib.sha256(text.encode()).hexdigest()
