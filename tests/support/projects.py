"""Drives a user's project as its user would, through the installed commands."""

from collections.abc import Sequence
import json
import pathlib
import signal
import subprocess
import time
from typing import Any, NamedTuple

import pytest

from dpdist.ledger import ledger as ledger_lib
from tests.support import installed

PROJECTS = pathlib.Path(__file__).parents[1] / "projects"
_SEED = "--config.insecure_seed=7"
_EXACT = "--config.clipping.exact_sum=True"
# An audit that takes no time.
_AUDIT = ("--mode=one_run", "--num_trials=16", "--num_steps=4")


class Driven(NamedTuple):
  """What a project's run left.

  Attributes:
    workdir: the directory of the run that was killed and went on.
    result: its `result.json`.
    said: what it wrote to the screen at its first start.
    used: what the project's user made of the exported model.
  """

  workdir: pathlib.Path
  result: dict[str, Any]
  said: str
  used: dict[str, Any]


def num_lines(project: pathlib.Path) -> int:
  """Returns how many lines the user wrote, without empty ones."""
  return sum(bool(line.strip()) for line in project.read_text().splitlines())


class Driver:
  """Runs a project's commands in its own folder, as they are installed."""

  def __init__(self, programs: pathlib.Path, project: pathlib.Path):
    """Stores where the programs and the project's file are."""
    self._programs, self._project = programs, project
    self._config = f"--config={project.name}"

  def drive(
    self, use: str, *, is_exact: bool, command: Sequence[object] = ()
  ) -> Driven:
    """Trains twice, once with a kill and a restart, and uses the result.

    Both runs end with the same bits. With exact sums the one that was killed
    goes on in two processes. Without, two processes train beside them, and end
    as well but for what is rounded.

    Args:
      use: Python code that makes `scores` of `project`, the module, `params`,
        what was exported, and `test`, the held-out examples.
      is_exact: whether sums are exact.
      command: what trains in the directory and with the seed that follow; none:
        `train`.
    """
    settings = [_SEED, *([_EXACT] if is_exact else [])]
    train = [*command] or ["dpdist", "train", self._config, *settings]
    local = ["dpdist", "local", "--num_processes=2", "--"]
    local += [self._config, *settings]
    said = self._done(train, "whole")
    self._kill(train, "cut", kill_at=8)
    self._done(local if is_exact else train, "cut")
    whole, cut = self._result("whole"), self._result("cut")
    for name in ("params_sha256", "steps_charged", "test_tables"):
      assert cut.get(name) == whole.get(name), name
    # Means over several processes are added up in another order.
    for name in ("test", "test_ema"):
      want = pytest.approx(whole.get(name, {}), rel=1e-6 if is_exact else 0)
      assert cut.get(name, {}) == want, name
    assert len(ledger_lib.Ledger(self._run("cut") / "ledger").branches) == 1
    if not is_exact and not command:
      self._done(local, "pair")
      pair = self._result("pair")
      assert pair["test"] == pytest.approx(whole["test"], rel=0.01)
    return Driven(self._run("cut"), cut, said, self._used(settings, use, cut))

  def _used(
    self, settings: list[str], use: str, result: dict[str, Any]
  ) -> dict[str, Any]:
    """Verifies, audits, evaluates, exports and loads what a run released."""
    run = self._run("cut")
    self._dpdist("verify", f"--workdir={run}")
    flags = [self._config, *settings]
    assert "nothing was shown" in self._dpdist("audit", *flags, *_AUDIT)
    flags += [f"--workdir={run}"]
    evaluated = json.loads(self._dpdist("eval", *flags, "--json"))
    assert evaluated["test"] == pytest.approx(result["test"], rel=1e-6)
    assert evaluated.get("test_tables") == result.get("test_tables")
    self._dpdist("export", *flags, f"--output={self._run('model')}")
    lines = [
      "import json, dpdist, jax, numpy as np, sklearn.metrics as sk",
      f"import {self._project.stem} as project",
      f"model, params = dpdist.export.load({str(self._run('model'))!r})",
      "assert model is None",
      "data = project.get_dataset(project.get_config())",
      "test = data.test.read(np.arange(len(data.test)))",
      use,
      "print(json.dumps({k: float(x) for k, x in scores.items()}))",
    ]
    said = self._done(["python", "-c", "\n".join(lines)])
    used: dict[str, Any] = json.loads(said.splitlines()[-1])
    return used

  def _run(self, name: str) -> pathlib.Path:
    return self._project.parent.parent / name

  def _result(self, name: str) -> dict[str, Any]:
    path = self._run(name) / "result.json"
    result: dict[str, Any] = json.loads(path.read_text())
    return result

  def _dpdist(self, *words: str) -> str:
    return self._done(["dpdist", *words])

  def _begun(
    self, command: Sequence[object], run: str
  ) -> subprocess.Popen[str]:
    program, *words = map(str, command)
    if run:
      place = str(self._run(run))
      words += [place, "7"] if program == "python" else [f"--workdir={place}"]
    return subprocess.Popen(
      [str(self._programs / program), *words],
      cwd=self._project.parent,
      env=installed.variables(),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT if run else subprocess.PIPE,
      text=True,
    )

  def _done(self, command: Sequence[object], run: str = "") -> str:
    process = self._begun(command, run)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + (err or "")
    return out

  def _kill(self, command: Sequence[object], run: str, *, kill_at: int) -> None:
    """Begins a run, and ends it by force once a step is saved."""
    process = self._begun(command, run)
    while not [*self._run(run).glob(f"checkpoints/writer_*/{kill_at}")]:
      assert process.poll() is None, "it ended before it was killed"
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (self._run(run) / "result.json").exists()
