"""Whether files are still those that were opened.

What is looked at is what the file system tells of a file. Its time of change
can be set back by anyone who may write there. The time at which anything of the
file was changed, its ctime, cannot: but it is also another after a file was
renamed or linked to, and after its mode, owner or labels were changed. So a
ctime alone accuses nobody; it says whose content has to be looked at again.
Where the platform tells no such time, as Windows, there is nothing to look at.
"""

from collections.abc import Callable, Iterable
import os
import threading


class FileStamps:
  """The size, time of change and inode of files, as they were found.

  A file that is written to, or has another in its place, has another stamp.
  Content is looked at only where a file was touched and is otherwise as it was,
  so that asking costs next to nothing.

  Raises:
    OSError: a file cannot be looked at.
  """

  def __init__(self, paths: Iterable[str | os.PathLike[str]]):
    self._stamps = {os.fspath(path): _stamp(path) for path in paths}
    self._ctimes = {path: _ctime(path) for path in self._stamps}
    self._lock = threading.Lock()

  @property
  def paths(self) -> list[str]:
    """Of the files."""
    return list(self._stamps)

  def is_touched(self) -> bool:
    """Whether the ctime of a file is another; looks at no content.

    Raises:
      OSError: as in `changed`.
    """
    return any(_ctime(path) != time for path, time in self._ctimes.items())

  def changed(self, is_same: Callable[[], bool]) -> list[str]:
    """The files that are not what they were.

    Args:
      is_same: whether all of their content is what it was, by a hash of it;
        called only where the size, time and inode of all are what they were,
        and the ctime of one is not.

    Raises:
      OSError: a file cannot be looked at now, but perhaps later.
    """
    with self._lock:
      changed = [
        path for path, stamp in self._stamps.items() if _stamp(path) != stamp
      ]
      # Before content is read, so that no change after that is missed.
      ctimes = {path: _ctime(path) for path in self._ctimes}
      if changed or ctimes == self._ctimes:
        return changed
      if is_same():
        self._ctimes = ctimes
        return []
      return [p for p, time in ctimes.items() if time != self._ctimes[p]]


def _ctime(path: str | os.PathLike[str]) -> int:
  # Elsewhere it is the time at which the file was made.
  return os.stat(path).st_ctime_ns if os.name == "posix" else 0


def _stamp(path: str | os.PathLike[str]) -> tuple[int, int, int, int]:
  found = os.stat(path)
  return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev
