"""Checkpoints come back whole or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist import checkpoint
from dpdist import mesh as mesh_lib


def _state(value):
  mesh = mesh_lib.make({"data": -1, "fsdp": 1, "model": 1})
  state = {
    "w": jnp.full((64, 64), value),
    "none": None,
    "step": jnp.int32(value),
  }
  return jax.device_put(state, mesh_lib.replicated(mesh))


def _data_files(path):
  return [
    p
    for p in sorted(path.rglob("*"))
    if p.is_file() and p.stat().st_size and "manifest.json" not in p.name
  ]


def test_round_trip_keeps_bits_and_sharding(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    state = _state(3.0)
    digest = checkpoints.save(state, step=3, ledger_head="h")
    got = checkpoints.restore(_state(0.0), [(3, digest)])
  assert (got.step, got.digest, got.ledger_head) == (3, digest, "h")
  assert got.rejected == []
  assert got.state["none"] is None
  np.testing.assert_array_equal(got.state["w"], state["w"])
  assert got.state["w"].sharding == state["w"].sharding
  assert got.state["step"].dtype == jnp.int32


def test_nothing_to_restore(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(_state(0.0), []) is None


def test_any_flipped_byte_falls_back_to_the_step_before(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    known = [
      (step, checkpoints.save(_state(step), step=step, ledger_head=""))
      for step in (1, 2)
    ]
    files = _data_files(tmp_path / "2")
    assert len(files) > 3
    for file in files:
      good = file.read_bytes()
      bad = bytearray(good)
      bad[len(bad) // 2] ^= 1
      file.write_bytes(bytes(bad))
      got = checkpoints.restore(_state(0.0), known)
      assert got.step == 1
      assert len(got.rejected) == 1
      assert "step 2" in got.rejected[0]
      file.write_bytes(good)
    assert checkpoints.restore(_state(0.0), known).step == 2


def test_missing_or_added_files_and_foreign_manifests_are_refused(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    known = [
      (step, checkpoints.save(_state(step), step=step, ledger_head=""))
      for step in (1, 2)
    ]
    extra = tmp_path / "2" / "extra"
    extra.write_bytes(b"x")
    assert checkpoints.restore(_state(0.0), known).step == 1
    extra.unlink()
    victim = _data_files(tmp_path / "2")[0]
    content = victim.read_bytes()
    victim.unlink()
    assert checkpoints.restore(_state(0.0), known).step == 1
    victim.write_bytes(content)
    assert checkpoints.restore(_state(0.0), known).step == 2
    assert checkpoints.restore(_state(0.0), [(2, "0" * 64)]) is None
    next((tmp_path / "2").glob("*manifest.json")).unlink()
    assert checkpoints.restore(_state(0.0), known).step == 1


def test_a_step_is_saved_again_after_a_replay(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(_state(1), step=1, ledger_head="old")
    digest = checkpoints.save(_state(7), step=1, ledger_head="new")
    got = checkpoints.restore(_state(0.0), [(1, digest)])
  assert got.ledger_head == "new"
  assert float(got.state["w"][0, 0]) == 7.0


def test_a_save_that_was_cut_off_is_ignored_and_replaced(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    known = [(1, checkpoints.save(_state(1), step=1, ledger_head=""))]
  # A directory without a manifest is what a kill leaves between Orbax's end
  # and ours.
  (tmp_path / "2" / "state").mkdir(parents=True)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(_state(0.0), known).step == 1
    digest = checkpoints.save(_state(2), step=2, ledger_head="")
    known.append((2, digest))
    assert checkpoints.restore(_state(0.0), known).step == 2


def test_saving_goes_on_below_checkpoints_that_were_rejected(tmp_path):
  directory = tmp_path / "checkpoints"
  with checkpoint.Checkpoints(directory, max_to_keep=2) as checkpoints:
    known = [
      (step, checkpoints.save(_state(step), step=step, ledger_head=""))
      for step in (10, 20)
    ]
  (directory / "30").mkdir()
  for file in _data_files(directory / "20"):
    file.write_bytes(b"damaged")
  with checkpoint.Checkpoints(directory, max_to_keep=2) as checkpoints:
    assert checkpoints.restore(_state(0.0), known).step == 10
    known.append((15, checkpoints.save(_state(15), step=15, ledger_head="")))
    assert checkpoints.restore(_state(0.0), known).step == 15
    known.append((20, checkpoints.save(_state(20), step=20, ledger_head="")))
    assert checkpoints.restore(_state(0.0), known).step == 20
  aside = sorted(
    p.name.split(".")[0] for p in (tmp_path / "rejected_checkpoints").iterdir()
  )
  assert aside == ["20", "30"]


def test_a_state_of_another_shape_is_a_mismatch(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    known = [(1, checkpoints.save(_state(1), step=1, ledger_head=""))]
    other = _state(0.0)
    other["w"] = {"deeper": other["w"]}
    with pytest.raises(checkpoint.MismatchError, match=r"step 1 .* not fit"):
      checkpoints.restore(other, known)


def test_old_checkpoints_are_deleted(tmp_path):
  with checkpoint.Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    known = [
      (step, checkpoints.save(_state(step), step=step, ledger_head=""))
      for step in (1, 2, 3)
    ]
    assert not (tmp_path / "1").exists()
    assert checkpoints.restore(_state(0.0), known[:1]) is None
    assert checkpoints.restore(_state(0.0), known).step == 3
