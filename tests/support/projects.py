"""Drives a user's project as its user would, through the commands."""

from collections.abc import Sequence
import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from dpdist import export
from dpdist.ledger import ledger as ledger_lib
from tests.support import commands

PROJECTS = pathlib.Path(__file__).parents[1] / "projects"
_SEED = "--config.insecure_seed=7"


class Driven(NamedTuple):
  """What a project's run left.

  Attributes:
    workdir: the directory of the run that was killed and went on.
    result: its `result.json`.
    evaluated: what `eval` printed of it.
    params: what `export` wrote of it.
    said: what it wrote to the screen at its first start.
  """

  workdir: pathlib.Path
  result: dict[str, Any]
  evaluated: dict[str, Any]
  params: Any
  said: str


def num_lines(project: pathlib.Path) -> int:
  """Returns how many lines the user wrote, without empty ones."""
  return sum(bool(line.strip()) for line in project.read_text().splitlines())


def load(project: pathlib.Path) -> Any:
  """Imports a project."""
  spec = importlib.util.spec_from_file_location(project.stem, project)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def drive(
  project: pathlib.Path,
  folder: pathlib.Path,
  *,
  kill_at: int = 8,
  command: Sequence[str] = (),
) -> Driven:
  """Trains twice, once with a kill and a restart, and uses the result.

  Asserts that both runs end with the same bits, and that all commands accept
  the run that was killed.

  Args:
    project: the file.
    folder: where the runs go.
    kill_at: the step whose checkpoint is waited for before the kill.
    command: what trains in the directory that is appended; none: `train`.
  """
  whole, cut = folder / "whole", folder / "cut"
  trained = _start(project, whole, command)
  said, _ = trained.communicate()
  assert trained.returncode == 0, said
  killed = _start(project, cut, command)
  while not [*cut.glob(f"checkpoints/writer_*/{kill_at}")]:
    assert killed.poll() is None, "it ended before it was killed"
    time.sleep(0.01)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  assert killed.returncode == -signal.SIGKILL
  again = _start(project, cut, command)
  text, _ = again.communicate()
  assert again.returncode == 0, text
  result, other = (
    json.loads((workdir / "result.json").read_text())
    for workdir in (cut, whole)
  )
  for name in ("params_sha256", "test", "steps_charged"):
    assert result[name] == other[name], name
  groups = ("test_ema", "test_tables", "test_ema_tables")
  assert [result.get(x) for x in groups] == [other.get(x) for x in groups]
  assert len(ledger_lib.Ledger(cut / "ledger").branches) == 1
  return _used(project, cut, folder, result, said)


def _used(
  project: pathlib.Path,
  workdir: pathlib.Path,
  folder: pathlib.Path,
  result: dict[str, Any],
  said: str,
) -> Driven:
  """Verifies, evaluates, exports and loads what a run released."""

  def run(name: str, *flags: str) -> str:
    done = commands.run(name, *flags)
    assert done.code == 0, done.err
    return done.out

  flags = (f"--config={project}", _SEED, f"--workdir={workdir}")
  run("verify", f"--workdir={workdir}")
  evaluated = json.loads(run("eval", *flags, "--json"))
  assert evaluated["test"] == result["test"]
  assert evaluated.get("test_tables") == result.get("test_tables")
  run("export", *flags, f"--output={folder / 'model'}")
  model, params = export.load(folder / "model")
  assert model is None
  run("check", *flags[:2])
  return Driven(workdir, result, evaluated, params, said)


def _start(
  project: pathlib.Path, workdir: pathlib.Path, command: Sequence[str]
) -> subprocess.Popen[str]:
  flags = [f"--config={project}", _SEED, f"--workdir={workdir}"]
  train = [sys.executable, "-m", "launch.train", *flags]
  return subprocess.Popen(
    [*command, str(workdir), "7"] if command else train,
    cwd=PROJECTS.parents[1],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
