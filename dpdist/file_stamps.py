"""Whether files are still those that were opened."""

from collections.abc import Iterable
import os


class FileStamps:
  """The size, time of change and inode of files, as they were found.

  A file that is written to, or has another in its place, has another stamp.
  Content is not looked at, so that asking costs next to nothing.

  Raises:
    OSError: a file cannot be looked at.
  """

  def __init__(self, paths: Iterable[str | os.PathLike[str]]):
    self._stamps = {os.fspath(path): _stamp(path) for path in paths}

  def changed(self) -> list[str]:
    """The files that are not what they were.

    Raises:
      OSError: a file cannot be looked at now, but perhaps later.
    """
    return [
      path for path, stamp in self._stamps.items() if _stamp(path) != stamp
    ]


def _stamp(path: str | os.PathLike[str]) -> tuple[int, int, int, int]:
  found = os.stat(path)
  return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev
