"""Opens data files that are on a disk, or in a bucket under an s3:// URL.

A bucket is read by pyarrow, which takes credentials, region and endpoint
(AWS_ENDPOINT_URL, for a store that is not Amazon's) from the environment.

Whoever runs the store sees which parts of a file are read, as whoever runs a
network disk does: with row groups, about which rows a step drew.
"""

import atexit
from collections.abc import Iterator
import contextlib
import errno
import io
import os
import pathlib
import shutil
import tempfile
from typing import Any, BinaryIO

from dpdist import errors

_SCHEME = "s3://"
_BLOCK_BYTES = 1 << 24
# What Amazon's client calls what can be wrong.
_REASONS = (
  "ACCESS_DENIED",
  "INVALID_ACCESS_KEY_ID",
  "NETWORK_CONNECTION",
  "NO_SUCH_BUCKET",
  "SIGNATURE_DOES_NOT_MATCH",
)


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is a URL."""
  return "://" in os.fspath(path)


def directory(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path of a run's directory; ArgumentError if it is no disk's."""
  if not os.fspath(path) or is_remote(path):
    raise errors.ArgumentError(
      "workdir must be a directory on a disk, got"
      f" {os.fspath(path)!r}; for a run whose disk goes with its machine, set"
      " ledger, checkpoint_copies and secret_file",
      hint=errors.Hint(flags=("--workdir=DIRECTORY",)),
    )
  return pathlib.Path(path)


def is_file(path: str | os.PathLike[str]) -> bool:
  """Returns whether there is a file; OSError if a store does not answer."""
  if not is_remote(path):
    return os.path.isfile(path)
  from pyarrow import fs

  store, key = _store(path)
  with _answers():
    return bool(store.get_file_info(key).type == fs.FileType.File)


def stamp(path: str | os.PathLike[str]) -> tuple[Any, ...]:
  """Returns what tells a file from one that is put in its place.

  On a disk that is size, mtime, inode and device. In a bucket it is the size,
  the time, and the ETag, which is made of hashes of the content. Raises OSError
  if there is no such file.
  """
  if not is_remote(path):
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev
  store, key = _store(path)
  with _answers(), store.open_input_file(key) as file:
    values = file.metadata() or {}
  names = ("Content-Length", "Last-Modified", "ETag")
  return tuple(values.get(name, b"").decode() for name in names)


def open_binary(path: str | os.PathLike[str]) -> BinaryIO:
  """Opens a file for reading, from its beginning to its end."""
  if not is_remote(path):
    return open(path, "rb")
  return io.BufferedReader(_object(path), _BLOCK_BYTES)


def open_arrow(path: str | os.PathLike[str]) -> Any:
  """Opens a file for pyarrow, which reads parts of it at any position.

  It is not given a path, in which it would read "key=value" as a column.
  """
  import pyarrow as pa

  return _object(path) if is_remote(path) else pa.OSFile(os.fspath(path))


def on_disk(path: str | os.PathLike[str]) -> str:
  """Returns a path for programs that read disks alone.

  An object is copied into a folder of this process, which only its user can
  read, under $TMPDIR. It is deleted when the process ends, unless that is
  killed.
  """
  if not is_remote(path):
    return os.fspath(path)
  before = stamp(path)
  folder = tempfile.mkdtemp(prefix="dpdist-data-")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  copy = pathlib.Path(folder, os.fspath(path).rpartition("/")[2])
  with open_binary(path) as file, open(copy, "wb") as target:
    shutil.copyfileobj(file, target, _BLOCK_BYTES)
  if stamp(path) != before or copy.stat().st_size != int(before[0]):
    raise OSError(errno.EIO, "an object was replaced while it was copied")
  return str(copy)


def _object(path: str | os.PathLike[str]) -> "_Object":
  store, key = _store(path)
  with _answers():
    return _Object(store.open_input_file(key))


class _Object(io.RawIOBase):
  """An object of a bucket; what fails may work later, and is an OSError."""

  def __init__(self, file: Any):
    self._file = file

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    return int(self._file.seek(offset, whence))

  def tell(self) -> int:
    return int(self._file.tell())

  def readinto(self, buffer: Any) -> int:
    with _answers():
      return int(self._file.readinto(buffer))

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def _store(path: str | os.PathLike[str]) -> tuple[Any, str]:
  """Returns pyarrow's file system of a URL, and the object's place there."""
  url = os.fspath(path)
  # What stands before the bucket would be a secret; it is not shown.
  name = url.partition("://")[2]
  if "@" in name.partition("/")[0] or "secret" in name.partition("?")[2]:
    raise errors.ArgumentError(
      "a URL of data must hold no credentials, since it is recorded; set"
      " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
    )
  if not url.startswith(_SCHEME) or not name.partition("/")[2]:
    raise errors.ArgumentError(
      f"paths must be files, or URLs like s3://BUCKET/PATH, got {url!r}"
    )
  try:
    from pyarrow import fs
  except ModuleNotFoundError as error:
    raise errors.missing("data in a bucket", "pyarrow", "parquet") from error
  try:
    store, key = fs.FileSystem.from_uri(url)
  except (ValueError, OSError) as error:
    raise errors.ArgumentError(
      f"paths must be files, or URLs like s3://BUCKET/PATH, got {url!r}:"
      f" {error}"
    ) from error
  return store, key


@contextlib.contextmanager
def _answers() -> Iterator[None]:
  """Gives errors of a store a number, as those of a disk have one.

  pyarrow's have none where the store did not answer or refused; readers of file
  formats would be blamed for them.
  """
  try:
    yield
  except OSError as error:
    if error.errno is not None:
      raise
    # Not the whole text, which names the object and the place in it.
    known = (word for word in _REASONS if word in str(error))
    reason = next(known, "error").lower().replace("_", " ")
    raise OSError(errno.EIO, f"the object store: {reason}") from error
