"""Writes down what each noise key is used for, before it is used.

Nobody can tell from outside whether a loop of unknown code computes the same
again after it was killed. So a session writes for every release a line with a
digest of all that goes into it, and waits until it is on disk. A release that
runs again is a replay, and free, only if the digest is the same. Where there is
no line, nothing was released.

Guarantees:
  * One line for each release of a branch, whatever number of processes write:
    a line is added under a lock, by who has read all lines before.
  * Keys depend on the line's `start` too, a random name of the process that
    wrote it. So processes and copies of a directory share no key, unless one
    repeats what is written in a line that both have.
  * A digest has a key of its own, so that it says nothing of what went into it,
    and nobody without the secret can write a line.
  * Lines that were altered or removed are found, and so is a file that was
    copied or restored from a backup, since it has another inode: lines may have
    been written since. So are lines that were cut off in place, even if the
    file with the last line's digest was set back to fit: what keeps the
    ledger's head has it too. The branch is given up then, and its steps are
    charged again. Who can set back the ledger's head as well is not found.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import hmac
import json
import os
import pathlib
from typing import NamedTuple, Self

from dpdist import errors
from dpdist.files import atomic
from dpdist.keys import keys
from dpdist.ledger import ledger as ledger_lib

_FILE = "releases.jsonl"
_HEAD = "releases.head"


class Line(NamedTuple):
  """What was written of a release."""

  branch: str  # The branch's identity.
  release: int  # The number of its charged step.
  start: str  # The name of the process that made it.
  inputs: str  # The digest of all that went into it, hex.


class Commitments:
  """The lines of one run directory; a context manager.

  Only one process of a job has it.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    secret: bytes,
    ledger: ledger_lib.Ledger,
    *,
    is_new: bool,
  ):
    """Reads the lines; `is_new` says that no step was charged so far.

    This process writes the ledger, and nothing else notes anything there.
    Raises LedgerError if lines are missing or were altered.
    """
    self._ledger = ledger
    self._key = keys.derive(secret, "commitments")
    self._head = workdir / _HEAD
    path = workdir / _FILE
    if not is_new and not path.exists():
      raise errors.LedgerError(f"{path} is missing")
    self._file = open(path, "a+b")  # noqa: SIM115 - closed by `close`.
    self._end, self._last = 0, ""
    self._lines: dict[tuple[str, int], Line] = {}
    self._macs = {""}  # Of all lines, and of none.
    try:
      with self._locked():
        self._read()
        if is_new and not self._lines:
          self._write_head()
        # It may be behind, and is never ahead.
        elif (
          not self._head.exists()
          or not self._is_of(self._head.read_text())
          or self._ledger.note not in self._macs
        ):
          raise errors.LedgerError(f"{path} was copied, or lines removed")
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def find(self, branch: str) -> dict[int, str]:
    """Returns the start of each release of a branch that has a line."""
    return {
      line.release: line.start
      for line in self._lines.values()
      if line.branch == branch
    }

  def commit(self, line: Line) -> bool:
    """Returns whether a release may be made: it is new, or a replay.

    A new one is written, and on disk when this returns. Raises LedgerError if
    another process has written since this one read the lines.
    """
    known = self._lines.get((line.branch, line.release))
    if known is not None:
      return known == line
    with self._locked():
      before = self._end
      self._read()
      if self._end != before:
        raise errors.ShutOutError(
          "another process goes on with this run: it has made a release since"
          " this process began"
        )
      self._append(line)
    return True

  @contextlib.contextmanager
  def _locked(self) -> Iterator[None]:
    fcntl.flock(self._file, fcntl.LOCK_EX)
    try:
      yield
    finally:
      fcntl.flock(self._file, fcntl.LOCK_UN)

  def _read(self) -> None:
    """Reads the lines that were added; cuts one that is written in part."""
    self._file.seek(self._end)
    for text in self._file.readlines():
      if not text.endswith(b"\n"):
        # The process died, and did not go on to make the release.
        self._file.truncate(self._end)
        return
      try:
        *fields, mac = json.loads(text)
        line = Line(*fields)
      except (TypeError, ValueError) as error:
        raise errors.LedgerError(f"a line of {_FILE} was altered") from error
      if not hmac.compare_digest(str(mac), self._mac(line)):
        raise errors.LedgerError(f"a line of {_FILE} was altered or removed")
      self._take(line, str(mac), len(text))

  def _append(self, line: Line) -> None:
    mac = self._mac(line)
    text = (json.dumps([*line, mac]) + "\n").encode()
    self._file.seek(self._end)
    self._file.write(text)
    self._file.flush()
    os.fsync(self._file.fileno())
    self._take(line, mac, len(text))
    self._write_head()

  def _write_head(self) -> None:
    # Before the release is made, or its line could be taken away unnoticed.
    self._ledger.put_note(self._last)
    # It need not be durable: what it says may be behind.
    atomic.write(self._head, f"{self._last} {self._inode}".encode())

  def _is_of(self, head: str) -> bool:
    """Returns whether what the head says fits the file and its lines."""
    mac, _, inode = head.partition(" ")
    return mac in self._macs and inode == self._inode

  @property
  def _inode(self) -> str:
    return str(os.fstat(self._file.fileno()).st_ino)

  def _take(self, line: Line, mac: str, size: int) -> None:
    self._lines[line.branch, line.release] = line
    self._last, self._end = mac, self._end + size
    self._macs.add(mac)

  def _mac(self, line: Line) -> str:
    """Returns the digest of a line and of all lines before it."""
    text = json.dumps([self._last, *line])
    return hmac.digest(self._key, text.encode(), "sha256").hex()


def set_aside(workdir: pathlib.Path) -> None:
  """Puts files that cannot be relied on where nothing reads them."""
  for name in (_FILE, _HEAD):
    with contextlib.suppress(FileNotFoundError):
      os.replace(workdir / name, workdir / f"{name}.set_aside")
