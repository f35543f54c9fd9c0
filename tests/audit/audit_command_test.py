"""The command of audits, as its users open it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).parents[2]
_ARGS = (
  "--config=configs/digits.py",
  "--config.model.width=64",
  "--config.privacy.target_epsilon=8",
  "--config.privacy.expected_batch_size=360",
  "--config.privacy.num_steps=4",
  "--num_trials=2000",
)
# Half of the noise that is planned.
_BROKEN = """
import dataclasses, runpy, sys
from dpdist.mechanism import mechanism
make = mechanism.make
def broken(*args, **kwargs):
  made = make(*args, **kwargs)
  return dataclasses.replace(made, noise_stddev=made.noise_stddev / 2)
mechanism.make = broken
sys.argv[0] = "launch.audit"
runpy.run_module("launch.audit", run_name="__main__", alter_sys=True)
"""


def _run(how, *args):
  return subprocess.run(
    [sys.executable, *how, *_ARGS, *args],
    cwd=_ROOT,
    env=os.environ | {"PYTHONPATH": str(_ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


def test_a_config_is_audited_and_drawn(tmp_path):
  plot = tmp_path / "audit.svg"
  before = set(_ROOT.iterdir())
  run = _run(["-m", "launch.audit"], "--json", f"--plot={plot}")
  # One run of twenty may be above the claim by chance: its keys are new.
  assert run.returncode in (0, 1), run.stderr
  facts = json.loads(run.stdout)
  assert facts["mode"] == "worst_case"
  assert facts["epsilon_lower_bound"] == max(facts["bounds"].values())
  assert facts["epsilon_lower_bound"] > facts["epsilon_claimed"] / 2
  above = facts["epsilon_lower_bound"] > facts["epsilon_claimed"]
  assert run.returncode == above
  assert plot.stat().st_size > 5_000
  # Nothing else is left anywhere: no ledger, no secret, no release.
  assert list(tmp_path.iterdir()) == [plot]
  assert set(_ROOT.iterdir()) - before <= {_ROOT / "__pycache__"}


def test_a_violation_is_the_exit_code():
  run = _run(["-c", _BROKEN])
  assert run.returncode == 1, run.stderr
  assert "the claim is wrong" in run.stdout
  assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("--num_steps=5", "num_steps must be an integer in [1, 4], got 5"),
    ("--plot=audit.txt", "plot must be a file that ends in one of"),
  ],
)
def test_bad_usage_is_one_line(arg, message):
  run = _run(["-m", "launch.audit"], arg)
  assert run.returncode == 2, run.stderr
  assert message in run.stderr
  assert "Traceback" not in run.stderr
