"""Whom a job waits for, told from what its processes last said."""

import pytest

from dpdist.distributed import progress
from dpdist.distributed import stalls

_LIMIT = 100.0


def _sign(step, phase, seconds=200.0, silence=1.0):
  return stalls.Sign(step, phase, seconds, silence)


def test_the_one_that_is_behind_is_named():
  signs = {
    "one": _sign(6, "reducing"),
    "two": _sign(6, "computing"),
    "three": _sign(6, "reducing"),
  }
  assert stalls.stuck(signs, _LIMIT) == (
    "two is stuck in step 7 (computing) for 200 s, and the others wait"
  )
  # An earlier step counts before an earlier phase.
  signs["three"] = _sign(5, "agreeing")
  assert "three is stuck in step 6 (agreeing)" in stalls.stuck(signs, _LIMIT)


def test_those_that_are_behind_together_are_named_up_to_a_few():
  signs = {str(i): _sign(6, "reading") for i in range(9)}
  assert stalls.stuck(signs, _LIMIT) == (
    "all 9 processes are stuck in step 7 (reading) for 200 s"
  )
  signs["9"] = _sign(6, "reducing")
  assert "0, 1, 2, 3 and 5 more are stuck in" in stalls.stuck(signs, _LIMIT)


def test_one_that_has_not_waited_long_is_given_time():
  signs = {"one": _sign(6, "reducing"), "two": _sign(6, "computing", 99.0)}
  assert stalls.stuck(signs, _LIMIT) == ""
  signs["two"] = _sign(6, "computing", 101.0)
  assert stalls.stuck(signs, _LIMIT)
  assert stalls.stuck(signs, 0.0) == ""


@pytest.mark.parametrize(
  "phase", ["starting", "compiling", "evaluating", "saving", "finishing"]
)
def test_what_may_take_long_holds_up_whoever_waits_for_it(phase):
  signs = {"one": _sign(7, "reading"), "two": _sign(6, phase, 1e6)}
  assert stalls.stuck(signs, _LIMIT) == ""


def test_who_reads_is_not_behind_one_that_compiles_by_chance():
  signs = {"one": _sign(0, "compiling"), "two": _sign(0, "reading")}
  assert "two is stuck in step 1 (reading)" in stalls.stuck(signs, _LIMIT)
  # One that compiles may be what those in `reducing` wait for.
  signs = {"one": _sign(0, "compiling"), "two": _sign(0, "agreeing")}
  assert stalls.stuck(signs, _LIMIT) == ""


def test_silence_is_named_before_jax_aborts():
  assert stalls.SILENT_SECONDS < 100
  signs = {
    "one": _sign(6, "saving", silence=59.0),
    "two": _sign(-1, "starting", silence=61.0),
  }
  assert stalls.silent(signs, 600.0) == (
    "two is not heard of for 61 s, and last told of starting"
  )
  assert "one, two are not" in stalls.silent(signs, 10.0)
  assert stalls.silent(signs, 0.0) == ""


def test_every_phase_has_a_place():
  for phase in progress.PHASES:
    stalls.stuck({"one": _sign(1, phase)}, _LIMIT)
