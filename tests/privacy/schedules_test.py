"""Schedules, turns and sizes: in the compiled step, and in what is charged."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
import dpdist
from dpdist import sampling
from dpdist.accounting import gaussian_events
from dpdist.data import arrays as arrays_lib
from dpdist.data import users
from dpdist.distributed import mesh as mesh_lib
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.tasks import per_unit
from dpdist.training import step as step_lib

_CONFIG = dpdist.PrivacyConfig(
  num_examples=400,
  expected_batch_size=40,
  num_steps=12,
  l2_clip_norm=1.0,
  target_delta=1e-5,
  noise_multiplier=2.0,
  accountant="rdp",
)


def _plan(**changes):
  return dpdist.make_plan(dataclasses.replace(_CONFIG, **changes))


_CHANGING = {
  "noise_schedule": ((4, 1.0), (9, 3.0)),
  "batch_size_schedule": ((6, 80),),
}


def test_settings_hold_from_their_step_on():
  plan = _plan(**_CHANGING)
  found = [plan.phase(step)[1:] for step in range(12)]
  assert (
    found
    == [(2.0, 40.0)] * 4
    + [(1.0, 40.0)] * 2
    + [(1.0, 80.0)] * 3
    + [(3.0, 80.0)] * 3
  )


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_composes_what_was_taken(accountant):
  plan = _plan(**_CHANGING, accountant=accountant)
  plain = _plan(accountant=accountant)
  first = lambda plan, n: plan.curve([plan.delta], n)[0]
  spent = [first(plan, n) for n in range(13)]
  assert spent == sorted(spent)
  assert spent[:5] == [first(plain, n) for n in range(5)]
  assert spent[5] > first(plain, 5)
  # Each setting's steps, whatever their order.
  counts = {(p.sigma, p.q): n for p, n in plan.steps()}
  assert counts == {(2.0, 0.1): 4, (1.0, 0.1): 2, (1.0, 0.2): 3, (3.0, 0.2): 3}


def test_one_noise_multiplier_is_calibrated_for_all_sizes():
  plan = _plan(
    noise_multiplier=None,
    target_epsilon=2.0,
    batch_size_schedule=((6, 80),),
  )
  assert 1.999 < plan.epsilon() <= 2.0
  small = _plan(noise_multiplier=None, target_epsilon=2.0)
  assert plan.noise_multiplier > small.noise_multiplier
  with pytest.raises(ValueError, match="noise_schedule must be empty with"):
    _plan(noise_multiplier=None, target_epsilon=2.0, noise_schedule=((3, 1.0),))


@pytest.mark.parametrize(
  "schedule",
  [((0, 1.0),), ((12, 1.0),), ((3, 1.0), (3, 2.0)), ((3, 0.0),), (3, 1.0), "x",
   ((3, True),), ((True, 1.0),), ((3, "1"),)],
)  # fmt: skip
def test_bad_schedules_are_named(schedule):
  with pytest.raises(ValueError, match=r"noise_schedule must be .* pairs"):
    _plan(noise_schedule=schedule)


def test_a_schedule_over_steps_that_are_no_number_names_the_steps():
  with pytest.raises(ValueError, match="num_steps must be an integer"):
    _plan(noise_schedule=((1, 2.0),), num_steps="40")


def test_a_plan_written_before_there_was_a_choice_is_the_same_plan():
  plan = _plan()
  new = {"sampling", "unit", "group_size", "noise_schedule", "cycle_length"}
  assert not new & plan.to_dict().keys()
  again = _plan(**_CHANGING)
  loaded = plan_lib.PrivacyPlan.from_dict(
    json.loads(json.dumps(again.to_dict()))
  )
  assert loaded == again
  assert loaded.fingerprint() == again.fingerprint() != plan.fingerprint()


# The compiled step.


def _step(plan):
  loss = lambda params, x, rng: (jnp.sum(params["w"] * x), None)
  return step_lib.Step(
    mechanism.make(plan, loss),
    optax.sgd(1.0),
    mesh_lib.make({"data": -1, "fsdp": 1, "model": 1}),
  )


def test_noise_and_divisor_change_at_their_step_and_nothing_recompiles():
  plan = _plan(**_CHANGING)
  step = _step(plan)
  key = mechanism.Streams(bytes(32), "").key("noise")
  size = 20_000
  state = step.init({"w": jnp.zeros(size)})
  deviations = []
  for t in range(12):
    before = np.asarray(state.params["w"])
    state, _ = step.apply(state, step.zeros(state.params), key, np.int32(t))
    deviations.append(np.std(np.asarray(state.params["w"]) - before))
  # The standard error is half a percent.
  expected = [s / b for s, b in (plan.phase(t)[1:] for t in range(12))]
  np.testing.assert_allclose(deviations, expected, rtol=0.04)
  assert step.apply._cache_size() == 1
  with pytest.raises(ValueError, match="release_index must be given"):
    step.apply(state, step.zeros(state.params), key)


def test_without_a_schedule_a_step_need_not_say_which_it_is():
  step = _step(_plan())
  state = step.init({"w": jnp.zeros(8)})
  key = mechanism.Streams(bytes(32), "").key("noise")
  more = step.zeros(state.params)
  after, _ = step.apply(step.init({"w": jnp.zeros(8)}), more, key)
  same, _ = step.apply(state, more, key, np.int32(7))
  np.testing.assert_array_equal(after.params["w"], same.params["w"])


@pytest.mark.slow
def test_a_group_is_one_gradient_in_training(tmp_path):
  config = digits.get_config()
  config.insecure_seed = 7
  config.model.width = 32
  config.privacy.update(
    num_steps=3,
    expected_batch_size=64,
    target_epsilon=None,
    noise_multiplier=1.0,
    group_size=4,
    neighboring_relation="zero_out",
    accountant="rdp",
  )
  result = dpdist.train(config, tmp_path)
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  assert ledger.plan.group_size == 4
  assert result["epsilon"] == ledger.plan.epsilon()
  ((event, count),) = ledger.plan.steps()
  assert event == gaussian_events.Replace(1.0, event.q)
  assert count == 3


def test_one_row_moves_a_groups_sum_by_two_clip_norms_at_most():
  """On eight devices, with the step's own sums."""
  source = arrays_lib.ArraySource(
    {"x": np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)}
  )
  grouped = users.in_groups(source, 4)
  assert len(grouped) == 8
  rows = grouped.read(np.arange(8))
  assert rows[users.SLOT_IS_EMPTY].sum() == 2  # The last group has two.
  np.testing.assert_array_equal(rows["x"][1], source.read(np.arange(4, 8))["x"])
  plan = _plan(group_size=4, neighboring_relation="zero_out")
  linear = lambda w, example, rng: (10 * jnp.sum(w["w"] * example["x"]), None)
  loss = per_unit.mean_over_unit(linear, empty_slot=users.SLOT_IS_EMPTY)
  step = step_lib.Step(
    mechanism.make(plan, loss),
    optax.sgd(1.0),
    mesh_lib.make({"data": -1, "fsdp": 1, "model": 1}),
  )
  params = step.init({"w": jnp.ones(5)}).params

  def total(rows):
    put = lambda x: jax.device_put(
      x, jax.NamedSharding(step.mesh, mesh_lib.EXAMPLES)
    )
    summed = step.accumulate(
      params,
      step.zeros(params),
      jax.tree.map(put, rows),
      put(np.zeros(8, bool)),
      jax.random.key(0),
      0,
    )
    return np.asarray(summed.clipped_sum["w"]).sum(0)

  before = total(rows)
  turned = {name: x.copy() for name, x in rows.items()}
  turned["x"][3, 2] = -1e3 * rows["x"][3].mean(0)
  moved = np.linalg.norm(total(turned) - before)
  # One clip norm would not do: it is twice what is accounted for one row.
  assert 1.9 < moved <= 2.0001
  missing = {name: x.copy() for name, x in rows.items()}
  missing[users.SLOT_IS_EMPTY][3, 2] = True
  assert np.linalg.norm(total(missing) - before) <= 2.0001


# What is drawn.


def _draws(plan, first_release=0, count=12):
  sampler = mechanism.Streams(bytes(32), "").sampler(plan, first_release)
  return [sampler(t) for t in range(count)]


def test_each_sampling_draws_as_its_name_says():
  fixed = {"sampling": "fixed_size", "neighboring_relation": "replace_one"}
  assert {len(x) for x in _draws(_plan(**fixed))} == {40}
  cut = {"sampling": "truncated_poisson", "truncated_batch_size": 40}
  sizes = [len(x) for x in _draws(_plan(**cut, accountant="pld"))]
  whole = [len(x) for x in _draws(_plan())]
  assert sizes == [min(40, size) for size in whole]
  assert max(whole) > 40 > min(whole)
  groups = _draws(_plan(group_size=7, neighboring_relation="zero_out"))
  assert max(max(x) for x in groups) <= 57
  assert 0 < np.mean([len(x) for x in groups]) < 12
  grown = _draws(_plan(batch_size_schedule=((6, 200),)))
  assert max(map(len, grown[:6])) < 80 < min(map(len, grown[6:]))
  for t in range(6):
    np.testing.assert_array_equal(grown[t], _draws(_plan())[t])


def test_a_schedule_of_sizes_goes_by_what_was_charged():
  plan = _plan(batch_size_schedule=((4, 200), (8, 10)))
  for first in (0, 3, 7):
    sizes = [len(x) for x in _draws(plan, first, 12 - first)]
    for t, size in enumerate(sizes, first):
      low, high = ((20, 65), (150, 250), (0, 24))[(t >= 4) + (t >= 8)]
      assert low <= size <= high


def test_private_gradients_have_the_noise_and_the_size_of_their_draw():
  plan = _plan(
    num_steps=4,
    noise_schedule=((1, 20.0), (3, 5.0)),
    batch_size_schedule=((2, 80.0),),
  )
  loss = lambda w, x: jnp.sum(w) * jnp.sum(x) * 0
  gradient_fn = dpdist.private_gradients(loss, plan=plan, seed=bytes(32))
  params, batch = jnp.zeros(4_000), jnp.zeros((1, 1))
  state = gradient_fn.init(params)
  deviations = []
  compiled = jax.jit(gradient_fn)
  for _ in range(4):
    found, state = compiled(params, batch, state)
    deviations.append(float(jnp.std(found.gradient)))
  # The standard error is a percent.
  expected = [2 / 40, 20 / 40, 20 / 80, 5 / 80]
  np.testing.assert_allclose(deviations, expected, rtol=0.06)


def test_parts_take_turns_by_what_was_charged():
  plan = _plan(
    sampling="cyclic_poisson",
    cycle_length=3,
    neighboring_relation="zero_out",
  )
  for first in (0, 4, -2):
    for t, drawn in enumerate(_draws(plan, first)):
      if t + first >= 0:
        assert set(drawn % 3) <= {(t + first) % 3}
        assert len(drawn) > 20


def test_replacing_has_twice_the_noise_of_adding():
  step = _step(_plan(sampling="fixed_size", neighboring_relation="replace_one"))
  assert (
    step.mechanism.noise_stddev == 2 * _step(_plan()).mechanism.noise_stddev
  )


# What is charged.


def _history(plan, events):
  past = history.History()
  past.apply({"kind": "writer"})
  past.apply(
    {
      "kind": "open",
      "format": history.FORMAT,
      "run": "r",
      "secret_hash": "s",
      "plan": plan.to_dict(),
      "config": {},
      "data": "d",
      "start_step": 0,
    }
  )
  for start, stop in events:
    number = len(past.branches)
    past.apply(
      {
        "kind": "branch",
        "branch": number,
        "start_step": start,
        "fingerprint": "f",
        "base": "",
      }
    )
    for step in range(start + 1, stop + 1):
      past.apply({"kind": "reserve", "branch": number, "stop_step": step})
  return past


def test_no_two_steps_of_a_run_have_the_same_release():
  plan = _plan(**_CHANGING)
  past = _history(plan, [(0, 5), (4, 6), (2, 7)])
  releases = [
    branch.release_index(step)
    for branch in past.branches
    for step in range(branch.start_step, branch.stop_step)
  ]
  assert releases == list(range(12))
  assert composition.epsilon(past.spent) == plan.epsilon()
  # A step run again under other keys does not have its old numbers again.
  assert past.branches[2].release_index(2) == 7


@pytest.mark.slow
def test_a_run_with_a_schedule_goes_on_but_not_with_other_settings(tmp_path):
  config = digits.get_config()
  config.insecure_seed = 7
  config.model.width = 32
  config.checkpoint_every = 3
  config.privacy.update(
    num_steps=6,
    expected_batch_size=64,
    target_epsilon=None,
    noise_multiplier=1.0,
    noise_schedule=((2, 2.0),),
    batch_size_schedule=((4, 100.0),),
  )
  crash = sampling.PoissonSampler.__call__
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sampling.PoissonSampler,
      "__call__",
      lambda self, t: crash(self, t) if t < 5 else 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
      dpdist.train(config, tmp_path / "run")
  again = dpdist.train(config, tmp_path / "run")
  whole = dpdist.train(config, tmp_path / "whole")
  assert again["params_sha256"] == whole["params_sha256"]
  ledger = ledger_lib.Ledger(tmp_path / "run" / "ledger")
  assert again["epsilon"] == ledger.plan.epsilon()
  assert len(ledger.plan.phases) == 3
  config.privacy.noise_multiplier = 1.5
  config.privacy.num_steps = 8
  with pytest.raises(ValueError, match="noise_schedule must be empty in a run"):
    dpdist.train(config, tmp_path / "run")
