"""Tests of dpdist.assets.fetch, with packages that are on this machine."""

import hashlib
import subprocess
import sys
import zipfile

import pytest

from dpdist import errors
from dpdist.assets import fetch

CONTENT = b'{"some": "data"}'


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A pinned package, which pip finds in a folder; the cache is empty."""
  shelf = tmp_path / "shelf"
  shelf.mkdir()
  path = shelf / "tiny_data-1.0-py3-none-any.whl"
  info = "tiny_data-1.0.dist-info"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("tiny_data/data.json", CONTENT)
    archive.writestr("tiny_data/setup.py", "raise SystemExit(9)")
    archive.writestr(
      f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0"
    )
    archive.writestr(
      f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true"
    )
    archive.writestr(f"{info}/RECORD", "")
  pinned = fetch.Package(
    client="pip",
    requirement="tiny-data==1.0",
    file=path.name,
    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    members=("tiny_data/data.json",),
    terms="none",
  )
  monkeypatch.setitem(fetch.PACKAGES, "tiny", pinned)
  monkeypatch.setenv("DPDIST_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
  return path


@pytest.mark.parametrize("given", [True, False])
def test_what_was_pinned_is_kept_and_found(package, given):
  folder = fetch.fetch("tiny", package if given else None)
  assert folder == fetch.find("tiny")
  assert [p.name for p in folder.iterdir()] == ["data.json"]
  assert (folder / "data.json").read_bytes() == CONTENT
  assert [*fetch.cache().iterdir()] == [folder]
  # From now on nothing is asked for.
  package.unlink()
  assert fetch.fetch("tiny") == folder


def test_without_members_the_package_is_kept_as_it_is(package, monkeypatch):
  whole = fetch.PACKAGES["tiny"]._replace(members=())
  monkeypatch.setitem(fetch.PACKAGES, "tiny", whole)
  (kept,) = fetch.fetch("tiny", package).iterdir()
  assert (kept.name, kept.read_bytes()) == (package.name, package.read_bytes())


def _append(path):
  path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize(
  ("given", "spoil", "message"),
  [
    (True, _append, "must be tiny-data==1.0 with SHA-256 .* got .* not used"),
    (False, _append, "must be tiny-data==1.0 with SHA-256 .* got .* not used"),
    (True, lambda path: path.unlink(), "tiny-data==1.0: .*No such file"),
    (False, lambda path: path.unlink(), "pip could not get tiny-data==1.0: "),
  ],
)
def test_what_is_not_as_pinned_leaves_nothing(package, given, spoil, message):
  spoil(package)
  with pytest.raises(errors.FetchError, match=message):
    fetch.fetch("tiny", package if given else None)
  assert not [*fetch.cache().iterdir()]
  with pytest.raises(ValueError, match="dpdist fetch --name=tiny"):
    fetch.find("tiny")


@pytest.mark.parametrize("function", [fetch.fetch, fetch.find])
def test_an_unknown_name_lists_the_known_ones(function):
  with pytest.raises(ValueError, match=r"one of \['adult'.* got 'chitcat'"):
    function("chitcat")


def test_the_command_says_what_is_wrong_with_a_file(package):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "launch.fetch", "--name=chitchat"),
      f"--file={package}",
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: {package} must be chitchat-dataset==")
  assert "Traceback" not in done.stderr
