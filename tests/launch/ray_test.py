"""`launch.engines.ray_driver` on a real Ray cluster of two nodes on this
machine."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.cluster

_ROOT = pathlib.Path(__file__).parents[2]
_SETTINGS = (
  f"--config={_ROOT}/configs/digits.py",
  "--config.insecure_seed=7",
  "--config.checkpoint_every=4",
  "--config.eval_every=1",
  "--config.model.width=64",
  "--config.privacy.accountant=rdp",
  "--config.privacy.expected_batch_size=64",
)


# In a process of its own, since it forks.
_CLUSTER = """
import sys
from ray import cluster_utils
cluster = cluster_utils.Cluster(
  initialize_head=True,
  head_node_args={"num_cpus": 1, "include_dashboard": True},
)
cluster.add_node(num_cpus=1)
print("ADDRESS", cluster.address, cluster.head_node.webui_url, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


class _Cluster(NamedTuple):
  """Where a cluster and its dashboard are."""

  address: str
  dashboard: str


@pytest.fixture(scope="module")
def cluster():
  """Two nodes of one processor each; their processes are ended with it."""
  process = subprocess.Popen(
    [sys.executable, "-c", _CLUSTER],
    cwd=_ROOT,
    env=_environment(),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  line = ""
  while not line.startswith("ADDRESS"):
    assert process.poll() is None
    line = process.stdout.readline()
  yield _Cluster(*line.split()[1:])
  process.communicate("", timeout=120)


def _environment(**variables):
  """One device a process, whatever the tests have."""
  return {
    **os.environ,
    "XLA_FLAGS": "",
    "PYTHONPATH": str(_ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    **variables,
  }


def _start(cluster, workdir, *args, num_steps=12):
  return subprocess.Popen(
    [
      *(
        sys.executable,
        "-m",
        "launch.engines.ray_driver",
        *args,
        "--",
        *_SETTINGS,
      ),
      f"--config.privacy.num_steps={num_steps}",
      f"--workdir={workdir}",
    ],
    cwd=_ROOT,
    env=_environment(RAY_ADDRESS=cluster.address),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _wait_for_step(process, workdir, step):
  path = workdir / "metrics.jsonl"
  while not path.exists() or path.read_text().count("\n") < step:
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)


def _trainers(workdir):
  """Process ids of the job's processes."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      words = (path / "cmdline").read_bytes().decode().split("\0")
    except OSError:
      continue
    if "launch.train" in words and f"--workdir={workdir}" in words:
      found.append(int(path.name))
  return found


def test_a_killed_process_starts_all_again_to_the_end(cluster, tmp_path):
  workdir = tmp_path / "run"
  driver = _start(cluster, workdir, "--nodes=2", num_steps=24)
  _wait_for_step(driver, workdir, 6)
  trainers = _trainers(workdir)
  assert len(trainers) == 2
  os.kill(trainers[0], signal.SIGKILL)
  out, _ = driver.communicate(timeout=500)
  assert driver.returncode == 0, out
  assert "all start again" in out
  assert "resumed after step" in out
  result = json.loads((workdir / "result.json").read_text())
  # Neither the restart nor the second process was charged for.
  assert result["steps_charged"] == result["num_steps"] == 24
  assert not _trainers(workdir)


def test_sigterm_saves_and_nothing_starts_again(cluster, tmp_path):
  workdir = tmp_path / "run"
  driver = _start(cluster, workdir, "--nodes=2", num_steps=2000)
  _wait_for_step(driver, workdir, 4)
  driver.send_signal(signal.SIGTERM)
  out, _ = driver.communicate(timeout=300)
  assert driver.returncode == 75, out
  assert "stopped after step" in out
  assert not _trainers(workdir)


def test_a_refusal_is_final(cluster, tmp_path):
  driver = _start(cluster, tmp_path / "run", "--nodes=1", num_steps=-1)
  out, _ = driver.communicate(timeout=300)
  assert driver.returncode == 2, out
  assert "num_steps" in out
  assert "all start again" not in out


def test_nodes_that_do_not_come_are_an_error(cluster, tmp_path):
  driver = _start(
    cluster,
    tmp_path / "run",
    *("--nodes=3", "--wait_seconds=2", "--max_restarts=0"),
  )
  out, _ = driver.communicate(timeout=300)
  assert driver.returncode == 1, out
  assert "no 3 nodes" in out


def test_a_submitted_job_trains_to_the_end(cluster, tmp_path):
  workdir = tmp_path / "run"
  submit = subprocess.run(
    [
      *(sys.executable, "-m", "launch.submit", "--to=ray", "--nodes=2"),
      *(f"--address=http://{cluster.dashboard}", f"--directory={_ROOT}"),
      *_SETTINGS,
      "--config.privacy.num_steps=12",
      f"--workdir={workdir}",
    ],
    cwd=_ROOT,
    env=_environment(),
    capture_output=True,
    text=True,
    timeout=500,
  )
  assert submit.returncode == 0, submit.stdout + submit.stderr
  assert "will spend epsilon" in submit.stderr
  assert "succeeded" in submit.stdout
  result = json.loads((workdir / "result.json").read_text())
  assert result["steps_charged"] == 12
