"""What parts of a run spend together, against independent computations."""

import dataclasses
import math

import dp_accounting
import pytest
from scipy import special

from dpdist.accounting import calibration
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import statement

_CONFIG = plan_lib.PrivacyConfig(
  num_examples=10_000,
  expected_batch_size=200,
  num_steps=500,
  l2_clip_norm=1.0,
  target_delta=1e-5,
  noise_multiplier=1.2,
)
_PLAN = plan_lib.make_plan(_CONFIG)


def _part(num_steps, **changes):
  return plan_lib.PlanUse(dataclasses.replace(_PLAN, **changes), num_steps)


def _before(**changes):
  return dataclasses.asdict(dataclasses.replace(_CONFIG, **changes))


def _divergence(plan, order):
  """Mironov, Talwar & Zhang 2019, section 3.3: the sum for whole orders."""
  q, sigma = plan.sampling_probability, plan.noise_multiplier
  terms = [
    special.gammaln(order + 1)
    - special.gammaln(k + 1)
    - special.gammaln(order - k + 1)
    + (order - k) * math.log1p(-q)
    + k * math.log(q)
    + (k * k - k) / (2 * sigma**2)
    for k in range(order + 1)
  ]
  return special.logsumexp(terms) / (order - 1)


def _epsilon(divergence, order, delta):
  """Canonne, Kamath & Steinke 2020, Proposition 12."""
  return (
    divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
  )


def test_steps_of_one_mechanism_are_as_many_steps_of_it():
  parts = [_part(100), _part(50, l2_clip_norm=3.0), _part(0), _part(7)]
  assert composition.valid_accountants(parts) == ("pld", "rdp")
  for accountant in ("pld", "rdp"):
    assert composition.epsilon(parts, accountant) == calibration.epsilon(
      noise_multiplier=1.2,
      sampling_probability=0.02,
      num_steps=157,
      delta=1e-5,
      accountant=accountant,
    )
  assert composition.epsilon(parts) == composition.epsilon(parts, "pld")
  assert composition.epsilon([_part(0)]) == 0.0


def test_who_may_change_a_plan_or_not_has_the_filters_for_both():
  # Looked at after one step: to go on with the first plan is a way as well.
  first = dataclasses.replace(
    _PLAN,
    num_examples=1000,
    expected_batch_size=50.0,
    num_steps=16,
    noise_multiplier=0.6,
    delta=1e-4,
  )
  later = dataclasses.replace(
    first, num_steps=2, expected_batch_size=1000.0, noise_multiplier=1.587
  )
  whole = [plan_lib.PlanUse(first, 16)]
  changed = [plan_lib.PlanUse(first, 1), plan_lib.PlanUse(later, 2)]
  # By PLD, whose delta would be spent beside that of the filters, 4.95.
  assert composition.epsilon(whole) < 5
  assert composition.guaranteed([whole, changed]) == pytest.approx(
    8.0, rel=0.01
  )


def test_a_run_is_bounded_by_the_dearest_of_its_plans():
  # 500 steps were planned, and 100 of them made before it was shortened.
  planned, way = [_part(500)], [_part(100), _part(50)]
  guaranteed = composition.guaranteed([planned, way])
  assert guaranteed == composition.epsilon(planned)
  assert guaranteed > composition.epsilon(way)
  longer = [_part(100), _part(900)]
  assert composition.guaranteed([planned, longer]) == composition.epsilon(
    longer
  )
  assert composition.guaranteed([]) == 0.0


@pytest.mark.parametrize("count", [1, 100])
@pytest.mark.parametrize("sigma", [0.6, 0.9, 1.1])
def test_noise_chosen_after_looking_adds_up_at_orders_fixed_before(
  sigma, count
):
  later = _part(60, noise_multiplier=sigma, expected_batch_size=100.0)
  best = min(
    range(2, 64),
    key=lambda a: _epsilon(500 * _divergence(_PLAN, a), a, 1e-5),
  )
  # The orders depend on the first plan alone, not on what came of it.
  assert best == 8
  shares = {2: 0.1, 3: 0.1, 4: 0.1, 6: 0.1, 8: 0.4, 12: 0.1, 20: 0.06, 40: 0.04}
  assert math.fsum(shares.values()) == pytest.approx(1)
  expected = {}
  for by_one_order, deltas in ((False, shares), (True, {best: 1.0})):
    expected[by_one_order] = min(
      _epsilon(
        count * _divergence(_PLAN, a) + 60 * _divergence(later.plan, a),
        a,
        1e-5 * share,
      )
      for a, share in deltas.items()
    )
    found = composition.epsilon(
      [_part(count), later], by_one_order=by_one_order
    )
    assert found == pytest.approx(expected[by_one_order], rel=1e-9)
  # Where noise falls, the first plan's own order comes to be the wrong one.
  if sigma == 0.6:
    assert expected[False] < expected[True] / 3


def test_it_is_no_less_than_numbers_chosen_beforehand_spend():
  parts = [_part(100), _part(60, noise_multiplier=0.9)]
  accountant = dp_accounting.pld.PLDAccountant()
  for plan, num_steps in parts:
    accountant.compose(plan.event(num_steps))
  assert composition.epsilon(parts) > accountant.get_epsilon(1e-5)


def test_losses_are_not_convolved_where_numbers_changed():
  parts = [_part(100), _part(60, noise_multiplier=0.9)]
  assert composition.accountant_of(parts) == "rdp"
  assert composition.epsilons(parts)["pld"] is None
  with pytest.raises(ValueError, match=r"accountant .*'rdp'.* got 'pld'"):
    composition.epsilon(parts, "pld")


def test_other_relations_do_not_compose():
  other = dataclasses.replace(_PLAN)
  object.__setattr__(other, "neighboring_relation", "replace_one")
  with pytest.raises(ValueError, match="one neighboring_relation"):
    composition.epsilon([_part(1), plan_lib.PlanUse(other, 1)])


def test_another_clip_norm_leaves_the_mechanism_as_it_is():
  config = dataclasses.replace(_CONFIG, l2_clip_norm=0.5)
  plan = composition.plan_after(
    config, before=_before(), spent=[_part(130)], start_step=100
  )
  # Thirty steps that were charged and lost are not had again.
  assert plan == dataclasses.replace(_PLAN, l2_clip_norm=0.5, num_steps=370)
  with pytest.raises(ValueError, match="spent"):
    composition.plan_after(
      config, before=_before(), spent=[_part(500)], start_step=450
    )


@pytest.mark.parametrize(("charged", "left"), [(0, 10), (4, 6), (5, 4), (8, 2)])
def test_turns_that_begin_anew_are_no_more_than_were_planned(charged, left):
  config = dataclasses.replace(
    _CONFIG,
    num_steps=10,
    sampling="cyclic_poisson",
    cycle_length=4,
    neighboring_relation="zero_out",
  )
  current = plan_lib.make_plan(config)
  spent = [plan_lib.PlanUse(current, charged)]
  plan = composition.plan_after(
    dataclasses.replace(config, l2_clip_norm=0.5),
    before=dataclasses.asdict(config),
    spent=spent,
    start_step=charged,
  )
  assert plan.num_steps == left
  parts = [*spent, plan_lib.PlanUse(plan, left)]
  assert composition.epsilon(parts, "rdp") <= calibration.epsilon(
    noise_multiplier=1.2,
    sampling_probability=current.sampling_probability,
    num_steps=3,
    delta=1e-5,
    accountant="rdp",
  )


def test_given_noise_is_taken_as_it_is():
  config = dataclasses.replace(_CONFIG, noise_multiplier=2.0, num_steps=700)
  plan = composition.plan_after(
    config, before=_before(), spent=[_part(130)], start_step=100
  )
  assert (plan.noise_multiplier, plan.num_steps) == (2.0, 600)


@pytest.mark.parametrize("num_examples", [10_000, 12_000])
def test_a_target_is_for_the_whole_run(num_examples):
  spent = [_part(130)]
  config = dataclasses.replace(
    _CONFIG,
    noise_multiplier=None,
    target_epsilon=3.0,
    num_examples=num_examples,
  )
  plan = composition.plan_after(
    config, before=_before(), spent=spent, start_step=100
  )
  whole = [*spent, plan_lib.PlanUse(plan, plan.num_steps)]
  assert plan.num_steps == 400
  assert plan.target_epsilon == 3.0
  assert composition.epsilon(whole) <= 3.0
  less = dataclasses.replace(
    plan, noise_multiplier=plan.noise_multiplier * (1 - 1e-4)
  )
  assert composition.epsilon([*spent, plan_lib.PlanUse(less, 400)]) > 3.0


def test_a_run_that_charged_nothing_is_planned_anew():
  config = dataclasses.replace(
    _CONFIG, noise_multiplier=None, target_epsilon=3.0
  )
  plan = composition.plan_after(
    config, before=_before(), spent=[_part(0)], start_step=0
  )
  assert plan == plan_lib.make_plan(config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_steps": 100}, r"num_steps must be more than the 100 .* got 100"),
    (
      {"noise_multiplier": None, "target_epsilon": 0.5},
      r"target_epsilon must be more than .* orders fixed before, got 0\.5",
    ),
  ],
)
def test_what_cannot_be_planned_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    composition.plan_after(
      dataclasses.replace(_CONFIG, **changes),
      before=_before(),
      spent=[_part(130)],
      start_step=100,
    )


def test_the_statement_tells_of_every_part():
  alone = composition.statement([_part(500)])
  assert alone == statement.of_plan(_PLAN)
  parts = [_part(100), _part(60, noise_multiplier=0.9)]
  text = composition.statement(parts)
  assert "100 steps that draw each" in text
  assert "noise of 1.2 times" in text
  assert "60 steps that draw each" in text
  assert "noise of 0.9 times" in text
  assert "by RDP at the best of several orders that the first settings" in text
  # The event is the same, so all holds as without a change.
  text = composition.statement([_part(100), _part(60, l2_clip_norm=3.0)])
  assert "by PLD. This holds" in text
