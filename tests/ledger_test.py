"""The ledger's promises, one test each, and what it does with damage."""

import hashlib
import json

import pytest

from dpdist import ledger as ledger_lib
from dpdist import plan as plan_lib

_SETTINGS = {
  "num_examples": 1000,
  "expected_batch_size": 10,
  "num_steps": 100,
  "l2_clip_norm": 1.0,
  "target_delta": 1e-5,
  "noise_multiplier": 2.0,
}


def _opened(path):
  ledger = ledger_lib.Ledger(path)
  ledger.open(
    config=_SETTINGS,
    plan=plan_lib.make_plan(plan_lib.PrivacyConfig(**_SETTINGS)),
    data="d" * 64,
    secret_hash="5" * 64,
  )
  return ledger


def _resume(ledger, step=0, digest="", head="", fingerprint="f"):
  return ledger.resume(
    step=step, digest=digest, ledger_head=head, fingerprint=fingerprint
  )


def _files(path):
  return sorted(p for p in path.iterdir() if p.suffix == ".json")


def test_charge_is_on_disk_when_reserve_returns(tmp_path):
  ledger = _opened(tmp_path)
  _resume(ledger)
  assert ledger_lib.Ledger(tmp_path).spent_steps == 0
  ledger.reserve_through(7)
  other = ledger_lib.Ledger(tmp_path)
  assert other.spent_steps == ledger.spent_steps == 7
  assert other.head == ledger.head
  assert other.plan == ledger.plan
  ledger.reserve_through(7)
  ledger.reserve_through(3)
  assert ledger_lib.Ledger(tmp_path).spent_steps == 7


def test_replay_of_the_same_release_is_free(tmp_path):
  ledger = _opened(tmp_path)
  assert _resume(ledger).number == 0
  ledger.reserve_through(20)
  ledger.record_checkpoint(10, "ten")
  ledger = ledger_lib.Ledger(tmp_path)
  assert _resume(ledger, 10, "ten").number == 0
  assert ledger.spent_steps == 20
  assert ledger.last_step == 100
  # Falling back to the beginning is the same release, too.
  assert _resume(ledger, 0, "").number == 0


@pytest.mark.parametrize(
  ("digest", "fingerprint"), [("other", "f"), ("ten", "other")]
)
def test_another_release_is_a_new_branch_and_charged_again(
  tmp_path, digest, fingerprint
):
  ledger = _opened(tmp_path)
  _resume(ledger)
  ledger.reserve_through(20)
  ledger.record_checkpoint(10, "ten")
  branch = _resume(ledger, 10, digest, fingerprint=fingerprint)
  assert branch.number == 1
  assert branch.start_step == 10
  assert ledger.spent_steps == 20
  assert ledger.last_step == 90
  ledger.reserve_through(30)
  assert ledger_lib.Ledger(tmp_path).spent_steps == 40
  assert ledger.spent_through(15) == 25


def test_a_checkpoint_of_an_older_branch_is_not_a_base_of_a_newer(tmp_path):
  ledger = _opened(tmp_path)
  _resume(ledger)
  ledger.reserve_through(20)
  ledger.record_checkpoint(10, "ten")
  ledger.record_checkpoint(20, "twenty")
  # Step 20's checkpoint could not be read, and the code had changed.
  assert _resume(ledger, 10, "ten", fingerprint="g").number == 1
  ledger.reserve_through(30)
  # Now it can be read again; branch 1 has seen other parameters at step 20.
  assert _resume(ledger, 20, "twenty", fingerprint="g").number == 2


def test_never_past_the_plan(tmp_path):
  ledger = _opened(tmp_path)
  _resume(ledger)
  ledger.reserve_through(100)
  with pytest.raises(ledger_lib.RefusedError, match=r"at most 100.* 101"):
    ledger.reserve_through(101)
  _resume(ledger, 60, "unknown")
  assert ledger.last_step == 60
  with pytest.raises(ledger_lib.RefusedError, match="at most 60"):
    ledger.reserve_through(61)
  assert ledger_lib.Ledger(tmp_path).spent_steps == 100


@pytest.mark.parametrize(
  ("changes", "data", "secret_hash", "message"),
  [
    ({"l2_clip_norm": 2.0}, "d" * 64, "5" * 64, r"l2_clip_norm: 1\.0 -> 2\.0"),
    ({"num_steps": 101}, "d" * 64, "5" * 64, "num_steps: 100 -> 101"),
    ({"new": 1}, "d" * 64, "5" * 64, "new: None -> 1"),
    ({}, "e" * 64, "5" * 64, "training data: manifest dddddddddddd -> eeeee"),
    ({}, "d" * 64, "6" * 64, "secret: hash 555555555555 -> 666666666666"),
  ],
)
def test_changed_settings_are_refused(
  tmp_path, changes, data, secret_hash, message
):
  ledger = _opened(tmp_path)
  ledger.check(config=_SETTINGS, data="d" * 64, secret_hash="5" * 64)
  with pytest.raises(ledger_lib.RefusedError, match=message):
    ledger.check(config=_SETTINGS | changes, data=data, secret_hash=secret_hash)


def test_a_second_writer_is_stopped(tmp_path):
  first = _opened(tmp_path)
  _resume(first)
  second = ledger_lib.Ledger(tmp_path)
  first.reserve_through(10)
  before = [p.read_bytes() for p in _files(tmp_path)]
  with pytest.raises(ledger_lib.LedgerError, match="another process"):
    second.reserve_through(20)
  assert [p.read_bytes() for p in _files(tmp_path)] == before


def test_notices_are_recorded_once_and_void_the_guarantee(tmp_path):
  ledger = _opened(tmp_path)
  assert ledger.guarantee == "holds"
  ledger.notice("a seed")
  ledger.notice("a seed")
  ledger.notice("metrics")
  ledger = ledger_lib.Ledger(tmp_path)
  assert ledger.notices == ["a seed", "metrics"]
  assert ledger.guarantee == "void: a seed; metrics"


def _ledger_with_history(path):
  ledger = _opened(path)
  _resume(ledger)
  ledger.reserve_through(10)
  ledger.record_checkpoint(10, "ten")
  ledger.reserve_through(20)
  return ledger


def test_every_flipped_byte_before_the_last_record_is_found(tmp_path):
  _ledger_with_history(tmp_path)
  for file in _files(tmp_path)[:-1]:
    good = file.read_bytes()
    for position in range(0, len(good), 7):
      bad = bytearray(good)
      bad[position] ^= 1
      file.write_bytes(bytes(bad))
      with pytest.raises(ledger_lib.LedgerError, match="ledger record"):
        ledger_lib.Ledger(tmp_path)
    file.write_bytes(good)
  ledger_lib.Ledger(tmp_path)


def test_removed_swapped_and_torn_records_are_found(tmp_path):
  _ledger_with_history(tmp_path)
  files = _files(tmp_path)
  contents = [file.read_bytes() for file in files]

  def restore():
    for file, content in zip(files, contents, strict=True):
      file.write_bytes(content)

  for file in files[:-1]:
    file.unlink()
    with pytest.raises(ledger_lib.LedgerError, match="missing"):
      ledger_lib.Ledger(tmp_path)
    restore()
  files[2].write_bytes(contents[4])
  files[4].write_bytes(contents[2])
  with pytest.raises(ledger_lib.LedgerError, match="record 2"):
    ledger_lib.Ledger(tmp_path)
  restore()
  files[-1].write_bytes(contents[-1][:-5])
  with pytest.raises(ledger_lib.LedgerError, match="record 4"):
    ledger_lib.Ledger(tmp_path)


def test_a_ledger_older_than_the_checkpoint_is_found(tmp_path):
  ledger = _ledger_with_history(tmp_path)
  head = ledger.head
  _files(tmp_path)[-1].unlink()
  rolled_back = ledger_lib.Ledger(tmp_path)
  with pytest.raises(ledger_lib.LedgerError, match="records were removed"):
    _resume(rolled_back, 10, "ten", head)


def test_a_forged_record_of_unknown_kind_is_found(tmp_path):
  ledger = _ledger_with_history(tmp_path)
  record = {"seq": 5, "prev": ledger.head, "kind": "refund", "steps": 20}
  value = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
  (tmp_path / "000000000005.json").write_bytes(value)
  with pytest.raises(ledger_lib.LedgerError, match="refund"):
    ledger_lib.Ledger(tmp_path)


def test_head_is_the_digest_of_the_last_record(tmp_path):
  ledger = _ledger_with_history(tmp_path)
  last = _files(tmp_path)[-1].read_bytes()
  assert ledger.head == hashlib.sha256(last).hexdigest()
