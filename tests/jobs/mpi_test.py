"""`mpirun` starts a job of several processes, which detect it."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.support import training

pytestmark = pytest.mark.cluster

_ROOT = pathlib.Path(__file__).parents[2]


def test_mpirun_starts_a_job_that_ends_as_one_process_does(tmp_path):
  if shutil.which("mpirun") is None:
    if os.environ.get("CI"):
      pytest.fail("mpirun is missing: apt-get install openmpi-bin")
    pytest.skip("mpirun is missing: apt-get install openmpi-bin")
  args = ("--config.clipping.exact_sum=True", "--config.eval_every=6")
  one = training.Run(tmp_path / "one", *args)
  assert one.wait() == 0, one.screen
  run = subprocess.run(
    [
      *("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"),
      *(sys.executable, "-m", "launch.train", f"--workdir={tmp_path / 'run'}"),
      *training.ARGS,
      *args,
    ],
    cwd=_ROOT,
    env=os.environ | {"XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=500,
  )
  assert run.returncode == 0, run.stderr
  training.check(tmp_path / "run")
  assert training.outcome(tmp_path / "run") == training.outcome(
    tmp_path / "one"
  )
