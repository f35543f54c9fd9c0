"""Copies of checkpoints in a bucket, for machines whose disk goes with them.

A checkpoint is copied before the ledger records it, so that each one that a run
may go on from is in both places. A machine with an empty disk fetches the
newest, and holds it against the digest in the ledger. Each run has a folder of
its own there.
"""

from collections.abc import Sequence
import pathlib
import secrets
import shutil
from typing import Any

from dpdist import errors
from dpdist.ledger import history
from dpdist.ledger import stores
from dpdist.workdir import manifest

# A copy may take a minute, and a second more for each of so many bytes.
_PATIENCE_SECONDS = 60.0
_SLOWEST_BYTES = 1 << 20
_MARK = "checkpoints_of_dpdist"


class Copies:
  """The copies of a run's checkpoints."""

  def __init__(self, location: str, run: str):
    """Opens the folder of a run in a bucket, or in a directory.

    `run` is the digest that names the run; see `ledger.Ledger.name`. Raises
    ValueError if the location is no store, and SaveError if it does not answer.
    """
    self._location, self._run = location, run
    self._store = _result(stores.opening(location), location)

  def check(self) -> None:
    """Raises SaveError unless something can be written there."""
    self._put(_MARK, b"")

  def put(self, path: pathlib.Path) -> None:
    """Copies a checkpoint, with its manifest; SaveError if that fails."""
    for file in sorted(path.rglob("*")):
      if file.is_file():
        self._put(self._key(path, file), file.read_bytes())

  def fetch(
    self, directory: pathlib.Path, known: Sequence[history.CheckpointRef]
  ) -> None:
    """Fetches the newest whole checkpoint, unless the newest of all is there.

    Those in the ledger are given, oldest first. What is fetched is held against
    its digest; nothing happens where no copy is whole. Raises SaveError if the
    store does not answer.
    """
    for saved in reversed(known):
      path = manifest.location(directory, saved)
      if manifest.problem(path, saved.digest) is None:
        return
      partial = directory / f".fetched_{secrets.token_hex(8)}"
      try:
        self._fetch(path, partial)
        if manifest.problem(partial, saved.digest) is None:
          shutil.rmtree(path, ignore_errors=True)
          path.parent.mkdir(parents=True, exist_ok=True)
          partial.rename(path)
          return
      finally:
        shutil.rmtree(partial, ignore_errors=True)

  def delete_others(self, kept: Sequence[pathlib.Path]) -> None:
    """Deletes the copies of all checkpoints but those at the paths given."""
    names = tuple(self._key(path, path) + "/" for path in kept)
    for key in self._keys(f"{self._run}/"):
      if not key.startswith(names):
        _result(self._store.write(key, None), self._location)

  def _fetch(self, path: pathlib.Path, target: pathlib.Path) -> None:
    prefix = self._key(path, path) + "/"
    for key in self._keys(prefix):
      file = target / key.removeprefix(prefix)
      if not file.resolve().is_relative_to(target.resolve()):
        raise errors.SaveError(f"{self._location} holds an odd name, {key!r}")
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_bytes(_result(self._store.read(key), self._location).value)

  def _keys(self, prefix: str) -> list[str]:
    found = _result(self._store.list(_range(prefix)), self._location)
    return sorted(key.decode() for key in found)

  def _key(self, path: pathlib.Path, file: pathlib.Path) -> str:
    """Returns the name of a file of the checkpoint in `path`."""
    return f"{self._run}/{file.relative_to(path.parent.parent).as_posix()}"

  def _put(self, key: str, value: bytes) -> None:
    _result(self._store.write(key, value), self._location, len(value))


def _range(prefix: str) -> Any:
  import tensorstore as ts

  return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))


def _result(future: Any, location: str, num_bytes: int = 0) -> Any:
  try:
    return future.result(_PATIENCE_SECONDS + num_bytes / _SLOWEST_BYTES)
  except (ValueError, OSError, TimeoutError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise errors.SaveError(
      f"checkpoint_copies {location!r} did not take or give a copy: {reason}"
    ) from error
