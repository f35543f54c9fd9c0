"""The gate itself: its patches are whole, and it is not easily pleased."""

import pathlib
import subprocess
import sys

import pytest

from tests import parts
from tests.mutants import gate
from tests.mutants import patches

_BUGS = patches.read_all()
# A patch of a test would prove nothing.
_PRODUCT = ("dpdist/", "launch/")


# The patches as they are.


def test_every_kind_of_bug_has_a_patch():
  assert {bug.kind for bug in _BUGS} == {*patches.KINDS}


def test_every_patch_applies_to_the_tree_and_leaves_python(tmp_path):
  scratch = patches.Scratch(patches.ROOT, tmp_path / "copy")
  for bug in _BUGS:
    assert all(name.startswith(_PRODUCT) for name in bug.files), bug.name
    scratch.apply(bug)
    scratch.restore(bug)
    for name in bug.files:
      text = (scratch.path / name).read_text()
      assert text == (patches.ROOT / name).read_text()


def test_every_patch_names_tests_that_are_there():
  for bug in _BUGS:
    assert patches.missing_tests(patches.ROOT, bug.tests) == [], bug.name


@pytest.mark.slow
def test_the_tests_of_every_bug_are_ordinary_ones():
  # Others pytest would leave out, and the gate would find no test.
  named = sorted({test for bug in _BUGS for test in bug.tests})
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-n0", "--collect-only", *named],
    cwd=patches.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout
  assert "deselected" not in done.stdout, done.stdout[-500:]


def test_every_bug_is_in_one_part():
  found = [gate.chosen(_BUGS, str(k), None) for k in range(parts.COUNT)]
  assert sorted(bug.name for part in found for bug in part) == [
    bug.name for bug in _BUGS
  ]


# A package of one function, and what the gate says of patches to it.

_MODULE = """\
def clipped(x):
  return min(x, 1.0)
"""
_TESTS = """\
import pytest

from dpdist import tiny


def test_clips():
  assert tiny.clipped(3.0) == 1.0


def test_leaves_small_ones_alone():
  assert tiny.clipped(0.5) == 0.5


@pytest.fixture
def value():
  if tiny.clipped(3.0) > 1.0:
    raise OSError
  return 1.0


def test_of_a_fixture(value):
  assert value == 1.0
"""


def _bug(root, name, after, test, before="  return min(x, 1.0)"):
  num_lines = 2 + after.count("\n")
  path = root / "bugs" / f"{name}.patch"
  path.parent.mkdir(exist_ok=True)
  path.write_text(f"""\
Bug: something
  is wrong.
Listed as: infinite norm
Tests: tests/tiny_test.py::{test}

--- a/dpdist/tiny.py
+++ b/dpdist/tiny.py
@@ -1,2 +1,{num_lines} @@
 def clipped(x):
-{before}
+{after}
""")
  return patches.read(path)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  """By name, what becomes of bugs of every sort; two at once."""
  root = tmp_path_factory.mktemp("project")
  _write(root)
  none = "  return min(x, 1.0)"
  bugs = [
    _bug(root, "killed", "  return x", "test_clips"),
    _bug(root, "survived", "  return x", "test_leaves_small_ones_alone"),
    _bug(root, "same_size_killed", "  return max(x, 1.0)", "test_clips"),
    _bug(root, "outdated", "  return x", "test_clips", before="  return 1"),
    _bug(root, "no_python", "  return (", "test_clips"),
    _bug(root, "nothing", none, "test_clips"),
    _bug(root, "nonsense", "  return min(y, 1.0)", "test_clips"),
    _bug(root, "no_test", "  return x", "test_of_nothing"),
    _bug(root, "no_setup", "  return x", "test_of_a_fixture"),
    _bug(
      root, "no_import", "  return x\n+\n+\n+raise ValueError", "test_clips"
    ),
  ]
  found = gate.run(bugs, root=root, baseline=False)
  return {outcome.name: outcome for outcome in found}


def _write(root: pathlib.Path) -> None:
  for folder, name, text in (
    ("dpdist", "tiny.py", _MODULE),
    ("tests", "tiny_test.py", _TESTS),
  ):
    (root / folder).mkdir()
    (root / folder / name).write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "same_size_killed"])
def test_a_bug_is_killed_by_a_test_that_fails(outcomes, name):
  assert outcomes[name].status == "killed"
  assert outcomes[name].by == "tests/tiny_test.py::test_clips"
  assert "assert" in outcomes[name].reason
  assert outcomes[name].seconds > 0


def test_a_bug_that_no_test_sees_has_survived(outcomes):
  assert outcomes["survived"].status == "survived"


@pytest.mark.parametrize(
  ("name", "reason"),
  [
    ("outdated", "does not apply"),
    ("no_python", "leaves no Python"),
    ("nothing", "did not change dpdist/tiny.py"),
    ("nonsense", "own code fails: NameError"),
    ("no_test", "pytest ended with 4"),
    ("no_setup", "could not begin"),
    ("no_import", "found no collectors"),
  ],
)
def test_what_is_no_failure_of_a_test_is_the_gates_own(outcomes, name, reason):
  assert outcomes[name].status == "broken"
  assert reason in outcomes[name].reason


def test_tests_without_an_end_are_the_gates_own_failure(tmp_path):
  _write(tmp_path)
  bug = _bug(tmp_path, "slow", "  return x", "test_clips")
  (outcome,) = gate.run([bug], root=tmp_path, seconds=0.0, baseline=False)
  assert outcome.status == "broken"
  assert "no end within 0 s" in outcome.reason


@pytest.mark.slow
def test_tests_that_fail_without_a_bug_stop_the_gate(tmp_path):
  _write(tmp_path)
  bug = _bug(tmp_path, "killed", "  return x", "test_clips")
  (tmp_path / "dpdist" / "tiny.py").write_text(_MODULE.replace("1.0", "2.0"))
  with pytest.raises(
    patches.BrokenError, match="without any bug, pytest ended"
  ):
    list(gate.run([bug], root=tmp_path))


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("Bug:", "lacks 'Bug'"),
    ("Listed as: infinite norms", "no such kind: 'infinite norms'"),
    ("Tested: tests/x_test.py", "may not have the line 'Tested: "),
    ("", "lacks"),
  ],
)
def test_a_header_that_is_not_whole_is_refused(tmp_path, line, message):
  bug = _bug(tmp_path, "it", "  return x", "test_clips")
  field = line.partition(":")[0].replace("Tested", "Tests") or "Tests"
  old = next(
    x for x in bug.path.read_text().splitlines() if x.startswith(field)
  )
  text = bug.path.read_text().replace(f"{old}\n", f"{line}\n" if line else "")
  bug.path.write_text(text.replace("  is wrong.\n", ""))
  with pytest.raises(patches.BrokenError, match=message):
    patches.read(bug.path)


def test_the_part_is_that_of_the_commit(tmp_path):
  git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
  for command in (
    ["init", "-q"],
    ["commit", "-q", "--allow-empty", "-m", "one"],
  ):
    subprocess.run([*git, *command], cwd=tmp_path, check=True)
  head = (
    subprocess.run(
      ["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True
    )
  ).stdout
  assert parts.number("commit", tmp_path) == int(head, 16) % parts.COUNT
