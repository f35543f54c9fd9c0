"""Checkpoints: Orbax, with a manifest that is verified before restore.

Orbax restores flipped bits without an error, and takes a directory whose commit
marker is gone. So every checkpoint gets a manifest, the SHA-256 of each of its
files, written and synced after Orbax has finished; the manifest's own SHA-256
is the checkpoint's digest, which the ledger records. A checkpoint is restored
only if the ledger knows its digest and every file matches; else the one before
it is tried.

Nothing random is stored: keys are functions of the secret and the step.
"""

from collections.abc import Sequence
import hashlib
import json
import os
import pathlib
import time
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

PyTree = Any

_MANIFEST = "dpdist_manifest.json"


class MismatchError(ValueError):
  """A sound checkpoint does not fit the model or the optimizer."""


class Restored(NamedTuple):
  """A verified checkpoint.

  Attributes:
    state: the pytree that was saved.
    step: updates made in it.
    digest: SHA-256 of its manifest, hex.
    ledger_head: the head of the ledger when it was saved.
    rejected: why newer ones were passed over; one line each.
  """

  state: PyTree
  step: int
  digest: str
  ledger_head: str
  rejected: list[str]


class Checkpoints:
  """The checkpoints of one run directory; a context manager."""

  def __init__(
    self, directory: str | os.PathLike[str], *, max_to_keep: int = 3
  ):
    """Opens or creates the directory.

    Args:
      directory: a local path.
      max_to_keep: older checkpoints are deleted.
    """
    self._directory = pathlib.Path(directory).absolute()
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep, enable_async_checkpointing=False
      ),
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self._manager.close()

  def save(self, state: PyTree, *, step: int, ledger_head: str) -> str:
    """Saves a checkpoint durably.

    Args:
      state: pytree of arrays.
      step: updates made in it.
      ledger_head: the ledger's head; every step in state must be charged by it.

    Returns:
      The digest, to be recorded in the ledger.
    """
    self._set_aside(step)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        meta=ocp.args.JsonSave({"step": step, "ledger_head": ledger_head}),
      ),
    )
    self._manager.wait_until_finished()
    return _write_manifest(self._directory / str(step))

  def restore(
    self, like: PyTree, known: Sequence[tuple[int, str]]
  ) -> Restored | None:
    """Restores the newest checkpoint that is whole and known.

    Args:
      like: pytree of arrays with the shapes, dtypes and shardings to restore
        to.
      known: (step, digest) of the checkpoints in the ledger, oldest first.

    Returns:
      The checkpoint, or None if there is none that can be trusted.

    Raises:
      MismatchError: the newest sound one has other parameters than like.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    rejected: list[str] = []
    for step, digest in reversed(known):
      path = self._directory / str(step)
      problem = _verify(path, digest)
      if problem is not None:
        rejected.append(f"checkpoint of step {step} passed over: {problem}")
        continue
      try:
        restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            meta=ocp.args.JsonRestore(),
          ),
        )
      except (KeyError, TypeError, ValueError) as error:
        # Its bytes are right, so it is the settings that changed.
        raise MismatchError(
          f"the checkpoint of step {step} in {self._directory} does not fit the"
          " model, optimizer and ema_decay of these settings; go on with those"
          " that the run began with"
        ) from error
      head = restored.meta["ledger_head"]
      return Restored(restored.state, step, digest, head, rejected)
    return None

  def _set_aside(self, step: int) -> None:
    """Moves what is in the way of saving a step out of the directory.

    A run that goes on from a checkpoint finds the ones after it torn, damaged
    or unknown to the ledger. Orbax would count them as the newest.
    """
    stale = [
      path
      for path in self._directory.iterdir()
      if path.name.isdecimal() and int(path.name) >= step
    ]
    for path in stale:
      aside = self._directory.with_name("rejected_checkpoints")
      aside.mkdir(exist_ok=True)
      path.rename(aside / f"{path.name}.{time.time_ns()}")
    if stale:
      self._manager.reload()


def _write_manifest(path: pathlib.Path) -> str:
  text = json.dumps(_file_digests(path), sort_keys=True, indent=1).encode()
  # Orbax does not sync its files; a manifest must not outlive what it names.
  for file in _files(path):
    _sync(file)
  temporary = path / (_MANIFEST + ".tmp")
  temporary.write_bytes(text)
  _sync(temporary)
  temporary.rename(path / _MANIFEST)
  for directory in [path, *(d for d in path.rglob("*") if d.is_dir())]:
    _sync(directory)
  _sync(path.parent)
  return hashlib.sha256(text).hexdigest()


def _verify(path: pathlib.Path, digest: str) -> str | None:
  """What is wrong with a checkpoint; None if it is whole."""
  try:
    text = (path / _MANIFEST).read_bytes()
  except OSError:
    return "it has no manifest"
  if hashlib.sha256(text).hexdigest() != digest:
    return "its manifest is not the one in the ledger"
  expected, found = json.loads(text), _file_digests(path)
  for name in sorted({*expected, *found}):
    if expected.get(name) != found.get(name):
      return f"{name} is damaged, missing or new"
  return None


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  skip = {_MANIFEST, _MANIFEST + ".tmp"}
  return sorted(
    p for p in path.rglob("*") if p.is_file() and p.name not in skip
  )


def _file_digests(path: pathlib.Path) -> dict[str, str]:
  digests = {}
  for file in _files(path):
    with file.open("rb") as stream:
      digest = hashlib.file_digest(stream, "sha256").hexdigest()
    digests[file.relative_to(path).as_posix()] = digest
  return digests


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
