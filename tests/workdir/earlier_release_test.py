"""A run of the release before the packages were moved: it is read, and goes on.

`earlier_run` was left by a process of commit fb9491c that was asked to stop
after its first checkpoint, at step 20 of 40.
"""

import json
import pathlib
import shutil

import pytest

from dpdist.ledger import ledger as ledger_lib
from tests.support import commands

pytestmark = pytest.mark.usefixtures("quick_compiles")

_CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "digits.py"


@pytest.fixture(name="workdir")
def fixture_workdir(tmp_path: pathlib.Path) -> pathlib.Path:
  workdir = tmp_path / "run"
  shutil.copytree(pathlib.Path(__file__).parent / "earlier_run", workdir)
  # Git does not keep that mode.
  (workdir / "secret").chmod(0o600)
  return workdir


def test_it_is_verified_and_its_budget_is_shown(workdir):
  verified = commands.run("verify", f"--workdir={workdir}")
  assert verified.code == 0, verified.err
  assert "The record is sound." in verified.out
  assert "20 of 40 charged" in verified.out
  budget = commands.run("budget", f"--workdir={workdir}")
  assert budget.code == 0, budget.err
  assert "1.40" in budget.out


@pytest.mark.slow
def test_it_goes_on_as_a_new_branch_and_is_charged_for_no_step_twice(workdir):
  before = ledger_lib.Ledger(workdir / "ledger")
  done = commands.run(
    "train",
    f"--config={_CONFIG}",
    f"--workdir={workdir}",
    "--config.model.width=32",
    "--config.privacy.num_steps=40",
    "--config.checkpoint_every=20",
  )
  assert done.code == 0, done.err
  after = ledger_lib.Ledger(workdir / "ledger")
  assert len(after.branches) == len(before.branches) + 1
  result = json.loads((workdir / "result.json").read_text())
  assert result["num_steps"] == 40
  assert result["epsilon"] <= 2
  assert (workdir / "report.html").exists()
  assert commands.run("verify", f"--workdir={workdir}").code == 0
