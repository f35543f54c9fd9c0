"""Steps that were charged and never begun are given back, and no other.

What a writer did not charge itself, another may have begun. So hostile records,
lives, copies and deaths at any moment are tried here.
"""

import pathlib
import shutil
import subprocess
import sys

import pytest

from dpdist import errors
from dpdist.ledger import data_budget
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from dpdist.privacy import plan as plan_lib
from dpdist.workdir import verify
from tests.support import tracing

_ROOT = pathlib.Path(__file__).parents[2]
_DATA = "d" * 64
_CONFIG = plan_lib.PrivacyConfig(
  num_examples=1000,
  expected_batch_size=10,
  num_steps=100,
  l2_clip_norm=1.0,
  target_delta=1e-5,
  noise_multiplier=1.0,
  accountant="rdp",
)
_PLAN = plan_lib.make_plan(_CONFIG)


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
  """Takes over from writers of the same test."""
  monkeypatch.setattr(records, "PATIENCE_SECONDS", 0.0)


def _writer(path, *, step=0, digest="", fingerprint="f"):
  """A process that begins to write, or goes on from a checkpoint."""
  ledger = ledger_lib.Ledger(path)
  ledger.acquire()
  if ledger.is_new:
    ledger.open(
      config=_CONFIG.to_dict(),
      plan=_PLAN,
      data=_DATA,
      secret_hash="5" * 64,
      run="a run",
    )
  ledger.resume(
    step=step, digest=digest, ledger_head="", fingerprint=fingerprint
  )
  return ledger


def _charged(path):
  ledger = ledger_lib.Ledger(path)
  return ledger.spent_steps, ledger.branches[-1].stop_step, ledger.last_step


def test_what_was_begun_stays_charged_and_the_rest_can_be_charged_again(
  tmp_path,
):
  ledger = _writer(tmp_path)
  ledger.reserve_through(10)
  assert ledger.refund(3) == 7
  assert _charged(tmp_path) == (3, 3, 100)
  assert ledger.refund(3) == 0
  assert ledger.refund(2) == 0  # Nothing was charged since.
  ledger.record_checkpoint(3, "three")
  ledger.close()
  # The next one goes on with the same keys, which those steps never met.
  again = _writer(tmp_path, step=3, digest="three")
  assert len(again.branches) == 1
  again.reserve_through(5)
  assert _charged(tmp_path) == (5, 5, 100)
  assert again.spent_through(4) == [(_PLAN, 4)]


def test_the_whole_plan_can_be_made_after_any_number_of_stops(tmp_path):
  """By other code each time, which charges all that it does anew."""
  done = 0
  for life in range(4):
    ledger = _writer(
      tmp_path, step=done, digest=f"{done}" * bool(done), fingerprint=str(life)
    )
    ledger.reserve_through(min(ledger.last_step, done + 30))
    done = min(ledger.last_step, done + 25)
    ledger.record_checkpoint(done, f"{done}")
    ledger.refund(done)
    ledger.close()
  assert done == 100
  ledger = ledger_lib.Ledger(tmp_path)
  assert ledger.spent_steps == 100
  # No two steps have the same place in the plan's schedules and turns.
  places = [
    branch.release_index(step)
    for branch in ledger.branches
    for step in range(branch.start_step, branch.stop_step)
  ]
  assert sorted(places) == list(range(100))


def test_what_an_earlier_process_charged_is_never_given_back(tmp_path):
  """It may have begun all of it, and may still be at it when it wakes."""
  _writer(tmp_path).reserve_through(10)
  again = _writer(tmp_path)
  assert again.refund(2) == 0
  again.reserve_through(20)
  assert again.refund(2) == 10
  assert _charged(tmp_path) == (10, 10, 100)
  # Nor by one that takes over what was given back once.
  third = _writer(tmp_path)
  assert third.refund(0) == 0


def test_another_branch_gives_back_its_own_steps_alone(tmp_path):
  _writer(tmp_path).reserve_through(10)
  again = _writer(tmp_path, fingerprint="other code")
  again.reserve_through(4)
  assert again.refund(0) == 4
  assert _charged(tmp_path) == (10, 0, 90)


def test_what_a_checkpoint_has_is_never_given_back(tmp_path):
  ledger = _writer(tmp_path)
  ledger.reserve_through(10)
  ledger.record_checkpoint(6, "six")
  assert ledger.refund(2) == 4
  assert _charged(tmp_path) == (6, 6, 100)


def test_a_process_that_was_shut_out_gives_nothing_back(tmp_path):
  first = _writer(tmp_path)
  first.reserve_through(10)
  second = _writer(tmp_path)
  with pytest.raises(errors.LedgerError, match="another process"):
    first.refund(1)
  assert second.spent_steps == _charged(tmp_path)[0] == 10


def test_a_charge_that_was_lost_stays_lost(tmp_path):
  ledger = _writer(tmp_path)
  ledger.reserve_through(10)
  ledger.close()
  number = len(ledger.records)
  (tmp_path / f"{number:012d}.json").write_bytes(b'{"torn')
  again = _writer(tmp_path)
  again.reserve_through(20)
  assert again.refund(0) == 10
  assert _charged(tmp_path) == (11, 10, 99)
  again.close()


def test_where_the_record_itself_is_torn_all_stays_charged(tmp_path):
  ledger = _writer(tmp_path)
  ledger.reserve_through(10)
  head = (tmp_path / "head.json").read_bytes()
  number = len(ledger.records)
  ledger.refund(3)
  ledger.close()
  (tmp_path / "head.json").write_bytes(head)  # The power went before it.
  (tmp_path / f"{number:012d}.json").write_bytes(b'{"torn')
  assert _charged(tmp_path) == (11, 10, 99)


def test_under_another_plan_only_its_own_steps_are_given_back(tmp_path):
  ledger = _writer(tmp_path)
  ledger.reserve_through(10)
  ledger.open_segment(config={}, plan=_PLAN, data=_DATA, start_step=0)
  assert ledger.refund(0) == 0  # No branch has begun under it.
  ledger.resume(step=0, digest="", ledger_head="", fingerprint="f")
  ledger.reserve_through(5)
  assert ledger.refund(1) == 4
  assert ledger.spent == [(_PLAN, 10), (_PLAN, 1)]


def test_epsilons_of_what_was_given_back_are_not_told(tmp_path):
  ledger = _writer(tmp_path)
  ledger.reserve_through(10)
  ledger.record_epsilons(spent={"rdp": 0.5}, planned={"rdp": 1.0})
  assert ledger.epsilons is not None
  ledger.refund(1)
  assert ledger.epsilons is None
  assert ledger_lib.Ledger(tmp_path).epsilons is None


_UNSTARTED = {"kind": "unstarted", "branch": 0}


@pytest.mark.parametrize(
  ("stop_step", "message"),
  [
    (5, "before 6 may have begun"),  # A checkpoint has them.
    (10, "before 10 are charged"),
    (11, "before 10 are charged"),
    (-1, "stop_step must be of kind int"),
  ],
)
def test_a_record_that_gives_back_what_it_may_not_is_found(
  tmp_path, stop_step, message
):
  ledger = _writer(tmp_path)
  ledger.reserve_through(10)
  ledger.record_checkpoint(6, "six")
  with pytest.raises(ValueError, match=message):
    ledger.check({**_UNSTARTED, "stop_step": stop_step})
  ledger._log._apply = lambda record: None
  ledger._log.append("unstarted", branch=0, stop_step=stop_step)
  ledger.close()
  with pytest.raises(errors.LedgerError, match=message):
    ledger_lib.Ledger(tmp_path)


@pytest.mark.parametrize(
  "before",
  [
    [{"kind": "writer"}],
    [{"kind": "lost"}],
    [{**_UNSTARTED, "stop_step": 8}, {"kind": "reserve", "stop_step": 9}],
    [{"kind": "end"}],
    [{"kind": "branch", "branch": 1, "fingerprint": "g"}],
  ],
  ids=["another writer", "lost", "given back twice", "ended", "no branch"],
)
def test_no_record_gives_back_after(before):
  """Each is forged: no ledger would write it, and its reader refuses it."""
  run = history.History()
  whole = {"config": {}, "plan": _PLAN.to_dict(), "data": "", "start_step": 0}
  opens = {"format": history.FORMAT, "secret_hash": "", "run": "r"}
  branch = {"kind": "branch", "start_step": 0, "fingerprint": "f", "base": ""}
  run.apply({"kind": "open", **whole, **opens})
  run.apply({**branch, "branch": 0})
  for stop in range(1, 11):
    run.apply({"kind": "reserve", "branch": 0, "stop_step": stop})
  run.check({**_UNSTARTED, "stop_step": 7})
  for record in before:
    full = {**branch, **record} if record["kind"] == "branch" else record
    run.apply({"branch": 0, **full})
  with pytest.raises(ValueError, match=r"begun|end|not the current"):
    run.check({**_UNSTARTED, "stop_step": 7})


def test_copies_that_give_back_otherwise_share_no_key(tmp_path):
  """Unless they release the same: as many were charged before it."""
  ledger = _writer(tmp_path / "one")
  ledger.reserve_through(10)
  ledger.record_checkpoint(3, "three")
  shutil.copytree(tmp_path / "one", tmp_path / "copy")
  ledger.refund(3)
  ledger.close()
  again = {"step": 3, "digest": "three", "fingerprint": "new"}
  one = _writer(tmp_path / "one", **again).branches[-1]
  copy = _writer(tmp_path / "copy", **again)
  other = copy.branches[-1]
  assert (one.number, other.number) == (1, 1)
  assert (one.release_index(3), other.release_index(3)) == (3, 10)
  assert one.identity != other.identity
  # The copy can give back what it charged itself, and nothing of before.
  copy.reserve_through(9)
  assert copy.refund(4) == 5
  assert copy.spent_steps == 11


# The budget of the data set.


def _budget(path):
  budget = data_budget.DataBudget(path, _DATA)
  budget.make(epsilon=9.0, delta=1e-6, neighboring_relation="add_or_remove_one")
  return budget


def _ended(budget, ledger):
  """What is reserved once a run was ended, as a part of its plan's cost."""
  ledger.end()
  budget.refund(ledger)
  whole = budget.cost([plan_lib.PlanUse(_PLAN, 100)])
  return pytest.approx(budget.reserved / whole)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_budget_follows_or_holds_too_much(tmp_path, is_told):
  """Also where the process died before it told of it."""
  budget, ledger = _budget(tmp_path / "root"), _writer(tmp_path / "run")
  whole = [plan_lib.PlanUse(_PLAN, 100)]
  budget.allocate(ledger, whole, label="run")
  ledger.reserve_through(10)
  budget.advance(ledger)
  before = budget.reserved
  ledger.refund(3)
  if is_told:
    budget.advance(ledger)
  # All that the plan can come to is reserved until the run is ended.
  assert data_budget.DataBudget(tmp_path / "root", _DATA).reserved == before
  ledger.close()
  again = _writer(tmp_path / "run", step=0)
  budget.allocate(again, whole, label="run")
  assert budget.reserved == before
  assert len(budget.allocations) == 1
  again.reserve_through(5)
  budget.advance(again)
  assert _ended(budget, again) == 5 / 100


def test_a_copy_from_before_pays_for_itself(tmp_path):
  """It would go on with what the run gave back."""
  budget, ledger = _budget(tmp_path / "root"), _writer(tmp_path / "run")
  whole = [plan_lib.PlanUse(_PLAN, 100)]
  budget.allocate(ledger, whole, label="run")
  ledger.reserve_through(10)
  budget.advance(ledger)
  shutil.copytree(tmp_path / "run", tmp_path / "copy")
  ledger.refund(3)
  budget.advance(ledger)
  ledger.close()
  copy = _writer(tmp_path / "copy")
  budget.allocate(copy, whole, label="copy")
  assert len(budget.allocations) == 2
  assert budget.reserved == pytest.approx(2 * budget.cost(whole))
  # What the run leaves is given back without a word of the copy's.
  ledger = _writer(tmp_path / "run")
  ledger.end()
  budget.refund(ledger)
  assert budget.reserved == pytest.approx(
    budget.cost(whole) + budget.cost([plan_lib.PlanUse(_PLAN, 3)])
  )


# What `launch.verify` says.


def _findings(workdir):
  ledger = ledger_lib.Ledger(workdir / "ledger")
  return {f.what: f for f in verify.verify(workdir, ledger)}


def test_what_was_given_back_is_said_and_held_against_what_was_released(
  tmp_path,
):
  ledger = _writer(tmp_path / "ledger")
  ledger.reserve_through(10)
  metrics = tmp_path / "metrics.jsonl"
  metrics.write_text('{"step": 3, "epsilon": 0.01}\n')
  ledger.refund(3)
  ledger.close()
  found = _findings(tmp_path)
  assert found["steps"].found == (
    "3 of 100 charged, on 1 branch; 7 charged ahead were given back"
  )
  assert not any(f.problem for f in found.values())
  # A step that was told of was begun, whatever the record says.
  metrics.write_text('{"step": 4, "epsilon": 0.01}\n')
  assert (
    "step 4, which was not charged" in _findings(tmp_path)["metrics"].problem
  )


# A death at any moment.

_PROGRAM = """
import sys
from dpdist.ledger import ledger
from dpdist.privacy import plan
run = ledger.Ledger(sys.argv[1] + "/ledger")
run.acquire()
if run.is_new:
  run.open(config={}, data="", secret_hash="", run="r", plan=plan.PrivacyPlan(
    num_examples=9, expected_batch_size=3.0, num_steps=9, l2_clip_norm=1.0,
    noise_multiplier=1.0, delta=1e-5, accountant="rdp",
    neighboring_relation="add_or_remove_one", target_epsilon=None))
with open(sys.argv[1] + "/begun", "a") as begun:
  run.resume(step=0, digest="", ledger_head="", fingerprint=sys.argv[2])
  for life in range(2):
    run.reserve_through(3)
    print(sys.argv[2], 0, file=begun, flush=True)
    run.refund(1)
run.close()
"""


def _run(path, code, *prefix):
  return subprocess.run(
    [*prefix, sys.executable, "-c", _PROGRAM, str(path), code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.mark.slow
@pytest.mark.skipif(
  not tracing.is_allowed(), reason="wants strace, and may not trace"
)
@pytest.mark.parametrize("calls", ["fsync,fdatasync", "rename"])
def test_killed_at_any_call_what_was_begun_is_charged(tmp_path, calls):
  """And then the run goes on, by the same code or other, which pays anew."""
  number, kills = 0, 0
  while True:
    number += 1
    path = tmp_path / str(number)
    path.mkdir()
    done = _run(
      path,
      "a",
      *("strace", "-f", "-o", str(path / "calls"), "-e", f"trace={calls}"),
      *("-e", f"inject={calls}:signal=KILL:when={number}"),
    )
    whole = done.returncode == 0
    kills += not whole
    if not whole:
      assert "killed by SIGKILL" in (path / "calls").read_text(), done.stderr
    again = _run(path, "ab"[number % 2])
    assert again.returncode == 0, again.stderr
    begun = {*(path / "begun").read_text().splitlines()}
    ledger = ledger_lib.Ledger(path / "ledger")
    assert len(begun) <= ledger.spent_steps <= 9
    assert ledger.branches[-1].stop_step >= 1
    shutil.rmtree(path)
    if whole:
      break
  assert kills >= 3
