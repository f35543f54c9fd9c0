"""Writes a file so that a reader finds the old one or the new, never half."""

import os
import pathlib


def write(path: pathlib.Path, data: bytes, *, is_durable: bool = False) -> None:
  """Writes a file beside its place, and renames it into place.

  If is_durable, syncs it first, so that all of it is there after a crash of the
  machine, or the old file is. The directory is not synced.
  """
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "wb") as file:
    file.write(data)
    if is_durable:
      file.flush()
      os.fsync(file.fileno())
  os.replace(temporary, path)
