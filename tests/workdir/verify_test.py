"""launch.verify finds what was changed, and says where."""

import json
import shutil

import pytest

from configs import digits
import dpdist
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.workdir import verify
from tests.support import without_jax

pytestmark = pytest.mark.usefixtures("quick_compiles")

_VERIFY = """
import runpy
sys.argv = ["launch.verify", *sys.argv[1:]]
runpy.run_module("launch.verify", run_name="__main__")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  config = digits.get_config()
  config.model.width = 64
  config.privacy.num_steps = 6
  config.checkpoint_every = 2
  config.max_checkpoints = 2
  workdir = tmp_path_factory.mktemp("finished")
  dpdist.train(config, workdir)
  return workdir


@pytest.fixture
def run(finished, tmp_path):
  shutil.copytree(finished, tmp_path / "run")
  return tmp_path / "run"


def _problems(workdir):
  ledger = ledger_lib.Ledger(workdir / "ledger")
  return [f for f in verify.verify(workdir, ledger) if f.problem]


def _edit(path, **changes):
  lines = path.read_text().splitlines()
  if path.suffix == ".jsonl":
    lines[-1] = json.dumps(json.loads(lines[-1]) | changes)
  else:
    lines = [json.dumps(json.loads("".join(lines)) | changes)]
  path.write_text("\n".join(lines) + "\n")


def test_a_run_is_sound_and_can_be_verified_without_jax(run):
  done = without_jax.run(_VERIFY, f"--workdir={run}", "--json")
  assert done.returncode == 0, done.stderr
  report = json.loads(done.stdout)
  assert report["sound"]
  found = {row["what"]: row["found"] for row in report["findings"]}
  assert found["steps"] == "6 of 6 charged, on 1 branch"
  assert found["checkpoints"] == "3 recorded, 2 there and whole"
  assert "(pld)" in found["epsilon spent"]
  assert "(rdp)" in found["epsilon spent"]


def test_a_flipped_byte_ends_with_1_and_its_place(run):
  file = run / "ledger" / "000000000003.json"
  bad = bytearray(file.read_bytes())
  bad[10] ^= 1
  file.write_bytes(bytes(bad))
  done = without_jax.run(_VERIFY, f"--workdir={run}")
  assert done.returncode == 1
  assert "ledger record 3 was altered" in done.stdout
  assert "NOT sound" in done.stdout


def test_no_run_is_wrong_usage(tmp_path):
  done = without_jax.run(_VERIFY, f"--workdir={tmp_path}")
  assert done.returncode == 2
  assert str(tmp_path) in done.stderr
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"epsilon": 0.5}, "epsilon is 0.5, by the ledger "),
    ({"steps_charged": 3}, "steps_charged is 3, by the ledger 6"),
    ({"noise_multiplier": 9.0}, "noise_multiplier is 9.0"),
    ({"guarantee": "better"}, "guarantee is 'better', by the ledger 'holds'"),
  ],
)
def test_a_result_that_claims_something_else_is_found(run, changes, message):
  _edit(run / "result.json", **changes)
  (problem,) = _problems(run)
  assert problem.what == "result"
  assert message in problem.problem


@pytest.mark.parametrize(
  ("factor", "problems"),
  [
    (0.2, set()),  # A tighter bound was found since.
    (1 - 1e-5, set()),
    (1 + 1e-5, set()),  # Losses are cut into other cells.
    (1.01, {"plan", "epsilons told", "result"}),  # It was no bound.
  ],
)
def test_a_record_of_an_older_version_is_held_against_the_bounds_of_today(
  run, monkeypatch, factor, problems
):
  epsilon = composition.epsilon
  monkeypatch.setattr(
    composition, "epsilon", lambda *a, **k: factor * epsilon(*a, **k)
  )
  assert {finding.what for finding in _problems(run)} == problems


@pytest.mark.parametrize("changes", [{"epsilon": 99.0}, {"step": 7}])
def test_metrics_beyond_the_ledger_are_found(run, changes):
  _edit(run / "metrics.jsonl", **changes)
  (problem,) = _problems(run)
  assert problem.what == "metrics"
  assert str(*changes.values()).removesuffix(".0") in problem.problem


@pytest.mark.parametrize("step", [4, 6])
def test_a_damaged_checkpoint_is_found(run, step):
  path = run / "checkpoints" / "writer_000001" / str(step)
  files = [p for p in path.rglob("*") if p.is_file()]
  victim = max(files, key=lambda p: p.stat().st_size)
  victim.write_bytes(b"?" + victim.read_bytes()[1:])
  (problem,) = _problems(run)
  assert problem.problem.startswith(f"step {step}: ")


def test_a_missing_newest_checkpoint_is_found(run):
  path = run / "checkpoints" / "writer_000001"
  shutil.rmtree(path / "4")
  assert not _problems(run)  # Older ones are deleted by the run itself.
  shutil.rmtree(path / "6")
  (problem,) = _problems(run)
  assert problem.what == "checkpoints"


@pytest.mark.slow
def test_a_ledger_of_another_run_is_found(run, finished, tmp_path):
  config = digits.get_config()
  config.model.width = 64
  config.privacy.num_steps = 6
  config.checkpoint_every = 2
  dpdist.train(config, tmp_path / "other")
  shutil.rmtree(run / "ledger")
  shutil.copytree(tmp_path / "other" / "ledger", run / "ledger")
  found = {f.what for f in _problems(run)}
  assert "checkpoints" in found
