"""What the keys of a branch depend on: everything that its steps release.

Fields are taken from the code's own lists, so that a new one cannot be
forgotten: a test fails until it is said here what the field does.
"""

import dataclasses
import hashlib
import json
import shutil

import pytest

from dpdist.accounting import step_events
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from dpdist.privacy import plan as plan_lib

_PLAN = plan_lib.make_plan(
  plan_lib.PrivacyConfig(
    num_examples=1000,
    expected_batch_size=100,
    num_steps=100,
    l2_clip_norm=1.0,
    target_delta=1e-5,
    noise_multiplier=1.0,
    noise_schedule=((55, 4.0),),
  )
)
_SEGMENT = {
  "config": {"noise_multiplier": 1.0},
  "plan": _PLAN.to_dict(),
  "data": "d" * 64,
  "start_step": 3,
}
_BRANCH = {"start_step": 3, "fingerprint": "f", "base": "three"}


def _branch(
  number=2, *, opened=(), segment=(), segments=0, before=1, version=2, **changes
):
  """The last branch of a run with two segments and charges in both."""
  run = history.History()
  whole = {**_SEGMENT, **dict(segment)}
  opens = {"format": history.FORMAT, "secret_hash": "5" * 64, "run": "a run"}
  run.apply({"kind": "open", **whole, **opens, **dict(opened)})
  begin = {"kind": "branch", "start_step": 0, "fingerprint": "0", "base": ""}
  run.apply({**begin, "branch": 0})
  run.apply({"kind": "reserve", "branch": 0, "stop_step": 1})
  for _ in range(1 + segments):
    run.apply({"kind": "segment", **whole})
  for i in range(1, number):
    run.apply({**begin, "branch": i})
  for stop in range(1, 1 + before):
    run.apply({"kind": "reserve", "branch": number - 1, "stop_step": stop})
  record = {"kind": "branch", "branch": number, **_BRANCH, **changes}
  run.apply(record | ({"identity": version} if version else {}))
  return run.branches[-1]


# Another value of each field of a plan.
_OTHER_PLANS = {
  "num_examples": 1001,
  "expected_batch_size": 101.0,
  "num_steps": 101,
  "l2_clip_norm": 2.0,
  "delta": 1e-6,
  "noise_multiplier": 2.0,
  "target_epsilon": 3.0,
  "accountant": "rdp",
  "neighboring_relation": "zero_out",
  "sampling": "cyclic_poisson",
  "truncated_batch_size": 201,
  "cycle_length": 3,
  "noise_schedule": [[56, 4.0]],
  "batch_size_schedule": [[55, 50.0]],
  "examples_per_user": 2,
  "group_size": 2,
  "unit": "user",
  "noise": "identity_noise",
  "noise_options": {"taps": 2},
  "clipping": "identity_clipper",
  "clipping_options": {"quantile": 0.5},
  "statistics_noise_multiplier": 5.0,
}
# What both plans need, so that the field makes sense.
_BOTH_PLANS = {
  "truncated_batch_size": {
    "sampling": "truncated_poisson",
    "truncated_batch_size": 200,
  },
  "cycle_length": {
    "sampling": "cyclic_poisson",
    "cycle_length": 2,
    "neighboring_relation": "zero_out",
  },
  "group_size": {"neighboring_relation": "zero_out"},
  "noise_options": {"noise": "identity_noise"},
  "clipping_options": {"clipping": "identity_clipper"},
}


def _proof(numbers):
  """Stands for a proof, so that a plan may have such names."""
  return step_events.steps(
    dataclasses.replace(numbers, noise_options=(), clipping_options=())
  )


for _names in ({"noise": "identity_noise"}, {"clipper": "identity_clipper"}):
  step_events.proof(sampling="poisson", **_names)(_proof)


@pytest.mark.parametrize(
  "name", [field.name for field in dataclasses.fields(plan_lib.PrivacyPlan)]
)
def test_every_number_of_a_plan_changes_the_identity(name):
  one = _PLAN.to_dict() | _BOTH_PLANS.get(name, {})
  other = one | {name: _OTHER_PLANS[name]}
  plans = [plan_lib.PrivacyPlan.from_dict(plan) for plan in (one, other)]
  assert plans[0] != plans[1]
  identities = [_branch(segment={"plan": p}).identity for p in (one, other)]
  assert identities[0] != identities[1]


_OTHER_SEGMENTS = {
  "config": {"noise_multiplier": 2.0},
  "plan": _PLAN.to_dict() | {"l2_clip_norm": 2.0},
  "data": "e" * 64,
  "start_step": 4,
}


@pytest.mark.parametrize("name", history.FIELDS["segment"])
def test_every_field_of_a_segment_changes_the_identity(name):
  other = _branch(segment={name: _OTHER_SEGMENTS[name]})
  assert other.identity != _branch().identity


# Not the hash of the secret, from which keys are derived, nor the format.
_OTHER_RUNS = {"run": "another run", "secret_hash": None, "format": None}


@pytest.mark.parametrize(
  "name", sorted(set(history.FIELDS["open"]) - set(history.FIELDS["segment"]))
)
def test_every_field_of_a_run_changes_the_identity(name):
  other = _OTHER_RUNS[name]
  if other is not None:
    assert _branch(opened={name: other}).identity != _branch().identity


_OTHER_BRANCHES = {
  "branch": {"number": 3},
  "start_step": {"start_step": 2},
  "fingerprint": {"fingerprint": "g"},
  "base": {"base": "another three"},
}


@pytest.mark.parametrize("name", history.FIELDS["branch"])
def test_every_field_of_a_branch_changes_the_identity(name):
  other = _branch(**_OTHER_BRANCHES[name])
  assert other.identity != _branch().identity


# What of a branch is in its identity, and how it can come to be another.
_IN = {
  "number": {"number": 3},
  "segment": {"segments": 1},
  "start_step": {"start_step": 2},
  "fingerprint": {"fingerprint": "g"},
  "charged": {"before": 0},
  "bases": {"base": "another three"},  # The first; its own come later.
}
# It is the identity, says how that was made, or grows while steps are charged.
_OUT = {"identity", "version", "stop_step"}


@pytest.mark.parametrize(
  "name", [field.name for field in dataclasses.fields(history.Branch)]
)
def test_every_attribute_of_a_branch_is_in_its_identity_or_decides_nothing(
  name,
):
  assert (name in _IN) != (name in _OUT)
  if name in _IN:
    one, other = _branch(), _branch(**_IN[name])
    assert getattr(one, name) != getattr(other, name)
    assert one.identity != other.identity


def test_equal_histories_have_equal_identities():
  assert _branch().identity == _branch().identity


def test_a_branch_of_an_older_release_keeps_its_keys():
  """By the rule that made them; the value is one that was made then."""
  old = _branch(version=0)
  text = json.dumps(["a run", 2, 3, "f", "three"])
  assert old.identity == hashlib.sha256(text.encode()).hexdigest()
  assert old.identity == (
    "f9fa3890530b922862b8619d370f85413882c752bfc4e1bdf0131a89440ad3ce"
  )
  assert old.version == 1


def test_an_identity_of_a_later_release_is_not_made_up():
  with pytest.raises(ValueError, match="identity version 3"):
    _branch(version=3)


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
  """Takes over from writers of the same test."""
  monkeypatch.setattr(records, "PATIENCE_SECONDS", 0.0)


def _writer(path):
  ledger = ledger_lib.Ledger(path)
  ledger.acquire()
  return ledger


def _opened(path):
  ledger = _writer(path)
  ledger.open(
    config={}, plan=_PLAN, data="d" * 64, secret_hash="5" * 64, run="a run"
  )
  ledger.resume(step=0, digest="", ledger_head="", fingerprint="old")
  return ledger


def test_copies_that_charged_otherwise_share_no_key(tmp_path):
  """One of them is further on in the schedule at the same step."""
  ledger = _opened(tmp_path / "one")
  ledger.reserve_through(45)
  ledger.record_checkpoint(45, "c")
  ledger.reserve_through(50)
  ledger.close()
  shutil.copytree(tmp_path / "one", tmp_path / "copy")
  again = {"step": 45, "digest": "c", "ledger_head": ""}
  one = _writer(tmp_path / "one").resume(**again, fingerprint="new")
  copy = _writer(tmp_path / "copy")
  copy.resume(**again, fingerprint="old")
  copy.reserve_through(60)
  other = copy.resume(**again, fingerprint="new")
  assert (one.number, other.number) == (1, 1)
  assert (one.release_index(45), other.release_index(45)) == (50, 60)
  assert one.identity != other.identity


def test_a_run_of_an_older_release_goes_on_on_a_new_branch(
  tmp_path, monkeypatch
):
  """Even by the same code, as its keys were made by another rule."""
  ledger = _opened(tmp_path)
  with monkeypatch.context() as patch:
    append = ledger._log.append

    def without_identity(kind, **body):
      body.pop("identity", None)
      append(kind, **body)

    patch.setattr(ledger._log, "append", without_identity)
    old = ledger.resume(step=0, digest="", ledger_head="", fingerprint="f")
    ledger.reserve_through(2)
  assert old.version == 1
  ledger.close()
  ledger = _writer(tmp_path)
  assert ledger.spent_steps == 2
  new = ledger.resume(step=0, digest="", ledger_head="", fingerprint="f")
  assert (new.number, new.version) == (2, history.IDENTITY_VERSION)
  assert new.release_index(0) == 2
  same = ledger.resume(step=0, digest="", ledger_head="", fingerprint="f")
  assert same.number == 2
