"""Data that goes away while `launch.train` reads it, and comes back, or not.

Real runs over real files, of which the second holds a few examples that are
not needed in every step.
"""

import functools
import os
import re
import shutil
import threading
import time

import ml_collections
import numpy as np
import pytest

from dpdist.data import array_record
from dpdist.data.datasets import datasets
from tests.support import jobs
from tests.support import training

pytestmark = pytest.mark.cluster

_RARE = 5  # Examples in the second file.
_TIMEOUT = 120


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """The digits in files that are read as they are needed."""
  directory = tmp_path_factory.mktemp("digits")
  splits = datasets.load(ml_collections.ConfigDict({"name": "digits"}))
  num_train = len(splits.train)
  for name, source, start, stop in (
    ("train-0", splits.train, 0, num_train - _RARE),
    ("train-1", splits.train, num_train - _RARE, num_train),
    ("test", splits.test, 0, len(splits.test)),
  ):
    whole = source.read(np.arange(start, stop))
    array_record.write_array_record(
      directory / f"{name}.array_record",
      [{k: a[i] for k, a in whole.items()} for i in range(stop - start)],
    )
  return directory


def _start(workdir, data, retry_seconds, change=None):
  return training.Run(
    workdir,
    "--config.data.name=array_record",
    f"--config.data.path={data}",
    f"--config.data.retry_seconds={retry_seconds}",
    "--config.data.stall_seconds=3",
    change=change,
  )


@pytest.fixture(scope="module")
def expected(digits, tmp_path_factory):
  """What an undisturbed run comes to."""
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  run = _start(workdir, digits, 0)
  assert run.wait() == 0, run.screen
  return training.outcome(workdir)


@pytest.fixture
def data(digits, tmp_path):
  """Files of one's own, to take away."""
  return shutil.copytree(digits, tmp_path / "digits")


def _take_away(file):
  os.rename(file, f"{file}.away")


def _clog(file):
  """What reads it from now on never hears of it again; it looks as it did."""
  shutil.copy(file, f"{file}.away")
  array_record.ArrayRecordSource.read = lambda self, indices: (
    threading.Event().wait()
  )


def _bring_back(file):
  os.replace(f"{file}.away", file)


def _before_the_first_step(do, file):
  return training.before(
    "dpdist.data.pipeline:steps", 1, functools.partial(do, file)
  )


def _wait_for(run, text):
  deadline = time.monotonic() + _TIMEOUT
  while text not in run.screen:
    assert run.process.is_alive(), run.screen
    assert time.monotonic() < deadline, run.screen
    time.sleep(0.01)


def test_a_run_waits_for_its_data_and_ends_as_if_it_had_been_there(
  data, expected, tmp_path
):
  file = str(data / "train-1.array_record")
  change = _before_the_first_step(_take_away, file)
  run = _start(tmp_path / "run", data, 3600, change)
  _wait_for(run, "it is waited for")
  _bring_back(file)
  assert run.wait() == 0, run.screen
  (line,) = [x for x in run.screen.splitlines() if "is waited for" in x]
  assert line == (
    f"WARNING: data set 'array_record' in {str(data)!r} cannot be read (No"
    " such file or directory); it is waited for, up to 3600 s"
  )
  training.check(tmp_path / "run")
  assert training.outcome(tmp_path / "run") == expected


@pytest.mark.parametrize(
  ("do", "reason"),
  [
    (_take_away, r"cannot be read \(.*No such file or .*\)"),
    (_clog, "has not answered for 3 s"),
  ],
  ids=["gone", "silent"],
)
def test_a_run_stops_when_its_data_stays_away_and_goes_on_later(
  data, expected, tmp_path, do, reason
):
  file = str(data / "train-1.array_record")
  workdir = tmp_path / "run"
  run = _start(workdir, data, 1, _before_the_first_step(do, file))
  assert run.wait() == 1, run.screen
  (line,) = [x for x in run.screen.splitlines() if x.startswith("error:")]
  where = re.escape(repr(str(data)))
  assert re.fullmatch(
    rf"error: (step \d+: )?data set 'array_record' in {where} {reason}, and was"
    " waited for 1 s: see that all of it can be read, and run the same command"
    " again, which goes on from the last checkpoint",
    line,
  )
  assert "Traceback" not in run.screen
  # Which of them were read is private.
  assert "train-1" not in run.screen
  training.check(workdir)

  _bring_back(file)
  run = _start(workdir, data, 0)
  assert run.wait() == 0, run.screen
  training.check(workdir)
  assert training.outcome(workdir) == expected


def test_processes_stop_together_when_data_stays_away_and_go_on_later(
  data, tmp_path
):
  args = (
    "--config.data.name=array_record",
    f"--config.data.path={data}",
    "--config.data.retry_seconds=1",
  )
  (whole,) = jobs.start(tmp_path / "whole", 1, *args, aside=tmp_path)
  assert whole.wait() == 0, whole.screen
  file = str(data / "train-1.array_record")
  workdir = tmp_path / "run"
  # They read from the same files, so that one takes them from both; who needs
  # them first is chance.
  change = _before_the_first_step(_take_away, file)
  runs = jobs.start(workdir, 2, *args, aside=tmp_path, changes={1: [change]})
  assert [run.wait() for run in runs] == [1, 1], runs[0].screen
  for run in runs:
    (line,) = [x for x in run.screen.splitlines() if x.startswith("error:")]
    assert re.match(
      # While a step reads, or where it looks whether files were changed.
      r"error: (process \d \(.*\) failed: )?(step \d+: )?data set"
      " 'array_record' in .* was waited for 1 s",
      line,
    )
    assert "Traceback" not in run.screen
  training.check(workdir)

  _bring_back(file)
  runs = jobs.start(workdir, 2, *args, aside=tmp_path)
  assert [run.wait() for run in runs] == [0, 0], runs[0].screen
  training.check(workdir)
  assert training.outcome(workdir) == training.outcome(tmp_path / "whole")
