"""No key of a run is in anything that it leaves behind, nor another run's.

The runs are real: stopped, refused, failed and gone on with under other
settings, with compiled programs dumped. What is looked for are the secret and
all that is derived from it, in every way that `tests.keys.needles` knows,
which is shown to find them.
"""

import base64
import dataclasses
import functools
import gzip
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib

import jax
import numpy as np
import pyarrow
import pytest

from dpdist.data import users
from dpdist.keys import keys
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.noise import noise
from dpdist.privacy import plan as plan_lib
from dpdist.reporting import tensorboard
from dpdist.training import job as job_lib
from dpdist.workdir import checkpoints as checkpoints_lib
from tests.keys import needles
from tests.support import training

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of bytes that no encoding leaves as they are.
_SECRET = bytes(range(1, 256, 8))
_STEPS = 6
_SHORT = (
  f"--config.privacy.num_steps={_STEPS}",
  "--config.privacy.expected_batch_size=32",
  "--config.checkpoint_every=2",
)


def _files(*folders):
  return sorted(
    path for folder in folders for path in folder.rglob("*") if path.is_file()
  )


# What looks for keys finds them.

_WORDS = mechanism.Streams(_SECRET, "b").key_data("noise", 3)
_WAYS = {
  "raw": _SECRET,
  "cut": b"x" + _SECRET[3:13],
  "hex": _SECRET.hex().encode(),
  "HEX": _SECRET.hex().upper().encode(),
  "hex of half": _SECRET[16:].hex().encode(),
  **{
    f"base64 {shift}": base64.b64encode(b"seed="[:shift] + _SECRET + b"x")
    for shift in range(3)
  },
  **{
    f"urlsafe {shift}": base64.urlsafe_b64encode(b"xyz"[:shift] + _SECRET)
    for shift in range(3)
  },
  "base32": base64.b32encode(_SECRET),
  "big": str(int.from_bytes(_SECRET, "big")).encode(),
  "little": str(int.from_bytes(_SECRET, "little")).encode(),
  "rounded": f"{int.from_bytes(_SECRET, 'big'):.17e}".replace(".", "").encode(),
  "repr": repr(_SECRET).encode(),
  "list": str([*_SECRET]).encode(),
  "json": json.dumps({"key": _SECRET.decode("latin-1")}).encode(),
  "compact": json.dumps([*_SECRET], separators=(",", ":")).encode(),
  "utf-8": _SECRET.decode("latin-1").encode(),
  "octal": b"".join(b"\\%03o" % x for x in _SECRET),
  "derived": keys.derive(_SECRET, "noise", branch="b").hex().encode(),
  "derived, decimal": str(
    int.from_bytes(keys.derive(_SECRET, "sampling", branch="b"), "big")
  ).encode(),
  "words": _WORDS.tobytes(),
  "words of jax": repr(jax.random.key_data(noise.as_key(_WORDS))).encode(),
  "words of numpy": str(_WORDS).encode(),
  "words as one": str(int(_WORDS[0]) << 32 | int(_WORDS[1])).encode(),
  "words as hex": b"0x%x, 0x%x" % tuple(map(int, _WORDS)),
  "words as constant": b"u32[2]{0} constant({%d, %d})" % tuple(_WORDS.tolist()),
}


def _page(data):
  image = b"\x89PNG....IDAT" + zlib.compress(b"\0" * 40 + data)
  return b"<img src='data:image/png;base64," + base64.b64encode(image) + b"'>"


def _archive(data):
  buffer = io.BytesIO()
  np.savez_compressed(buffer, x=np.frombuffer(data, np.uint8))
  return buffer.getvalue()


def _zstd(data):
  packed = pyarrow.compress(data * 3, "zstd", asbytes=True)
  return b"some header" + packed + b"and more"


_KINDS = {
  "log": lambda data: b"I1126 step 3: " + data + b"\nnext line",
  "event": lambda data: bytes(3) + data + bytes(9),
  "gzip": lambda data: gzip.compress(b"text" + data),
  "zlib": lambda data: zlib.compress(b"text" + data),
  "npz": _archive,
  "zstd": _zstd,
  "zstd in gzip": lambda data: gzip.compress(_zstd(data)),
  "page": _page,
}


@pytest.fixture(name="searched", scope="module")
def fixture_searched():
  return needles.of_run(_SECRET, ["b"], steps=_STEPS)


@pytest.mark.parametrize("way", _WAYS)
def test_a_key_is_found_wherever_it_was_put(way, searched):
  for name, kind in _KINDS.items():
    assert [*searched.in_data("x", kind(_WAYS[way]))], name


def test_a_key_is_found_in_a_checkpoint_and_in_names(tmp_path, searched):
  for number, planted in enumerate(
    [
      {"key": np.frombuffer(_SECRET, np.uint8)},
      {"key": _WORDS},
      {"rng": jax.random.key_data(noise.as_key(_WORDS))},
    ]
  ):
    state = {"params": np.zeros(300, np.float32), **planted}
    path = tmp_path / str(number)
    with checkpoints_lib.Checkpoints(path, writer=1) as checkpoints:
      checkpoints.save(state, step=2, ledger_head="0" * 64)
    found = searched.in_files(_files(path))
    assert any("zstd" in x.where for x in found), planted
  path = tmp_path / "board"
  with tensorboard.Events(path, purge_step=0, has_times=True) as board:
    board.write(1, {f"loss/{_SECRET.hex()}": 1.0})
  assert searched.in_files(_files(path))
  (tmp_path / _SECRET[:10].hex()).write_text("")
  assert searched.in_files([tmp_path / _SECRET[:10].hex()])


def test_nothing_is_found_where_nothing_is(searched):
  rng = np.random.default_rng(0)
  for data in (rng.bytes(1 << 17), rng.bytes(1 << 16).hex().encode()):
    for kind in _KINDS.values():
      assert not [*searched.in_data("x", kind(data))]
  # What is meant to be published names no key.
  assert not [*searched.in_data("x", keys.secret_hash(_SECRET).encode())]


def test_every_stream_of_the_package_is_looked_for():
  pattern = r'(?:derive\([\w.]+,\s*|streams?\.key\(|key_data\(|\.key\()"(\w+)"'
  used = set()
  for path in (_ROOT / "dpdist").rglob("*.py"):
    used |= set(re.findall(pattern, path.read_text()))
  assert used == {*needles.STREAMS}


# Real runs.


def _tell(path):
  """What others can see of this process, and what is dumped for debugging."""
  from absl import flags

  config = flags.FLAGS.config
  path.mkdir()
  for name in ("cmdline", "environ"):
    shutil.copy(f"/proc/self/{name}", path / name)
  (path / "threads").write_text(str([t.name for t in threading.enumerate()]))
  (path / "variables").write_text(str(dict(os.environ)))
  (path / "argv").write_text(str(sys.argv))
  (path / "config").write_text(f"{config}\n{config!r}")
  (path / "config.json").write_text(config.to_json_best_effort())
  (path / "config.pickle").write_bytes(pickle.dumps(config.to_dict()))
  (path / "flagfile").write_text(flags.FLAGS.flags_into_string())


def _fail():
  raise RuntimeError("a fault in the depths")


class _Change:
  """To a process: it dumps its programs, logs all, and does something once."""

  def __init__(self, aside, do, where):
    self._aside, self._do, self._where = aside, do, where

  def __call__(self):
    os.umask(0)
    jax.config.update("jax_log_compiles", True)
    jax.config.update("jax_dump_ir_to", str(self._aside / "programs"))
    if self._do is not None:
      training.before(self._where, 1, self._do)()


class _Left:
  """What runs left: their directory, all else, and how they ended."""

  def __init__(self, folder):
    self.workdir, self.aside = folder / "run", folder / "aside"
    self.aside.mkdir()
    self.codes = []

  def start(
    self,
    *args,
    do=None,
    where="dpdist.reporting.metrics:Writer:write",
    **options,
  ):
    run = training.Run(
      self.workdir,
      *_SHORT,
      "--verbosity=1",
      *args,
      change=_Change(self.aside, do, where),
      aside=self.aside,
      **options,
    )
    self.codes.append(run.wait())
    self.screen = run.screen

  def search(self, secret):
    """Looks for all keys in all that was left, but in the secret's own file."""
    for name in (
      *("run/ledger/*", "run/tensorboard/*", "run/operations/*"),
      *("run/checkpoints/*/*/state/**/d/*", "run/metrics.jsonl"),
      *("run/result.json", "run/report.html", "aside/screen-*"),
      *("aside/programs/*", "aside/compiled/*", "aside/told/*"),
    ):
      assert [*self.workdir.parent.glob(name)], name
    ledger = ledger_lib.Ledger(self.workdir / "ledger")
    branches = [branch.identity for branch in ledger.branches]
    files = {*_files(self.workdir, self.aside)} - {self.workdir / "secret"}
    searched = needles.of_run(secret, branches, steps=_STEPS)
    return searched.in_files(sorted(files))


@pytest.fixture(name="seeded", scope="module")
def fixture_seeded(tmp_path_factory):
  """A run whose secret is made of an insecure seed."""
  left = _Left(tmp_path_factory.mktemp("seeded"))
  left.start(do=functools.partial(_tell, left.aside / "told"))
  assert left.codes == [0], left.screen
  return left


@pytest.fixture(name="left", scope="module")
def fixture_left(tmp_path_factory):
  left = _Left(tmp_path_factory.mktemp("secrets"))
  stop = training.send(signal.SIGTERM)
  left.start(do=stop, is_seeded=False)
  left.start("--config.privacy.target_delta=1e-6", is_seeded=False)
  left.start(
    do=_fail,
    where="dpdist.workdir.checkpoints:Checkpoints:save",
    is_seeded=False,
  )
  left.start(
    "--config.privacy.l2_clip_norm=0.5",
    do=functools.partial(_tell, left.aside / "told"),
    is_seeded=False,
  )
  return left


@pytest.mark.slow
def test_no_artefact_holds_a_key(seeded):
  assert not seeded.search(keys.insecure_secret(7))


@pytest.mark.slow
def test_no_artefact_holds_a_key_after_a_stop_a_refusal_and_a_fault(left):
  assert left.codes == [75, 2, 1, 0]
  assert len(ledger_lib.Ledger(left.workdir / "ledger").branches) == 2
  screens = "".join(p.read_text() for p in left.aside.glob("screen-*"))
  for said in ("Traceback", "a fault in the depths", "error: ", "resumed"):
    assert said in screens
  assert not left.search((left.workdir / "secret").read_bytes())


@pytest.mark.slow
def test_a_search_of_the_run_would_find_its_secret(seeded, tmp_path):
  secret = keys.insecure_secret(7)
  searched = needles.of_run(secret, [], steps=1)
  for path in (
    seeded.workdir / "result.json",
    seeded.workdir / "report.html",
    next(seeded.workdir.glob("tensorboard/*")),
    next(seeded.workdir.glob("checkpoints/*/*/state/**/d/*")),
    next(seeded.aside.glob("compiled/*")),
  ):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes() + base64.b64encode(b"k" + secret))
    assert searched.in_files([copy]), path


def _modes(workdir):
  modes = {
    str(path.relative_to(workdir)): stat.S_IMODE(path.stat().st_mode)
    for path in (workdir, *workdir.rglob("*"))
  }
  assert modes["operations"] == 0o700
  return modes


@pytest.mark.slow
def test_nobody_else_may_write_whatever_the_umask(seeded):
  assert not [x for x, mode in _modes(seeded.workdir).items() if mode & 0o002]


@pytest.mark.slow
def test_the_secret_is_its_owners_whatever_the_umask(left):
  modes = _modes(left.workdir)
  assert modes["secret"] == 0o600
  assert not [x for x, mode in modes.items() if mode & 0o002]


@pytest.mark.slow
def test_an_insecure_seed_is_said_everywhere(seeded):
  result = (seeded.workdir / "result.json").read_text()
  ledger = ledger_lib.Ledger(seeded.workdir / "ledger")
  for name, said in {
    "screen": seeded.screen,
    "result": result,
    "report": (seeded.workdir / "report.html").read_text(),
    "budget": _command("budget", seeded.workdir),
    "verify": _command("verify", seeded.workdir),
    "ledger": ledger.guarantee,
  }.items():
    said = " ".join(said.split())
    assert "insecure_seed fixes every random stream" in said, name
    assert "void: " in said or "No privacy guarantee" in said, name
  assert json.loads(result)["guarantee"].startswith("void: ")


def _command(name, workdir):
  done = subprocess.run(
    [sys.executable, "-m", f"launch.{name}", f"--workdir={workdir}"],
    capture_output=True,
    text=True,
    cwd=_ROOT,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


# What holds keys does not show them.


def test_nothing_that_holds_a_key_shows_it(searched):
  plan = plan_lib.PrivacyPlan.from_dict(_plan().to_dict())
  streams = mechanism.Streams(_SECRET, "b")
  fields = dict.fromkeys(f.name for f in dataclasses.fields(job_lib.Job))
  source = users.UserSource(_Rows(), np.arange(4), 4, 1)
  drawing = source.drawing(keys.derive(_SECRET, "unit_examples", branch="b"))
  held = [
    streams,
    job_lib.Job(**{**fields, "secret": _SECRET, "plan": plan}),
    drawing,
    drawing(3),
  ]
  for name, extra in {
    "poisson": {},
    "fixed_size": {"neighboring_relation": "replace_one"},
    "truncated_poisson": {"truncated_batch_size": 9},
    "cyclic_poisson": {"neighboring_relation": "zero_out", "cycle_length": 2},
  }.items():
    held.append(streams.sampler(_plan(sampling=name, **extra)))
  for holder in held:
    for text in (repr(holder), str(holder)):
      assert not [*searched.in_data("x", text.encode())], text


class _Rows:
  def __len__(self):
    return 4


def _plan(**changes):
  given = {
    "num_examples": 100,
    "expected_batch_size": 10,
    "num_steps": 5,
    "l2_clip_norm": 1.0,
    "target_delta": 1e-5,
    "noise_multiplier": 1.0,
  }
  return plan_lib.make_plan(plan_lib.PrivacyConfig(**{**given, **changes}))


# No two runs, branches, data sets or copies share a key.


def _opened(path, run="r1", data="d" * 64):
  ledger = ledger_lib.Ledger(path)
  ledger.acquire()
  ledger.open(config={}, plan=_plan(), data=data, secret_hash="5" * 64, run=run)
  return ledger


def _keys_of(secret, ledger):
  """All that a branch draws from, as a set of bytes."""
  branch = ledger.branches[-1].identity
  streams = mechanism.Streams(secret, branch)
  found = {keys.derive(secret, name, branch=branch) for name in needles.STREAMS}
  for name in needles.STREAMS:
    for step in (None, *range(50)):
      found.add(streams.key_data(name, step).tobytes())
  assert len(found) == len(needles.STREAMS) * 52
  return found


def _resumed(ledger, fingerprint="f", step=0, digest=""):
  ledger.resume(
    step=step, digest=digest, ledger_head="", fingerprint=fingerprint
  )
  return ledger


def test_runs_branches_data_sets_and_copies_share_no_key(tmp_path):
  taken = {}

  def take(name, secret, ledger):
    taken[name] = _keys_of(secret, ledger)

  one = _resumed(_opened(tmp_path / "one"))
  take("first", _SECRET, one)
  take("another secret", bytes(32), one)
  one.reserve_through(1)
  one.record_checkpoint(1, "c" * 64)
  one.close()
  for copy in ("copy", "other copy"):
    # Each goes on under the same number, from the same checkpoint.
    shutil.copytree(tmp_path / "one", tmp_path / copy)
    ledger = ledger_lib.Ledger(tmp_path / copy)
    ledger.acquire()
    take(copy, _SECRET, _resumed(ledger, copy, 1, "c" * 64))
    take(f"{copy}, branch", _SECRET, _resumed(ledger, "h", 0))
    ledger.close()
    # They meet again in what they do: the same release, or none.
    assert taken.pop(f"{copy}, branch") is not None
  two = _opened(tmp_path / "two", run="r2")
  take("another run", _SECRET, _resumed(two))
  changed = {"config": {}, "plan": _plan(), "start_step": 0}
  two.open_segment(data="e" * 64, **changed)
  take("another data set", _SECRET, _resumed(two, "of other data"))
  two.open_segment(data="e" * 64, **changed)
  take("another segment", _SECRET, _resumed(two, "of other settings"))
  two.close()
  names = [*taken]
  for i, name in enumerate(names):
    for other in names[:i]:
      assert not taken[name] & taken[other], (name, other)


@pytest.mark.slow
def test_processes_show_no_key_and_runs_of_one_secret_share_none(tmp_path):
  """Real commands, one process and two, from nothing, beside one another."""
  secret = tmp_path / "secret"
  secret.write_bytes(_SECRET)
  secret.chmod(0o600)
  common = [a for a in training.ARGS if "insecure_seed" not in a]
  common += [*_SHORT, f"--config.secret_file={secret}"]
  seen, hashes, branches = [], set(), set()
  for name, command in (
    ("one", ["launch.train"]),
    ("two", ["launch.train"]),
    ("pod", ["launch.local", "--num_processes=2", "--"]),
  ):
    workdir, home = tmp_path / name, tmp_path / f"home of {name}"
    home.mkdir()
    with open(home / "screen", "w") as screen:
      process = subprocess.Popen(
        [sys.executable, "-m", *command, *common, f"--workdir={workdir}"],
        stdout=screen,
        stderr=screen,
        cwd=home,
        start_new_session=True,
        env={
          **os.environ,
          "HOME": str(home),
          "TMPDIR": str(home),
          "PYTHONPATH": str(_ROOT),
        },
      )
      while process.poll() is None:
        seen += _of_session(process.pid)
        time.sleep(0.2)
    assert process.returncode == 0, (home / "screen").read_text()
    ledger = ledger_lib.Ledger(workdir / "ledger")
    branches |= {branch.identity for branch in ledger.branches}
    result = json.loads((workdir / "result.json").read_text())
    hashes.add(result["params_sha256"])
  assert len(hashes) == len(branches) == 3
  assert b"launch.train" in b"".join(seen)
  assert b"PYTHONPATH" in b"".join(seen)
  searched = needles.of_run(_SECRET, branches, steps=_STEPS)
  assert not [*searched.in_data("processes", b"\n".join({*seen}))]
  assert not searched.in_files(x for x in _files(tmp_path) if x != secret)


def _of_session(leader):
  """Command line, environment and names of threads of its processes."""
  found = []
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      if os.getsid(int(folder.name)) != leader:
        continue
      found += [(folder / x).read_bytes() for x in ("cmdline", "environ")]
      found += [x.read_bytes() for x in folder.glob("task/*/comm")]
    except OSError:
      continue
  return found
