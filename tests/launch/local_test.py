"""`launch.local`: real processes under one command, and what it refuses."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.support import commands

_ROOT = pathlib.Path(__file__).parents[2]
_SETTINGS = (
  f"--config={_ROOT}/configs/digits.py",
  "--config.insecure_seed=7",
  "--config.clipping.exact_sum=True",
  "--config.clipping.exact_group_size=16",
  "--config.checkpoint_every=6",
  "--config.eval_every=1",
  "--config.model.width=64",
  "--config.privacy.accountant=rdp",
  "--config.privacy.expected_batch_size=64",
)


def _start(*args, command="local", **kwargs):
  return subprocess.Popen(
    [sys.executable, "-m", f"launch.{command}", *args],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


def _local(workdir, *args, num_steps=12, **kwargs):
  return _start(
    "--num_processes=2",
    "--devices_per_process=2",
    "--",
    *_SETTINGS,
    f"--config.privacy.num_steps={num_steps}",
    f"--workdir={workdir}",
    *args,
    **kwargs,
  )


def _wait_for_step(process, workdir, step):
  path = workdir / "metrics.jsonl"
  while not path.exists() or path.read_text().count("\n") < step:
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)


def _trainers(command):
  """Process ids below the command, by rank."""
  found = {}
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      stat = (path / "stat").read_text().rpartition(")")[2].split()
      environment = (path / "environ").read_bytes().split(b"\0")
    except OSError:
      continue
    if int(stat[1]) == command and stat[0] != "Z":
      variables = dict(v.split(b"=", 1) for v in environment if b"=" in v)
      found[int(variables[b"JAX_PROCESS_ID"])] = int(path.name)
  return found


def _is_gone(pid):
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return True
  return stat.rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.cluster
def test_two_processes_end_with_the_parameters_of_one(tmp_path):
  one = _start(
    *_SETTINGS,
    "--config.privacy.num_steps=12",
    f"--workdir={tmp_path / 'one'}",
    command="train",
  )
  _, err = one.communicate(timeout=300)
  assert one.returncode == 0, err
  two = _local(tmp_path / "two")
  out, err = two.communicate(timeout=300)
  assert two.returncode == 0, err
  assert "[0] step 12/12" in out
  assert all(line[:4] in ("[0] ", "[1] ") for line in out.splitlines())
  results = [
    json.loads((tmp_path / name / "result.json").read_text())
    for name in ("one", "two")
  ]
  for name in ("params_sha256", "epsilon", "steps_charged"):
    assert results[0][name] == results[1][name]


@pytest.mark.cluster
def test_ctrl_c_saves_the_same_step_in_all_and_the_run_goes_on(tmp_path):
  workdir = tmp_path / "run"
  # Its own group, as a terminal would have it, and all of that gets the signal.
  command = _local(workdir, num_steps=60, process_group=0)
  _wait_for_step(command, workdir, 4)
  trainers = _trainers(command.pid)
  assert set(trainers) == {0, 1}
  os.killpg(command.pid, signal.SIGINT)
  out, err = command.communicate(timeout=300)
  assert command.returncode == 75, err
  # Each process says where it stopped.
  stops = {
    line.partition("] ")[2]
    for line in err.splitlines()
    if "stopped after step" in line
  }
  assert len(stops) == 1, err
  assert err.count("stopped after step") == 2
  assert "stopped and saved" in err.splitlines()[-1]
  assert "Traceback" not in out + err
  assert all(map(_is_gone, trainers.values()))
  command = _local(workdir, num_steps=60)
  out, err = command.communicate(timeout=300)
  assert command.returncode == 0, err
  assert "resumed after step" in out


@pytest.mark.cluster
def test_a_dead_process_stops_all(tmp_path):
  workdir = tmp_path / "run"
  command = _local(workdir, num_steps=2000)
  _wait_for_step(command, workdir, 4)
  trainers = _trainers(command.pid)
  os.kill(trainers[1], signal.SIGKILL)
  _, err = command.communicate(timeout=300)
  assert command.returncode == 128 + signal.SIGKILL
  assert "process 1 was the first to fail, by SIGKILL" in err.splitlines()[-1]
  assert all(map(_is_gone, trainers.values()))


@pytest.mark.cluster
def test_no_process_outlives_a_killed_command(tmp_path):
  workdir = tmp_path / "run"
  command = _local(workdir, num_steps=2000)
  _wait_for_step(command, workdir, 2)
  trainers = _trainers(command.pid)
  assert set(trainers) == {0, 1}
  command.kill()
  command.communicate()
  deadline = time.monotonic() + 60
  while not all(map(_is_gone, trainers.values())):
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--num_processes=0", "--", "--config=x"], "--num_processes=0"),
    (["--devices_per_process=0", "--", "--config=x"], "devices_per_process=0"),
    (["--grace_seconds=-1", "--", "--config=x"], "grace_seconds=-1"),
    (["--num_processes=2", "--"], "after --"),
    (["extra", "--", "--config=x"], "'extra'"),
    (
      ["--config=configs/digits.py", "--", "--workdir=w"],
      "no flag --config: flags of what it starts come after --",
    ),
    (["--", "--config=x", "--process_id=3"], "--process_id"),
    (["--", "--config=x", "--num_processes", "3"], "--num_processes"),
    (["--", "-coordinator_address=a:1"], "--coordinator_address"),
  ],
)
def test_wrong_usage_starts_nothing(args, message):
  _assert_refused(*commands.run("local", *args), message)


def test_wrong_usage_of_a_process_starts_nothing():
  command = _start("--num_processes=2")
  out, err = command.communicate(timeout=120)
  _assert_refused(command.returncode, out, err, "after --")


def _assert_refused(code, out, err, message):
  assert code == 2
  assert not out
  assert err.startswith("error: ")
  assert message in err
  assert "Traceback" not in err


def test_accelerators_are_not_divided():
  command = _start(
    "--", "--config=x", env={**os.environ, "JAX_PLATFORMS": "cuda"}
  )
  _, err = command.communicate(timeout=120)
  assert command.returncode == 2
  assert "JAX_PLATFORMS must be cpu" in err


# Shells in place of trainers: what a pod does needs no jax. In a process of its
# own, since it forks.
_POD = """
import json, os, sys
from launch import local
from launch.engines import local_processes as pod
script, count, grace, term = json.loads(sys.argv[1])
pod._TERM_SECONDS = term
running = pod.Pod(
  ["bash", "-c", script],
  [{**os.environ, "RANK": str(rank)} for rank in range(count)],
  grace,
)
running.run()
code, line = local._summary(running.exits, running.signals)
print(line, file=sys.stderr)
print(json.dumps(running.exits), file=sys.stderr)
sys.exit(code)
"""


def _pod(script, count, grace_seconds=60.0, term_seconds=60.0):
  settings = json.dumps([script, count, grace_seconds, term_seconds])
  return subprocess.Popen(
    [sys.executable, "-c", _POD, settings],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_lines_come_whole_and_each_with_its_rank():
  command = _pod(
    r"printf 'a%.0s' {1..70000}; printf '\n\n[red]x\xff'; echo e >&2", 11
  )
  out, err = command.communicate(timeout=120)
  assert command.returncode == 0, err
  lines = out.splitlines()
  assert len(lines) == 33
  for rank in range(11):
    prefix = f"[{rank:>2}] "
    own = [s.removeprefix(prefix) for s in lines if s.startswith(prefix)]
    assert own == ["a" * 70000, "", "[red]x\ufffd"]
    assert f"{prefix}e" in err.splitlines()


def test_who_does_not_stop_after_a_failure_is_made_to():
  # One fails; one goes on until SIGTERM; one ignores that too, as its child.
  script = """
    case $RANK in
      0) exit 3 ;;
      1) exec sleep 1000 ;;
      2) trap '' TERM; while :; do sleep 1000; done ;;
    esac"""
  command = _pod(script, 3, grace_seconds=1.0, term_seconds=0.5)
  _, err = command.communicate(timeout=120)
  assert command.returncode == 3
  *_, line, exits = err.splitlines()
  assert "process 0 failed first" in line
  assert json.loads(exits) == [
    [0, 3, False],
    [1, -signal.SIGTERM, True],
    [2, -signal.SIGKILL, True],
  ]


def test_what_a_process_leaves_behind_is_ended():
  # A child that holds the pipes open for longer than this test would wait.
  command = _pod("sleep 1000 & exit 0", 2)
  _, err = command.communicate(timeout=120)
  assert command.returncode == 0, err


@pytest.mark.parametrize(("signals", "code"), [(1, 75), (2, 128 + 15)])
def test_a_signal_is_passed_on_once_and_a_second_kills(signals, code):
  script = (
    f"trap 'echo caught; [ {signals} = 1 ] && exit 75' TERM; echo ready;"
    " while :; do sleep 0.1; done"
  )
  command = _pod(script, 2)
  assert command.stdout is not None
  for _ in range(2):
    assert "ready" in command.stdout.readline()
  command.send_signal(signal.SIGTERM)
  for _ in range(2):
    assert "caught" in command.stdout.readline()
  if signals == 2:
    time.sleep(1.1)
    command.send_signal(signal.SIGTERM)
  rest, err = command.communicate(timeout=120)
  assert not rest
  assert command.returncode == code, err


def test_a_terminal_that_is_closed_hangs_up_twice_and_kills_nothing():
  script = (
    "trap 'echo caught; sleep 0.5; exit 75' TERM; echo ready;"
    " while :; do sleep 0.1; done"
  )
  command = _pod(script, 2)
  assert command.stdout is not None
  for _ in range(2):
    assert "ready" in command.stdout.readline()
  command.send_signal(signal.SIGHUP)
  assert "caught" in command.stdout.readline()
  command.send_signal(signal.SIGHUP)
  _, err = command.communicate(timeout=120)
  assert command.returncode == 75, err


def test_what_cannot_be_started_leaves_nothing():
  code = """
import os
from launch.engines import local_processes as pod
good = dict(os.environ)
try:
  pod.Pod(["sleep", "1000"], [good, {"A=": "not a variable"}], 1.0).run()
except (OSError, ValueError) as error:
  print("refused")
try:
  os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
  print("no child is left")
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.stdout.split("\n") == ["refused", "no child is left", ""], done


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do this")
def test_a_silent_process_does_not_outlive_a_killed_command():
  # It prints no more, and so would not miss its reader.
  command = _pod("echo $$; exec sleep 1000", 2)
  assert command.stdout is not None
  pids = [int(command.stdout.readline().split()[-1]) for _ in range(2)]
  command.kill()
  command.wait()
  deadline = time.monotonic() + 60
  while not all(map(_is_gone, pids)):
    assert time.monotonic() < deadline
    time.sleep(0.02)
  command.communicate()
