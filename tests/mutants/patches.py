"""The patch files of bugs, and the scratch copies that they are applied to.

A patch is a unified diff with a header before it, as Git's own patches have:

  Bug: what is wrong, in one plain sentence.
  Listed as: the kind of bug, one of `KINDS`.
  Had by: who had it, where that is known.
  Tests: the node ids of the tests of which one must fail.

A value may go on in lines that are indented. Node ids are quoted as for a shell
where they hold spaces.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "mutants" / "bugs"

# Bugs that private training has had. Each has a patch at least.
KINDS = (
  "clip after averaging",
  "sensitivity off by the batch size",
  "mean noised with the sum's sigma",
  "sum noised with the mean's sigma",
  "noise drawn per device and summed",
  "sigma/D per device",
  "same key for every leaf",
  "same key for every step",
  "key reused after restart",
  "randomness that can be guessed",
  "noise per chunk instead of per step",
  "noise skipped on an empty batch",
  "step skipped and not charged on an empty batch",
  "division by the drawn batch",
  "NaN passed by the clip",
  "infinite norm",
  "norm of another gradient than the sum's",
  "padding counted",
  "padding in the noise divisor",
  "clip in bf16",
  "noise in bf16",
  "accumulation in bf16",
  "sums that drift in float32",
  "gradients summed over shards before clipping",
  "per-example gradients under plain jit with a sharded batch",
  "a tied weight counted once",
  "a parameter left out of the norm",
  "bias left out",
  "a norm taken for too small",
  "a part of the loss left out",
  "per-layer sensitivity not joint",
  "sampler without replacement accounted as Poisson",
  "shuffling accounted as Poisson",
  "same sample on every host",
  "hosts' shards overlapping",
  "silent truncation",
  "q computed from the drawn batch",
  "epsilon query that changes state",
  "calibration that overshoots",
  "replace-one accounted as add-remove",
  "same sigma at every step of a schedule",
  "ledger written after the step",
  "fsync left out",
  "charged for nothing",
  "a begun step's charge given back",
  "replay with a fresh key uncharged",
  "replay with the same key on other data",
  "two writers",
  "seed in a log",
  "seed in a flag file",
  "seed in a checkpoint",
  "training loss in the metrics by default",
  "released without noise",
  "batch norm let through",
  "a setting that no flag can unset",
  "data changed under the run",
  "budget that forgets charges",
  "epsilon told too low",
  "secret that others can read",
  "sensitivity that nobody watches",
  "audit that shows too much",
)

_FIELDS = ("Bug", "Listed as", "Had by", "Tests")
_PACKAGE = ("configs", "dpdist", "launch", "tests", "pyproject.toml")


class BrokenError(Exception):
  """A patch, or the gate, cannot be relied on; says why."""


@dataclasses.dataclass(frozen=True)
class Bug:
  """One patch.

  Attributes:
    path: of its file; the name less the suffix is the bug's.
    what: is wrong, a sentence.
    kind: one of `KINDS`.
    had_by: who had it; "" where that is not known.
    tests: node ids of pytest, of which one must fail.
    files: that it changes, from the root of the project.
  """

  path: pathlib.Path
  what: str
  kind: str
  had_by: str
  tests: tuple[str, ...]
  files: tuple[str, ...]

  @property
  def name(self) -> str:
    """What it is called."""
    return self.path.stem


def read_all(folder: pathlib.Path = FOLDER) -> list[Bug]:
  """All bugs of a folder, by name.

  Raises:
    BrokenError: one is not as it should be.
  """
  return [read(path) for path in sorted(folder.glob("*.patch"))]


def read(path: pathlib.Path) -> Bug:
  """Reads the header of a patch.

  Raises:
    BrokenError: a field is missing, unknown or empty, or nothing is changed.
  """
  header, mark, diff = path.read_text().partition("\n--- a/")
  found: dict[str, str] = {}
  name = ""
  for line in header.strip().splitlines():
    if line.startswith(" "):
      found[name] = f"{found[name]} {line.strip()}".strip()
      continue
    name, _, value = line.partition(":")
    if name not in _FIELDS or name in found:
      raise BrokenError(f"{path.name}: a header may not have the line {line!r}")
    found[name] = value.strip()
  for field in ("Bug", "Listed as", "Tests"):
    if not found.get(field):
      raise BrokenError(f"{path.name}: the header lacks {field!r}")
  if found["Listed as"] not in KINDS:
    raise BrokenError(f"{path.name}: no such kind: {found['Listed as']!r}")
  files = re.findall(r"^\+\+\+ b/(\S+)", mark + diff, flags=re.MULTILINE)
  if not files:
    raise BrokenError(f"{path.name}: changes no file")
  return Bug(
    path,
    found["Bug"],
    found["Listed as"],
    found.get("Had by", ""),
    tuple(shlex.split(found["Tests"])),
    tuple(files),
  )


class Scratch:
  """A copy of the package, to which one bug at a time is applied."""

  def __init__(self, root: pathlib.Path, copy: pathlib.Path):
    """Copies.

    Args:
      root: of the project.
      copy: a directory, to be made.
    """
    self._root, self.path = root, copy
    # A byte-code file is taken for that of a source with the same size and
    # second, patched or not.
    unwanted = shutil.ignore_patterns("__pycache__", ".*")
    for name in _PACKAGE:
      source = root / name
      if source.is_dir():
        shutil.copytree(source, copy / name, ignore=unwanted)
      elif source.exists():
        copy.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy / name)

  def apply(self, bug: Bug) -> None:
    """Applies a bug to a copy without one.

    Raises:
      BrokenError: the patch does not apply, changes nothing or is no Python.
    """
    git = ["git", "apply", "--whitespace=nowarn", str(bug.path.resolve())]
    done = subprocess.run(
      git,
      cwd=self.path,
      # Inside a repository Git leaves out, silently, what it does not track.
      env=os.environ | {"GIT_CEILING_DIRECTORIES": str(self.path.parent)},
      capture_output=True,
      text=True,
    )
    if done.returncode:
      raise BrokenError(f"the patch does not apply: {done.stderr.strip()}")
    for name in bug.files:
      text = (self.path / name).read_text()
      if text == (self._root / name).read_text():
        raise BrokenError(f"the patch did not change {name}")
      try:
        compile(text, name, "exec")
      except SyntaxError as error:
        raise BrokenError(f"the patch leaves no Python: {error}") from error

  def restore(self, bug: Bug) -> None:
    """Undoes `apply`, also where it failed half-way."""
    for name in bug.files:
      if (self._root / name).exists():
        shutil.copy(self._root / name, self.path / name)


def missing_tests(root: pathlib.Path, tests: Sequence[str]) -> list[str]:
  """Those of some node ids that name no test function of the files there.

  It looks at the source alone, and so not at parameters.
  """
  missing = []
  for test in tests:
    file, _, name = test.partition("::")
    function = name.partition("[")[0].rpartition("::")[2]
    path = root / file
    if not path.is_file() or not re.search(
      rf"^ *def {re.escape(function)}\(", path.read_text(), re.MULTILINE
    ):
      missing.append(test)
  return missing
