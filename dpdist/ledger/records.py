"""A log of immutable records, chained by hash, on any key-value store.

Record n is the value of key n in a tensorstore key-value store: a local
directory, or a bucket. It is written once, on the condition that the key does
not exist, so nothing is appended to, renamed or overwritten, and two processes
cannot both write record n. Each record holds a SHA-256 of itself and of the one
before it.

One value changes, the head. It says how far the log has come at least, and
which process writes it. It is written after each record and also, as a
heartbeat, every few seconds. It keeps a note of the writer's, which is replaced
at once and leaves no record (`put_note`).

A log has one writer for a long time (`acquire`, then `append`), or many, each
for one record (`propose`).

Guarantees:
  * Durable when `append` returns. On a local disk tensorstore writes and syncs
    the file, renames it and syncs the directory; on an object store the write
    has been committed.
  * One writer. A writer begins with a record of its own. The writer before it
    can then write nothing more, since the key that it would create exists: a
    process that was paused and wakes cannot write. This rests on conditional
    writes and on no clock; the heartbeat only keeps a second process from
    taking over while the first one lives.
  * A record that is altered, missing, exchanged or repeated is detected when
    the log is read, and named. The head reveals the loss of the newest records.
  * If the newest record is damaged and the head does not count it yet, it was
    being written when the machine stopped. It is kept as a lost record, and its
    reader must assume the worst. The next record says that it was lost.
  * Without its head, or with a damaged one, a log is not read: nothing could
    tell whether it was rolled back.
"""

import atexit
from collections.abc import Callable, Mapping
import contextlib
import errno
import json
import os
import re
import secrets
import threading
import time
from typing import Any

from dpdist import errors
from dpdist.files import json_fields
from dpdist.files import sealed_json
from dpdist.ledger import liveness
from dpdist.ledger import stores

FIRST = "0" * 64
# How often a writer sends a heartbeat, and how long the next one waits for it,
# by the process's own clock. Safety depends on neither.
BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 20.0

_HEAD = "head.json"
_HEAD_FIELDS = {
  "seq": int, "head": str, "open": bool, "writer": str, "beat": int,
  "pid": int, "started": str, "host": str, "host_name": str,
}  # fmt: skip
_RECORD = re.compile(r"\d{12}\.json")
_ATTEMPTS = 5


class Log:
  """An open log. One process writes, any may read."""

  def __init__(
    self,
    location: str | os.PathLike[str],
    apply: Callable[[dict[str, Any]], None],
  ):
    """Reads and checks every record.

    The location is a local path, a URL such as s3://bucket/path, or the JSON of
    a tensorstore key-value store's spec, and need not exist. `apply` is called
    with each record that is read or written, and raises ValueError, KeyError,
    TypeError or IndexError for one that makes no sense. Raises ValueError for
    another location, and LedgerError if a record is missing, altered or out of
    order.
    """
    self._name = f"the store {stores.shown(location)}"
    self._store = self._result(stores.opening(location))
    self._apply = apply
    self._lock = threading.Lock()
    self._token = ""
    self._beats = 0
    self._stopped = threading.Event()
    self._heart = threading.Thread(target=self._live, daemon=True)
    # The bodies of all records, in order. Beside the user's kinds there are
    # "writer", for a process that began to write, and "lost".
    self.records: list[dict[str, Any]] = []
    # heads[n] is the SHA-256, hex, of the record before record n.
    self.heads = [FIRST]
    self._note = ""
    self._read()

  @property
  def head(self) -> str:
    """Returns the SHA-256 of the last record, hex."""
    return self.heads[-1]

  @property
  def note(self) -> str:
    """Returns what a writer last noted; "" for nothing."""
    return self._note

  def put_note(self, text: str) -> None:
    """Notes a text in the head, durably, in the place of the one before.

    Raises LedgerError if this process is not the writer, or no longer, or if
    the store failed, and it may have been noted or not.
    """
    if not self._token:
      raise errors.LedgerError(
        "this process must acquire the ledger before it writes there"
      )
    with self._lock:
      self._note = text
      self._write_head()

  def acquire(self) -> None:
    """Makes this process the writer; raises LedgerError if there is another."""
    before = self._read_head()
    if before is None:
      self._write_head(if_missing=True)
    elif before["open"] and not liveness.is_gone(before):
      self._watch(before)
    self._token = secrets.token_hex(16)
    try:
      self.append("writer", token=self._token)
    except errors.LedgerError:
      self._token = ""
      raise
    stores.sync_above(self._store)
    self._heart.start()
    # A heartbeat during the interpreter's exit would abort the process.
    atexit.register(self._stop_heart)

  def append(self, kind: str, **body: Any) -> None:
    """Writes a record, with its kind and its JSON-able fields, durably.

    Raises LedgerError if this process is not the writer, or no longer, or if
    the store failed, and the record may have been written or not.
    """
    if not self._token:
      raise errors.LedgerError(
        "this process must acquire the ledger before it writes there"
      )
    with self._lock:
      self._write_record(kind, body)
      self._write_head()

  def propose(
    self, decide: Callable[[], tuple[str, Mapping[str, Any]] | None]
  ) -> None:
    """Writes a record durably, in a log that any process may write.

    `decide` returns the record's kind and its fields, or None if there is
    nothing to write. If other processes wrote first, it is called again after
    `apply` was called with their records. Its exceptions come through. Raises
    LedgerError if the log is damaged, or the store failed, and the record may
    have been written or not.
    """
    with self._lock:
      if self._read_head() is None:
        with contextlib.suppress(errors.ShutOutError):
          self._write_head(is_open=False, if_missing=True)
        stores.sync_above(self._store)
      while (decided := decide()) is not None:
        kind, body = decided
        # Two processes that write equal records must not both take one record
        # for their own.
        nonce = secrets.token_hex(16)
        try:
          self._write_record(kind, {**body, "nonce": nonce})
        except errors.ShutOutError:
          self._read()
        else:
          self._advance_head()
          return

  def confirm(self) -> None:
    """Raises LedgerError if another process has begun to write."""
    with self._lock:
      if self._is_shut_out():
        raise errors.ShutOutError(_shut_out(len(self.records)))

  def close(self) -> None:
    """Closes the log, so that the next process can write at once."""
    self._stop_heart()
    atexit.unregister(self._stop_heart)
    with self._lock, contextlib.suppress(errors.LedgerError):
      if self._token:
        self._write_head(is_open=False)
    self._token = ""

  def _read(self) -> None:
    """Reads the records that were written since the last read."""
    # The head first: what is written meanwhile then comes after it.
    head = self._read_head()
    names = sorted(
      name
      for key in self._result(self._store.list())
      if (name := key.decode()) != _HEAD
    )
    for seq, name in enumerate(names):
      if not _RECORD.fullmatch(name):
        raise errors.LedgerError(
          f"{name!r} is no record of the ledger: take it away"
        )
      if name != _key(seq):
        raise errors.LedgerError(
          f"ledger record {seq} is missing: the next key is {name!r}"
        )
    first = len(self.records)
    reads = [self._store.read(name) for name in names[first:]]
    values = [sealed_json.trim(self._result(read).value) for read in reads]
    for i, value in enumerate(values):
      seq = first + i
      if sealed_json.is_whole(value):
        self._add(value)
        continue
      # Several in a row may be lost; the record after them lists each.
      after = next((v for v in values[i:] if sealed_json.is_whole(v)), None)
      covered = head is not None and head["seq"] > seq
      if _acknowledges(after, value) or (after is None and not covered):
        self._lose(value)
      else:
        raise errors.LedgerError(f"ledger record {seq} was altered")
    if head is None:
      # The first writer may have begun just after the first read of the head.
      if values and self._read_head() is None:
        raise errors.LedgerError(f"the ledger's {_HEAD} is missing")
    elif head["seq"] > len(self.records):
      raise errors.LedgerError(
        f"ledger records {len(self.records)} to {head['seq'] - 1} are missing:"
        " the ledger was rolled back"
      )
    elif self.heads[head["seq"]] != head["head"]:
      raise errors.LedgerError(
        f"ledger record {head['seq'] - 1} is not the one that {_HEAD} speaks of"
      )

  def _write_record(self, kind: str, body: Mapping[str, Any]) -> None:
    seq = len(self.records)
    if len(self.heads) != seq + 1:
      raise errors.LedgerError(
        "this process was interrupted while it wrote to the ledger: start again"
      )
    record = {"seq": seq, "prev": self.head, "kind": kind, **body}
    lost = 0
    while lost < seq and self.records[seq - lost - 1]["kind"] == "lost":
      lost += 1
    if lost:
      record["torn"] = self.heads[-lost:]
    value = sealed_json.seal(record)
    self._create(seq, value)
    self._add(value)

  def _add(self, value: bytes) -> None:
    seq = len(self.records)
    try:
      record = json.loads(value)
      json_fields.check(record, {"seq": int, "prev": str, "kind": str})
      if record["seq"] != seq or record["prev"] != self.head:
        raise errors.LedgerError(
          f"ledger record {seq} does not follow record {seq - 1}: one of them"
          " is another's"
        )
      self._apply(record)
    except (ValueError, KeyError, TypeError, IndexError) as error:
      raise errors.LedgerError(
        f"ledger record {seq} cannot be understood: {error!r}"
      ) from error
    self.records.append(record)
    self.heads.append(sealed_json.digest(value))

  def _lose(self, value: bytes) -> None:
    record = {"seq": len(self.records), "kind": "lost"}
    self._apply(record)
    self.records.append(record)
    self.heads.append(sealed_json.digest(value))

  def _create(self, seq: int, value: bytes) -> None:
    """Writes a value under a key that does not exist; safe to repeat."""
    key = _key(seq)
    problem: Exception | None = None
    for attempt in range(_ATTEMPTS):
      try:
        found = stores.answer(self._store.read(key), self._name)
        if found.state == "missing":
          stamp = stores.answer(
            self._store.write(key, value, if_equal=found.stamp.generation),
            self._name,
          )
          # A condition that does not hold gives an empty generation.
          if stamp.generation:
            return
        elif sealed_json.trim(found.value) == value:
          return  # An attempt had succeeded, though its answer was lost.
        else:
          raise errors.ShutOutError(_shut_out(seq))
      except (ValueError, OSError) as error:
        problem = error
        if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:
          break
        time.sleep(0.05 * 2**attempt)
    reason = getattr(problem, "strerror", None) or problem
    raise errors.LedgerError(
      f"ledger record {seq} could not be written: {reason}"
    ) from problem

  def _is_shut_out(self) -> bool:
    found = self._result(self._store.read(_key(len(self.records))))
    return found.state != "missing"

  def _read_head(self) -> dict[str, Any] | None:
    found = self._result(self._store.read(_HEAD))
    if found.state == "missing":
      return None
    head = _head_of(found)
    if not self._token:  # Else it is this writer's.
      self._note = str(head.get("note", ""))
    return head

  def _write_head(
    self, *, is_open: bool = True, if_missing: bool = False
  ) -> None:
    # In this order: a process that is paused before it writes, while another
    # takes over, then finds the head changed, and cannot turn it back.
    found = self._result(self._store.read(_HEAD))
    if (found.state != "missing") if if_missing else self._is_shut_out():
      raise errors.ShutOutError(_shut_out(len(self.records)))
    self._put_head(found, is_open=is_open)

  def _advance_head(self) -> None:
    """Makes the head count at least all records that were read."""
    while True:
      found = self._result(self._store.read(_HEAD))
      if _head_of(found)["seq"] >= len(self.records):
        return
      self._put_head(found, is_open=False)

  def _put_head(self, found: Any, *, is_open: bool) -> None:
    """Writes the head if it is still the one that was found."""
    self._beats += 1
    value = {
      "seq": len(self.records),
      "head": self.head,
      "open": is_open,
      "writer": self._token,
      "beat": self._beats,
      **liveness.process_id(),
      **({"note": self._note} if self._note else {}),
    }
    self._result(
      self._store.write(
        _HEAD, sealed_json.seal(value), if_equal=found.stamp.generation
      )
    )

  def _watch(self, before: dict[str, Any]) -> None:
    """Waits for a heartbeat of the writer that `before` names."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
      now = self._read_head()
      if now is not None and not now["open"]:
        return
      if now != before:
        raise errors.LedgerError(
          f"process {before['pid']} on {before['host_name']} writes this"
          " ledger: one run directory takes one writer"
        )
      time.sleep(PATIENCE_SECONDS / 100)

  def _stop_heart(self) -> None:
    self._stopped.set()
    if self._heart.is_alive():
      self._heart.join()

  def _live(self) -> None:
    while not self._stopped.wait(BEAT_SECONDS):
      # No single heartbeat is essential.
      with self._lock, contextlib.suppress(errors.LedgerError):
        if self._is_shut_out():
          return
        self._write_head()

  def _result(self, future: Any) -> Any:
    return _result(future, self._name)


def folders(root: str | os.PathLike[str]) -> list[str]:
  """Returns the names of the logs below a root."""
  name = f"the store {stores.shown(root)}"
  store = _result(stores.opening(stores.below(root, "")), name)
  keys = _result(store.list(), name)
  return sorted({key.decode().partition("/")[0] for key in keys if b"/" in key})


def _result(future: Any, name: str) -> Any:
  try:
    return stores.answer(future, name)
  except (ValueError, OSError, NotImplementedError) as error:
    reason = getattr(error, "strerror", None) or error
    raise errors.LedgerError(f"the ledger's store failed: {reason}") from error


def _head_of(found: Any) -> dict[str, Any]:
  value = sealed_json.trim(found.value)
  if not sealed_json.is_whole(value):
    raise errors.LedgerError(f"the ledger's {_HEAD} was altered")
  head = json_fields.parse(value, _HEAD)
  try:
    json_fields.check(head, _HEAD_FIELDS)
  except ValueError as error:
    raise errors.LedgerError(
      f"the ledger's {_HEAD} cannot be understood: {error}"
    ) from error
  return head


def _key(seq: int) -> str:
  return f"{seq:012d}.json"


def _acknowledges(after: bytes | None, value: bytes) -> bool:
  """Returns whether a later writer recorded that this record was lost."""
  if after is None or not sealed_json.is_whole(after):
    return False
  torn = json.loads(after).get("torn", [])
  return isinstance(torn, list) and sealed_json.digest(value) in torn


def _shut_out(seq: int) -> str:
  return (
    f"another process wrote ledger record {seq}: one run directory takes one"
    " writer; this process must stop"
  )
