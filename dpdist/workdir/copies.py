"""Copies of checkpoints in a bucket, for machines whose disk goes with them.

A checkpoint is copied before the ledger records it, so that each one that a run
may go on from is in both places. A machine with an empty disk fetches the
newest, and holds it against the digest in the ledger. Each run has a folder of
its own there.
"""

from collections.abc import Sequence
import json
import pathlib
import secrets
import shutil
from typing import Any

from dpdist import errors
from dpdist.files import json_fields
from dpdist.ledger import history
from dpdist.ledger import stores
from dpdist.workdir import manifest

_MARK = "checkpoints_of_dpdist"
_SIZES = "dpdist_sizes.json"
# A file comes in pieces, each of which is waited for by itself.
_PIECE_BYTES = 1 << 24


class Copies:
  """The copies of a run's checkpoints."""

  def __init__(self, location: str, run: str):
    """Opens the folder of a run in a bucket, or in a directory.

    `run` is the digest that names the run; see `ledger.Ledger.name`. Raises
    ValueError if the location is no store, and SaveError if it does not answer.
    """
    self._name = stores.shown(location)
    self._run = run
    self._store = self._result(stores.opening(location))

  def check(self) -> None:
    """Raises SaveError unless something can be written and listed there."""
    self._put(_MARK, b"")
    self._keys(_MARK)

  def put(self, path: pathlib.Path) -> None:
    """Copies a checkpoint, with its manifest; SaveError if that fails."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sizes = {
      file.relative_to(path).as_posix(): file.stat().st_size for file in files
    }
    # Of use to whoever fetches; the manifest says whether it is right.
    self._put(f"{self._key(path, path)}/{_SIZES}", json.dumps(sizes).encode())
    for file in files:
      self._put(self._key(path, file), file.read_bytes())

  def fetch(
    self, directory: pathlib.Path, known: Sequence[history.CheckpointRef]
  ) -> None:
    """Fetches the newest whole checkpoint, unless the newest of all is there.

    Those in the ledger are given, oldest first. What is fetched is held against
    its digest; nothing happens where no copy is whole. Raises SaveError if the
    store does not answer, or the disk does not take it.
    """
    for saved in reversed(known):
      path = manifest.location(directory, saved)
      if manifest.problem(path, saved.digest) is None:
        return
      aside = directory / f".fetched_{secrets.token_hex(8)}"
      try:
        if self._fetch(path, aside / "new", saved.digest):
          # Another start may have fetched it meanwhile, and restore it now.
          if manifest.problem(path, saved.digest) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
              path.rename(aside / "old")
            (aside / "new").rename(path)
          return
      except errors.SaveError:
        raise
      except OSError as error:
        raise errors.SaveError(
          f"{path} could not be fetched from {self._name}: {error.strerror}"
        ) from error
      finally:
        shutil.rmtree(aside, ignore_errors=True)

  def delete_others(
    self, kept: Sequence[pathlib.Path], folder: pathlib.Path
  ) -> None:
    """Deletes the copies of all checkpoints but those at the paths given.

    None is deleted of a writer after the one whose folder is given, which may
    have been taken for dead, and go on. SaveError if the store does not.
    """
    names = tuple(self._key(path, path) + "/" for path in kept)
    for key in self._keys(f"{self._run}/"):
      writer = key.split("/")[1]
      if writer <= folder.name and not key.startswith(names):
        self._result(self._store.write(key, None))

  def _fetch(
    self, path: pathlib.Path, target: pathlib.Path, digest: str
  ) -> bool:
    """Fetches the files that a checkpoint's manifest names, and no other.

    Returns whether they are what the digest is of.
    """
    prefix = self._key(path, path) + "/"
    listed, sizes = (
      self._result(self._store.read(prefix + name)).value
      for name in (manifest.FILE, _SIZES)
    )
    names = manifest.names(listed, digest)
    known = json_fields.counts(sizes)
    if names is None or not known.keys() >= {*names}:
      return False
    target.mkdir(parents=True)
    (target / manifest.FILE).write_bytes(listed)
    for name in names:
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      with open(target / name, "wb") as file:
        for start in range(0, known[name], _PIECE_BYTES):
          part = slice(start, min(start + _PIECE_BYTES, known[name]))
          read = self._store.read(prefix + name, byte_range=part)
          try:
            found = self._result(read, _PIECE_BYTES)
          except errors.SaveError as error:
            if "OUT_OF_RANGE" in str(error):  # The copy is shorter.
              return False
            raise
          file.write(found.value)
    return manifest.problem(target, digest) is None

  def _keys(self, prefix: str) -> list[str]:
    found = self._result(self._store.list(_range(prefix)))
    return sorted(key.decode() for key in found)

  def _key(self, path: pathlib.Path, file: pathlib.Path) -> str:
    """Returns the name of a file of the checkpoint in `path`."""
    return f"{self._run}/{file.relative_to(path.parent.parent).as_posix()}"

  def _put(self, key: str, value: bytes) -> None:
    self._result(self._store.write(key, value), len(value))

  def _result(self, future: Any, num_bytes: int = 0) -> Any:
    try:
      return stores.answer(future, self._name, num_bytes)
    except (ValueError, OSError, NotImplementedError) as error:
      reason = getattr(error, "strerror", None) or error
      first_line = (str(reason).splitlines() or [type(error).__name__])[0]
      raise errors.SaveError(
        f"checkpoint_copies {self._name!r} did not take or give a copy:"
        f" {first_line}"
      ) from error


def _range(prefix: str) -> Any:
  import tensorstore as ts

  return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))
