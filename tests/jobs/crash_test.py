"""A process that is killed before each of its writes, syncs and renames.

strace kills it where one of its threads enters the n-th system call of a kind,
for every n until it comes to its end. Wants strace and the right to trace.
"""

import pathlib
import shutil
import subprocess
import sys

import pytest

from dpdist.ledger import records
from tests.support import tracing

_ROOT = pathlib.Path(__file__).parents[2]

# Charges a step, and only then releases it, as a training loop does.
_PROGRAM = """
import os, sys
from dpdist.ledger import records
log = records.Log(sys.argv[1], lambda record: None)
log.acquire()
done = sum(record["kind"] == "charge" for record in log.records)
for step in range(done, 3):
  # Longer than what the next writer puts in its place.
  log.append("charge", step=step, text="." * 400)
  with open(sys.argv[2], "a") as file:
    file.write(f"{step}\\n")
log.close()
"""


def _run(path, *prefix):
  return subprocess.run(
    [
      *prefix,
      sys.executable,
      "-c",
      _PROGRAM,
      str(path / "log"),
      str(path / "released"),
    ],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def _charged(path):
  log = records.Log(path / "log", lambda record: None)
  return [r["step"] for r in log.records if r["kind"] == "charge"]


def _released(path):
  file = path / "released"
  return [int(x) for x in file.read_text().split()] if file.exists() else []


@pytest.mark.skipif(
  not tracing.is_allowed(), reason="wants strace, and may not trace"
)
@pytest.mark.parametrize(
  "calls",
  [
    "write,pwrite64",
    pytest.param("fsync,fdatasync", marks=pytest.mark.slow),
    pytest.param("rename", marks=pytest.mark.slow),
  ],
)
def test_killed_at_any_call_the_log_covers_what_was_released(tmp_path, calls):
  number, kills = 0, 0
  while True:
    number += 1
    path = tmp_path / str(number)
    path.mkdir()
    done = _run(
      path,
      *("strace", "-f", "-o", str(path / "calls"), "-e", f"trace={calls}"),
      *("-e", f"inject={calls}:signal=KILL:when={number}"),
    )
    whole = done.returncode == 0
    kills += not whole
    if not whole:
      assert "killed by SIGKILL" in (path / "calls").read_text(), done.stderr
    charged, released = _charged(path), _released(path)
    assert set(released) <= set(charged)
    # The next one takes over at once, and comes to the end.
    again = _run(path)
    assert again.returncode == 0, again.stderr
    assert _charged(path) == [0, 1, 2]
    shutil.rmtree(path)
    if whole:
      break
  # Each of the pool's threads has its own count of calls.
  assert kills >= 3
