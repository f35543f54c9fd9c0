"""The promises of a budget that runs share, one test each."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs import digits
import dpdist
from dpdist import config as config_lib
from dpdist import errors
from dpdist import sampling
from dpdist.accounting import gaussian_events
from dpdist.accounting import rdp
from dpdist.data import array_record
from dpdist.data import sources
from dpdist.ledger import budgets
from dpdist.ledger import data_budget
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from dpdist.privacy import plan as plan_lib
from dpdist.workdir import resume
from dpdist.workdir import verify
from tests.support import without_jax

pytestmark = pytest.mark.usefixtures("quick_compiles")

_ROOT = pathlib.Path(__file__).parents[2]
_DATA = "d" * 64
_PLAN = plan_lib.make_plan(
  plan_lib.PrivacyConfig(
    num_examples=1000,
    expected_batch_size=10,
    num_steps=100,
    l2_clip_norm=1.0,
    target_delta=1e-5,
    noise_multiplier=1.0,
  )
)
_WHOLE = [plan_lib.PlanUse(_PLAN, 100)]


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
  """Takes over from writers of the same test."""
  monkeypatch.setattr(records, "PATIENCE_SECONDS", 0.0)


def _budget(root, epsilon=3.0):
  budget = data_budget.DataBudget(root, _DATA)
  budget.make(
    epsilon=epsilon, delta=1e-6, neighboring_relation="add_or_remove_one"
  )
  return budget


def _run(path):
  """The ledger of a run, at its start."""
  ledger = ledger_lib.Ledger(path)
  ledger.acquire()
  if ledger.is_new:
    ledger.open(
      config={}, plan=_PLAN, data=_DATA, secret_hash="5" * 64, run="a run"
    )
  ledger.resume(step=0, digest="", ledger_head="", fingerprint="f")
  return ledger


def _allocate(budget, ledger, **kwargs):
  return budget.allocate(ledger, _WHOLE, label="a run", **kwargs)


def _pair(sigma):
  return gaussian_events.AddRemove(sigma, 0.01)


def test_costs_are_divergences_at_one_order(tmp_path):
  budget = _budget(tmp_path)
  terms = budget.terms
  whole = rdp.epsilon_at(terms.order, terms.divergence, 1e-6)
  assert whole == pytest.approx(3.0)
  cost = budget.cost(_WHOLE)
  assert cost == pytest.approx(100 * rdp.divergence(_pair(1.0), 1, terms.order))
  fits = int(terms.divergence / cost)
  assert fits > 3
  budget.reserve("all", cost, fits - 1)
  _allocate(budget, _run(tmp_path / "run"))
  assert budget.epsilon <= 3.0
  with pytest.raises(errors.RefusedError, match="would be exceeded"):
    budget.check(cost)


def test_the_order_is_the_one_that_leaves_most_room(tmp_path):
  terms = _budget(tmp_path).terms
  step = lambda order: rdp.divergence(_pair(4.0), 1, order)
  room = {
    order: rdp.largest_divergence(order, 3.0, 1e-6) / step(order)
    for order in rdp.WHOLE_ORDERS
  }
  assert room[terms.order] > 0.9 * max(room.values())


def test_all_or_nothing(tmp_path):
  budget = _budget(tmp_path)
  cost = budget.cost(_WHOLE)
  fits = int(budget.terms.divergence / cost)
  before = budget.reserved
  with pytest.raises(errors.RefusedError, match=f"{fits + 1} runs"):
    budget.reserve("search", cost, fits + 1)
  assert budget.reserved == before == 0
  assert not data_budget.DataBudget(tmp_path, _DATA).reservations
  budget.reserve("search", cost * 1.05, fits - 1)
  with pytest.raises(errors.RefusedError, match="this run would take"):
    _allocate(budget, _run(tmp_path / "run"))
  assert not data_budget.DataBudget(tmp_path, _DATA).allocations


def test_a_search_has_its_room_whatever_comes_between(tmp_path):
  budget = _budget(tmp_path)
  cost = budget.cost(_WHOLE)
  budget.reserve("search", cost, 2)
  # Everything else goes to someone else.
  rest = budget.terms.divergence - budget.reserved
  budget.reserve("other", rest / 1.001, 1)
  total = budget.reserved
  for name in ("one", "two"):
    _allocate(budget, _run(tmp_path / name), reservation="search")
    assert budget.reserved == pytest.approx(total, rel=1e-4)
  with pytest.raises(errors.RefusedError, match="no run left"):
    _allocate(budget, _run(tmp_path / "three"), reservation="search")
  with pytest.raises(ValueError, match=r"one of \['other', 'search'\]"):
    _allocate(budget, _run(tmp_path / "three"), reservation="none")


def test_a_run_that_is_dearer_than_its_room_is_refused(tmp_path):
  budget = _budget(tmp_path)
  budget.reserve("search", budget.cost(_WHOLE) / 2, 1)
  with pytest.raises(errors.RefusedError, match="is for runs that take"):
    _allocate(budget, _run(tmp_path / "one"), reservation="search")


def test_a_restart_reserves_nothing_more(tmp_path):
  budget = _budget(tmp_path)
  allocation = _allocate(budget, _run(tmp_path / "run"))
  for _ in range(3):
    ledger = _run(tmp_path / "run")
    budget = _budget(tmp_path)
    assert _allocate(budget, ledger) == allocation
    ledger.reserve_through(1)
    budget.advance(ledger)
  assert budget.reserved == budget.cost(_WHOLE)


def test_a_changed_plan_reserves_the_difference_or_is_refused(tmp_path):
  budget = _budget(tmp_path)
  ledger = _run(tmp_path / "run")
  _allocate(budget, ledger)
  cost = budget.cost(_WHOLE)
  longer = [plan_lib.PlanUse(_PLAN, 100), plan_lib.PlanUse(_PLAN, 50)]
  budget.allocate(ledger, longer, label="a run")
  assert budget.reserved == pytest.approx(1.5 * cost)
  dearer = [plan_lib.PlanUse(_PLAN, 100_000)]
  with pytest.raises(errors.RefusedError, match="what changed in 'a run'"):
    budget.allocate(ledger, dearer, label="a run")
  # A plan holds all that was charged, so a smaller one gives the rest back.
  budget.allocate(ledger, _WHOLE, label="a run")
  assert budget.reserved == pytest.approx(cost)


def test_a_copy_is_charged_by_itself(tmp_path):
  budget = _budget(tmp_path)
  ledger = _run(tmp_path / "run")
  _allocate(budget, ledger)
  ledger.reserve_through(1)
  budget.advance(ledger)
  cost = budget.reserved
  shutil.copytree(tmp_path / "run", tmp_path / "copy")
  ledger.reserve_through(2)
  budget.advance(ledger)
  # The copy knows nothing of the last charge.
  _allocate(_budget(tmp_path), _run(tmp_path / "copy"))
  assert _budget(tmp_path).reserved == pytest.approx(2 * cost)
  ledger.reserve_through(3)
  budget.advance(ledger)


def test_a_copy_that_goes_on_in_a_run_s_place_stops_the_run(tmp_path):
  """Before the run releases anything more; and then it has to pay anew."""
  budget = _budget(tmp_path)
  ledger = _run(tmp_path / "run")
  allocation = _allocate(budget, ledger)
  ledger.reserve_through(1)
  budget.advance(ledger)
  shutil.copytree(tmp_path / "run", tmp_path / "copy")
  copy = _run(tmp_path / "copy")
  other = _budget(tmp_path)
  assert _allocate(other, copy) == allocation
  assert other.reserved == other.cost(_WHOLE)
  ledger.reserve_through(2)
  with pytest.raises(errors.LedgerError, match="a copy of this run went on"):
    budget.advance(ledger)
  copy.reserve_through(2)
  other.advance(copy)
  again = _budget(tmp_path)
  assert _allocate(again, _run(tmp_path / "run")) != allocation
  assert again.reserved == pytest.approx(2 * again.cost(_WHOLE))


def test_only_what_can_never_be_released_is_given_back(tmp_path):
  budget = _budget(tmp_path)
  ledger = _run(tmp_path / "run")
  _allocate(budget, ledger)
  ledger.reserve_through(30)
  budget.advance(ledger)
  with pytest.raises(ValueError, match="of a run that was ended"):
    budget.refund(ledger)
  shutil.copytree(tmp_path / "run", tmp_path / "copy")
  ledger.end()
  whole = budget.cost(_WHOLE)
  assert budget.refund(ledger) == pytest.approx(0.7 * whole)
  assert budget.reserved == pytest.approx(0.3 * whole)
  assert budget.refund(ledger) == 0.0
  # A copy of the time before the end could go on, but not on this allocation.
  copy = _run(tmp_path / "copy")
  _allocate(budget, copy)
  assert budget.reserved == pytest.approx(1.3 * whole)
  stranger = _run(tmp_path / "stranger")
  stranger.end()
  with pytest.raises(ValueError, match="holds an allocation"):
    budget.refund(stranger)


@pytest.mark.parametrize("is_too_long", [True, False])
def test_a_run_of_which_no_bound_is_known_gives_nothing_back(
  tmp_path, is_too_long
):
  budget = _budget(tmp_path)
  ledger = _run(tmp_path / "run")
  _allocate(budget, ledger)
  ledger.reserve_through(30)
  budget.advance(ledger)
  if is_too_long:
    ledger.notice(history.TOO_LONG)
  else:
    ledger.notice("files were changed", unsound=True)
  ledger.end()
  before = budget.reserved
  assert budget.refund(ledger) == 0
  assert budget.reserved == before
  assert all(allocation.is_ended for allocation in budget.allocations.values())


def test_a_run_that_was_ended_stays_so(tmp_path):
  budget = _budget(tmp_path)
  ledger = _run(tmp_path / "run")
  name = _allocate(budget, ledger)
  ledger.end()
  budget.refund(ledger)
  budget.allocate(ledger, ledger.spent, label="a run")
  assert budget.allocations[name].is_ended
  assert budget.refund(ledger) == 0.0


def test_a_run_that_is_dearer_by_little_than_its_room_is_refused(tmp_path):
  budget = _budget(tmp_path)
  budget.reserve("search", budget.cost(_WHOLE) / 1.05, 1)
  with pytest.raises(errors.RefusedError, match="is for runs that take"):
    _allocate(budget, _run(tmp_path / "one"), reservation="search")


def test_a_plan_that_grows_by_little_must_fit_too(tmp_path):
  budget = _budget(tmp_path)
  ledger = _run(tmp_path / "run")
  _allocate(budget, ledger)
  rest = budget.terms.divergence - budget.reserved
  budget.reserve("other", rest / 1.001, 1)
  longer = [plan_lib.PlanUse(_PLAN, 150)]
  assert budget.cost(longer) - budget.cost(_WHOLE) < 1
  with pytest.raises(errors.RefusedError, match="what changed in 'a run'"):
    budget.allocate(ledger, longer, label="a run")


def test_room_that_nobody_came_for_is_given_back(tmp_path):
  budget = _budget(tmp_path)
  cost = budget.cost(_WHOLE)
  budget.reserve("search", cost, 3)
  _allocate(budget, _run(tmp_path / "run"), reservation="search")
  budget.cancel("search")
  assert budget.reserved == pytest.approx(cost)
  with pytest.raises(errors.RefusedError, match="no run left"):
    _allocate(budget, _run(tmp_path / "late"), reservation="search")


@pytest.mark.parametrize(
  ("terms", "message"),
  [
    ({"epsilon": 4.0}, "made for epsilon 3 at delta 1e-06.*got epsilon 4"),
    ({"delta": 1e-5}, "made for epsilon 3 at delta 1e-06.*delta 1e-05"),
    ({"epsilon": -1.0}, "epsilon must be finite and > 0, got -1"),
    (
      {"epsilon": 1e-12, "delta": 1e-12},
      "epsilon must be large enough for data_budget.delta=1e-12",
    ),
    ({"delta": 1.0}, r"delta must be in \(0, 1\), got 1\.0"),
  ],
)
def test_other_terms_are_refused(tmp_path, terms, message):
  budget = _budget(tmp_path)
  given = {
    "epsilon": 3.0,
    "delta": 1e-6,
    "neighboring_relation": "add_or_remove_one",
  }
  with pytest.raises(ValueError, match=message):
    budget.make(**given | terms)


def test_each_data_set_has_its_own(tmp_path):
  _budget(tmp_path).reserve("search", 0.1, 1)
  other = data_budget.DataBudget(tmp_path, "e" * 64)
  assert other.terms is None
  with pytest.raises(ValueError, match="no budget for data set eeeeeeeeeeee"):
    other.check(0.1)
  assert [b.data for b in budgets.all_below(tmp_path)] == [_DATA]
  (tmp_path / _DATA).rename(tmp_path / ("e" * 64))
  with pytest.raises(errors.LedgerError, match="another data set"):
    data_budget.DataBudget(tmp_path, "e" * 64)


# --- Several segments ---------------------------------------------------------

# Each of them dearer than the one before.
_PLANS = [
  plan_lib.make_plan(
    plan_lib.PrivacyConfig(
      num_examples=1000,
      expected_batch_size=10,
      num_steps=100,
      l2_clip_norm=1.0,
      target_delta=1e-5,
      noise_multiplier=sigma,
    )
  )
  for sigma in (4.0, 2.0, 1.0)
]


def _changed_twice(path, counts=(10, 20, 30)):
  """The ledger of a run that charged steps under three plans."""
  ledger = ledger_lib.Ledger(path)
  ledger.acquire()
  ledger.open(
    config={}, plan=_PLANS[0], data=_DATA, secret_hash="5" * 64, run="a run"
  )
  for number, (plan, count) in enumerate(zip(_PLANS, counts, strict=True)):
    if number:
      ledger.open_segment(config={}, plan=plan, data=_DATA, start_step=0)
    ledger.resume(step=0, digest="", ledger_head="", fingerprint=str(number))
    ledger.reserve_through(count)
  return ledger


def _cost(budget, counts, plans=_PLANS):
  """Step by step, from the divergence of one step of each plan."""
  return sum(
    count * rdp.divergence(_pair(plan.noise_multiplier), 1, budget.terms.order)
    for plan, count in zip(plans, counts, strict=True)
  )


def test_a_cost_is_of_all_parts_also_of_equal_ones(tmp_path):
  budget = _budget(tmp_path)
  parts = [plan_lib.PlanUse(plan, 10) for plan in _PLANS]
  assert budget.cost(parts) == pytest.approx(_cost(budget, (10, 10, 10)))
  one = [plan_lib.PlanUse(_PLAN, 10)]
  assert budget.cost(one * 3) == pytest.approx(3 * budget.cost(one))
  ledger = _changed_twice(tmp_path / "run")
  assert budget.cost(ledger.spent) == pytest.approx(_cost(budget, (10, 20, 30)))
  # Equal plans on both sides of another one.
  plans = [_PLANS[0], _PLANS[1], _PLANS[0]]
  parts = [plan_lib.PlanUse(plan, 10) for plan in plans]
  assert budget.cost(parts) == pytest.approx(_cost(budget, (10, 10, 10), plans))


def test_what_all_segments_spent_is_kept_when_the_rest_is_given_back(tmp_path):
  budget = _budget(tmp_path, epsilon=30.0)
  ledger = _changed_twice(tmp_path / "run")
  budget.allocate(ledger, ledger.planned, label="a run")
  whole = _cost(budget, (10, 20, 100))
  assert budget.reserved == pytest.approx(whole)
  ledger.end()
  spent = _cost(budget, (10, 20, 30))
  assert budget.refund(ledger) == pytest.approx(whole - spent)
  assert budget.reserved == pytest.approx(spent)


@pytest.mark.parametrize("is_changed", [False, True])
def test_at_each_start_a_run_reserves_its_past_and_its_plan(
  tmp_path, is_changed
):
  """Also the steps of the segment that a change is about to end."""
  budget = _budget(tmp_path, epsilon=30.0)
  _changed_twice(tmp_path / "run").close()
  ledger = ledger_lib.Ledger(tmp_path / "run")
  config = config_lib.default()
  config.data_budget.location = budget.root
  plan = _PLANS[1] if is_changed else ledger.plan
  resume.open_or_resume(
    config,
    tmp_path,
    ledger,
    budget,
    plan=plan,
    settings={},
    data=_DATA,
    secret_hash="5" * 64,
    is_changed=is_changed,
  )
  expected = _cost(budget, (10, 20, 30 if is_changed else 100))
  if is_changed:
    expected += _cost(budget, (100,), [plan])
  assert budget.reserved == pytest.approx(expected)
  (allocation,) = ledger.allocations
  assert (allocation["root"], allocation["data"]) == (budget.root, _DATA)
  ledger.close()


# --- What a data set is called ------------------------------------------------


def _make(root, data, **kwargs):
  return budgets.open_or_make(
    root,
    data,
    epsilon=3.0,
    delta=1e-6,
    neighboring_relation="add_or_remove_one",
    **kwargs,
  )


def test_a_budget_of_an_earlier_release_is_found_and_stays_found(tmp_path):
  """Under the manifest that it gave, and then whatever files are called."""
  root = tmp_path / "budgets"
  old = _budget(root)
  _allocate(old, _run(tmp_path / "run"))
  asked, told = [], []

  def earlier():
    asked.append(True)
    return [_DATA]

  for number in range(3):
    found = _make(root, "e" * 64, earlier=earlier, tell=told.append)
    assert (found.data, found.allocations) == (_DATA, old.allocations)
    assert found.reserved == old.reserved > 0
    # The second time it is written down, and nobody need ask.
    assert len(asked) == 1, number
  renamed = _make(root, "e" * 64, earlier=lambda: ["f" * 64])
  assert renamed.data == _DATA
  assert not told
  made = [b.data for b in budgets.all_below(root) if b.terms]
  assert made == [_DATA]
  with pytest.raises(errors.RefusedError, match="has a budget"):
    data_budget.DataBudget(root, "e" * 64).refer_to("f" * 64)
  with pytest.raises(errors.RefusedError, match="has a budget"):
    old.refer_to("e" * 64)
  # Nor can another one be made under the new name.
  with pytest.raises(errors.LedgerError, match="in this place"):
    data_budget.DataBudget(root, "e" * 64).make(
      epsilon=3.0, delta=1e-6, neighboring_relation="add_or_remove_one"
    )


@pytest.mark.parametrize("first", ["today's", "an earlier", "none"])
def test_a_data_set_with_two_budgets_spends_from_neither(tmp_path, first):
  """As of an .npz and an ArrayRecord, or of one under two names of files."""
  today, old, older = _DATA, "e" * 64, "f" * 64
  made = {"today's": [today, old], "an earlier": [old, older], "none": []}[
    first
  ]
  if first == "an earlier":
    _make(tmp_path, old)
    assert _make(tmp_path, today, earlier=lambda: [old]).data == old
    _make(tmp_path, older)
  for data in made:
    data_budget.DataBudget(tmp_path, data).make(
      epsilon=3.0, delta=1e-6, neighboring_relation="add_or_remove_one"
    )
  # One of other data is no second one.
  _make(tmp_path, "a" * 64)
  before = {b.data: b.reserved for b in budgets.all_below(tmp_path)}
  if not made:
    assert _make(tmp_path, today, earlier=lambda: [old]).data == today
    return
  with pytest.raises(errors.RefusedError) as refused:
    _make(tmp_path, today, earlier=lambda: [old, older][: len(made)])
  for part in ("has 2 budgets", made[0][:12], made[1][:12], "keep one"):
    assert part in str(refused.value)
  assert "\n" not in str(refused.value)
  after = {b.data: b.reserved for b in budgets.all_below(tmp_path)}
  assert after == before
  # Once one of them was taken away, the other is the data set's.
  shutil.rmtree(tmp_path / made[1])
  assert _make(tmp_path, today, earlier=lambda: made[1:]).data == made[0]


def test_a_budget_that_is_made_beside_others_is_told_of(tmp_path):
  told = []
  first = _make(tmp_path, _DATA, earlier=lambda: ["f" * 64], tell=told.append)
  assert first.terms is not None
  assert first.data == _DATA
  assert not told
  _make(tmp_path, "e" * 64, tell=told.append)
  (line,) = told
  assert line.startswith("data set eeeeeeeeeeee had no budget in")
  assert "beside those of 1 other data sets" in line
  _make(tmp_path, "e" * 64, tell=told.append)
  assert len(told) == 1


@pytest.mark.parametrize(
  ("recorded", "now", "expected"),
  [
    (_DATA, _DATA, _DATA),
    ("f" * 64, _DATA, "f" * 64),
    ("b" * 64, _DATA, _DATA),
  ],
  ids=["the same", "an earlier release's", "other data"],
)
def test_a_run_of_an_earlier_release_goes_on_under_its_name(
  tmp_path, recorded, now, expected
):
  ledger = ledger_lib.Ledger(tmp_path)
  assert resume.recorded_digest(ledger, now, lambda: ["f" * 64]) == now
  ledger.acquire()
  ledger.open(
    config={}, plan=_PLAN, data=recorded, secret_hash="5" * 64, run="a run"
  )
  assert resume.recorded_digest(ledger, now, lambda: ["f" * 64]) == expected
  ledger.close()


def test_a_budget_that_is_gone_is_not_made_anew(tmp_path):
  root = tmp_path / "budgets"
  _budget(root)
  _make(root, "e" * 64, earlier=lambda: [_DATA])
  shutil.rmtree(root / _DATA)
  with pytest.raises(errors.RefusedError, match="bring it back"):
    _make(root, "e" * 64, earlier=lambda: [_DATA])


def test_renamed_files_spend_the_same_budget(tmp_path):
  rows = [{"inputs": np.float32([i])} for i in range(5)]
  for name in ("train.array_record", "renamed.array_record"):
    array_record.write_array_record(tmp_path / name, rows)
    source = array_record.ArrayRecordSource(tmp_path / name)
    budget = _make(
      tmp_path / "budgets",
      source.content_digest(),
      earlier=lambda: sources.earlier_digests(source),  # noqa: B023
    )
    if name.startswith("train"):
      cost = budget.cost(_WHOLE)
      budget.reserve("all", cost, int(budget.terms.divergence / cost / 1.001))
  with pytest.raises(errors.RefusedError, match="would be exceeded"):
    budget.reserve("more", cost, 1)


_CHILD = """
import sys
from dpdist.ledger import data_budget
budget = data_budget.DataBudget(sys.argv[1], "d" * 64)
try:
  budget.reserve(sys.argv[2], float(sys.argv[3]), 1)
  print("reserved")
except ValueError as error:
  print(error)
"""


@pytest.mark.slow
def test_of_many_at_once_no_more_are_let_in_than_fit(tmp_path):
  budget = _budget(tmp_path)
  cost = budget.terms.divergence / 4.1
  children = [
    subprocess.Popen(
      [sys.executable, "-c", _CHILD, str(tmp_path), f"run {i}", str(cost)],
      stdout=subprocess.PIPE,
      text=True,
      cwd=_ROOT,
    )
    for i in range(10)
  ]
  said = [child.communicate()[0] for child in children]
  assert said.count("reserved\n") == 4
  assert sum("would be exceeded" in line for line in said) == 6
  assert 2.9 < _budget(tmp_path).epsilon <= 3.0


# --- Runs and commands --------------------------------------------------------


def _config(root, **changes):
  config = digits.get_config()
  config.model.width = 64
  config.privacy.expected_batch_size = 64
  config.privacy.num_steps = 4
  config.privacy.target_epsilon = None
  config.privacy.noise_multiplier = 2.0
  config.data_budget.location = str(root)
  config.data_budget.epsilon = 1.5
  config.data_budget.delta = 1e-4
  config.update_from_flattened_dict(changes)
  return config


_DOOR = """
import runpy
sys.argv = ["launch.budget", *sys.argv[1:]]
runpy.run_module("launch.budget", run_name="__main__")
"""


def _command(*args):
  done = without_jax.run(_DOOR, *args)
  assert done.returncode == 0, done.stderr
  return done


def _problems(workdir):
  ledger = ledger_lib.Ledger(workdir / "ledger")
  return [f for f in verify.verify(workdir, ledger) if f.problem]


class _StopError(Exception):
  pass


def _stop(self, step):
  if step == 2:
    raise _StopError
  return np.arange(3)


@pytest.mark.slow
def test_runs_share_a_budget_and_give_back_what_they_leave(
  tmp_path, monkeypatch
):
  root, one, two = tmp_path / "budgets", tmp_path / "one", tmp_path / "two"
  dpdist.train(_config(root), one)
  assert not _problems(one)
  (budget,) = budgets.all_below(root)
  assert [allocation.label for allocation in budget.allocations.values()] == [
    str(one)
  ]
  assert 0 < budget.epsilon <= 1.5
  # It was told of every charge, so that a copy could not go on for nothing.
  log = records.Log(one / "ledger", lambda record: None)
  last = max(r["seq"] for r in log.records if r["kind"] == "reserve")
  (allocation,) = budget.allocations.values()
  assert allocation.head == log.heads[last + 1]
  with pytest.raises(ValueError, match="would be exceeded"):
    dpdist.train(_config(root, **{"privacy.num_steps": 3000}), two)
  assert not two.exists()
  with pytest.raises(ValueError, match=r"data_budget\.location must be"):
    dpdist.train(_config(root, **{"data_budget.location": ""}), one)
  # It stops before its third step, with three of thirty charged, and gives the
  # one back that it never began.
  with monkeypatch.context() as patch:
    patch.setattr(sampling.PoissonSampler, "__call__", _stop)
    with pytest.raises(_StopError):
      dpdist.train(_config(root, **{"privacy.num_steps": 30}), two)
  before = budgets.all_below(root)[0].reserved
  facts = json.loads(_command(f"--workdir={two}", "--end", "--json").stdout)
  assert facts["steps_spent"] == 2
  (given_back,) = (v for k, v in facts.items() if k.startswith("share"))
  assert given_back > 0
  with pytest.raises(ValueError, match="run that was ended"):
    dpdist.train(_config(root), two)
  (budget,) = budgets.all_below(root)
  given = 28 / 34 * before
  assert before - budget.reserved == pytest.approx(given)
  done = _command(f"--dataset={root}")
  assert re.search(rf"ended +{two}", done.stdout)
  assert re.search(rf"may go on +{one}", done.stdout)


@pytest.mark.slow
def test_a_run_cannot_leave_the_budget_that_it_has_its_stake_in(
  tmp_path, monkeypatch
):
  one, other = tmp_path / "one", tmp_path / "other"
  monkeypatch.chdir(tmp_path)
  dpdist.train(_config("one"), tmp_path / "run")
  before = ledger_lib.Ledger(tmp_path / "run" / "ledger").head
  with pytest.raises(ValueError, match="does not know of it"):
    dpdist.train(_config(other), tmp_path / "run")
  # Nor where it is what it was before the run came.
  shutil.copytree(one, tmp_path / "kept")
  data = next(one.iterdir()).name
  shutil.rmtree(one)
  data_budget.DataBudget(one, data).make(
    epsilon=1.5, delta=1e-4, neighboring_relation="add_or_remove_one"
  )
  with pytest.raises(ValueError, match="was rolled back"):
    dpdist.train(_config(one), tmp_path / "run")
  assert ledger_lib.Ledger(tmp_path / "run" / "ledger").head == before
  # But it may have moved, and be named from elsewhere.
  shutil.rmtree(one)
  (tmp_path / "kept").rename(one)
  monkeypatch.chdir("/")
  dpdist.train(_config(one), tmp_path / "run")
  (budget,) = budgets.all_below(one)
  assert len(budget.allocations) == 1


@pytest.mark.parametrize(
  "void", [{"insecure_seed": 3}, {"unsafe_metrics": True}]
)
def test_a_run_without_a_guarantee_takes_no_part(tmp_path, void):
  with pytest.raises(ValueError, match="a run without a guarantee"):
    dpdist.train(_config(tmp_path / "budgets", **void), tmp_path / "run")
  assert not (tmp_path / "run" / "ledger").exists()


@pytest.mark.slow
def test_a_stake_that_the_ledger_was_not_told_of_is_given_back(
  tmp_path, monkeypatch
):
  """The process was killed between the two."""
  with monkeypatch.context() as patch:
    told = ledger_lib.Ledger.record_allocation

    def killed(self, **place):
      if place["allocation"]:
        raise _StopError
      told(self, **place)

    patch.setattr(ledger_lib.Ledger, "record_allocation", killed)
    with pytest.raises(_StopError):
      dpdist.train(_config(tmp_path / "budgets"), tmp_path / "run")
  (budget,) = budgets.all_below(tmp_path / "budgets")
  assert budget.reserved > 0
  _command(f"--workdir={tmp_path / 'run'}", "--end")
  (budget,) = budgets.all_below(tmp_path / "budgets")
  assert budget.reserved == 0


def test_a_cost_that_makes_no_sense_is_refused(tmp_path):
  for cost in (-1.0, float("nan"), float("inf")):
    with pytest.raises(ValueError, match="cost must be"):
      _budget(tmp_path).reserve("search", cost, 1)


@pytest.mark.slow
def test_a_run_that_spent_more_than_it_reserved_is_found(tmp_path):
  root, run = tmp_path / "budgets", tmp_path / "run"
  dpdist.train(_config(root), run)
  shutil.rmtree(root)
  (problem,) = _problems(run)
  assert (problem.what, problem.problem) == (
    "data budget",
    "the run has no allocation in it",
  )


@pytest.mark.slow
def test_the_commands_reserve_and_cancel(tmp_path):
  root = tmp_path / "budgets"
  reserve = [
    *(sys.executable, "-m", "launch.reserve"),
    "--config=configs/digits.py",
    "--config.privacy.num_steps=4",
    f"--config.data_budget.location={root}",
    "--config.data_budget.epsilon=30.0",
    "--config.data_budget.delta=1e-4",
    "--label=search",
  ]
  for code, count, said in (
    (2, 999, "would be exceeded"),
    (0, 3, "room for 3 runs"),
    (2, 3, "no reservation has yet, got 'search'"),
  ):
    done = subprocess.run(
      [*reserve, f"--count={count}"], cwd=_ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
  done = _command(f"--dataset={root}", "--cancel=search", "--json")
  (facts,) = json.loads(done.stdout).values()
  assert facts["epsilon_reserved"] == 0.0
  done = without_jax.run(_DOOR, f"--dataset={root}", "--cancel=none")
  assert done.returncode == 2
  assert "cancel must be a label of one data set's budget" in done.stderr
  assert "'none', which 0 have" in done.stderr
