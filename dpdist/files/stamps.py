"""Checks whether files are still those that were opened.

The check reads the file system's metadata. Anyone who may write a file can set
back its modification time (mtime). The time of any change to the file or its
metadata (ctime) cannot be set back, but it also changes when a file is renamed
or linked to, or when its mode, owner or labels change. So a new ctime alone
proves nothing; it only says whose content has to be read again. Windows and
other platforms without such a time have no ctime check.
"""

from collections.abc import Callable, Iterable
import os
import threading

from dpdist.files import places


class FileStamps:
  """The stamps of files, as they were found; see `places.stamp`.

  A file that is written to or replaced has another stamp. Content is read only
  if a file's ctime changed while its stamp did not, so checks cost next to
  nothing. Raises OSError if a file's metadata cannot be read.
  """

  def __init__(self, paths: Iterable[str | os.PathLike[str]]):
    self._stamps = {os.fspath(path): places.stamp(path) for path in paths}
    self._ctimes = {path: _ctime(path) for path in self._stamps}
    self._lock = threading.Lock()

  @property
  def paths(self) -> list[str]:
    """Returns the paths of the files."""
    return list(self._stamps)

  def is_touched(self) -> bool:
    """Returns whether a file's ctime changed; reads no content."""
    return any(_ctime(path) != time for path, time in self._ctimes.items())

  def changed(self, is_same: Callable[[], bool]) -> list[str]:
    """Returns the files that changed; raises OSError if that is unknown now.

    Only where no stamp changed but a ctime did, calls is_same, which returns
    whether a hash of all their content is what it was.
    """
    with self._lock:
      changed = [
        path
        for path, stamp in self._stamps.items()
        if places.stamp(path) != stamp
      ]
      # Taken before content is read, so that no later change is missed.
      ctimes = {path: _ctime(path) for path in self._ctimes}
      if changed or ctimes == self._ctimes:
        return changed
      if is_same():
        self._ctimes = ctimes
        return []
      return [p for p, time in ctimes.items() if time != self._ctimes[p]]


def _ctime(path: str | os.PathLike[str]) -> int:
  # Elsewhere st_ctime is the time at which the file was made; an object of a
  # bucket has none.
  if os.name != "posix" or places.is_remote(path):
    return 0
  return os.stat(path).st_ctime_ns
