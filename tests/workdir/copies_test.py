"""Copies of checkpoints come back whole or not at all, from a bucket too."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
import dpdist
from dpdist import errors
from dpdist import sampling
from dpdist.distributed import preemption
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import stores
from dpdist.workdir import checkpoints as checkpoints_lib
from dpdist.workdir import copies as copies_lib
from dpdist.workdir import manifest
from dpdist.workdir import verify
from tests.support import object_store

_RUN = "a" * 64


@pytest.fixture(scope="module")
def server():
  with object_store.serving("copies") as port:
    yield port


def _spec(port, path):
  return json.dumps(
    {
      "driver": "s3",
      "bucket": "copies",
      "path": path,
      "endpoint": f"http://127.0.0.1:{port}",
      "aws_region": "us-east-1",
    }
  )


@pytest.fixture(params=["disk", "bucket"])
def location(request, server, tmp_path, monkeypatch):
  if request.param == "disk":
    return str(tmp_path / "copies")
  for name, value in object_store.VARIABLES.items():
    monkeypatch.setenv(name, value)
  return _spec(server, f"{request.node.name}/")


def _state(value):
  return {"w": jnp.full((64, 64), float(value)), "step": jnp.int32(value)}


def _saved(directory, copies, steps, max_to_keep=3):
  known = []
  with checkpoints_lib.Checkpoints(
    directory, writer=1, max_to_keep=max_to_keep, copies=copies
  ) as checkpoints:
    for step in steps:
      digest = checkpoints.save(_state(step), step=step, ledger_head="")
      known.append(history.CheckpointRef(step, digest, 1))
      checkpoints.delete_old(known)
  return known


def test_an_empty_disk_gets_the_newest_checkpoint(location, tmp_path):
  copies = copies_lib.Copies(location, _RUN)
  copies.check()
  other = copies_lib.Copies(location, "b" * 64)
  here, there = tmp_path / "here", tmp_path / "there"
  others = _saved(tmp_path / "other", other, [1])
  known = _saved(here, copies, [2, 4, 6], max_to_keep=2)
  copies.fetch(there, known)
  saved, rejected = manifest.newest(there, known)
  assert (saved, rejected) == (known[-1], [])
  state, _ = checkpoints_lib.restore(there, _state(0), saved)
  np.testing.assert_array_equal(state["w"], _state(6)["w"])
  # What was too old is deleted there too, and nothing of another run.
  copies.fetch(tmp_path / "older", known[:2])
  assert manifest.newest(tmp_path / "older", known[:2])[0] == known[1]
  copies.fetch(tmp_path / "oldest", known[:1])
  assert manifest.newest(tmp_path / "oldest", known[:1])[0] is None
  other.fetch(tmp_path / "others", others)
  assert manifest.newest(tmp_path / "others", others)[0] == others[0]


def test_a_damaged_copy_is_passed_over_and_a_whole_disk_is_left_alone(tmp_path):
  copies = copies_lib.Copies(str(tmp_path / "copies"), _RUN)
  here = tmp_path / "here"
  known = _saved(here, copies, [1, 2])
  copied = tmp_path / "copies" / _RUN / "writer_000001"
  for file in (copied / "2").rglob("metadata"):
    file.write_bytes(b"{}")
  before = sorted(here.rglob("*"))
  copies.fetch(here, known)
  assert sorted(here.rglob("*")) == before
  shutil.rmtree(here / "writer_000001" / "2")
  copies.fetch(here, known)  # The one before it is on the disk.
  there = tmp_path / "there"
  copies.fetch(there, known)
  for directory in (here, there):
    saved, rejected = manifest.newest(directory, known)
    assert saved == known[0]
    assert len(rejected) == 1
  assert not [*there.glob(".fetched*")]


def test_a_checkpoint_is_copied_before_its_digest_is_told(
  tmp_path, monkeypatch
):
  copies = copies_lib.Copies(str(tmp_path / "copies"), _RUN)

  def fail(path: pathlib.Path) -> None:
    raise errors.SaveError("the bucket is full")

  monkeypatch.setattr(copies, "put", fail)
  with pytest.raises(errors.SaveError, match="full"):
    _saved(tmp_path / "here", copies, [1])


def test_only_what_the_manifest_names_is_fetched(location, tmp_path):
  copies = copies_lib.Copies(location, _RUN)
  known = _saved(tmp_path / "here", copies, [1])
  for name in ("/", "state/", "odd", "evil/dpdist_manifest.json"):
    if not (name.endswith("/") and location.startswith("/")):
      copies._put(f"{_RUN}/writer_000001/1/{name}", b"")
  there = tmp_path / "there"
  copies.fetch(there, known)
  assert manifest.newest(there, known)[0] == known[0]
  assert not [*there.rglob("odd")]
  assert not [*there.rglob("evil")]


def test_a_file_comes_in_pieces(location, tmp_path, monkeypatch):
  monkeypatch.setattr(copies_lib, "_PIECE_BYTES", 100)
  copies = copies_lib.Copies(location, _RUN)
  known = _saved(tmp_path / "here", copies, [1])
  copies.fetch(tmp_path / "there", known)
  assert manifest.newest(tmp_path / "there", known)[0] == known[0]


def test_a_writer_that_wakes_deletes_no_copy_of_the_next(tmp_path):
  copies = copies_lib.Copies(str(tmp_path / "copies"), _RUN)
  with checkpoints_lib.Checkpoints(
    tmp_path / "one", writer=1, max_to_keep=2, copies=copies
  ) as woken:
    digest = woken.save(_state(1), step=1, ledger_head="")
    known = [history.CheckpointRef(1, digest, 1)]
    with checkpoints_lib.Checkpoints(
      tmp_path / "two", writer=2, max_to_keep=2, copies=copies
    ) as other:
      digest = other.save(_state(2), step=2, ledger_head="")
    woken.delete_old(known)
  newer = [*known, history.CheckpointRef(2, digest, 2)]
  copies.fetch(tmp_path / "there", newer)
  assert manifest.newest(tmp_path / "there", newer)[0] == newer[-1]


def test_a_checkpoint_that_another_start_fetched_is_left_alone(tmp_path):
  copies = copies_lib.Copies(str(tmp_path / "copies"), _RUN)
  known = _saved(tmp_path / "here", copies, [1])
  there = tmp_path / "there"
  fetch, seen = copies._fetch, []

  def late(path, target, digest):
    is_whole = fetch(path, target, digest)
    copies_lib.Copies(str(tmp_path / "copies"), _RUN).fetch(there, known)
    seen.append(path.stat().st_ino)
    return is_whole

  copies._fetch = late
  copies.fetch(there, known)
  assert manifest.location(there, known[0]).stat().st_ino == seen[0]


def test_copies_that_cannot_be_deleted_do_not_end_a_run(
  tmp_path, monkeypatch, capsys
):
  copies = copies_lib.Copies(str(tmp_path / "copies"), _RUN)

  def fail(*unused):
    raise errors.SaveError("the bucket keeps all")

  monkeypatch.setattr(copies, "delete_others", fail)
  known = _saved(tmp_path / "here", copies, [1, 2, 3], max_to_keep=2)
  assert len(known) == 3
  assert "old copies are left: the bucket keeps all" in capsys.readouterr().err
  assert not (tmp_path / "here" / "writer_000001" / "1").exists()


@pytest.mark.parametrize("below", ["", "/checkpoints"])
def test_copies_are_not_among_a_ledger_s_records(tmp_path, below):
  config = digits.get_config()
  config.insecure_seed = 7
  config.ledger = str(tmp_path / "ledger")
  config.checkpoint_copies = config.ledger + below
  with pytest.raises(errors.SettingsError, match="must not be in ledger"):
    dpdist.train(config, tmp_path / "run")
  assert not (tmp_path / "ledger").exists()
  stores.check_apart("s3://bkt/run", {"ledger": "s3://bkt/run/ledger"})
  stores.check_apart("s3://bkt/runs", {"ledger": "s3://bkt/run"})


def test_a_store_that_cannot_be_had_is_refused_before_anything(tmp_path):
  config = digits.get_config()
  config.insecure_seed = 7
  config.checkpoint_copies = "ftp://host/x"
  with pytest.raises(errors.SettingsError, match=r"checkpoint_copies: .*ftp"):
    dpdist.train(config, tmp_path / "run")
  (tmp_path / "file").write_text("no directory")
  config.checkpoint_copies = str(tmp_path / "file")
  with pytest.raises(errors.SaveError, match="checkpoint_copies"):
    dpdist.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
def test_a_run_goes_on_for_free_on_a_machine_with_an_empty_disk(
  location, tmp_path, monkeypatch
):
  def config(**places):
    found = digits.get_config()
    found.model.width = 64
    found.update_from_flattened_dict(
      {
        "privacy.expected_batch_size": 64,
        "privacy.num_steps": 12,
        "privacy.target_epsilon": None,
        "privacy.noise_multiplier": 1.0,
        "checkpoint_every": 4,
        "eval_every": 12,
        "insecure_seed": 7,
        **places,
      }
    )
    return found

  expected = dpdist.train(config(), tmp_path / "expected")
  places = {
    "ledger": str(tmp_path / "ledger"),
    "checkpoint_copies": location,
  }
  sample, notices = sampling.PoissonSampler.__call__, []
  enter = preemption.Notice.__enter__

  def signalled(self, step):
    if step == 9:
      notices[-1].received = True
    return sample(self, step)

  with monkeypatch.context() as patched:
    patched.setattr(
      preemption.Notice,
      "__enter__",
      lambda self: notices.append(self) or enter(self),
    )
    patched.setattr(sampling.PoissonSampler, "__call__", signalled)
    with pytest.raises(errors.Preempted) as stopped:
      dpdist.train(config(**places), tmp_path / "lost")
  assert 0 < stopped.value.step < 12
  shutil.rmtree(tmp_path / "lost")
  result = dpdist.train(config(**places), tmp_path / "new")
  assert result["test"] == expected["test"]
  assert result["params_sha256"] == expected["params_sha256"]
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  assert (len(ledger.branches), ledger.spent_steps) == (1, 12)
  assert not [x for x in verify.verify(tmp_path / "new", ledger) if x.problem]
