"""A power cut at any system call, and any part of what was not yet synced lost.

strace shows what a real writer asks of the system, and
`tests.support.disk_model` what of that must be on the disk after a power cut.
"""

import ast
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest

from dpdist import errors
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from dpdist.workdir import manifest
from tests.support import disk_model
from tests.support import tracing

_ROOT = pathlib.Path(__file__).parents[2]
# Ways in which what was not synced may fare: names, and bytes of data.
_EXTREMES = (
  (lambda: False, lambda size: 0),
  (lambda: True, lambda size: size),
)
_MIXED = (
  (lambda: True, lambda size: 0),
  (lambda: False, lambda size: size),
  (lambda: True, lambda size: size // 2),
)


def _at_random(rng):
  return (
    lambda: rng.random() < 0.5,
    lambda size: rng.choice([0, size, rng.randint(0, size)]),
  )


def _write_out(state, path):
  path.mkdir()
  for name, item in state.items():
    if isinstance(item, dict):
      _write_out(item, path / name)
    else:
      (path / name).write_bytes(item)


def _read_in(path):
  return {
    p.name: _read_in(p) if p.is_dir() else p.read_bytes()
    for p in sorted(path.iterdir())
  }


def _violations(program, check, path):
  """Runs a program, and cuts the power at each of its system calls.

  It is given a directory and prints what it has done. `check` is given a
  directory as the power cut left it, and all that was printed before.

  Yields the message of each assertion that failed in `check`.
  """
  disk_path, trace = path / "disk", path / "trace"
  calls = ",".join(disk_model.ON_DESCRIPTORS + disk_model.ON_PATHS)
  disk_path.mkdir()
  done = subprocess.run(
    [
      *("strace", "-f", "-y", "-s", str(2**20)),
      *("-e", f"trace={calls}"),
      *("-o", str(trace), sys.executable, "-c", program, str(disk_path)),
    ],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  disk, printed, rng = disk_model.Disk(str(disk_path)), "", random.Random(0)
  seen = set()
  for call, text, result in tracing.calls(trace.read_text()):
    outcomes = _EXTREMES
    if call in ("fsync", "fdatasync"):  # Most is unsure just before.
      outcomes += (*_MIXED, _at_random(rng), _at_random(rng))
    for outcome in outcomes:
      state = disk.after(*outcome)
      key = repr((state, printed))
      if key in seen:
        continue
      seen.add(key)
      left = path / str(len(seen))
      _write_out(state, left)
      try:
        check(left, printed.split())
      except (AssertionError, errors.LedgerError) as error:
        yield str(error).partition("\n")[0]
      shutil.rmtree(left)
    disk.do(call, text, result)
    if call == "write" and text.startswith("1<"):
      printed += ast.literal_eval(re.search(r'".*"', text)[0])
  # Nothing that the program did has escaped the model.
  assert disk.after(lambda: True, lambda size: size) == _read_in(disk_path)
  assert len(seen) > 30


_LOG = """
import sys
from dpdist.ledger import records
{change}
log = records.Log(sys.argv[1] + "/new/log", lambda record: None)
log.acquire()
for step in range(3):
  log.append("charge", step=step)
  print(step, flush=True)
log.close()
open(sys.argv[1] + "/end", "w").close()  # A call after the last that counts.
"""


def _check_log(path, released):
  log = records.Log(path / "new" / "log", lambda record: None)
  charged = [r["step"] for r in log.records if r["kind"] == "charge"]
  assert {int(step) for step in released} <= set(charged), "not charged"
  # And it goes on.
  log.acquire()
  log.append("charge", step=3)
  log.close()
  log = records.Log(path / "new" / "log", lambda record: None)
  assert log.records[-1]["step"] == 3


_NO_SYNC = """
from dpdist.ledger import stores
spec = stores._spec
stores._spec = lambda location: {**spec(location), "file_io_sync": False}
stores._check_durable = lambda spec: None
"""

_GIVE_BACK = """
import sys
from dpdist.ledger import ledger
from dpdist.privacy import plan
{change}
run = ledger.Ledger(sys.argv[1] + "/new/ledger")
run.acquire()
run.open(config={{}}, data="", secret_hash="", run="", plan=plan.PrivacyPlan(
  num_examples=9, expected_batch_size=3.0, num_steps=9, l2_clip_norm=1.0,
  noise_multiplier=1.0, delta=1e-5, accountant="rdp",
  neighboring_relation="add_or_remove_one", target_epsilon=None))
run.resume(step=0, digest="", ledger_head="", fingerprint="")
for step in (1, 2):
  run.reserve_through(step + 1)
  print("released", flush=True)
  run.refund(step)
run.close()
open(sys.argv[1] + "/end", "w").close()
"""


def _check_given_back(path, printed):
  ledger = ledger_lib.Ledger(path / "new" / "ledger")
  assert ledger.spent_steps >= printed.count("released"), "not charged"


wants_strace = pytest.mark.skipif(
  not tracing.is_allowed(), reason="wants strace, and may not trace"
)


@wants_strace
def test_a_record_survives_whatever_was_not_synced(tmp_path):
  program = _LOG.format(change="")
  assert list(_violations(program, _check_log, tmp_path)) == []


@wants_strace
def test_a_record_that_is_not_synced_is_found_missing(tmp_path):
  program = _LOG.format(change=_NO_SYNC)
  assert "not charged" in _violations(program, _check_log, tmp_path)


@pytest.mark.slow
@wants_strace
@pytest.mark.parametrize(
  ("change", "problems"),
  [("", set()), (_NO_SYNC, {"not charged"})],
  ids=["synced", "not synced"],
)
def test_what_was_begun_is_charged_whatever_is_given_back(
  tmp_path, change, problems
):
  program = _GIVE_BACK.format(change=change)
  found = {*_violations(program, _check_given_back, tmp_path)}
  assert problems <= found
  assert problems or not found


_RUN = """
import sys
import jax.numpy as jnp
from dpdist.ledger import ledger
from dpdist.privacy import plan
from dpdist.workdir import checkpoints as checkpoint, manifest
{change}
run = ledger.Ledger(sys.argv[1] + "/new/ledger")
run.acquire()
run.open(config={{}}, data="", secret_hash="", run="", plan=plan.PrivacyPlan(
  num_examples=9, expected_batch_size=3.0, num_steps=9, l2_clip_norm=1.0,
  noise_multiplier=1.0, delta=1e-5, accountant="rdp",
  neighboring_relation="add_or_remove_one", target_epsilon=None))
run.resume(step=0, digest="", ledger_head="", fingerprint="")
with checkpoint.Checkpoints(sys.argv[1] + "/new/checkpoints", writer=1) as all:
  for step in (1, 2):
    run.reserve_through(step)
    print("released", flush=True)
    digest = all.save({{"w": jnp.ones(3)}}, step=step, ledger_head=run.head)
    run.record_checkpoint(step, digest)
    print("saved", flush=True)
run.close()
open(sys.argv[1] + "/end", "w").close()
"""


def _check_run(path, printed):
  ledger = ledger_lib.Ledger(path / "new" / "ledger")
  assert ledger.spent_steps >= printed.count("released"), "not charged"
  # Each that is recorded must be there, since it was recorded after that.
  assert len(ledger.checkpoints) >= printed.count("saved"), "not recorded"
  for saved in ledger.checkpoints:
    folder = manifest.folder(path / "new" / "checkpoints", saved.writer)
    problem = manifest.problem(folder / str(saved.step), saved.digest)
    assert problem is None, "damaged"


@pytest.mark.slow
@wants_strace
def test_a_checkpoint_survives_whatever_was_not_synced(tmp_path):
  program = _RUN.format(change="")
  assert list(_violations(program, _check_run, tmp_path)) == []


@wants_strace
def test_a_checkpoint_that_is_not_synced_is_found_damaged(tmp_path):
  program = _RUN.format(change="manifest.sync = lambda path: None")
  assert "damaged" in _violations(program, _check_run, tmp_path)
