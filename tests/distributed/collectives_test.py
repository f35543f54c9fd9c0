"""Jobs of several processes: they agree, stop together, and come back resized.

Real processes on this machine, which meet over gloo. Each run is one of those
in `tests.support.training`, with exact sums.
"""

import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from dpdist import errors
from dpdist.ledger import ledger as ledger_lib
from dpdist.reporting import metrics
from tests.support import training

pytestmark = pytest.mark.cluster

_ROOT = pathlib.Path(__file__).parents[2]


def _address():
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{server.getsockname()[1]}"


def _variables(address, count, number, devices):
  return {
    "JAX_COORDINATOR_ADDRESS": address,
    "JAX_NUM_PROCESSES": str(count),
    "JAX_PROCESS_ID": str(number),
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }


def _become(variables, changes):
  """In the process, before it starts: which one of the job it is."""
  os.environ |= variables
  for change in changes:
    change()


@pytest.fixture
def job(tmp_path):
  """Starts a job of several processes; kills what is left of it."""
  runs = []

  def start(
    count,
    devices,
    *changes,
    args=((),),
    workdir=tmp_path / "run",
    primary=False,
  ):
    address = _address()
    started = [
      training.Run(
        workdir,
        "--config.clipping.exact_sum=True",
        "--config.clipping.exact_group_size=16",
        "--config.eval_every=6",
        *args[i % len(args)],
        # Changes are for one process: the last one, or the primary process.
        change=functools.partial(
          _become,
          _variables(address, count, i, devices)
          if count > 1
          else {"XLA_FLAGS": _variables("", 1, 0, devices)["XLA_FLAGS"]},
          changes if i == (0 if primary else count - 1) else (),
        ),
        aside=tmp_path / f"process{i}",
      )
      for i in range(count)
    ]
    runs.extend(started)
    return started

  for i in range(4):
    (tmp_path / f"process{i}").mkdir()
  yield start
  for run in runs:
    run.kill()


def _codes(runs):
  return [run.wait() for run in runs]


# The first call in a process is on zeros, before its first step.
_APPLY = "dpdist.training.exact_step:ExactStep:apply"


def test_a_job_comes_back_on_another_number_of_processes_and_devices(
  job, tmp_path
):
  (whole,) = job(1, 1, workdir=tmp_path / "whole")
  assert whole.wait() == 0, whole.screen
  expected = training.outcome(tmp_path / "whole")
  workdir = tmp_path / "run"
  kill = training.before(_APPLY, 11, training.send(signal.SIGKILL))
  stop = training.before(_APPLY, 11, training.send(signal.SIGTERM))

  # Two devices of one process, which is killed in its tenth step.
  (run,) = job(1, 2, kill)
  assert run.wait() == -signal.SIGKILL
  assert training.check(workdir) == 8
  # Two processes, of which the second is asked to stop, in step 8 + 10.
  runs = job(2, 2, stop)
  assert _codes(runs) == [75, 75], runs[0].screen
  assert training.check(workdir, 8) == 18
  for run in runs:
    assert "stopped after step 18" in run.screen
  # Four processes; then one device to the end.
  runs = job(4, 1, stop)
  assert _codes(runs) == [75] * 4, runs[0].screen
  assert training.check(workdir, 18) == 28
  (run,) = job(1, 1)
  assert run.wait() == 0, run.screen
  training.check(workdir)
  assert training.outcome(workdir) == expected
  # It was one line of steps, all under the same keys.
  ledger = ledger_lib.Ledger(workdir / "ledger")
  assert len(ledger.branches) == 1
  assert ledger.spent_steps == training.NUM_STEPS
  assert ledger.writer == 4


def test_parameters_that_are_divided_between_processes(job, tmp_path):
  args = [("--config.clipping.exact_sum=False", "--config.mesh.fsdp=4")]
  (one,) = job(1, 4, args=args, workdir=tmp_path / "one")
  assert one.wait() == 0, one.screen
  # No process has all parameters; they save together, and stop.
  save = "dpdist.workdir.checkpoints:Checkpoints:save"
  stop = training.before(save, 5, training.send(signal.SIGTERM))
  runs = job(2, 2, stop, args=args)
  assert _codes(runs) == [75, 75], runs[0].screen
  runs = job(2, 2, args=args)
  assert _codes(runs) == [0, 0], runs[0].screen
  workdir = tmp_path / "run"
  training.check(workdir)
  ledger = ledger_lib.Ledger(workdir / "ledger")
  assert len(ledger.branches) == 1
  assert ledger.spent_steps == training.NUM_STEPS
  losses = [
    metrics.read(path)[-1]["test/loss"] for path in (workdir, tmp_path / "one")
  ]
  # Sums between processes round otherwise than those between devices.
  assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_processes_with_other_settings_stop_before_anything_is_charged(
  job, tmp_path
):
  runs = job(2, 1, args=[(), ("--config.optimizer.learning_rate=0.5",)])
  assert _codes(runs) == [2, 2]
  for run in runs:
    assert "settings must be the same in all processes" in run.screen
    assert "Traceback" not in run.screen
  assert not (tmp_path / "run" / "ledger").exists()


def _raise(kind, text):
  # By its name: nothing of JAX's may be imported before the process is set up.
  import jax

  raise {"jax": jax.errors.JaxRuntimeError, "other": RuntimeError}[kind](text)


@pytest.mark.parametrize(
  ("kind", "text", "said", "code"),
  [
    ("jax", "RESOURCE_EXHAUSTED: no memory", "chunk_size must be small", 2),
    ("other", "the device is gone", "the device is gone", 1),
  ],
)
def test_a_step_that_fails_on_zeros_in_one_process_stops_all_for_nothing(
  job, tmp_path, kind, text, said, code
):
  fail = training.before(
    "dpdist.training.exact_step:ExactStep:accumulate",
    1,
    functools.partial(_raise, kind, text),
  )
  runs = job(2, 1, fail, args=[("--config.chunk_size=64",)])
  assert _codes(runs) == [code, code], runs[0].screen + runs[1].screen
  for run in runs:
    assert said in run.screen
  assert not (tmp_path / "run" / "ledger").exists()
  assert not (tmp_path / "run" / "secret").exists()


def test_what_stops_the_leader_stops_all(job, tmp_path):
  (tmp_path / "run" / "ledger").mkdir(parents=True)
  (tmp_path / "run" / "ledger" / "stray").write_text("")
  runs = job(2, 1)
  assert _codes(runs) == [1, 1]
  assert "'stray' is no record of the ledger" in runs[0].screen
  assert "process 0 stopped: 'stray' is no record" in runs[1].screen
  for run in runs:
    assert "Traceback" not in run.screen


def _fail():
  raise errors.LedgerError("no room for a record")


def test_nobody_computes_a_step_that_could_not_be_charged(job, tmp_path):
  reserve = training.before(
    "dpdist.ledger.ledger:Ledger:reserve_through", 3, _fail
  )
  runs = job(3, 1, reserve, primary=True)
  assert _codes(runs) == [1, 1, 1], runs[0].screen
  assert "error: no room for a record" in runs[0].screen
  for run in runs[1:]:
    assert "process 0 stopped: no room for a record" in run.screen
  # Charged twice, up to the checkpoints of steps 4 and 8.
  assert training.check(tmp_path / "run") == 8


_TALK = """
import sys
from dpdist import errors
from dpdist.distributed import collectives
from dpdist.distributed import startup
startup.start({})
import jax
number = jax.process_index()
texts = collectives.gather(["", "ünïcode" * 1000][number])
assert texts == ["", "ünïcode" * 1000], texts
value = {"text": "ü", "none": None, "number": 0.1, "list": [1, [2]]}
assert collectives.run_on_primary(lambda: value) == value
assert collectives.run_on_primary(lambda: None) is None
assert collectives.any_process(False) is False
assert collectives.any_process(number == 1) is True
collectives.assert_equal(same={"a": 1, "b": 2})
for name, fact, error in (
  ("fact", number, errors.DisagreementError),
  ("primary", lambda: 1 / 0, (ZeroDivisionError, errors.PeerError)[number]),
):
  try:
    if callable(fact):
      collectives.run_on_primary(fact)
    else:
      collectives.assert_equal(fact=fact)
  except error as caught:
    print(name, caught)
"""


def test_processes_tell_one_another():
  address = _address()
  children = [
    subprocess.Popen(
      [sys.executable, "-c", _TALK],
      env=os.environ | _variables(address, 2, i, 1),
      cwd=_ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  said = []
  for child in children:
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    said.append(out)
  for out in said:
    assert "fact must be the same in all processes" in out
    assert "is not that of [1]" in out
  assert "primary division by zero" in said[0]
  assert "primary process 0 stopped: division by zero" in said[1]
