"""Copies of checkpoints come back whole or not at all, from a bucket too."""

import http.client
import json
import pathlib
import shutil

import jax.numpy as jnp
from moto import server as moto_server
import numpy as np
import pytest

from configs import digits
import dpdist
from dpdist import errors
from dpdist import sampling
from dpdist.distributed import preemption
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.workdir import checkpoints as checkpoints_lib
from dpdist.workdir import copies as copies_lib
from dpdist.workdir import manifest
from dpdist.workdir import verify

_RUN = "a" * 64


@pytest.fixture(scope="module")
def server():
  found = moto_server.ThreadedMotoServer(port=0, verbose=False)
  found.start()
  yield found.get_host_and_port()[1]
  found.stop()


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
  for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
    monkeypatch.setenv(name, "test")
  connection = http.client.HTTPConnection("127.0.0.1", server)
  connection.request("PUT", "/copies")
  connection.getresponse().read()
  connection.close()
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


def test_names_from_a_bucket_stay_in_the_directory(tmp_path):
  copies = copies_lib.Copies(str(tmp_path / "copies"), _RUN)
  known = _saved(tmp_path / "here", copies, [1])
  listed = copies._keys
  copies._keys = lambda prefix: [*listed(prefix), f"{prefix}../../../out"]
  with pytest.raises(errors.SaveError, match="odd name"):
    copies.fetch(tmp_path / "there", known)
  assert not (tmp_path / "out").exists()


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
