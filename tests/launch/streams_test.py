"""A run goes on when nobody reads what it prints."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch.cli import streams

_ROOT = pathlib.Path(__file__).parents[2]


def test_what_nobody_reads_is_dropped_and_said_once(monkeypatch, capfd):
  reads, writes = os.pipe()
  os.close(reads)
  with os.fdopen(writes, "w") as broken:
    monkeypatch.setattr(sys, "stdout", broken)
    with streams.lasting():
      print("one", flush=True)
      print("two", flush=True)
      assert not sys.stdout.isatty()
    assert sys.stdout is broken
  assert capfd.readouterr().err.count("the run goes on") == 1


def test_streams_that_were_closed_before_the_start_are_dropped(monkeypatch):
  monkeypatch.setattr(sys, "stdout", None)
  monkeypatch.setattr(sys, "stderr", None)
  with streams.lasting():
    print("one", flush=True)
    print("two", file=sys.stderr, flush=True)
    assert not sys.stdout.isatty()


def test_what_is_read_comes_through(capsys):
  with streams.lasting():
    print("one", flush=True)
    print("two", file=sys.stderr, flush=True)
  assert capsys.readouterr() == ("one\n", "two\n")


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["| head -n 1", ">&-", ">/dev/full"])
def test_a_run_ends_as_it_would_have_ended(tmp_path, redirection):
  command = (
    f"{sys.executable} -m launch.train --config=digits --workdir={tmp_path}"
    " --config.privacy.num_steps=4 --config.insecure_seed=7"
    f" --config.model.width=64 {redirection}"
  )
  done = subprocess.run(
    ["bash", "-o", "pipefail", "-c", command],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["num_steps"] == 4
  assert ("the run goes on" in done.stderr) == (redirection != ">&-")
