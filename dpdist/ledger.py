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
  * A record that was altered, removed or reordered is found by the hash chain;
    so is a ledger older than a checkpoint, which carries the head it was saved
    under. What came after the last checkpoint can still be cut off.

Records are immutable: record n is the JSON value of key n in a tensorstore
key-value store, created on the condition that the key does not exist, and names
the SHA-256 of record n - 1. Two writers cannot both create record n. This
module imports no jax, so that a budget can be read anywhere.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
from typing import Any

import tensorstore as ts

from dpdist import plan as plan_lib

_FORMAT = 1
_NO_RECORD = "0" * 64


class LedgerError(Exception):
  """The record is damaged, or another process writes it."""


class RefusedError(ValueError):
  """The record forbids going on with these settings."""


@dataclasses.dataclass(frozen=True)
class Branch:
  """A line of steps under one set of keys.

  Attributes:
    number: counts from 0; the keys depend on it.
    start_step: updates made before its first step.
    stop_step: its steps [start_step, stop_step) are charged.
    fingerprint: of everything that decides the bits of a step.
    bases: digests of the checkpoints it may go on from: the one it started
      from ("" for the initial parameters) and its own.
  """

  number: int
  start_step: int
  stop_step: int
  fingerprint: str
  bases: tuple[str, ...]


class Ledger:
  """An open ledger. One process writes, any may read.

  Attributes:
    records: the bodies of all records, in order.
    branches: the branches of the run, in order.
    checkpoints: (step, digest) of every recorded checkpoint, in order.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    """Reads and checks every record.

    Args:
      directory: a local path; it need not exist.

    Raises:
      LedgerError: a record is missing, altered or out of order.
    """
    self._store = _open_store(directory)
    self.records: list[dict[str, Any]] = []
    self.branches: list[Branch] = []
    self.checkpoints: list[tuple[int, str]] = []
    self._heads = [_NO_RECORD]
    keys = sorted(key.decode() for key in self._store.list().result())
    for seq, key in enumerate(keys):
      if key != _key(seq):
        raise LedgerError(
          f"ledger record {seq} is missing: the next key is {key!r}"
        )
      self._replay(self._store.read(key).result().value)

  @property
  def is_new(self) -> bool:
    """Whether nothing was ever recorded."""
    return not self.records

  @property
  def head(self) -> str:
    """SHA-256 of the last record, hex."""
    return self._heads[-1]

  @property
  def plan(self) -> plan_lib.PrivacyPlan:
    """The plan that the run is bound to."""
    return plan_lib.PrivacyPlan.from_dict(self.records[0]["plan"])

  @property
  def spent_steps(self) -> int:
    """Steps that may have been released, over all branches."""
    return sum(b.stop_step - b.start_step for b in self.branches)

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
  ) -> None:
    """Writes the first record.

    Args:
      config: the privacy settings as the user gave them, JSON-able.
      plan: what they came to.
      data: the manifest of the training set, hex.
      secret_hash: see `dpdist.keys.secret_hash`.
    """
    self._append(
      "open",
      format=_FORMAT,
      config=dict(config),
      plan=plan.to_dict(),
      data=data,
      secret_hash=secret_hash,
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
    opened = self.records[0]
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
    if ledger_head and ledger_head not in self._heads:
      raise LedgerError(
        f"the checkpoint of step {step} was saved under ledger head"
        f" {ledger_head[:12]}, which this ledger does not hold: records were"
        " removed, or the ledger belongs to another run"
      )
    if self.branches:
      branch = self.branches[-1]
      if branch.fingerprint == fingerprint and digest in branch.bases:
        return branch
    self._append(
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
    self._append("reserve", branch=branch.number, stop_step=stop_step)

  def record_checkpoint(self, step: int, digest: str) -> None:
    """Makes a checkpoint one that the current branch may go on from."""
    self._append(
      "checkpoint", branch=self.branches[-1].number, step=step, digest=digest
    )

  def notice(self, text: str) -> None:
    """Records, once, what weakens or voids the run's guarantee."""
    if text not in self.notices:
      self._append("notice", text=text)

  def _append(self, kind: str, **body: Any) -> None:
    record = {"seq": len(self.records), "prev": self.head, "kind": kind}
    value = _canonical(record | body)
    key = _key(len(self.records))
    missing = self._store.read(key).result()
    # An unsuccessful conditional write returns an empty generation.
    written = missing.state == "missing" and bool(
      self._store.write(key, value, if_equal=missing.stamp.generation)
      .result()
      .generation
    )
    if not written:
      raise LedgerError(
        f"another process wrote ledger record {len(self.records)}: one run"
        " directory takes one writer; this process must stop"
      )
    self._replay(value)

  def _replay(self, value: bytes) -> None:
    """Takes one record into account; the only way state changes."""
    seq = len(self.records)
    try:
      record = json.loads(value)
      if record["seq"] != seq or record["prev"] != self.head:
        raise LedgerError(
          f"ledger record {seq} does not follow record {seq - 1}: one of them"
          " was altered"
        )
      if value != _canonical(record):
        raise LedgerError(f"ledger record {seq} was altered")
      self._take(record)
    except (ValueError, KeyError, TypeError, IndexError) as error:
      raise LedgerError(
        f"ledger record {seq} cannot be read: {error!r}"
      ) from error
    self.records.append(record)
    self._heads.append(hashlib.sha256(value).hexdigest())

  def _take(self, record: dict[str, Any]) -> None:
    kind = record["kind"]
    if (kind == "open") != (not self.records):
      raise ValueError(f"a record of kind {kind!r} in this place")
    if kind == "open":
      if record["format"] != _FORMAT:
        raise ValueError(f"format {record['format']}, expected {_FORMAT}")
    elif kind == "branch":
      start = record["start_step"]
      self.branches.append(
        Branch(
          len(self.branches),
          start,
          start,
          record["fingerprint"],
          (record["base"],),
        )
      )
    elif kind == "reserve":
      branch = self.branches[-1]
      if record["stop_step"] <= branch.stop_step:
        raise ValueError("a reservation that reserves nothing")
      self.branches[-1] = dataclasses.replace(
        branch, stop_step=record["stop_step"]
      )
    elif kind == "checkpoint":
      branch = self.branches[-1]
      self.branches[-1] = dataclasses.replace(
        branch, bases=(*branch.bases, record["digest"])
      )
      self.checkpoints.append((record["step"], record["digest"]))
    elif kind == "notice":
      if not isinstance(record["text"], str):
        raise ValueError("a notice without text")
    else:
      raise ValueError(f"kind {kind!r}")


def _open_store(directory: str | os.PathLike[str]) -> ts.KvStore:
  path = os.path.join(os.path.abspath(directory), "")
  return ts.KvStore.open({"driver": "file", "path": path}).result()


def _key(seq: int) -> str:
  return f"{seq:012d}.json"


def _canonical(record: Mapping[str, Any]) -> bytes:
  return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
