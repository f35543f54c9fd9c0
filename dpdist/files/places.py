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
import re
import shutil
import tempfile
from typing import Any, BinaryIO
import urllib.parse

from dpdist import errors

_SCHEME = "s3://"
_BLOCK_BYTES = 1 << 24
# All that a URL of data may say beside the place.
_QUERY = {"endpoint_override", "region", "scheme"}
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
  return re.match(r"\w{2,}:/", os.fspath(path)) is not None


def directory(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path of a run's directory; ArgumentError if it is no disk's."""
  if not os.fspath(path) or is_remote(path):
    raise errors.ArgumentError(
      "workdir must be a directory on a disk, got"
      f" {shown(path)!r}; for a run whose disk goes with its machine, set"
      " ledger, checkpoint_copies and secret_file",
      hint=errors.Hint(flags=("--workdir=DIRECTORY",)),
    )
  return pathlib.Path(path)


def shown(path: str | os.PathLike[str]) -> str:
  """Returns a path as messages name it: of a URL nothing that may be secret."""
  text = os.fspath(path)
  if not is_remote(text):
    return text
  scheme, _, rest = text.partition(":/")
  rest = rest.removeprefix("/")
  place = rest.partition("?")[0].partition("#")[0]
  # A secret before a bucket may have slashes of its own.
  has_secret = "@" in urllib.parse.unquote(rest) or ":" in place
  return f"{scheme}://{'...' if has_secret else place}"


def is_file(path: str | os.PathLike[str]) -> bool:
  """Returns whether there is a file; OSError if a store does not answer."""
  if not is_remote(path):
    return os.path.isfile(path)
  store, key = _store(path)
  from pyarrow import fs

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


@contextlib.contextmanager
def unchanged(path: str | os.PathLike[str]) -> Iterator[None]:
  """Raises OSError at its end if a file was replaced since its beginning."""
  before = stamp(path)
  yield
  if stamp(path) != before:
    raise OSError(errno.EIO, "a file was replaced while it was read")


def open_binary(path: str | os.PathLike[str]) -> BinaryIO:
  """Opens a file for reading as a whole; an object is read into memory."""
  if not is_remote(path):
    return open(path, "rb")
  content = io.BytesIO()
  with unchanged(path), _object(path) as file:
    shutil.copyfileobj(file, content, _BLOCK_BYTES)
  content.seek(0)
  return content


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
  folder = tempfile.mkdtemp(prefix="dpdist-data-")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  copy = pathlib.Path(folder, os.path.basename(_store(path)[1]))
  with unchanged(path), _object(path) as file, open(copy, "wb") as target:
    shutil.copyfileobj(file, target, _BLOCK_BYTES)
  return str(copy)


def _object(path: str | os.PathLike[str]) -> "_Object":
  store, key = _store(path)
  with _answers():
    return _Object(store.open_input_file(key))


class _Object(io.RawIOBase):
  """An object of a bucket; what fails may work later, and is an OSError."""

  def __init__(self, file: Any):
    self._file = file
    self._size = file.size()

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    return int(self._file.seek(offset, whence))

  def tell(self) -> int:
    return int(self._file.tell())

  def readinto(self, buffer: Any) -> int:
    wanted = min(len(buffer), max(0, self._size - self.tell()))
    with _answers():
      count = int(self._file.readinto(buffer))
    if count < wanted:
      raise OSError(errno.EIO, "the object store: an answer was cut short")
    return count

  def readall(self) -> bytes:
    return self.read(self._size - self.tell()) or b""

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def _store(path: str | os.PathLike[str]) -> tuple[Any, str]:
  """Returns pyarrow's file system of a URL, and the object's place there."""
  url = os.fspath(path)
  place, _, query = url.partition("://")[2].partition("?")
  given = urllib.parse.parse_qs(query, keep_blank_values=True)
  if "@" in urllib.parse.unquote(url) or given.keys() - _QUERY:
    raise errors.ArgumentError(
      f"paths must be URLs without credentials, with {sorted(_QUERY)} alone"
      f" after a '?', since they are recorded, got {shown(url)!r} with more;"
      " set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
    )
  bucket, _, key = place.partition("/")
  if not url.startswith(_SCHEME) or ":" in bucket or not bucket or not key:
    raise errors.ArgumentError(
      f"paths must be files, or URLs like s3://BUCKET/PATH, got {shown(url)!r}"
    )
  try:
    from pyarrow import fs
  except ModuleNotFoundError as error:
    raise errors.missing("data in a bucket", "pyarrow", "parquet") from error
  regions = (os.environ.get(x) for x in ("AWS_REGION", "AWS_DEFAULT_REGION"))
  region = next(filter(None, regions), "")
  if region and "region" not in given:  # pyarrow would ask the network for it.
    url += ("&" if query else "?") + urllib.parse.urlencode({"region": region})
  try:
    with _answers():
      found, key = fs.FileSystem.from_uri(url)
  except ValueError as error:
    raise errors.ArgumentError(
      f"paths must be files, or URLs like s3://BUCKET/PATH, got {shown(path)!r}"
    ) from error
  return found, key


@contextlib.contextmanager
def _answers() -> Iterator[None]:
  """Gives errors of a store a number, as those of a disk have one.

  pyarrow's have none where the store did not answer or refused; readers of file
  formats would be blamed for them. Its texts name the object.
  """
  try:
    yield
  except OSError as error:
    if error.errno is not None:
      raise OSError(error.errno, os.strerror(error.errno)) from error
    known = (word for word in _REASONS if word in str(error))
    reason = next(known, "error").lower().replace("_", " ")
    raise OSError(errno.EIO, f"the object store: {reason}") from error
