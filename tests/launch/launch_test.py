"""The commands as a user opens them: processes, signals and exit codes."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.reporting import metrics
from tests.support import commands
from tests.support import without_jax

_ROOT = pathlib.Path(__file__).parents[2]
_NUM_STEPS = 40
_TRAIN = [
  "--config=configs/digits.py",
  "--config.insecure_seed=7",
  f"--config.privacy.num_steps={_NUM_STEPS}",
  "--config.checkpoint_every=6",
  "--config.eval_every=1",
]


def _start(command, *args, **kwargs):
  return subprocess.Popen(
    [sys.executable, "-m", f"launch.{command}", *args],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


def _run(command, *args, **kwargs):
  process = _start(command, *args, **kwargs)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def _steps_seen(workdir):
  if not (workdir / "metrics.jsonl").exists():
    return 0
  return max((row["step"] for row in metrics.read(workdir)), default=0)


def _wait_for_step(process, workdir, step):
  while _steps_seen(workdir) < step:
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)


@pytest.mark.slow
def test_kill_and_restart_ends_with_the_same_parameters(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  code, out, err = _run("train", *_TRAIN, f"--workdir={whole}")
  assert code == 0, err
  assert "Private training" in out
  expected = json.loads((whole / "result.json").read_text())

  process = _start("train", *_TRAIN, f"--workdir={killed}")
  _wait_for_step(process, killed, 20)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  ledger = ledger_lib.Ledger(killed / "ledger")
  assert ledger.spent_steps >= _steps_seen(killed) >= 20
  assert not (killed / "result.json").exists()

  process = _start("train", *_TRAIN, f"--workdir={killed}")
  _wait_for_step(process, killed, 26)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75, err
  assert "run the same command again" in err

  code, out, err = _run("train", *_TRAIN, f"--workdir={killed}")
  assert code == 0, err
  assert "resumed after step" in out
  got = json.loads((killed / "result.json").read_text())
  assert got["params_sha256"] == expected["params_sha256"]
  assert got["epsilon"] == expected["epsilon"] <= 2.0
  assert got["steps_charged"] == got["num_steps"] == _NUM_STEPS

  # Nor the accountants, which take a second to load: the ledger tells.
  done = without_jax.run(
    _BUDGET, f"--workdir={killed}", "--json", without=("jax", "scipy")
  )
  assert done.returncode == 0, done.stderr
  facts = json.loads(done.stdout)
  assert facts["epsilon_spent_rdp"] > facts["epsilon_spent_pld"]
  assert facts["epsilon_spent"] == got["epsilon"]
  assert facts["steps_spent"] == _NUM_STEPS


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--config=configs/none.py", "--workdir=w"], "configs/none.py"),
    (["--config=configs/digits.py", "--workdir=w", "extra"], "'extra'"),
    (["--config=configs/digits.py", "--workdir=w", "--nonsense"], "nonsense"),
    (
      ["--config=configs/digits.py", "--workdir=w", "--config.privcy=1"],
      "privacy",
    ),
    (
      [
        "--config=configs/digits.py",
        "--workdir=w",
        "--config.privacy.num_steps=x",
      ],
      "num_steps",
    ),
    (
      [
        "--config=configs/digits.py",
        "--workdir=w",
        "--config.privacy.target_delta=1.5",
      ],
      "target_delta must be in (0, 1), got 1.5",
    ),
  ],
)
def test_wrong_usage_exits_2_with_one_message(args, message, monkeypatch):
  monkeypatch.chdir(_ROOT)
  code, _, err = commands.run("train", *args)
  assert code == 2
  assert message in err
  assert "Traceback" not in err
  assert not (_ROOT / "w").exists()


def test_wrong_usage_of_a_process_exits_2_with_one_message():
  code, _, err = _run("train")
  assert code == 2
  assert "--config" in err
  assert "Traceback" not in err


def test_help_shows_the_flags():
  code, out, err = _run("train", "--help")
  assert (code, err) == (0, "")
  assert "--workdir" in out
  assert "dpdist train --config=digits" in out


_DIGITS = f"--config={_ROOT}/configs/digits.py"
_BUDGET = """
import runpy
sys.argv = ["launch.budget", *sys.argv[1:]]
runpy.run_module("launch.budget", run_name="__main__")
"""


def _budget_without_jax(*args):
  done = without_jax.run(_BUDGET, *args)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_budget_of_a_config_without_jax():
  code, out, err = _budget_without_jax(_DIGITS, "--json")
  assert code == 0, err
  facts = json.loads(out)
  assert 1.99 < facts["epsilon_planned"] <= 2.0
  assert facts["delta"] == 1e-4
  assert facts["noise_multiplier"] > 0
  code, out, err = _budget_without_jax(_DIGITS)
  assert code == 0, err
  assert "noise_multiplier" in out


def test_budget_of_a_stopped_run_quotes_its_whole_plan(tmp_path):
  settings = {
    "num_examples": 1000,
    "expected_batch_size": 10,
    "num_steps": 100,
    "l2_clip_norm": 1.0,
    "target_delta": 1e-5,
    "noise_multiplier": 2.0,
  }
  plan = plan_lib.make_plan(plan_lib.PrivacyConfig(**settings))
  with ledger_lib.Ledger(tmp_path / "ledger") as ledger:
    ledger.acquire()
    ledger.open(
      config=settings,
      plan=plan,
      data="d" * 64,
      secret_hash="5" * 64,
      run="a run",
    )
    ledger.resume(step=0, digest="", ledger_head="", fingerprint="f")
    ledger.reserve_through(1)
  code, out, err = _budget_without_jax(f"--workdir={tmp_path}", "--json")
  assert code == 0, err
  facts = json.loads(out)
  assert facts["epsilon"] == pytest.approx(plan.epsilon())
  assert facts["epsilon_spent"] < facts["epsilon"]
  assert "reading of its odometer" in facts["note"]


def test_budget_of_a_changed_run_quotes_the_dearest_of_its_plans(tmp_path):
  settings = {
    "num_examples": 1000,
    "expected_batch_size": 10,
    "num_steps": 100,
    "l2_clip_norm": 1.0,
    "target_delta": 1e-5,
    "noise_multiplier": 2.0,
    "accountant": "rdp",
  }
  with ledger_lib.Ledger(tmp_path / "ledger") as ledger:
    ledger.acquire()
    for number, noise in enumerate((2.0, 20.0)):
      config = settings | {"noise_multiplier": noise}
      plan = plan_lib.make_plan(plan_lib.PrivacyConfig(**config))
      opened = {"config": config, "plan": plan, "data": "d" * 64}
      if number:
        ledger.open_segment(**opened, start_step=1)
      else:
        ledger.open(**opened, secret_hash="5" * 64, run="a run")
      ledger.resume(step=number, digest="", ledger_head="", fingerprint="f")
      ledger.reserve_through(number + 1)
  code, out, err = _budget_without_jax(f"--workdir={tmp_path}", "--json")
  assert code == 0, err
  facts = json.loads(out)
  bounds = [composition.epsilon(parts) for parts in ledger.bounds]
  assert facts["epsilon"] >= bounds[0] > bounds[1]
  assert facts["epsilon_planned"] == pytest.approx(bounds[-1])


@pytest.mark.slow
def test_a_reader_that_ends_is_no_fault():
  done = subprocess.run(
    [
      *("bash", "-c", '"$@" | true; echo ${PIPESTATUS[0]}', "-"),
      *(sys.executable, "-m", "launch.budget", _DIGITS),
    ],
    cwd=_ROOT,
    capture_output=True,
    text=True,
  )
  assert done.stderr == ""
  assert done.stdout.strip() in ("0", "141")


def test_budget_names_what_is_wrong(tmp_path):
  code, _, err = _budget_without_jax(f"--workdir={tmp_path}")
  assert code == 2
  assert str(tmp_path) in err
  assert not list(tmp_path.iterdir())
  code, _, err = _budget_without_jax()
  assert code == 2
  assert "--workdir" in err
