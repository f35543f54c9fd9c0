"""How processes meet: what is found, what is refused, and that none hangs."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from dpdist import errors
from dpdist.distributed import startup
from tests.support import commands

_ROOT = pathlib.Path(__file__).parents[2]
_NO_FLAGS = dict.fromkeys(
  ("coordinator_address", "num_processes", "process_id")
)
_JAX = {
  "JAX_COORDINATOR_ADDRESS": "here:1",
  "JAX_NUM_PROCESSES": "2",
  "JAX_PROCESS_ID": "0",
}
_FLAGS = {
  "coordinator_address": "there:2",
  "num_processes": 3,
  "process_id": 1,
}


@pytest.mark.parametrize(
  ("flags", "environment", "expected"),
  [
    ({}, {}, None),
    ({}, _JAX, ("here:1", 2, 0, None)),
    # Flags before variables, and either before an engine.
    (_FLAGS, _JAX, ("there:2", 3, 1, None)),
    ({}, _JAX | {"SLURM_STEP_NUM_TASKS": "4"}, ("here:1", 2, 0, None)),
    ({}, {"SLURM_STEP_NUM_TASKS": "2"}, (None, None, None, "slurm")),
    ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, (None, None, None, "ompi")),
    ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None, "gketpu")),
    # One task, or a batch script outside a step, is one process.
    ({}, {"SLURM_STEP_NUM_TASKS": "1"}, None),
    ({}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),
    ({}, {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ({}, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
  ],
)
def test_flags_then_variables_then_the_engine(flags, environment, expected):
  assert startup.find(_NO_FLAGS | flags, environment) == expected


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"JAX_NUM_PROCESSES": ""}, "together, but JAX_NUM_PROCESSES is missing"),
    ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a .*'two'"),
    ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES must be at least 1, got 0"),
    ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID must be a number, got '-1'"),
    ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID must be below .*=2, got 2"),
    ({"JAX_COORDINATOR_ADDRESS": "here"}, "must be HOST:PORT, got 'here'"),
    ({"JAX_COORDINATOR_ADDRESS": "here:0"}, "must be HOST:PORT, got 'here:0'"),
    ({"JAX_COORDINATOR_ADDRESS": ":7"}, "must be HOST:PORT, got ':7'"),
  ],
)
def test_an_environment_that_makes_no_sense_is_named(changes, message):
  with pytest.raises(errors.StartError, match=message):
    startup.find(_NO_FLAGS, _JAX | changes)


def test_flags_that_make_no_sense_are_named():
  with pytest.raises(errors.StartError, match="but --num_processes is missing"):
    startup.find(_FLAGS | {"num_processes": None}, {})
  with pytest.raises(
    errors.StartError, match="--process_id must be below --num_processes=3"
  ):
    startup.find(_FLAGS | {"process_id": 3}, {})


def test_a_name_that_does_not_come_up_is_told():
  with pytest.raises(
    errors.ConnectError, match=r"'no-such-host\.invalid' has no address"
  ):
    startup.resolve("no-such-host.invalid", 0.1)
  assert "127.0.0.1" in startup.resolve("localhost", 1)
  for host in ("a..b", 70 * "a"):
    with pytest.raises(errors.StartError, match="is no name of a host"):
      startup.resolve(host, 60)


def test_a_name_that_is_loopback_is_refused_where_others_are_elsewhere():
  # 192.0.2.1 is no address of any machine (RFC 5737).
  with pytest.raises(errors.StartError, match="'localhost', must have an"):
    startup.check_own_name("localhost", ["192.0.2.1"])
  # On one machine nobody else has to reach it.
  startup.check_own_name("localhost", ["127.0.0.1"])


@pytest.mark.parametrize(
  ("address", "bound"),
  [
    ("127.0.0.1:7", "127.0.0.1:7"),
    ("[::1]:7", "[::1]:7"),
    ("localhost:7", None),
  ],
)
def test_processes_of_one_machine_meet_where_no_other_can_call(
  monkeypatch, address, bound
):
  given = {}
  monkeypatch.setattr(startup.jax.config, "update", lambda *unused: None)
  monkeypatch.setattr(
    startup.jax.distributed,
    "initialize",
    lambda *args, **kwargs: given.update(kwargs),
  )
  flags = {"coordinator_address": address, "num_processes": 2, "process_id": 0}
  startup.start(flags)
  assert given["coordinator_bind_address"] == bound


def _free_port():
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


def _train(*args, **variables):
  return subprocess.run(
    [
      *(sys.executable, "-m", "launch.train", "--config=configs/digits.py"),
      *args,
    ],
    cwd=_ROOT,
    env=os.environ | variables,
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ("--process_id=0", "error: --coordinator_address, --num_processes"),
    ("--start_timeout=0", "error: --start_timeout must be at least 1"),
  ],
)
def test_the_command_refuses_flags_on_one_line(
  tmp_path, args, message, monkeypatch
):
  monkeypatch.chdir(_ROOT)
  run = commands.run(
    *("train", "--config=configs/digits.py"),
    *(f"--workdir={tmp_path / 'run'}", args),
  )
  assert run.code == 2, run.err
  _assert_says_so(tmp_path, run.err, message)


def test_the_command_says_so_on_one_line(tmp_path):
  run = _train(
    f"--workdir={tmp_path / 'run'}",
    "--coordinator_address=no-such-host.invalid:9",
    "--num_processes=2",
    "--process_id=1",
    "--start_timeout=1",
  )
  assert run.returncode == 1, run.stderr
  message = (
    "error: the coordinator's host 'no-such-host.invalid' has no address"
  )
  _assert_says_so(tmp_path, run.stderr, message)


def _assert_says_so(tmp_path, err, message):
  assert message in err
  assert "Traceback" not in err
  assert not (tmp_path / "run" / "ledger").exists()


@pytest.mark.cluster
@pytest.mark.parametrize("number", [0, 1])
def test_others_that_never_come_are_not_waited_for_for_ever(tmp_path, number):
  run = _train(
    f"--workdir={tmp_path / 'run'}",
    f"--coordinator_address=127.0.0.1:{_free_port()}",
    "--num_processes=2",
    f"--process_id={number}",
    "--start_timeout=3",
  )
  assert run.returncode == 1
  assert not (tmp_path / "run" / "ledger").exists()
  assert "error: the processes of the job did not connect" in run.stderr
  assert "Traceback" not in run.stderr
