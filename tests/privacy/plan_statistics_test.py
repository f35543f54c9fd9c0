"""What a plan with private statistics spends: one Gaussian more, no less."""

import dataclasses

import dp_accounting
from dp_accounting.pld import pld_privacy_accountant
from dp_accounting.rdp import rdp_privacy_accountant
import pytest

import dpdist
from dpdist import data
from dpdist import errors
from dpdist.accounting import rdp
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import statement
from dpdist.workdir import run

_Relation = dp_accounting.NeighboringRelation
_CONFIG = {
  "num_examples": 1_000,
  "expected_batch_size": 20,
  "num_steps": 300,
  "l2_clip_norm": 1.0,
  "target_delta": 1e-5,
}


def _config(**changes):
  return plan_lib.PrivacyConfig(**{**_CONFIG, **changes})


def _plan(sigma=2.0, **changes):
  changes.setdefault("noise_multiplier", 1.5)
  config = _config(**changes, statistics_noise_multiplier=sigma)
  return plan_lib.make_plan(config)


def _independent(plan, event, relation):
  accountant = pld_privacy_accountant.PLDAccountant(
    relation, value_discretization_interval=1e-3
  )
  return accountant.compose(event).get_epsilon(plan.delta)


@pytest.mark.parametrize("sigma", [0.5, 2.0, 20.0])
@pytest.mark.parametrize(
  "relation", ["add_or_remove_one", "replace_one", "zero_out"]
)
def test_epsilon_is_that_of_steps_and_one_gaussian(relation, sigma):
  """By dp_accounting, of events that are written down here."""
  plan = _plan(sigma, neighboring_relation=relation)
  # Its accountant takes noise in units of one contribution: where one is
  # replaced by another, the sensitivity that noise is in proportion to is 2.
  reach = 2 if relation == "replace_one" else 1
  gaussian = dp_accounting.GaussianDpEvent
  step = dp_accounting.PoissonSampledDpEvent(0.02, gaussian(1.5 * reach))
  event = dp_accounting.ComposedDpEvent(
    [
      dp_accounting.SelfComposedDpEvent(step, 300),
      gaussian(sigma * reach),
    ]
  )
  of = (
    _Relation.REPLACE_ONE
    if relation == "replace_one"
    else _Relation.ADD_OR_REMOVE_ONE
  )
  expected = _independent(plan, event, of)
  assert plan.epsilon() == pytest.approx(expected, rel=2e-3)
  assert _independent(plan, plan.event(), of) == pytest.approx(expected)
  assert plan.epsilon() > _plan(0.0, neighboring_relation=relation).epsilon()


def test_rdp_adds_the_gaussian_too():
  plan = _plan(accountant="rdp")
  accountant = rdp_privacy_accountant.RdpAccountant()
  gaussian = dp_accounting.GaussianDpEvent
  step = dp_accounting.PoissonSampledDpEvent(0.02, gaussian(1.5))
  accountant.compose(dp_accounting.SelfComposedDpEvent(step, 300))
  accountant.compose(gaussian(2.0))
  expected = accountant.get_epsilon(1e-5)
  assert plan.epsilon() == pytest.approx(expected, rel=1e-2)


def test_a_person_of_several_rows_moves_them_by_all_of_them():
  plan = _plan(6.0, examples_per_user=3)
  *_, (event, count) = plan.steps()
  gaussian = dp_accounting.GaussianDpEvent(2.0)
  assert (event.dp_event(), count) == (gaussian, 1)


@pytest.mark.parametrize(
  "changes",
  [
    {"sampling": "truncated_poisson", "truncated_batch_size": 25},
    {
      "sampling": "cyclic_poisson",
      "cycle_length": 4,
      "neighboring_relation": "zero_out",
    },
    {"sampling": "fixed_size", "neighboring_relation": "replace_one"},
    {"group_size": 2, "neighboring_relation": "zero_out"},
    {"noise_schedule": ((100, 2.0),)},
    {"expected_batch_size": 1000},
  ],
)
def test_every_sampling_pays_for_them(changes):
  """At least what each alone spends, and at most what both do in the sum."""
  plan, without = _plan(**changes), _plan(0.0, **changes)
  alone = _plan(expected_batch_size=1e-6, noise_multiplier=1e5)
  assert max(without.epsilon(), alone.epsilon()) < plan.epsilon()
  assert plan.curve([2e-5])[0] <= without.epsilon() + alone.epsilon()


def test_they_come_with_the_first_step_and_not_before():
  plan = _plan()
  assert not plan.steps(0)
  assert plan.curve([1e-5], 0) == [0.0]
  for num_steps in (1, 2, 300, 500):
    assert [count for _, count in plan.steps(num_steps)] == [num_steps, 1]


def test_a_target_has_room_for_them():
  plan = _plan(4.0, target_epsilon=2.0, noise_multiplier=None)
  without = _plan(0.0, target_epsilon=2.0, noise_multiplier=None)
  assert 2.0 * (1 - 1e-4) < plan.epsilon() <= 2.0
  assert plan.noise_multiplier > without.noise_multiplier
  with pytest.raises(ValueError, match="target_epsilon must be within reach"):
    _plan(0.5, target_epsilon=2.0, noise_multiplier=None)


def test_a_plan_without_them_is_as_it_was():
  plan = _plan(0.0)
  assert "statistics_noise_multiplier" not in plan.to_dict()
  assert plan.fingerprint() == (
    plan_lib.make_plan(_config(noise_multiplier=1.5)).fingerprint()
  )
  assert "statistics" not in statement.of_plan(plan)
  other = _plan()
  assert other.fingerprint() != plan.fingerprint()
  assert plan_lib.PrivacyPlan.from_dict(other.to_dict()) == other
  assert "noise of 2 times their l2 sensitivity" in statement.of_plan(other)


@pytest.mark.parametrize("sigma", [-1.0, 0.05, float("nan"), float("inf"), "1"])
def test_too_little_noise_is_refused(sigma):
  with pytest.raises(
    errors.ArgumentError,
    match=r"statistics_noise_multiplier must be 0, or in \[0.1, ",
  ):
    _config(noise_multiplier=1.0, statistics_noise_multiplier=sigma)


def test_each_segment_that_has_them_pays_again():
  """As if nobody knew that it is the same release."""
  plan = _plan()
  parts = [plan_lib.PlanUse(plan, 100), plan_lib.PlanUse(plan, 200)]
  (step, _), (gaussian, _) = plan.steps()
  spent = composition.epsilon(parts)
  orders = rdp.ladder(plan.steps(), plan.delta)
  expected = min(
    rdp.epsilon_at(
      order,
      rdp.divergence(step, 300, order) + rdp.divergence(gaussian, 2, order),
      delta,
    )
    for order, delta in orders.items()
  )
  assert spent == pytest.approx(expected)
  assert spent > plan.epsilon()
  # A segment in which nothing was charged has released nothing.
  idle = [plan_lib.PlanUse(plan, 0), plan_lib.PlanUse(plan, 300)]
  assert composition.epsilon(idle) == plan.epsilon()
  assert "statistics of the training data" in composition.statement(parts)


def test_what_follows_a_change_keeps_to_the_target():
  """Also where the steps alone would be the same, which are not planned anew
  without statistics."""
  settings = {
    "target_epsilon": 3.0,
    "statistics_noise_multiplier": 20.0,
    "accountant": "rdp",
  }
  first = plan_lib.make_plan(_config(**settings))
  spent = [plan_lib.PlanUse(first, 100)]
  after = composition.plan_after(
    _config(**settings, l2_clip_norm=0.5),
    before=_config(**settings).to_dict(),
    spent=spent,
    start_step=100,
  )
  assert after.num_steps == 200
  assert after.noise_multiplier > first.noise_multiplier
  whole = [*spent, plan_lib.PlanUse(after, 200)]
  assert composition.epsilon(whole) <= 3.0
  begun = [[plan_lib.PlanUse(first, 300)], whole]
  assert composition.guaranteed(begun) >= composition.epsilon(whole)


def test_who_cannot_release_them_refuses_them(tmp_path):
  plan = _plan()
  loss = lambda params, example: 0.0
  for make in (
    lambda: dpdist.private_gradients(loss, plan, seed=b"s"),
    lambda: dpdist.Session(
      tmp_path / "a", plan, loss=loss, data_digest="d" * 64
    ),
    lambda: run.Run(tmp_path / "b", plan),
  ):
    with pytest.raises(
      ValueError, match="statistics_noise_multiplier must be 0"
    ):
      make()


def test_a_loop_of_ones_own_refuses_a_data_set_that_asks(tmp_path):
  asking = data.from_arrays(
    {"age": [30.0] * 10},
    test={"age": [1.0]},
    private_statistics={"age": data.Standardized(0, 120)},
  )
  with pytest.raises(
    errors.ArgumentError, match="dataset must have no private_statistics"
  ):
    dpdist.Session(
      tmp_path,
      _plan(0.0, num_examples=10, expected_batch_size=2),
      loss=lambda params, example, key: 0.0,
      dataset=asking,
    )


def test_a_config_of_theirs_is_frozen_with_it():
  config = _config(noise_multiplier=1.0, statistics_noise_multiplier=2)
  assert config.to_dict()["statistics_noise_multiplier"] == 2.0
  assert dataclasses.replace(config, statistics_noise_multiplier=0) == (
    _config(noise_multiplier=1.0)
  )
