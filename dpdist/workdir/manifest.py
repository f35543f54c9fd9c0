"""The SHA-256 of every file of a checkpoint, and its own digest.

Orbax restores flipped bits without an error, and accepts a directory whose
commit marker is gone. A manifest detects both. Imports no jax, so that
checkpoints can be verified anywhere.
"""

from collections.abc import Sequence
import contextlib
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

from dpdist.files import atomic
from dpdist.files import json_fields
from dpdist.ledger import history

FILE = "dpdist_manifest.json"


class ResumePoint(NamedTuple):
  """The checkpoint that a run can go on from."""

  # The newest whole one; None if there is none.
  saved: history.CheckpointRef | None
  rejected: list[str]  # Why newer ones were passed over; one line each.


def newest(
  directory: pathlib.Path, known: Sequence[history.CheckpointRef]
) -> ResumePoint:
  """Finds the newest whole checkpoint of those in the ledger, oldest first."""
  rejected: list[str] = []
  for saved in reversed(known):
    wrong = problem(location(directory, saved), saved.digest)
    if wrong is None:
      return ResumePoint(saved, rejected)
    rejected.append(f"checkpoint of step {saved.step} passed over: {wrong}")
  return ResumePoint(None, rejected)


def location(
  directory: pathlib.Path, saved: history.CheckpointRef
) -> pathlib.Path:
  """Returns a checkpoint's directory, below the run's checkpoints."""
  return folder(directory, saved.writer) / str(saved.step)


def folder(directory: pathlib.Path, writer: int) -> pathlib.Path:
  """Returns the folder of a writer's checkpoints, below the run's."""
  return directory / f"writer_{writer:06d}"


def ledger_heads(directory: pathlib.Path) -> dict[str, str]:
  """Returns the heads that checkpoints were saved under, by readable path."""
  found = {}
  for file in sorted(directory.glob("writer_*/*/meta/metadata")):
    with contextlib.suppress(OSError, ValueError):
      path = file.parent.parent
      found[str(path)] = ledger_head(path)
  return found


def ledger_head(path: pathlib.Path) -> str:
  """Returns the ledger's head that a checkpoint was saved under."""
  return str(meta(path)["ledger_head"])


def meta(path: pathlib.Path) -> dict[str, Any]:
  """Returns what a checkpoint says of itself beside its state."""
  file = path / "meta" / "metadata"
  found = json_fields.parse(file.read_bytes(), "its metadata")
  json_fields.check(found, {"ledger_head": str})
  return dict(found)


def statistics(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns the private statistics that a checkpoint was trained with.

  None: there are none. The manifest must have been verified.
  """
  file = path / "meta" / "metadata"
  meta = json_fields.parse(file.read_bytes(), "its metadata")
  if "statistics" not in meta:
    return None
  json_fields.check(meta, {"statistics": dict})
  found: dict[str, Any] = meta["statistics"]
  fields = {"query": str, "data": str, "noise_multiplier": float}
  json_fields.check(found, fields | {"columns": dict})
  return found


def write(path: pathlib.Path) -> str:
  """Writes a directory's manifest, and syncs all; returns its SHA-256, hex."""
  text = json.dumps(_file_digests(path), sort_keys=True, indent=1).encode()
  # Orbax does not sync its files, and a manifest must not outlive them.
  for file in _files(path):
    sync(file)
  atomic.write(path / FILE, text, is_durable=True)
  for directory in [path, *(d for d in path.rglob("*") if d.is_dir())]:
    sync(directory)
  sync(path.parent)
  return hashlib.sha256(text).hexdigest()


def problem(path: pathlib.Path, digest: str) -> str | None:
  """Returns what is wrong with a directory; None if it is whole."""
  try:
    text = (path / FILE).read_bytes()
  except OSError:
    return "it has no manifest"
  if hashlib.sha256(text).hexdigest() != digest:
    return "its manifest is not the one in the ledger"
  try:
    expected = json_fields.parse(text, "its manifest")
    found = _file_digests(path)
  except ValueError as error:
    return str(error)
  except OSError as error:
    # Not the error's whole text, which holds the path, and goes into reports.
    return f"it cannot be read: {error.strerror or type(error).__name__}"
  for name in sorted({*expected, *found}):
    if expected.get(name) != found.get(name):
      return f"{name} is damaged, missing or new"
  return None


def names(text: bytes, digest: str) -> list[str] | None:
  """Returns the files that a manifest names; None if `digest` is not of it."""
  if hashlib.sha256(text).hexdigest() != digest:
    return None
  return sorted(json_fields.parse(text, "its manifest"))


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  skip = {path / FILE, path / (FILE + ".tmp")}
  return sorted(p for p in path.rglob("*") if p.is_file() and p not in skip)


def _file_digests(path: pathlib.Path) -> dict[str, str]:
  digests = {}
  for file in _files(path):
    with file.open("rb") as stream:
      digest = hashlib.file_digest(stream, "sha256").hexdigest()
    digests[file.relative_to(path).as_posix()] = digest
  return digests


def sync(path: pathlib.Path) -> None:
  """Makes what was written to a file, or created in a directory, durable."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
