"""Times and memory of machines: told, and told apart from what is released."""

import json
import stat

import pytest

from dpdist.distributed import progress as progress_lib
from dpdist.reporting import telemetry
from tests.support import tensorboard_files
from tests.support import training

_NAMES = ("step_seconds", "input_wait_seconds", "own_seconds", "host_bytes")


def test_time_is_that_of_the_phases(monkeypatch):
  now = 0.0
  monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now)
  progress = progress_lib.Progress()
  # Two steps, after ten seconds of something else.
  for phase, seconds in (
    *(("starting", 10.0), ("reading", 1.0), ("computing", 2.0)),
    *(("reducing", 4.0), ("agreeing", 0.5), ("reading", 1.0)),
    *(("computing", 2.0), ("reducing", 4.0), ("agreeing", 0.5)),
    ("evaluating", 100.0),
  ):
    progress.enter(3, phase)
    now += seconds
  assert progress.status() == (3, "evaluating", 100.0, 0.0)
  row = json.loads(telemetry.measure(progress, 2))
  assert row.pop("host_bytes") > 1e6
  assert row == {
    "step_seconds": 7.5,
    "input_wait_seconds": 1.0,
    "own_seconds": 3.0,
  }
  # The evaluation, when it is over, is no part of the steps that follow.
  progress.enter(4, "reading")
  assert json.loads(telemetry.measure(progress, 0))["step_seconds"] == 0.0


def test_the_slowest_is_held_against_the_median(tmp_path):
  row = dict.fromkeys(_NAMES, 1.0)
  rows = [json.dumps(row | {"own_seconds": x}) for x in (2.0, 1.0, 5.0)]
  with telemetry.Writer(tmp_path, start_step=0) as writer:
    writer.write(7, rows)
  scalars = tensorboard_files.scalars(tmp_path / telemetry.FOLDER)
  assert scalars["straggler_ratio", 7] == 2.5
  assert scalars["process_2/own_seconds", 7] == 5.0
  assert len(scalars) == 1 + 3 * len(_NAMES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  run = training.Run(tmp_path_factory.mktemp("run") / "run")
  assert run.wait() == 0, run.screen
  return run


@pytest.mark.slow
def test_a_run_tells_them_to_its_owner_alone(run):
  folder = run.workdir / telemetry.FOLDER
  assert stat.S_IMODE(folder.stat().st_mode) == 0o700
  scalars = tensorboard_files.scalars(folder)
  assert {name for name, _ in scalars} == {
    "examples_per_second",
    "straggler_ratio",
    *(f"process_0/{name}" for name in _NAMES),
  }
  assert len({step for _, step in scalars}) == training.NUM_STEPS
  assert scalars["process_0/step_seconds", training.NUM_STEPS] > 0
  page = (folder / "speed.html").read_text(encoding="utf-8")
  assert "Not for others" in page
  assert "Examples a second" in page


def test_nothing_of_them_is_in_what_is_released(run):
  released = [
    path
    for path in run.workdir.rglob("*")
    if path.is_file() and telemetry.FOLDER not in path.parts
  ]
  names = {path.name for path in released}
  assert {"metrics.jsonl", "result.json", "report.html"} <= names
  assert any("tensorboard" in path.parts for path in released)
  private = (*_NAMES, "straggler_ratio", "examples_per_second")
  private += ("Examples a second", "Seconds a step")
  for path in released:
    content = path.read_bytes()
    # The report says that it has them not, and who has.
    folder = () if path.name == "report.html" else (telemetry.FOLDER,)
    for name in (*private, *folder):
      assert name.encode() not in content, path
  for text in (telemetry.FOLDER, "examples/s"):
    assert text not in run.screen
