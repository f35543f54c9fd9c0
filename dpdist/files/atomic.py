"""Writes a file so that a reader finds the whole old one or the whole new."""

import os
import pathlib


def write(path: pathlib.Path, data: bytes, *, is_durable: bool = False) -> None:
  """Writes a file beside its place, and renames it into place.

  With `is_durable` it syncs the file before it is renamed. After a crash of the
  machine, either the whole new file is there, or the old one. The directory is
  not synced.
  """
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "wb") as file:
    file.write(data)
    if is_durable:
      file.flush()
      os.fsync(file.fileno())
  os.replace(temporary, path)
