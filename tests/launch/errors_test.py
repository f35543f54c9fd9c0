"""What a newcomer meets: one sentence, the next command, and no traceback.

A row of the table: the command and its flags; the exit code; what is said; the
command to try. Each is a real run of a command.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import plan as plan_lib
from dpdist.training import setup
from tests.support import commands

_ROOT = pathlib.Path(__file__).parents[2]
_DIGITS = f"--config={_ROOT}/configs/digits.py"
_TRAIN = ("train", _DIGITS, "--config.model.width=8", "--workdir=WORK")
_NPZ = (*_TRAIN, "--config.data.name=npz")

_PROJECT = """
from configs.digits import get_config


def get_task(config):
  return 1
"""

ROWS = {
  "wrong config path": (
    ("train", "--config=configs/none.py", "--workdir=WORK"),
    2,
    "--config cannot be loaded: [Errno 2] No such file or directory",
    "ls configs",
  ),
  "no such setting": (
    (*_TRAIN, "--config.privcy=1"),
    2,
    "there is no setting config.privcy: did you mean config.privacy?",
    "--config.privcy=1 --settings",
  ),
  "workdir is a file": (
    (*_TRAIN, "--workdir=FILE"),
    1,
    "Not a directory",
    "--workdir=ANOTHER",
  ),
  "a task that is none": (
    ("train", "--config=PROJECT", "--workdir=WORK"),
    2,
    "PROJECT: task must be a dpdist.Task or have its attributes, got int",
    "python -m launch.train --config=PROJECT --workdir=WORK --traceback",
  ),
  "a bucket for a workdir": (
    (*_TRAIN, "--workdir=gs://bucket/run"),
    2,
    "workdir must be a directory on a disk, got 'gs://bucket/run'; for a run",
    "--workdir=DIRECTORY",
  ),
  "no workdir": (
    (*_TRAIN, "--workdir="),
    2,
    "workdir must be a directory on a disk, got ''",
    "--workdir=DIRECTORY",
  ),
  "the run of a bucket": (
    ("budget", "--workdir=s3://bucket/run"),
    2,
    "workdir must be a directory on a disk, got 's3://bucket/run'",
    "--workdir=DIRECTORY",
  ),
  "missing data": (
    (*_NPZ, "--config.data.path=WORK/none"),
    2,
    "data.path must be a directory with train.npz",
    "--config.data.path=DIRECTORY",
  ),
  "data that a package of Debian's has": (
    ("train", f"--config={_ROOT}/configs/fashion_mnist.py", "--workdir=WORK")
    + ("--config.data.path=WORK",),
    2,
    "data.path must be a directory with train-images-idx3-ubyte",
    "apt-get install dataset-fashion-mnist",
  ),
  "data that were not fetched": (
    ("train", f"--config={_ROOT}/configs/chitchat_users.py", "--workdir=WORK"),
    2,
    "data set 'chitchat' is not in",
    "python -m launch.fetch --name=chitchat",
  ),
  "other data than the config says": (
    (*_TRAIN, "--config.privacy.num_examples=700"),
    2,
    "privacy.num_examples must be the number of training examples, 1438",
    "--config.privacy.num_examples=1438",
  ),
  "no number of examples": (
    (*_TRAIN, "--config.privacy.num_examples=0"),
    2,
    "privacy.num_examples must be the number of training examples, 1438",
    "--config.privacy.num_examples=1438",
  ),
  "wrong mesh": (
    (*_TRAIN, "--config.mesh.data=3"),
    2,
    "mesh must use all 8 devices, got {'data': 3",
    "--config.mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.model=1",
  ),
  "wrong chunk": (
    (*_TRAIN, "--config.chunk_size=12"),
    2,
    "chunk_size must be 0 or a multiple of 8",
    "--config.chunk_size=0",
  ),
  "out of memory": (
    (*_TRAIN, "--config.model.width=1000000000000"),
    1,
    "out of memory: 40,000.0 GB more were wanted",
    "--config.model.width=1000000000000 --autotune",
  ),
  "no run to look at": (
    ("eval", "--workdir=WORK"),
    2,
    "workdir must be the directory of a run, with a ledger",
    "--ledger=WHERE_THE_LEDGER_IS",
  ),
  "nothing to export": (
    ("export", "--workdir=WORK", "--output=WORK/out"),
    2,
    "workdir must be the directory of a run, with a ledger",
    "--ledger=WHERE_THE_LEDGER_IS",
  ),
  "nothing was spent": (
    ("budget", "--workdir=WORK"),
    2,
    "workdir must be the directory of a run, with a ledger",
    "--ledger=WHERE_THE_LEDGER_IS",
  ),
  "a damaged ledger": (
    ("budget", "--workdir=DAMAGED"),
    1,
    "record",
    "python -m launch.verify --workdir=DAMAGED",
  ),
}


@pytest.fixture
def places(tmp_path, monkeypatch):
  monkeypatch.setenv("DPDIST_CACHE", str(tmp_path / "cache"))
  (tmp_path / "file").touch()
  (tmp_path / "project.py").write_text(_PROJECT)
  with ledger_lib.Ledger(tmp_path / "damaged" / "ledger") as ledger:
    ledger.acquire()
  (record, *_) = (tmp_path / "damaged" / "ledger").glob("0*.json")
  record.write_bytes(b"{}")
  return {
    "WORK": str(tmp_path / "work"),
    "FILE": str(tmp_path / "file"),
    "DAMAGED": str(tmp_path / "damaged"),
    "PROJECT": str(tmp_path / "project.py"),
  }


def _placed(text, places):
  for name, path in places.items():
    text = text.replace(name, path)
  return text


@pytest.mark.parametrize("what", ROWS)
def test_a_mistake_ends_in_a_sentence_and_a_command(what, places):
  args, code, sentence, command = ROWS[what]
  done = commands.run(*(_placed(arg, places) for arg in args))
  assert done.code == code, done.err
  *said, tried = done.err.strip().splitlines()
  assert said[0].startswith("error: ")
  assert _placed(sentence, places) in "\n".join(said)
  assert tried.startswith("try: ")
  assert _placed(command, places) in tried
  assert "Traceback" not in done.out + done.err
  assert len(said) <= 2


def test_a_traceback_is_shown_when_asked_for(places):
  done = commands.run(
    *(_placed(arg, places) for arg in ROWS["a damaged ledger"][0]),
    "--traceback",
  )
  assert done.code == 1
  assert done.err.startswith("error: ")
  assert "Traceback (most recent call last)" in done.err
  assert "LedgerError" in done.err


def test_a_missing_package_is_named_with_its_command(places, monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  done = commands.run(*(_placed(arg, places) for arg in _TRAIN))
  assert done.code == 1
  assert done.err.splitlines() == [
    "error: digits needs scikit-learn: pip install 'dpdist[examples]'",
    "try: pip install 'dpdist[examples]'",
  ]


def test_ctrl_c_ends_a_command_that_only_looks(places, monkeypatch):
  def interrupted(config):
    signal.raise_signal(signal.SIGINT)
    time.sleep(60)

  monkeypatch.setattr(plan_lib, "make_plan", interrupted)
  done = commands.run("budget", _DIGITS)
  assert done.code == 130
  assert done.err.splitlines() == [
    "error: stopped by Ctrl-C",
    f"try: python -m launch.budget {_DIGITS}",
  ]


@pytest.mark.slow
def test_ctrl_c_of_a_run_says_how_to_go_on(places, monkeypatch):
  chunk_size = setup.chunk_size

  def interrupted(*args):
    signal.raise_signal(signal.SIGINT)
    return chunk_size(*args)

  monkeypatch.setattr(setup, "chunk_size", interrupted)
  args = [_placed(arg, places) for arg in _TRAIN]
  args += ["--config.privacy.accountant=rdp", "--config.privacy.num_steps=2"]
  done = commands.run(*args)
  assert done.code == 75, done.err
  said, tried = done.err.splitlines()
  assert "run the same command again" in said
  assert tried == f"try: python -m launch.train {' '.join(args[1:])}"
  ledger = ledger_lib.Ledger(pathlib.Path(places["WORK"]) / "ledger")
  assert ledger.spent_steps == 0


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
  def broken(config):
    raise KeyError("x")

  monkeypatch.setattr(plan_lib, "make_plan", broken)
  with pytest.raises(KeyError):
    commands.run("budget", _DIGITS)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_no_device_is_said_in_a_sentence(platform, tmp_path):
  args = [_DIGITS, f"--workdir={tmp_path}"]
  done = subprocess.run(
    [sys.executable, "-m", "launch.train", *args],
    env=os.environ | {"JAX_PLATFORMS": platform},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert done.stderr.splitlines()[-2:] == [
    f"error: no device: there is none for JAX_PLATFORMS={platform!r}",
    f"try: JAX_PLATFORMS=cpu python -m launch.train {' '.join(args)}",
  ]
