"""What befalls a run: kills, signals, full disks, wrong clocks, rivals.

Every run is `launch.train` in a process of its own, and must come to what a run
comes to that nothing befell; see `tests.support.training`.
"""

import datetime
import functools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import pytest

from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from tests.support import training

_YEAR = 365 * 24 * 3600


@pytest.fixture(scope="module")
def aside(tmp_path_factory):
  """Where what is compiled is kept, with a run that nothing befell."""
  path = tmp_path_factory.mktemp("aside")
  whole = training.Run(path / "whole")
  assert whole.wait() == 0, whole.screen
  return path


@pytest.fixture(scope="module")
def expected(aside):
  return training.outcome(aside / "whole")


@pytest.fixture
def start(aside, tmp_path):
  """Starts a run of the test's own directory; kills it if it is left."""
  runs = []

  def start(*changes, workdir=tmp_path / "run"):
    change = functools.partial(_change, changes)
    runs.append(training.Run(workdir, change=change, aside=aside))
    return runs[-1]

  yield start
  for run in runs:
    run.kill()


def _change(changes):
  for change in changes:
    change()


def _ends(run, expected):
  assert run.wait() == 0, run.screen
  training.check(run.workdir)
  assert training.outcome(run.workdir) == expected


def _fails(run, *messages):
  """It ends, before it is done, with one clear line."""
  assert run.wait() == 1, run.screen
  # A thread of Orbax may complain too, before or after.
  (line,) = (x for x in run.screen.splitlines() if x.startswith("error: "))
  for message in messages:
    assert message in line


_SAVE = "orbax.checkpoint:CheckpointManager:save"
_MANIFEST = "dpdist.workdir.manifest:write"
_RECORD = "dpdist.ledger.ledger:Ledger:record_checkpoint"
_RESERVE = "dpdist.ledger.ledger:Ledger:reserve_through"
_TERMINATE = training.send(signal.SIGTERM)
_DIE = training.send(signal.SIGKILL)
_ACQUIRE = "dpdist.ledger.ledger:Ledger:acquire"


@pytest.mark.slow
def test_killed_a_dozen_times_at_random(aside, expected, tmp_path):
  kills = training.kill_often(tmp_path, expected, kills=12, seed=4, aside=aside)
  assert len(list(kills)) == 12


@pytest.mark.slow
def test_a_signal_during_a_save_waits_for_its_end(start, expected, tmp_path):
  saved = 0
  for where in (_SAVE, _MANIFEST, _RECORD):
    run = start(training.before(where, 2, _TERMINATE))
    assert run.wait() == 75, run.screen
    assert "run the same command again" in run.screen
    training.check(run.workdir)
    checkpoints = ledger_lib.Ledger(tmp_path / "run" / "ledger").checkpoints
    saved += 2
    assert [c.step for c in checkpoints] == [4 * (i + 1) for i in range(saved)]
  # In the last save it comes too late to stop anything.
  left = training.NUM_STEPS // 4 - saved
  _ends(
    start(training.before(_MANIFEST, left, _TERMINATE)),
    expected,
  )


class _Disk:
  """A small file system of its own, that nobody else sees mounted."""

  def __init__(self, path):
    self._path = path
    path.mkdir()
    self._shell = subprocess.Popen(
      ["unshare", "--mount", "--map-root-user", "sh"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def mount(self, options):
    """Returns what went wrong."""
    command = f"mount -t tmpfs -o {options} none '{self._path}'; echo done\n"
    self._shell.stdin.write(command)
    self._shell.stdin.flush()
    return "".join(iter(self._shell.stdout.readline, "done\n"))

  @property
  def root(self):
    """Where everybody can reach it."""
    return pathlib.Path(f"/proc/{self._shell.pid}/root{self._path}")

  def close(self):
    self._shell.communicate()


@pytest.fixture
def disk(tmp_path):
  if shutil.which("unshare") is None:
    pytest.skip("wants unshare")
  disk = _Disk(tmp_path / "disk")
  try:
    problem = disk.mount("size=4k")
  except OSError as error:  # The shell could not be started there.
    problem = str(error)
  if problem:
    pytest.skip(f"may not mount a file system of its own: {problem}")
  yield disk
  disk.close()


@pytest.mark.slow
def test_a_full_disk_ends_a_run_and_loses_nothing(start, expected, disk):
  run = functools.partial(start, workdir=disk.root / "run")
  released = 0
  # In the ledger, in the metrics, in checkpoints.
  for size in (4, 24, 60, 150, 300):
    disk.mount(f"remount,size={size}k")
    _fails(run(), str(disk.root), "No space left on device")
    released = training.check(disk.root / "run", released)
  assert released
  disk.mount("remount,size=64m")
  _ends(run(), expected)


@pytest.mark.slow
def test_a_read_only_directory_is_named_and_nothing_charged(
  start, expected, disk
):
  run = functools.partial(start, workdir=disk.root / "run")
  disk.mount("remount,size=64m,ro")
  _fails(run(), str(disk.root), "Read-only file system")
  disk.mount("remount,rw")
  assert run(training.before(_SAVE, 3, _DIE)).wait() < 0
  head = ledger_lib.Ledger(disk.root / "run" / "ledger").head
  disk.mount("remount,ro")
  _fails(run(), str(disk.root), "Read-only file system")
  assert ledger_lib.Ledger(disk.root / "run" / "ledger").head == head
  training.check(disk.root / "run")
  disk.mount("remount,rw")
  _ends(run(), expected)


def _set_clock(seconds, wander):
  """Sets a process's clock off, and lets it jump."""
  now, rng = time.time, random.Random(0)

  def wrong():
    return now() + seconds + wander * rng.choice([-1, 0, 1])

  class Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return cls.fromtimestamp(wrong(), tz)

    @classmethod
    def utcnow(cls):
      return cls.fromtimestamp(wrong(), datetime.UTC).replace(tzinfo=None)

  time.time, time.time_ns = wrong, lambda: int(1e9 * wrong())
  datetime.datetime = Datetime


def clock(seconds: float, wander: float = 0.0):
  return functools.partial(_set_clock, seconds, wander)


@pytest.mark.slow
def test_clocks_that_are_years_off_change_nothing(start, expected, tmp_path):
  for offset, wander in ((_YEAR, 0), (-_YEAR, 0), (0, _YEAR)):
    run = start(
      clock(offset, wander),
      training.before(_SAVE, 3, _DIE),
    )
    assert run.wait() == -signal.SIGKILL, run.screen
    training.check(tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
      os.utime(path, (time.time() - offset,) * 2)
  _ends(start(clock(-2 * _YEAR, _YEAR)), expected)


def _wait_for(path, number=1):
  """Waits until there is a file, or are so many in a folder."""
  while not path.exists() or len(list(path.glob("*"))) < number - 1:
    time.sleep(0.01)


def held(path: pathlib.Path, call: int):
  """Has a process wait, before it charges, until there is a file."""
  return training.before(_RESERVE, call, functools.partial(_wait_for, path))


def _beat_often():
  records.BEAT_SECONDS = 0.2


@pytest.mark.slow
def test_a_clock_ahead_does_not_take_over_from_a_living_writer(
  start, expected, tmp_path
):
  go = tmp_path / "go"
  one = start(_beat_often, held(go, 3))
  _wait_for(tmp_path / "run" / "checkpoints" / "writer_000001" / "8")
  for offset in (_YEAR, -_YEAR):
    _fails(start(clock(offset)), "writes this ledger")
  go.touch()
  _ends(one, expected)


def _gather(folder, number):
  """Waits for others, so that all go on at one moment."""
  (folder / str(os.getpid())).touch()
  while len(list(folder.iterdir())) < number:
    time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 20])
def test_of_many_launchers_at_once_one_trains(
  start, expected, tmp_path, number
):
  gate, go = tmp_path / "gate", tmp_path / "go"
  gate.mkdir()
  together = training.before(
    _ACQUIRE, 1, functools.partial(_gather, gate, number)
  )
  runs = [start(_beat_often, together, held(go, 2)) for _ in range(number)]
  left = list(runs)
  while len(left) > 1:
    left = [run for run in left if run.process.is_alive()]
    time.sleep(0.01)
  go.touch()
  for run in runs:
    if run is not left[0]:
      _fails(run, "one run directory takes one writer")
  _ends(left[0], expected)


def _take_over_soon():
  records.PATIENCE_SECONDS = 0.5


@pytest.mark.slow
def test_a_paused_run_wakes_shut_out(start, expected, tmp_path):
  one = start(training.before(_RESERVE, 4, training.send(signal.SIGSTOP)))
  stat = pathlib.Path(f"/proc/{one.process.pid}/stat")
  while stat.read_text().rpartition(")")[2].split()[0] != "T":
    assert one.process.is_alive(), one.screen
    time.sleep(0.01)
  other = start(_take_over_soon)
  _ends(other, expected)
  os.kill(one.process.pid, signal.SIGCONT)
  _fails(one, "another process wrote ledger record")
  # What it did on waking is nothing to the other's result.
  training.check(tmp_path / "run")
  _ends(start(), expected)
