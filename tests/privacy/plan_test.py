"""What a plan promises, and that it survives being written down."""

import dataclasses
import json
import math

import dp_accounting
import numpy as np
import pytest

from dpdist.accounting import accountants
from dpdist.accounting import calibration
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import statement

_CONFIG = {
  "num_examples": 1_000,
  "expected_batch_size": 80,
  "num_steps": 500,
  "l2_clip_norm": 1.5,
  "target_delta": 1e-5,
}


def _config(**changes):
  return plan_lib.PrivacyConfig(**{**_CONFIG, **changes})


def _plan(**changes):
  return plan_lib.make_plan(_config(**{"noise_multiplier": 8.0, **changes}))


def test_plan_of_a_noise_multiplier():
  plan = _plan()
  assert plan.to_dict() == {
    "num_examples": 1_000,
    "expected_batch_size": 80.0,
    "num_steps": 500,
    "l2_clip_norm": 1.5,
    "noise_multiplier": 8.0,
    "delta": 1e-5,
    "accountant": "pld",
    "neighboring_relation": "add_or_remove_one",
    "target_epsilon": None,
  }
  assert plan.sampling_probability == 0.08


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("target", [0.5, 2, 3.3])
def test_plan_of_a_target_never_overspends(target, accountant):
  plan = plan_lib.make_plan(
    _config(target_epsilon=target, accountant=accountant)
  )
  assert plan.target_epsilon == target
  assert target * (1 - 1e-4) < plan.epsilon() <= target
  assert plan.noise_multiplier == calibration.calibrate_noise_multiplier(
    target_epsilon=target,
    delta=1e-5,
    sampling_probability=0.08,
    num_steps=500,
    accountant=accountant,
  )


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_the_accountants(accountant):
  plan = _plan(accountant=accountant)
  for given, meant in ((None, 500), (500, 500), (np.int64(7), 7), (1, 1)):
    want = calibration.epsilon(
      noise_multiplier=8.0,
      sampling_probability=0.08,
      num_steps=meant,
      delta=1e-5,
      accountant=accountant,
    )
    assert plan.curve([plan.delta], given) == [want]


def test_a_run_that_stops_early_has_the_epsilon_of_its_plan():
  plan = _plan()
  assert plan.epsilon(0) == 0.0
  assert plan.epsilon(1) == plan.epsilon(499) == plan.epsilon()
  assert plan.epsilon() == plan.curve([plan.delta])[0]


def test_epsilon_bounds_a_run_that_is_stopped_after_a_look():
  # Without sampling the privacy loss after t steps is normal: drawn for a run
  # that is stopped once its odometer's reading is far below the loss.
  steps, every, sigma, delta, runs = 400, 20, 40.0, 1e-2, 50_000
  plan = _plan(
    num_examples=10,
    expected_batch_size=10,
    num_steps=steps,
    noise_multiplier=sigma,
    target_delta=delta,
    accountant="pld",
  )
  rng = np.random.default_rng(0)
  loss, running = np.zeros(runs), np.ones(runs, bool)
  failed = {"guarantee": np.zeros(runs), "reading": np.zeros(runs)}
  guarantee = plan.epsilon(every)
  for t in range(every, steps + 1, every):
    loss += every / (2 * sigma**2)
    loss += rng.normal(size=runs) * math.sqrt(every) / sigma
    reading = plan.curve([delta], t)[0]
    is_last = t == steps
    stops = running & (is_last | (np.expm1(reading - loss) < -0.25))
    running &= ~stops
    for name, epsilon in (
      ("guarantee", guarantee),
      ("reading", reading),
    ):
      excess = np.maximum(0, -np.expm1(epsilon - loss))
      failed[name][stops] = excess[stops]
  error = failed["reading"].std() / math.sqrt(runs)
  assert failed["guarantee"].mean() <= delta + 4 * error
  # A reading would not do.
  assert failed["reading"].mean() > delta + 4 * error


def test_event():
  plan = _plan()
  step = dp_accounting.PoissonSampledDpEvent(
    0.08, dp_accounting.GaussianDpEvent(8.0)
  )
  assert plan.event() == dp_accounting.SelfComposedDpEvent(step, 500)
  assert plan.event(3) == dp_accounting.SelfComposedDpEvent(step, 3)
  assert plan.event(0) == dp_accounting.NoOpDpEvent()


@pytest.mark.parametrize("num_steps", [501, -1, 2.0, True, "3", math.nan])
def test_a_plan_covers_its_own_steps_alone(num_steps):
  for method in (_plan().epsilon, _plan().event):
    with pytest.raises(ValueError, match=r"^num_steps must be .*\[0, 500\]"):
      method(num_steps)


@pytest.mark.parametrize(("group_size", "parts"), [(1, 1_000), (30, 34)])
def test_no_part_that_takes_turns_is_empty(group_size, parts):
  run = {
    "sampling": "cyclic_poisson",
    "neighboring_relation": "zero_out",
    "group_size": group_size,
    "expected_batch_size": 0.5,
    "noise_multiplier": 1.0,
  }
  _config(**run, cycle_length=parts)
  with pytest.raises(ValueError, match=rf"^cycle_length must be .* {parts},"):
    _config(**run, cycle_length=parts + 1)


def test_a_probability_that_rounds_to_more_than_one_is_one():
  run = {
    "sampling": "cyclic_poisson",
    "neighboring_relation": "zero_out",
    "noise_multiplier": 1.0,
    "target_delta": 1e-5,
    "num_steps": 5,
  }
  plan = _plan(
    **run, num_examples=21, expected_batch_size=21 / 19, cycle_length=19
  )
  assert 21 / 19 * 19 / 21 > 1
  assert plan.sampling_probability == 1
  assert plan.epsilon() == calibration.epsilon(
    noise_multiplier=1.0, sampling_probability=1.0, num_steps=1, delta=1e-5
  )


@pytest.mark.parametrize("given", [{}, {"noise_multiplier": 2.5}])
def test_exactly_one_of_target_and_noise(given):
  target = 1.25 if given else None
  with pytest.raises(ValueError, match="exactly one of") as caught:
    _config(target_epsilon=target, **given)
  message = str(caught.value)
  assert f"target_epsilon={target}" in message
  assert f"noise_multiplier={given.get('noise_multiplier')}" in message


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *[("num_examples", x) for x in (0, -1, 1e3, math.nan, True, None, "9")],
    *[("expected_batch_size", x) for x in (0, -1, math.nan, math.inf, None)],
    ("expected_batch_size", 1_000.5),
    *[("num_steps", x) for x in (0, -1, 2.0, math.nan, True, None)],
    *[("l2_clip_norm", x) for x in (0, -1, math.nan, math.inf, None, "1")],
    *[("target_delta", x) for x in (0, 1, -1e-5, 2, math.nan, None)],
    *[("target_epsilon", x) for x in (0, -1, math.nan, math.inf, True)],
    *[("noise_multiplier", x) for x in (0, -1, math.nan, math.inf, "1")],
    *[("accountant", x) for x in ("prv", "", None)],
    *[("neighboring_relation", x) for x in ("replace", "", None)],
    *[("sampling", x) for x in ("shuffled", "", None)],
    *[("truncated_batch_size", x) for x in (0, 1.5, "9", True)],
    *[("cycle_length", x) for x in (0, -1, 2.0, None)],
    *[("examples_per_user", x) for x in (0, 1.5, None)],
    *[("group_size", x) for x in (0, 2.0, None)],
    *[("unit", x) for x in ("person", "", None)],
  ],
)
def test_bad_settings_are_named(name, value):
  given = {} if name == "target_epsilon" else {"noise_multiplier": 8.0}
  with pytest.raises(ValueError, match=rf"^{name} must be ") as caught:
    _config(**{**given, name: value})
  assert str(caught.value).endswith(f"got {value!r}")


def test_the_whole_data_set_is_a_batch():
  plan = _plan(expected_batch_size=1_000)
  assert plan.sampling_probability == 1
  gaussian = dp_accounting.GaussianDpEvent(8.0)
  assert plan.event() == dp_accounting.SelfComposedDpEvent(gaussian, 500)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"expected_batch_size": 256 / 3, "l2_clip_norm": 0.1 + 0.2},
    {"noise_multiplier": None, "target_epsilon": 1 / 3, "accountant": "rdp"},
  ],
)
def test_round_trip_through_json_is_exact(changes):
  plan = _plan(**changes)
  again = plan_lib.PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
  assert again == plan
  assert again.fingerprint() == plan.fingerprint()


@pytest.mark.parametrize("name", sorted(_plan().to_dict()))
def test_a_key_is_missing(name):
  values = _plan().to_dict()
  del values[name]
  with pytest.raises(ValueError, match=rf"'{name}'\] missing"):
    plan_lib.PrivacyPlan.from_dict(values)


def test_a_key_is_unknown():
  with pytest.raises(ValueError, match=r"\['seed'\] unknown"):
    plan_lib.PrivacyPlan.from_dict({**_plan().to_dict(), "seed": 7})


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("noise_multiplier", 0.0),
    ("noise_multiplier", None),
    ("delta", 1.5),
    ("num_steps", 0),
    ("expected_batch_size", 2_000),
    ("accountant", "none"),
  ],
)
def test_a_recorded_value_is_checked(name, value):
  with pytest.raises(ValueError, match=rf"^{name} must be "):
    plan_lib.PrivacyPlan.from_dict({**_plan().to_dict(), name: value})


def test_fingerprint_is_this_one():
  # A ledger written by an older version must still be readable.
  assert _plan().fingerprint() == (
    "22996e234bc99f69a517ef7703b16139aaf52fedb8f85cce5fb0c3dbf11cb20b"
  )


def test_fingerprint_sees_every_number_but_not_how_it_was_written():
  plan = _plan()
  assert _plan(expected_batch_size=80.0).fingerprint() == plan.fingerprint()
  assert (
    _plan(num_steps=np.int64(500), l2_clip_norm=np.float64(1.5)).fingerprint()
    == plan.fingerprint()
  )
  changed = [
    dataclasses.replace(plan, **{name: value}).fingerprint()
    for name, value in {
      "num_examples": 1_001,
      "expected_batch_size": 80.5,
      "num_steps": 501,
      "l2_clip_norm": math.nextafter(1.5, 2),
      "noise_multiplier": 8.1,
      "delta": 1e-6,
      "accountant": "rdp",
      "target_epsilon": 3.0,
    }.items()
  ]
  assert len({plan.fingerprint(), *changed}) == 9


def test_plans_are_frozen():
  for record in (_plan(), _config(noise_multiplier=1)):
    with pytest.raises(dataclasses.FrozenInstanceError):
      record.num_steps = 1


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_statement(accountant):
  plan = _plan(accountant=accountant)
  text = statement.of_plan(plan)
  for fact in (
    "one example of the 1,000",
    "add_or_remove_one",
    "Poisson sampling",
    "q = 80 / 1,000 = 0.08",
    "l2 norm 1.5",
    "noise of 8.0 times",
    "500 steps",
    "delta = 1e-05",
    f"{accountant.upper()} accountant",
  ):
    assert fact in text
  stated = float(text.split("epsilon = ")[1].split()[0])
  assert plan.epsilon() <= stated < plan.epsilon() * 1.001


@pytest.mark.parametrize("sampling", ["poisson", "cyclic_poisson"])
@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
def test_a_group_is_stated_however_it_is_drawn(sampling, relation):
  plan = _plan(
    sampling=sampling,
    cycle_length=5 if sampling == "cyclic_poisson" else 1,
    group_size=4,
    neighboring_relation=relation,
    accountant="rdp",
  )
  text = statement.of_plan(plan)
  assert "every group of 4 examples" in text
  assert "averaged and clipped as one" in text
  # That of replacing is noise for twice the clip norm already.
  moved = "their sum moves by up to twice the clip norm"
  assert (moved in text) == (relation == "zero_out")


@pytest.mark.parametrize(
  ("epsilon", "stated"),
  [(0.0, "0"), (math.inf, "inf"), (1.00001, "1.001"), (123.41, "123.5")],
)
def test_a_stated_epsilon_is_rounded_up(monkeypatch, epsilon, stated):
  monkeypatch.setattr(accountants, "epsilon", lambda *_: epsilon)
  assert f"epsilon = {stated} and" in statement.of_plan(_plan())
