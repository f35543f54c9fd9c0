"""What is said of a start is what a start does."""

import dataclasses

import pytest

from dpdist import errors
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.workdir import manifest
from dpdist.workdir import outlook

_PLAN = plan_lib.make_plan(
  plan_lib.PrivacyConfig(
    num_examples=100,
    expected_batch_size=10,
    num_steps=20,
    l2_clip_norm=1.0,
    target_delta=1e-4,
    noise_multiplier=2.0,
    accountant="rdp",
  )
)
_OTHER = dataclasses.replace(_PLAN, noise_multiplier=3.0, num_steps=16)
_SAVED = history.CheckpointRef(4, "c" * 64, 1)
_DATA = {"data": "d" * 64}


@pytest.fixture
def ledger(tmp_path):
  """Of a run with a checkpoint of step 4 and 6 of 20 steps charged."""
  with ledger_lib.Ledger(tmp_path / "ledger") as ledger:
    ledger.acquire()
    config, secret = _PLAN.to_dict(), "s" * 64
    ledger.open(config=config, plan=_PLAN, secret_hash=secret, run="", **_DATA)
    ledger.resume(step=0, digest="", ledger_head="", fingerprint="one")
    ledger.reserve_through(6)
    ledger.record_checkpoint(_SAVED.step, _SAVED.digest)
    yield ledger


def _look(ledger, fingerprint="one", *, saved=_SAVED, plan=_PLAN, changes=()):
  found = manifest.ResumePoint(saved, [] if saved else ["it is damaged"])
  before = len(ledger.records)
  looked = outlook.of(ledger, found, plan, changes, fingerprint)
  assert len(ledger.records) == before
  return looked


def _start(ledger, fingerprint, *, saved=_SAVED, plan=None):
  """Starts as a run does; returns the branch and all that it then spends."""
  step, digest = (saved.step, saved.digest) if saved else (0, "")
  if plan is not None:
    config = plan.to_dict()
    ledger.open_segment(config=config, plan=plan, start_step=step, **_DATA)
  branch = ledger.resume(
    step=step, digest=digest, ledger_head="", fingerprint=fingerprint
  )
  return branch, composition.guaranteed([*ledger.bounds, ledger.planned])


@pytest.mark.parametrize(
  ("fingerprint", "saved", "plan", "wanted"),
  [
    ("one", _SAVED, None, (outlook.GOES_ON, 4, 20, 2, 14)),
    ("one", None, None, (outlook.GOES_ON, 0, 20, 6, 14)),
    ("two", _SAVED, None, (outlook.BRANCHES, 4, 18, 0, 14)),
    ("one", _SAVED, _OTHER, (outlook.CHANGES, 4, 20, 0, 16)),
  ],
)
def test_a_start_does_what_was_said(ledger, fingerprint, saved, plan, wanted):
  looked = _look(
    ledger,
    fingerprint,
    saved=saved,
    plan=plan or _PLAN,
    changes=["noise_multiplier: 2.0 -> 3.0"] if plan else [],
  )
  action, start, last, free, to_charge = wanted
  assert looked.action == action
  assert (looked.start_step, looked.last_step) == (start, last)
  assert (looked.steps_free, looked.steps_to_charge) == (free, to_charge)
  assert looked.steps_spent == 6
  spent, branches = ledger.spent_steps, len(ledger.branches)
  branch, epsilon = _start(ledger, fingerprint, saved=saved, plan=plan)
  assert ledger.last_step == last
  assert branch.stop_step - start == free
  assert (len(ledger.branches) == branches) == (action == outlook.GOES_ON)
  assert looked.epsilon == epsilon
  ledger.reserve_through(last)
  assert ledger.spent_steps - spent == to_charge


def test_a_run_that_is_new_or_over(ledger):
  looked = outlook.of(None, manifest.ResumePoint(None, []), _PLAN, [], "one")
  assert (looked.action, looked.last_step) == (outlook.BEGINS, 20)
  assert looked.epsilon == _PLAN.epsilon()
  ledger.reserve_through(20)
  last = history.CheckpointRef(20, "e" * 64, 1)
  ledger.record_checkpoint(last.step, last.digest)
  looked = _look(ledger, saved=last)
  assert (looked.action, looked.steps_to_charge) == (outlook.ENDED, 0)
  with pytest.raises(errors.LedgerError, match="no checkpoint can be restored"):
    _look(ledger, "two", saved=None)
