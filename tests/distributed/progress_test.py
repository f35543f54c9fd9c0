"""Whom a job waits for, told from what its processes last said."""

import pytest

from dpdist.distributed import progress

_LIMIT = 100.0


def _status(step, phase, seconds=200.0, silence=1.0):
  return progress.ProcessStatus(step, phase, seconds, silence)


def test_the_one_that_is_behind_is_named():
  statuses = {
    "one": _status(6, "reducing"),
    "two": _status(6, "computing"),
    "three": _status(6, "reducing"),
  }
  assert progress.find_stuck(statuses, _LIMIT) == (
    "two is stuck in step 7 (computing) for 200 s, and the others wait"
  )
  # An earlier step counts before an earlier phase.
  statuses["three"] = _status(5, "agreeing")
  assert "three is stuck in step 6 (agreeing)" in progress.find_stuck(
    statuses, _LIMIT
  )


def test_those_that_are_behind_together_are_named_up_to_a_few():
  statuses = {str(i): _status(6, "reading") for i in range(9)}
  assert progress.find_stuck(statuses, _LIMIT) == (
    "all 9 processes are stuck in step 7 (reading) for 200 s"
  )
  statuses["9"] = _status(6, "reducing")
  assert "0, 1, 2, 3 and 5 more are stuck in" in progress.find_stuck(
    statuses, _LIMIT
  )


def test_one_that_has_not_waited_long_is_given_time():
  statuses = {
    "one": _status(6, "reducing"),
    "two": _status(6, "computing", 99.0),
  }
  assert progress.find_stuck(statuses, _LIMIT) == ""
  statuses["two"] = _status(6, "computing", 101.0)
  assert progress.find_stuck(statuses, _LIMIT)
  assert progress.find_stuck(statuses, 0.0) == ""


@pytest.mark.parametrize(
  "phase",
  [
    *("starting", "loading", "planning", "compiling", "checking"),
    *("evaluating", "saving", "finishing"),
  ],
)
def test_what_may_take_long_holds_up_whoever_waits_for_it(phase):
  statuses = {"one": _status(7, "reading"), "two": _status(6, phase, 1e6)}
  assert progress.find_stuck(statuses, _LIMIT) == ""


def test_who_reads_is_not_behind_one_that_compiles_by_chance():
  statuses = {"one": _status(0, "compiling"), "two": _status(0, "reading")}
  assert "two is stuck in step 1 (reading)" in progress.find_stuck(
    statuses, _LIMIT
  )
  # One that compiles may be what those in `reducing` wait for.
  statuses = {"one": _status(0, "compiling"), "two": _status(0, "agreeing")}
  assert progress.find_stuck(statuses, _LIMIT) == ""


def test_silence_is_named_before_jax_aborts():
  assert progress.SILENT_SECONDS < 100
  statuses = {
    "one": _status(6, "saving", silence=59.0),
    "two": _status(-1, "starting", silence=61.0),
  }
  assert progress.find_silent(statuses, 600.0) == (
    "two is not heard of for 61 s, and last reported starting"
  )
  assert "one, two are not" in progress.find_silent(statuses, 10.0)
  assert progress.find_silent(statuses, 0.0) == ""


def test_every_phase_has_a_place():
  for phase in progress.PHASES:
    progress.find_stuck({"one": _status(1, phase)}, _LIMIT)
