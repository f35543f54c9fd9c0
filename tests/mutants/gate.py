"""The mutation gate: known privacy bugs, each of which a test must catch.

  python -m tests.mutants.gate
  python -m tests.mutants.gate --part=commit
  python -m tests.mutants.gate --only=same_key_for_every_leaf,silent_truncation
  python -m tests.mutants.gate --list

Each file in `bugs/` is a bug that private training has had, as a patch. The
gate applies it to a copy of the package and runs the ordinary tests that the
patch names. It is killed if one of them fails: not if a test could not be
collected, set up or found, nor if it took too long, which are faults of the
gate. So are tests that fail without a bug, and a patch that does not apply or
whose own code is broken. Ends with 1 if a bug survived or the gate is at fault.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple
from xml.etree import ElementTree

import rich.console
import rich.table
import rich.text

from tests import parts
from tests.mutants import patches

# Generous: how busy a machine is decides nothing.
_SECONDS = 900.0
_NUM_WORKERS = 2
# Raised by code that makes no sense, and not by code that does the wrong thing.
_NONSENSE = re.compile(
  r"(NameError|UnboundLocalError|ImportError|ModuleNotFoundError|SyntaxError"
  r"|IndentationError|AttributeError)\b"
)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a bug.

  Attributes:
    name: of the bug.
    kind: of the bug; see `patches.KINDS`.
    status: "killed", "survived" or "broken".
    seconds: of the tests, with their start.
    by: the test that failed, if it was killed.
    reason: the failure in a line; or what is at fault.
  """

  name: str
  kind: str
  status: str
  seconds: float
  by: str = ""
  reason: str = ""


class _Case(NamedTuple):
  """A test that did not pass.

  Attributes:
    name: file and function.
    is_failure: that the test failed; else it could not begin.
    message: why, in a line.
  """

  name: str
  is_failure: bool
  message: str


class _Tests(NamedTuple):
  """What pytest came to.

  Attributes:
    code: its exit code; None if it took too long.
    bad: the tests that did not pass.
    num_tests: all that were begun.
    seconds: it took.
    text: the end of what it printed.
  """

  code: int | None
  bad: list[_Case]
  num_tests: int
  seconds: float
  text: str


def run(
  bugs: Sequence[patches.Bug],
  *,
  root: pathlib.Path = patches.ROOT,
  num_workers: int = _NUM_WORKERS,
  seconds: float = _SECONDS,
  baseline: bool = True,
) -> Iterator[Outcome]:
  """Yields what becomes of each bug, as it ends.

  Args:
    bugs: to be tried.
    root: of the project.
    num_workers: how many are tried at once.
    seconds: for the tests of one bug.
    baseline: whether to run all their tests without a bug before.

  Raises:
    BrokenError: tests fail, or are not there, without any bug.
  """
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(
      stack.enter_context(tempfile.TemporaryDirectory(prefix="gate-"))
    )
    free: queue.SimpleQueue[patches.Scratch] = queue.SimpleQueue()
    for i in range(num_workers):
      free.put(patches.Scratch(root, folder / str(i) / "copy"))
    pool = stack.enter_context(futures.ThreadPoolExecutor(num_workers))
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    if baseline:
      shares = _shares(
        {test for bug in bugs for test in bug.tests}, num_workers
      )
      # As long as all bugs together.
      limit = seconds * len(bugs)
      for found in pool.map(lambda mine: _baseline(free, mine, limit), shares):
        if found:
          raise patches.BrokenError(found)
    waiting = [pool.submit(_try, free, bug, seconds) for bug in bugs]
    for future in futures.as_completed(waiting):
      yield future.result()


def _shares(tests: set[str], count: int) -> list[list[str]]:
  """Tests in equal parts, by file: those of one share what they set up."""
  by_file: dict[str, list[str]] = {}
  for test in sorted(tests):
    by_file.setdefault(test.partition("::")[0], []).append(test)
  shares: list[list[str]] = [[] for _ in range(count)]
  for mine in sorted(by_file.values(), key=len, reverse=True):
    min(shares, key=len).extend(mine)
  return [share for share in shares if share]


def _baseline(
  free: "queue.SimpleQueue[patches.Scratch]", tests: list[str], seconds: float
) -> str:
  """Why tests cannot be relied on; "" if all pass."""
  with _taken(free) as scratch:
    got = _pytest(scratch, tests, seconds)
  if got.code == 0:
    return ""
  return f"without any bug, pytest ended with {got.code}:\n{got.text}"


def _try(
  free: "queue.SimpleQueue[patches.Scratch]", bug: patches.Bug, seconds: float
) -> Outcome:
  with _taken(free) as scratch:
    try:
      scratch.apply(bug)
      got = _pytest(scratch, ["-x", *bug.tests], seconds)
    except patches.BrokenError as error:
      return Outcome(bug.name, bug.kind, "broken", 0.0, reason=str(error))
    finally:
      scratch.restore(bug)
  status, by, reason = _judged(got)
  return Outcome(bug.name, bug.kind, status, got.seconds, by, reason)


def _judged(got: _Tests) -> tuple[str, str, str]:
  """Status, the test that failed, and why."""
  if got.code is None:
    return "broken", "", f"no end within {got.seconds:.0f} s"
  if got.code == 0 and got.num_tests:
    return "survived", "", f"{got.num_tests} tests passed"
  if got.code == 1 and got.bad:
    first = got.bad[0]
    if not first.is_failure:
      return "broken", "", f"{first.name} could not begin: {first.message}"
    if _NONSENSE.match(first.message):
      return "broken", "", f"the patch's own code fails: {first.message}"
    return "killed", first.name, first.message
  return "broken", "", f"pytest ended with {got.code}: {got.text[-300:]}"


@contextlib.contextmanager
def _taken(
  free: "queue.SimpleQueue[patches.Scratch]",
) -> Iterator[patches.Scratch]:
  scratch = free.get()
  try:
    yield scratch
  finally:
    free.put(scratch)


def _pytest(
  scratch: patches.Scratch, arguments: list[str], seconds: float
) -> _Tests:
  """Runs tests of a copy on the copy."""
  aside = scratch.path.parent
  report = aside / "report.xml"
  report.unlink(missing_ok=True)
  command = [
    *(sys.executable, "-m", "pytest", "-q", "-n0"),
    *("-p", "xdist", "-p", "no:cacheprovider"),
    *(f"--junitxml={report}", f"--basetemp={aside / 'tmp'}", *arguments),
  ]
  variables = {
    "PYTHONPATH": str(scratch.path),
    "PYTHONDONTWRITEBYTECODE": "1",
    "JAX_PLATFORMS": "cpu",
    "PYTEST_ADDOPTS": "",
    # To load those that are installed takes longer than many a test.
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
  }
  began = time.monotonic()
  process = subprocess.Popen(
    command,
    cwd=scratch.path,
    env=os.environ | variables,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )
  try:
    text, _ = process.communicate(timeout=seconds)
    code: int | None = process.returncode
  except subprocess.TimeoutExpired:
    code = None
  finally:
    # With what the tests may have started.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
  if code is None:
    text, _ = process.communicate()
  cases = _cases(report)
  bad = [case for case in cases if case is not None]
  return _Tests(code, bad, len(cases), time.monotonic() - began, text[-3000:])


def _cases(report: pathlib.Path) -> list[_Case | None]:
  """All tests of a report in JUnit's format; None for one that passed."""
  if not report.exists():
    return []
  cases: list[_Case | None] = []
  for case in ElementTree.parse(report).getroot().iter("testcase"):
    if case.find("skipped") is not None:
      continue
    found = None
    for kind in ("failure", "error"):
      problem = case.find(kind)
      if problem is not None:
        module = case.get("classname", "").replace(".", "/")
        message = " ".join((problem.get("message") or "").split())[:200]
        found = _Case(
          f"{module}.py::{case.get('name')}", kind == "failure", message
        )
    cases.append(found)
  return cases


def chosen(
  bugs: list[patches.Bug], part: str, only: str | None
) -> list[patches.Bug]:
  """Those of all bugs that the flags name."""
  if only is not None:
    wanted = only.split(",")
    unknown = sorted({*wanted} - {bug.name for bug in bugs})
    if unknown:
      raise patches.BrokenError(f"--only names no bug: {unknown}")
    return [bug for bug in bugs if bug.name in wanted]
  which = parts.number(part, patches.ROOT)
  if which is not None:
    print(f"part {which} of 0 to {parts.COUNT - 1}", flush=True)
  return list(parts.of(bugs, which))


def _show(console: rich.console.Console, outcomes: Sequence[Outcome]) -> None:
  table = rich.table.Table(title="Mutation gate")
  for name in ("bug", "outcome", "caught by, or why not"):
    table.add_column(name, overflow="fold")
  table.add_column("seconds", justify="right")
  styles = {"killed": "green", "survived": "bold red", "broken": "bold red"}
  for outcome in sorted(outcomes, key=lambda x: (x.status, x.name)):
    table.add_row(
      outcome.name,
      f"[{styles[outcome.status]}]{outcome.status}[/]",
      rich.text.Text(outcome.by or outcome.reason),
      f"{outcome.seconds:.1f}",
    )
  console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
  """Returns an exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m tests.mutants.gate",
    description="Applies known privacy bugs; a test must catch each.",
  )
  which = parser.add_mutually_exclusive_group()
  which.add_argument(
    "--part", choices=parts.CHOICES, default="all", help="a quarter of them"
  )
  which.add_argument("--only", metavar="NAME,...", help="these bugs")
  which.add_argument("--list", action="store_true", help="name all bugs")
  parser.add_argument(
    "--no_baseline",
    action="store_true",
    help="trust that all tests pass without a bug",
  )
  parser.add_argument("--json", type=pathlib.Path, help="a file for the report")
  arguments = parser.parse_args(argv)
  # Where it goes to a file, in lines that need not be broken.
  width = None if sys.stdout.isatty() else 200
  console = rich.console.Console(width=width)
  try:
    bugs = patches.read_all()
    if arguments.list:
      for bug in bugs:
        print(f"{bug.name}: {bug.what}")
      return 0
    wanted = chosen(bugs, arguments.part, arguments.only)
    began = time.monotonic()
    outcomes = []
    for outcome in run(wanted, baseline=not arguments.no_baseline):
      outcomes.append(outcome)
      told = outcome.by or outcome.reason
      print(
        f"{outcome.status:8} {outcome.seconds:5.1f} s {outcome.name}: {told}",
        flush=True,
      )
  except patches.BrokenError as error:
    print(f"the gate is at fault: {error}", file=sys.stderr)
    return 1
  seconds = time.monotonic() - began
  _show(console, outcomes)
  counts = {
    status: sum(outcome.status == status for outcome in outcomes)
    for status in ("killed", "survived", "broken")
  }
  print(
    f"{counts['killed']} of {len(outcomes)} bugs killed, {counts['survived']}"
    f" survived, {counts['broken']} broken, in {seconds:.0f} s"
  )
  if arguments.json is not None:
    report = {
      "seconds": seconds,
      **counts,
      "bugs": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
  return int(counts["killed"] != len(outcomes) or not outcomes)


if __name__ == "__main__":
  sys.exit(main())
