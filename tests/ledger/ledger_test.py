"""The ledger's promises, one test each, and what it does with damage."""

import shutil

import pytest

from dpdist import errors
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from dpdist.privacy import plan as plan_lib

_SETTINGS = {
  "num_examples": 1000,
  "expected_batch_size": 10,
  "num_steps": 100,
  "l2_clip_norm": 1.0,
  "target_delta": 1e-5,
  "noise_multiplier": 2.0,
}


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
  """Takes over from writers of the same test."""
  monkeypatch.setattr(records, "PATIENCE_SECONDS", 0.0)


def _writer(path):
  ledger = ledger_lib.Ledger(path)
  ledger.acquire()
  return ledger


def _opened(path, settings=_SETTINGS, run="a run"):
  ledger = _writer(path)
  ledger.open(
    config=settings,
    plan=plan_lib.make_plan(plan_lib.PrivacyConfig(**settings)),
    data="d" * 64,
    secret_hash="5" * 64,
    run=run,
  )
  return ledger


def _resume(ledger, step=0, digest="", head="", fingerprint="f"):
  return ledger.resume(
    step=step, digest=digest, ledger_head=head, fingerprint=fingerprint
  )


def _files(path):
  return sorted(p for p in path.iterdir() if p.name != "head.json")


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
  ledger = _writer(tmp_path)
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
  assert ledger.spent_through(15) == [(_plan(), 25)]


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
  with pytest.raises(errors.RefusedError, match=r"at most 100.* 101"):
    ledger.reserve_through(101)
  _resume(ledger, 60, "unknown")
  assert ledger.last_step == 60
  with pytest.raises(errors.RefusedError, match="at most 60"):
    ledger.reserve_through(61)
  assert ledger_lib.Ledger(tmp_path).spent_steps == 100


_SAME = {"config": _SETTINGS, "data": "d" * 64, "secret_hash": "5" * 64}


@pytest.mark.parametrize(
  ("changes", "name", "line"),
  [
    (
      {"config": _SETTINGS | {"l2_clip_norm": 2.0}},
      "l2_clip_norm",
      "l2_clip_norm: 1.0 -> 2.0",
    ),
    (
      {"config": _SETTINGS | {"num_steps": 101}},
      "num_steps",
      "num_steps: 100 -> 101",
    ),
    ({"config": _SETTINGS | {"new": 1}}, "new", "new: None -> 1"),
    # As of a schedule or a cycle that is left out again.
    (
      {"config": {k: _SETTINGS[k] for k in list(_SETTINGS)[:-1]}},
      "noise_multiplier",
      "noise_multiplier: 2.0 -> None",
    ),
    (
      {"data": "e" * 64},
      "data",
      "training data: digest dddddddddddd -> eeeeeeeeeeee",
    ),
  ],
)
def test_changes_open_a_segment(tmp_path, changes, name, line):
  ledger = _opened(tmp_path)
  assert ledger.changes(**_SAME) == {}
  assert ledger.changes(**_SAME | changes) == {name: line}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"config": _SETTINGS | {"target_delta": 1e-6}},
      "target_delta: 1e-05 -> 1e-06",
    ),
    (
      {"config": _SETTINGS | {"neighboring_relation": "replace_one"}},
      "neighboring_relation: None -> 'replace_one'",
    ),
    (
      {"secret_hash": "6" * 64},
      "secret: hash 555555555555 -> 666666666666",
    ),
  ],
)
def test_what_a_guarantee_is_about_cannot_change(tmp_path, changes, message):
  ledger = _opened(tmp_path)
  with pytest.raises(errors.RefusedError, match=message):
    ledger.changes(**_SAME | changes)


def _plan(**changes):
  return plan_lib.make_plan(plan_lib.PrivacyConfig(**_SETTINGS | changes))


def test_a_segment_keeps_what_was_charged_before_it(tmp_path):
  ledger = _opened(tmp_path)
  first = _resume(ledger)
  ledger.reserve_through(20)
  ledger.record_checkpoint(10, "ten")
  other = _plan(noise_multiplier=3.0, num_steps=30)
  ledger.open_segment(config={}, plan=other, data="d" * 64, start_step=10)
  # Not even with the same fingerprint: the numbers are others.
  branch = _resume(ledger, 10, "ten")
  assert branch.identity != first.identity
  assert (branch.start_step, ledger.last_step) == (10, 40)
  ledger.reserve_through(25)
  for found in (ledger, ledger_lib.Ledger(tmp_path)):
    assert found.spent == [(_plan(), 20), (other, 15)]
    assert found.planned == [(_plan(), 20), (other, 30)]
    assert found.spent_through(12) == [(_plan(), 20), (other, 2)]
    assert found.spent_steps == 35
    assert found.plan == other
  with pytest.raises(errors.RefusedError, match="at most 40"):
    ledger.reserve_through(41)


def test_a_run_is_bound_by_every_plan_that_it_had(tmp_path):
  ledger = _opened(tmp_path)
  assert ledger.bounds == []
  _resume(ledger)
  ledger.reserve_through(1)
  assert ledger.bounds == [ledger.planned]
  assert [part.num_steps for part in ledger.bounds[0]] == [100]
  shorter = _SETTINGS | {"num_steps": 40}
  plan = plan_lib.make_plan(plan_lib.PrivacyConfig(**shorter))
  ledger.open_segment(config=shorter, plan=plan, data="d" * 64, start_step=0)
  _resume(ledger)
  ledger.reserve_through(1)
  steps = [[part.num_steps for part in parts] for parts in ledger.bounds]
  assert steps == [[100], [1, 40]]


def test_a_segment_that_charged_nothing_is_left_out(tmp_path):
  ledger = _opened(tmp_path)
  other = _plan(noise_multiplier=3.0)
  ledger.open_segment(config={}, plan=other, data="d" * 64, start_step=0)
  assert ledger.spent == [(other, 0)]


def test_forks_add_up(tmp_path):
  """From an older checkpoint, again and again."""
  ledger = _opened(tmp_path)
  _resume(ledger)
  ledger.reserve_through(20)
  ledger.record_checkpoint(10, "ten")
  ledger.record_checkpoint(20, "twenty")
  for i in range(3):
    _resume(ledger, 10, "ten", fingerprint=f"g{i}")
    ledger.reserve_through(20)
  assert ledger_lib.Ledger(tmp_path).spent_steps == 20 + 3 * 10


def test_what_could_not_be_read_again_is_not_written(tmp_path):
  ledger = _writer(tmp_path)
  with pytest.raises(ValueError, match="in this place"):
    ledger.notice("before the run is open")
  ledger.close()
  ledger = _opened(tmp_path)
  with pytest.raises(ValueError, match="not the current"):
    ledger._append("reserve", branch=0, stop_step=1)
  _resume(ledger)
  with pytest.raises(ValueError, match="step 7, not charged"):
    ledger.record_checkpoint(7, "seven")
  with pytest.raises(ValueError, match="another delta"):
    ledger.open_segment(
      config={}, plan=_plan(target_delta=1e-6), data="", start_step=0
    )
  ledger.open_segment(config={}, plan=_plan(), data="", start_step=0)
  with pytest.raises(ValueError, match="no branch has begun"):
    ledger.reserve_through(1)
  before = len(ledger_lib.Ledger(tmp_path).records)
  assert before == len(ledger.records)


def test_after_its_end_a_run_charges_nothing(tmp_path):
  ledger = _opened(tmp_path)
  _resume(ledger)
  ledger.reserve_through(3)
  ledger.end()
  ledger.end()
  with pytest.raises(ValueError, match="after the run's end"):
    ledger.reserve_through(4)
  ledger.close()
  # Nor does what is torn after it count.
  (tmp_path / f"{len(_files(tmp_path)):012d}.json").write_bytes(b"")
  ended = ledger_lib.Ledger(tmp_path)
  assert ended.is_ended
  assert ended.spent_steps == 3


def test_epsilons_are_told_until_something_is_charged(tmp_path):
  ledger = _opened(tmp_path)
  _resume(ledger)
  assert ledger.epsilons is None
  ledger.reserve_through(3)
  ledger.record_epsilons(spent={"pld": 0.5}, planned={"pld": 1.0})
  ledger.record_checkpoint(3, "three")
  told = {"spent": {"pld": 0.5}, "planned": {"pld": 1.0}}
  assert ledger_lib.Ledger(tmp_path).epsilons == told
  ledger.reserve_through(4)
  assert ledger_lib.Ledger(tmp_path).epsilons is None


def test_a_second_writer_is_stopped(tmp_path):
  first = _opened(tmp_path)
  _resume(first)
  second = ledger_lib.Ledger(tmp_path)
  first.reserve_through(10)
  before = [p.read_bytes() for p in _files(tmp_path)]
  with pytest.raises(errors.LedgerError, match="another process"):
    second.acquire()
  assert [p.read_bytes() for p in _files(tmp_path)] == before
  third = _writer(tmp_path)
  with pytest.raises(errors.LedgerError, match="another process"):
    first.reserve_through(20)
  third.reserve_through(20)
  assert (third.spent_steps, third.writer) == (20, 2)


def test_one_record_charges_at_most_a_hundredth(tmp_path):
  settings = _SETTINGS | {"num_steps": 1234}
  ledger = _opened(tmp_path, settings)
  _resume(ledger)
  ledger.reserve_through(50)
  charges = [r["stop_step"] for r in ledger.records if r["kind"] == "reserve"]
  assert charges == [13, 26, 39, 50]


def test_a_torn_tail_counts_as_spent(tmp_path):
  settings = _SETTINGS | {"num_steps": 1234}
  ledger = _opened(tmp_path, settings)
  _resume(ledger)
  ledger.reserve_through(26)
  ledger.close()
  torn = tmp_path / f"{len(_files(tmp_path)):012d}.json"
  torn.write_bytes(b'{"branch":0,')
  assert ledger_lib.Ledger(tmp_path).spent_steps == 26 + 13
  ledger = _writer(tmp_path)
  assert ledger.last_step == 1234 - 13
  ledger.reserve_through(ledger.last_step)
  assert ledger.spent_steps == 1234
  # Not more than the plan, whose end no record passes.
  ledger.close()
  torn = tmp_path / f"{len(_files(tmp_path)):012d}.json"
  torn.write_bytes(b"")
  assert ledger_lib.Ledger(tmp_path).spent_steps == 1234


def test_the_same_key_never_meets_two_inputs(tmp_path):
  """Copies of a run that go on differently, and runs with one secret."""
  ledger = _opened(tmp_path / "one")
  first = _resume(ledger)
  ledger.reserve_through(10)
  ledger.record_checkpoint(10, "ten")
  ledger.close()
  identities = {first.identity}
  shutil.copytree(tmp_path / "one", tmp_path / "copy")
  for name, fingerprint in (("one", "g"), ("copy", "h")):
    ledger = _writer(tmp_path / name)
    assert _resume(ledger, 10, "ten").identity == first.identity
    branch = _resume(ledger, 10, "ten", fingerprint=fingerprint)
    assert branch.number == 1
    identities.add(branch.identity)
    ledger.close()
  identities.add(_resume(_opened(tmp_path / "two", run="another")).identity)
  assert len(identities) == 4


def test_a_repeatable_run_has_the_same_keys_everywhere(tmp_path):
  for name, fingerprint in (("one", "f"), ("two", "g")):
    ledger = _opened(tmp_path / name, run="")
    assert _resume(ledger, fingerprint=fingerprint).identity == "0"
    assert _resume(ledger, fingerprint="h").identity == "1"


def test_notices_are_recorded_once_and_void_the_guarantee(tmp_path):
  ledger = _opened(tmp_path)
  assert ledger.guarantee == "holds"
  ledger.notice("a seed")
  ledger.notice("a seed")
  ledger.notice("metrics")
  ledger = ledger_lib.Ledger(tmp_path)
  assert ledger.notices == ["a seed", "metrics"]
  assert ledger.guarantee == "void: a seed; metrics"


def test_a_run_that_the_sentinel_stopped_is_not_gone_on_with(tmp_path):
  """By whatever way in."""
  ledger = _ledger_with_history(tmp_path)
  ledger.notice(history.TOO_LONG)
  with pytest.raises(errors.LedgerError, match="void for good"):
    _resume(ledger, 10, "ten")
  assert ledger.spent_steps == 20


def test_steps_whose_data_may_have_changed_are_not_run_again_for_free(tmp_path):
  ledger = _ledger_with_history(tmp_path)
  first = ledger.branches[-1]
  ledger.notice("files were changed", unsound=True)
  identities = {first.identity}
  for _ in range(2):
    identities.add(_resume(ledger, 10, "ten").identity)
  assert len(identities) == 3


class _Interrupted(list):
  """A list whose append is done, and then interrupted."""

  def append(self, value):
    super().append(value)
    raise KeyboardInterrupt


def test_an_interrupted_writer_writes_no_more(tmp_path):
  """What it would write might not follow what is there."""
  ledger = _ledger_with_history(tmp_path)
  log = ledger._log
  log.records = _Interrupted(log.records)
  with pytest.raises(KeyboardInterrupt):
    ledger.reserve_through(21)
  log.records = list(log.records)
  with pytest.raises(errors.LedgerError, match="was interrupted"):
    ledger.refund(20)
  assert ledger_lib.Ledger(tmp_path).spent_steps == 21


def _ledger_with_history(path):
  ledger = _opened(path)
  _resume(ledger)
  ledger.reserve_through(10)
  ledger.record_checkpoint(10, "ten")
  ledger.reserve_through(20)
  return ledger


def test_a_ledger_older_than_the_checkpoint_is_found(tmp_path):
  """Also where its head was rolled back with it."""
  ledger = _ledger_with_history(tmp_path)
  before = (tmp_path / "head.json").read_bytes()
  ledger.reserve_through(30)
  head = ledger.head
  ledger.close()
  for file in _files(tmp_path)[-10:]:
    file.unlink()
  with pytest.raises(errors.LedgerError, match="rolled back"):
    ledger_lib.Ledger(tmp_path)
  (tmp_path / "head.json").write_bytes(before)
  rolled_back = _writer(tmp_path)
  with pytest.raises(errors.LedgerError, match="records were removed"):
    _resume(rolled_back, 10, "ten", head)


@pytest.mark.parametrize(
  ("kind", "body", "message"),
  [
    ("refund", {"steps": 20}, "refund"),
    ("reserve", {"branch": 0, "stop_step": 20}, "0 steps"),
    ("reserve", {"branch": 0, "stop_step": 22}, "2 steps"),
    ("reserve", {"branch": 1, "stop_step": 21}, "not the current one"),
    ("open", {"format": 2}, "in this place"),
    ("notice", {"text": 7}, "text must be of kind str, got 7"),
  ],
)
def test_a_record_that_makes_no_sense_is_found(tmp_path, kind, body, message):
  _ledger_with_history(tmp_path).close()
  log = records.Log(tmp_path, lambda record: None)
  log.acquire()
  log.append(kind, **body)
  log.close()
  with pytest.raises(errors.LedgerError, match=message):
    ledger_lib.Ledger(tmp_path)


def _forked(path):
  """On a branch that began at step 10, after 20 steps were charged."""
  ledger = _opened(path)
  _resume(ledger)
  ledger.reserve_through(20)
  ledger.record_checkpoint(10, "ten")
  _resume(ledger, 10, "ten", fingerprint="g")
  ledger.reserve_through(30)
  return ledger


def test_before_a_branch_began_what_came_before_it_was_spent(tmp_path):
  ledger = _forked(tmp_path)
  for step, charged in ((5, 20), (10, 20), (11, 21), (30, 40)):
    assert ledger.spent_through(step) == [(_plan(), charged)]


def test_a_checkpoint_from_before_its_branch_is_refused(tmp_path):
  ledger = _forked(tmp_path)
  with pytest.raises(ValueError, match="step 9, not charged"):
    ledger.record_checkpoint(9, "nine")
  ledger.record_checkpoint(10, "ten")


@pytest.mark.parametrize("event", ["segment", "lost"])
def test_epsilons_are_not_told_of_another_plan_or_a_lost_charge(
  tmp_path, event
):
  ledger = _opened(tmp_path)
  _resume(ledger)
  ledger.reserve_through(3)
  ledger.record_epsilons(spent={"pld": 0.5}, planned={"pld": 1.0})
  assert ledger.epsilons is not None
  if event == "segment":
    ledger.open_segment(config={}, plan=_plan(), data="", start_step=0)
  ledger.close()
  if event == "lost":
    (tmp_path / f"{len(_files(tmp_path)):012d}.json").write_bytes(b"")
  assert ledger_lib.Ledger(tmp_path).epsilons is None


def test_several_lost_records_in_a_row_are_all_acknowledged(tmp_path):
  ledger = _opened(tmp_path)
  _resume(ledger)
  ledger.reserve_through(3)
  ledger.close()
  for torn in (b'{"torn', b'{"torn too'):
    (tmp_path / f"{len(_files(tmp_path)):012d}.json").write_bytes(torn)
  ledger = _writer(tmp_path)
  ledger.reserve_through(4)
  ledger.close()
  # One more for each of them.
  assert ledger_lib.Ledger(tmp_path).spent_steps == 3 + 2 + 1
