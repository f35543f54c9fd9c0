"""Checkpoints come back whole or not at all."""

import errno
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist import errors
from dpdist.distributed import mesh as mesh_lib
from dpdist.ledger import history
from dpdist.workdir import checkpoints as checkpoints_lib
from dpdist.workdir import manifest


def _state(value):
  mesh = mesh_lib.make({"data": -1, "fsdp": 1, "model": 1})
  state = {
    "w": jnp.full((64, 64), value),
    "none": None,
    "step": jnp.int32(value),
  }
  return jax.device_put(state, mesh_lib.replicated(mesh))


def _checkpoints(path, writer=1, **kwargs):
  return checkpoints_lib.Checkpoints(path, writer=writer, **kwargs)


def _save(checkpoints, step, value=None, writer=1):
  value = step if value is None else value
  digest = checkpoints.save(_state(value), step=step, ledger_head="")
  return history.CheckpointRef(step, digest, writer)


def _restored(checkpoints, path, known):
  """The newest sound one's first weight."""
  saved, _ = manifest.newest(path, known)
  state, _ = checkpoints.restore(_state(0.0), saved)
  return float(state["w"][0, 0])


def _data_files(path):
  return [
    p
    for p in sorted(path.rglob("*"))
    if p.is_file() and p.stat().st_size and "manifest.json" not in p.name
  ]


def test_round_trip_keeps_bits_and_sharding(tmp_path):
  with _checkpoints(tmp_path) as checkpoints:
    state = _state(3.0)
    digest = checkpoints.save(state, step=3, ledger_head="h")
    saved = history.CheckpointRef(3, digest, 1)
    assert manifest.newest(tmp_path, [saved]) == (saved, [])
    got, head = checkpoints.restore(_state(0.0), saved)
  assert head == "h"
  assert got["none"] is None
  np.testing.assert_array_equal(got["w"], state["w"])
  assert got["w"].sharding == state["w"].sharding
  assert got["step"].dtype == jnp.int32


def test_a_checkpoint_holds_no_time(tmp_path):
  """Times tell how long steps took, and so how many examples were drawn."""
  with _checkpoints(tmp_path) as checkpoints:
    _save(checkpoints, 3)
  texts = {path.name: path.read_text() for path in tmp_path.rglob("*METADATA*")}
  assert '"commit_timestamp_nsecs": 0' in texts["_CHECKPOINT_METADATA"]
  now = str(time.time_ns())[:5]
  for path in tmp_path.rglob("*"):
    if path.is_file():
      assert now.encode() not in path.read_bytes(), path


def test_nothing_to_restore(tmp_path):
  assert manifest.newest(tmp_path, []) == (None, [])


def test_any_flipped_byte_falls_back_to_the_step_before(tmp_path):
  with _checkpoints(tmp_path) as checkpoints:
    known = [_save(checkpoints, step) for step in (1, 2)]
    files = _data_files(tmp_path / "writer_000001" / "2")
    assert len(files) > 3
    for file in files:
      good = file.read_bytes()
      bad = bytearray(good)
      bad[len(bad) // 2] ^= 1
      file.write_bytes(bytes(bad))
      saved, rejected = manifest.newest(tmp_path, known)
      assert saved == known[0]
      assert _restored(checkpoints, tmp_path, known) == 1.0
      assert len(rejected) == 1
      assert "step 2" in rejected[0]
      file.write_bytes(good)
    assert manifest.newest(tmp_path, known).saved.step == 2


def test_missing_or_added_files_and_foreign_manifests_are_refused(tmp_path):
  with _checkpoints(tmp_path) as checkpoints:
    known = [_save(checkpoints, step) for step in (1, 2)]
    extra = tmp_path / "writer_000001" / "2" / "extra"
    extra.write_bytes(b"x")
    assert manifest.newest(tmp_path, known).saved.step == 1
    extra.unlink()
    victim = _data_files(tmp_path / "writer_000001" / "2")[0]
    content = victim.read_bytes()
    victim.unlink()
    assert manifest.newest(tmp_path, known).saved.step == 1
    victim.write_bytes(content)
    assert manifest.newest(tmp_path, known).saved.step == 2
    foreign = [history.CheckpointRef(2, "0" * 64, 1)]
    assert manifest.newest(tmp_path, foreign).saved is None
    next((tmp_path / "writer_000001" / "2").glob("*manifest.json")).unlink()
    assert manifest.newest(tmp_path, known).saved.step == 1


def test_a_step_is_saved_again_by_another_writer(tmp_path):
  with _checkpoints(tmp_path) as checkpoints:
    old = _save(checkpoints, 1)
  with _checkpoints(tmp_path, 2) as checkpoints:
    known = [old, _save(checkpoints, 1, 7, writer=2)]
    assert _restored(checkpoints, tmp_path, known) == 7.0
    assert _restored(checkpoints, tmp_path, known[:1]) == 1.0


def test_a_writer_that_was_shut_out_touches_nothing_of_the_next(tmp_path):
  with (
    _checkpoints(tmp_path) as paused,
    _checkpoints(tmp_path, 2) as checkpoints,
  ):
    known = [_save(checkpoints, 1, 7, writer=2)]
    _save(paused, 1)
    _save(paused, 2)
    assert _restored(checkpoints, tmp_path, known) == 7.0
    known.append(_save(checkpoints, 2, 8, writer=2))
    checkpoints.delete_old(known)
    assert not (tmp_path / "writer_000001").exists()
    assert _restored(checkpoints, tmp_path, known) == 8.0


def test_a_save_that_was_cut_off_is_ignored(tmp_path):
  with _checkpoints(tmp_path) as checkpoints:
    known = [_save(checkpoints, 1)]
  # A directory without a manifest is what a kill leaves between Orbax's end
  # and ours.
  (tmp_path / "writer_000001" / "2" / "state").mkdir(parents=True)
  with _checkpoints(tmp_path, 2) as checkpoints:
    assert manifest.newest(tmp_path, known).saved.step == 1
    known.append(_save(checkpoints, 2, writer=2))
    assert manifest.newest(tmp_path, known).saved.step == 2


def test_damaged_checkpoints_are_passed_over_and_in_time_deleted(tmp_path):
  with _checkpoints(tmp_path) as checkpoints:
    known = [_save(checkpoints, step) for step in (10, 20)]
  for file in _data_files(tmp_path / "writer_000001" / "20"):
    file.write_bytes(b"damaged")
  with _checkpoints(tmp_path, 2, max_to_keep=2) as checkpoints:
    assert manifest.newest(tmp_path, known).saved.step == 10
    known.append(_save(checkpoints, 15, writer=2))
    checkpoints.delete_old(known)
    assert not (tmp_path / "writer_000001" / "10").exists()
    assert manifest.newest(tmp_path, known).saved.step == 15
    known.append(_save(checkpoints, 20, writer=2))
    checkpoints.delete_old(known)
    assert not (tmp_path / "writer_000001").exists()
    assert manifest.newest(tmp_path, known).saved.step == 20


def test_a_checkpoint_is_on_disk_before_its_digest_is_told(
  tmp_path, monkeypatch
):
  """Every file and every directory of it, and those that lead there."""
  synced = {}
  sync = os.fsync

  def fsync(descriptor):
    path = pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    content = path.read_bytes() if path.is_file() else sorted(path.iterdir())
    synced[path] = content
    sync(descriptor)

  monkeypatch.setattr(os, "fsync", fsync)
  directory = tmp_path / "checkpoints"
  with _checkpoints(directory) as checkpoints:
    _save(checkpoints, 1)
  path = directory / "writer_000001" / "1"
  wanted = [path, *path.rglob("*")]
  for file in (p for p in wanted if p.is_file()):
    # Ours was renamed after it was synced.
    is_ours = file.name == "dpdist_manifest.json"
    name = file.name + ".tmp" if is_ours else file.name
    assert synced[file.with_name(name)] == file.read_bytes()
  for folder in (p for p in wanted if p.is_dir()):
    assert synced[folder] == sorted(folder.iterdir())
  assert path in synced[path.parent]
  assert path.parent in synced[directory]
  assert directory in synced[tmp_path]


def test_a_state_of_another_shape_is_a_mismatch(tmp_path):
  with _checkpoints(tmp_path) as checkpoints:
    known = [_save(checkpoints, 1)]
    other = _state(0.0)
    other["w"] = {"deeper": other["w"]}
    with pytest.raises(errors.MismatchError, match=r"step 1 .* not fit"):
      checkpoints.restore(other, known[0])


def test_old_checkpoints_are_deleted(tmp_path):
  with _checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    known = [_save(checkpoints, step) for step in (1, 2, 3)]
    checkpoints.delete_old(known)
    assert not (tmp_path / "writer_000001" / "1").exists()
    assert manifest.newest(tmp_path, known[:1]).saved is None
    assert manifest.newest(tmp_path, known).saved.step == 3
    # Even where the newest two are lost afterwards, nothing is made up.
    assert manifest.newest(tmp_path, known[:2]).saved.step == 2


def test_a_save_that_orbax_skips_is_an_error(tmp_path):
  """It does so, without a word, where a newer step is."""
  with _checkpoints(tmp_path) as checkpoints:
    _save(checkpoints, 2)
    with pytest.raises(errors.SaveError, match="1 was not saved"):
      _save(checkpoints, 1)


def test_a_deletion_that_was_cut_off_leaves_no_damaged_checkpoint(
  tmp_path, monkeypatch
):
  def cut_off(path, **unused):
    _data_files(path)[0].unlink()
    raise KeyboardInterrupt

  with _checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    known = [_save(checkpoints, step) for step in (1, 2, 3)]
    with monkeypatch.context() as patch:
      patch.setattr(checkpoints_lib.shutil, "rmtree", cut_off)
      with pytest.raises(KeyboardInterrupt):
        checkpoints.delete_old(known)
    folder = tmp_path / "writer_000001"
    assert not (folder / "1").exists()
    checkpoints.delete_old(known)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_what_cannot_be_read_is_told_of_without_its_path(tmp_path, monkeypatch):
  """It goes into report.html, and a path may hold what nobody should see."""
  directory = tmp_path / "a-token-in-a-path"
  saved = history.CheckpointRef(3, "", 1)
  path = manifest.location(directory, saved)
  path.mkdir(parents=True)
  (path / "data").write_bytes(b"x")
  saved = saved._replace(digest=manifest.write(path))

  opened = pathlib.Path.open

  def denied(self, *args, **kwargs):
    if self.name == "data":
      raise PermissionError(errno.EACCES, "Permission denied", str(self))
    return opened(self, *args, **kwargs)

  monkeypatch.setattr(pathlib.Path, "open", denied)
  found = manifest.newest(directory, [saved])
  assert found.saved is None
  assert found.rejected == [
    "checkpoint of step 3 passed over: it cannot be read: Permission denied"
  ]
