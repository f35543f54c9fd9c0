"""The script of `launch.submit --to=slurm`, on a real cluster of two nodes."""

import json
import pathlib
import re
import subprocess
import sys
import time

import pytest

from tests.jobs import slurm_cluster

pytestmark = pytest.mark.cluster

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
  """The variables of a cluster's clients."""
  with slurm_cluster.running() as variables:
    yield {
      **variables,
      "XLA_FLAGS": "",
      "PYTHONPATH": str(_ROOT),
      "JAX_PLATFORMS": "cpu",
    }


def _submit(variables, folder, *args):
  return subprocess.run(
    [
      *(sys.executable, "-m", "launch.submit", "--to=slurm"),
      *(f"--config={_ROOT}/configs/digits.py", f"--workdir={folder}/run"),
      "--config.insecure_seed=7",
      "--config.checkpoint_every=4",
      "--config.eval_every=1",
      "--config.model.width=64",
      "--config.privacy.accountant=rdp",
      "--config.privacy.expected_batch_size=64",
      f"--python={sys.executable}",
      *args,
    ],
    cwd=folder,
    env=variables,
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_slurm_itself_takes_the_script_and_refuses_a_broken_one(
  cluster, tmp_path
):
  done = _submit(
    cluster,
    tmp_path,
    *("--nodes=2", "--memory=1M", "--time_limit=5", "--partition=main"),
    *("--dry_run", f"--out={tmp_path}"),
  )
  assert done.returncode == 0, done.stderr
  path = tmp_path / "dpdist.sbatch"
  text = path.read_text()
  for script, code in ((text, 0), (text.replace("--signal=", "--signall="), 1)):
    path.write_text(script)
    tried = subprocess.run(
      ["sbatch", "--test-only", str(path)],
      env=cluster,
      capture_output=True,
      text=True,
      timeout=60,
    )
    assert bool(tried.returncode) == bool(code), tried.stderr


def test_a_stopped_job_requeues_itself_and_ends(cluster, tmp_path):
  done = _submit(
    cluster,
    tmp_path,
    *("--nodes=1", "--config.privacy.num_steps=150"),
  )
  assert done.returncode == 0, done.stderr
  job = done.stdout.split()[-1]
  steps = tmp_path / "run/metrics.jsonl"
  _wait(lambda: steps.exists() and steps.read_text().count("\n") > 4, tmp_path)
  # To the processes alone, as before the end of a time limit.
  subprocess.run(["scancel", "--signal=TERM", job], env=cluster, check=True)
  _wait(lambda: "requeued" in _log(tmp_path), tmp_path)
  # A requeued job waits for as long as Slurm thinks fit.
  _wait(lambda: (tmp_path / "run/result.json").exists(), tmp_path, 400)
  result = json.loads((tmp_path / "run/result.json").read_text())
  assert result["steps_charged"] == result["num_steps"] == 150
  log = _log(tmp_path)
  assert "exit status 75: stopped and saved; requeued" in log
  assert "resumed after step" in log


def test_a_job_of_two_nodes_gives_way_to_a_higher_partition(cluster, tmp_path):
  done = _submit(
    cluster,
    tmp_path,
    *("--nodes=2", "--cpus=2", "--partition=main"),
    "--config.privacy.num_steps=150",
  )
  assert done.returncode == 0, done.stderr
  steps = tmp_path / "run/metrics.jsonl"
  _wait(lambda: steps.exists() and steps.read_text().count("\n") > 4, tmp_path)
  # The other one wants both nodes, for as long as it takes to be seen.
  subprocess.run(
    [
      *("sbatch", "--partition=high", "--nodes=2", "--exclusive"),
      *(f"--output={tmp_path}/high.log", "--wrap=touch seen; sleep 1"),
    ],
    env=cluster,
    cwd=tmp_path,
    check=True,
  )
  _wait(lambda: (tmp_path / "seen").exists(), tmp_path)
  assert not (tmp_path / "run/result.json").exists()
  _wait(lambda: (tmp_path / "run/result.json").exists(), tmp_path, 500)
  result = json.loads((tmp_path / "run/result.json").read_text())
  assert result["steps_charged"] == result["num_steps"] == 150
  assert result["epsilon"] == pytest.approx(2.0, abs=0.01)
  log = _log(tmp_path)
  assert "resumed after step" in log
  # Two processes, on a mesh of both nodes.
  assert re.search("mesh +data 2", log)


def _log(folder):
  return "".join(path.read_text() for path in folder.glob("dpdist-*.log"))


def _wait(is_so, folder, seconds=200):
  deadline = time.monotonic() + seconds
  while not is_so():
    assert time.monotonic() < deadline, _log(folder)
    time.sleep(0.2)
