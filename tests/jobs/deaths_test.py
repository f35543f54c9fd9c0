"""Jobs of which a process dies, fails, hangs or is asked to stop.

Whatever it is: all processes end soon, each says which one it was, and the job,
started again, comes to what one comes to that nothing befell.
"""

import functools
import os
import random
import signal
import time

import pytest

from dpdist import errors
from dpdist.distributed import preemption
from dpdist.ledger import ledger as ledger_lib
from tests.support import jobs
from tests.support import training

pytestmark = pytest.mark.cluster

# The first call in a process is on zeros, before its first step.
_APPLY = "dpdist.training.exact_step:ExactStep:apply"
_CONFIRM = "dpdist.ledger.ledger:Ledger:confirm"
_READ = "dpdist.data.arrays:ArraySource:read"
_HASTE = "--config.stuck_after=4"


@pytest.fixture(scope="module")
def aside(tmp_path_factory):
  """Where what is compiled is kept, with a run that nothing befell."""
  path = tmp_path_factory.mktemp("aside")
  (whole,) = jobs.start(path / "whole", 1, aside=path)
  assert whole.wait() == 0, whole.screen
  return path


@pytest.fixture(scope="module")
def expected(aside):
  return training.outcome(aside / "whole")


@pytest.fixture
def start(aside, tmp_path):
  """Starts jobs in the test's own directory; kills what is left of them."""
  runs = []

  def start(count, *args, **changes):
    changes = {int(who.removeprefix("of_")): x for who, x in changes.items()}
    started = jobs.start(
      tmp_path / "run", count, *args, aside=aside, changes=changes
    )
    runs.extend(started)
    return started

  yield start
  for run in runs:
    run.kill()


def _befalls(start, count, number, *changes, args=()):
  """Starts a job, and changes one of its processes; returns all."""
  return start(count, *args, **{f"of_{number}": changes})


def _codes(runs):
  return [run.wait() for run in runs]


def _end_of(run):
  """The line that a process ends with, as a person finds it."""
  lines = [x for x in run.screen.splitlines() if x.startswith("error: ")]
  assert len(lines) == 1, run.screen
  assert "Traceback" not in run.screen
  return lines[0]


def _comes_to(start, count, expected, workdir):
  runs = start(count, "--config.checkpoint_every=16")
  assert _codes(runs) == [0] * count, runs[0].screen
  training.check(workdir)
  assert training.outcome(workdir) == expected
  assert len(ledger_lib.Ledger(workdir / "ledger").branches) == 1


@pytest.mark.parametrize(("count", "kills"), [(2, 14), (4, 6)])
def test_killed_at_random_steps(start, expected, tmp_path, count, kills):
  rng = random.Random(count)
  workdir, released = tmp_path / "run", 0
  # The coordinator and others in turn.
  victims = [0, *rng.sample(range(1, count), 1)] * (kills // 2)
  for victim in victims:
    # Near enough that a run which goes on from its last checkpoint comes to it.
    where, call = rng.choice(
      [(_APPLY, rng.randint(1, 6)), (_READ, rng.randint(1, 6))]
    )
    runs = _befalls(
      start,
      count,
      victim,
      training.before(where, call, training.send(signal.SIGKILL)),
    )
    codes = _codes(runs)
    assert codes.pop(victim) == -signal.SIGKILL, runs[victim].screen
    assert codes == [1] * (count - 1)
    for run in runs:
      if run is not runs[victim]:
        assert f"process {victim} (" in _end_of(run)
    released = training.check(workdir, released)
  _comes_to(start, count, expected, workdir)


def test_a_process_that_is_stopped_is_named(start, expected, tmp_path):
  for victim in (1, 0):
    stop = training.before(_APPLY, 6, training.send(signal.SIGSTOP))
    runs = _befalls(start, 3, victim, stop, args=(_HASTE,))
    for run in runs:
      if run is not runs[victim]:
        assert run.wait() == 1, run.screen
        assert f"process {victim} (" in _end_of(run)
        assert "is not heard of for" in _end_of(run)
    runs[victim].kill()
    training.check(tmp_path / "run")
  _comes_to(start, 3, expected, tmp_path / "run")


def test_a_process_that_hangs_in_its_data_is_named(start, tmp_path):
  runs = _befalls(
    start,
    3,
    2,
    training.before(_READ, 12, functools.partial(time.sleep, 1000)),
    args=(_HASTE, "--config.data.num_threads=0"),
  )
  assert _codes(runs) == [1, 1, 1]
  for run in runs:
    assert "process 2 (" in _end_of(run)
    assert "is stuck in step" in _end_of(run)
    assert "(reading)" in _end_of(run)
  training.check(tmp_path / "run")


def _fail(error):
  raise error


def test_a_process_that_fails_is_named(start, expected, tmp_path):
  for number, where, error in (
    (1, _READ, RuntimeError("the data source is broken")),
    (0, _CONFIRM, errors.LedgerError("the bucket is gone")),
    # Outside of all that processes do together.
    (
      0,
      "dpdist.reporting.metrics:Writer:write",
      OSError("the disk of metrics is gone"),
    ),
    (1, _APPLY, RuntimeError("the device is gone")),
  ):
    fail = training.before(where, 2, functools.partial(_fail, error))
    runs = _befalls(start, 2, number, fail)
    assert _codes(runs) == [1, 1]
    assert str(error) in runs[number].screen
    other = _end_of(runs[1 - number])
    assert f"process {number} " in other
    assert str(error) in other
    training.check(tmp_path / "run")
  _comes_to(start, 2, expected, tmp_path / "run")


def test_a_long_evaluation_is_not_taken_for_a_hang(start, expected, tmp_path):
  # Twice as long as a phase of a step may.
  slow = training.before(
    "dpdist.reporting.metrics:Writer:write",
    2,
    functools.partial(time.sleep, 10),
  )
  runs = _befalls(start, 2, 0, slow, args=(_HASTE,))
  assert _codes(runs) == [0, 0], runs[0].screen
  assert training.outcome(tmp_path / "run") == expected


def test_any_process_may_be_asked_to_stop(start, expected, tmp_path):
  rng = random.Random(0)
  saved = 0
  for name in ("SIGTERM", "SIGUSR1"):
    number = rng.randrange(3)
    stop = training.before(_APPLY, 4, training.send(signal.Signals[name]))
    changes = {f"of_{i}": [_under_slurm] for i in range(3)}
    changes[f"of_{number}"] = [_under_slurm, stop]
    runs = start(3, **changes)
    assert _codes(runs) == [75] * 3, runs[0].screen
    saved += 3
    assert f"stopped after step {saved} ({name})" in runs[number].screen
    assert training.check(tmp_path / "run") == saved
  _comes_to(start, 2, expected, tmp_path / "run")


def _ask_when_all_have_stopped():
  leave = preemption.Notice.__exit__

  def ask_late(self, *raised):
    leave(self, *raised)
    os.kill(os.getpid(), signal.SIGTERM)

  preemption.Notice.__exit__ = ask_late


def test_who_is_asked_to_stop_when_all_have_stopped_ends_as_they_do(start):
  stop = training.before(_APPLY, 4, training.send(signal.SIGTERM))
  runs = start(2, of_0=[stop], of_1=[_ask_when_all_have_stopped])
  assert _codes(runs) == [75, 75], runs[0].screen
  assert "stopped after step 3; run the same" in runs[1].screen


def _under_slurm():
  os.environ["SLURM_JOB_ID"] = "7"
