"""Reads members of package files: wheels, npm's tarballs, Debian's packages.

They are read inside the archive. Nothing is unpacked under a path that an
archive names, and nothing in it is run.
"""

from collections.abc import Iterator
import contextlib
import io
import lzma
import os
import tarfile
from typing import IO
import zipfile

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60  # bytes


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], member: str) -> Iterator[IO[bytes]]:
  """Opens a member of a wheel or zip, a tar archive or a Debian package.

  A Debian package's members are its installed files.
  """
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      if member not in archive.namelist():
        raise ValueError(f"{path} must hold {member}, got none of that name")
      with archive.open(member) as file:
        yield file
    return
  with contextlib.ExitStack() as stack:
    package = stack.enter_context(open(path, "rb"))
    inner: IO[bytes] = package
    if package.read(len(_AR_MAGIC)) == _AR_MAGIC:
      inner = _installed_files(package, path)
    else:
      package.seek(0)
    try:
      tar = stack.enter_context(tarfile.open(fileobj=inner))
      found = tar.extractfile(member)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
      raise ValueError(
        f"{path} must be a zip, tar or Debian archive: {error}"
      ) from error
    except KeyError:
      found = None
    if found is None:
      raise ValueError(f"{path} must hold the file {member}, got none")
    yield found


def _installed_files(package: IO[bytes], path: object) -> IO[bytes]:
  """Opens the tar archive data.tar.* of a Debian package, see deb(5)."""
  while len(header := package.read(_AR_HEADER)) == _AR_HEADER:
    name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
    if name.startswith("data.tar"):
      return io.BytesIO(package.read(size))
    package.seek(size + size % 2, os.SEEK_CUR)
  raise ValueError(f"{path} must be a Debian package, got one without files")
