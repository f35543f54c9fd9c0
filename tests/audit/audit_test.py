"""Audits of the compiled, sharded step: they bite, and never too much.

At a confidence of 95 % a right step's bound is above the claim in at most one
seed of twenty; seeds are fixed, so that nothing here is left to chance. Against
steps that are broken the bound must be above the claim, and against the right
one above half of it: with these numbers of trials each fails for fewer than one
seed in a thousand.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
import dpdist
from dpdist import config as config_lib
from dpdist import sampling
from dpdist.audit import audit
from dpdist.audit import bounds
from dpdist.audit import canaries
from dpdist.privacy import plan as plan_lib
from dpdist.sampling import poisson
from dpdist.tasks import parts

pytestmark = pytest.mark.usefixtures("quick_compiles")

_UNITS = 400


def _config(**privacy):
  config = digits.get_config()
  config.model.width = 48
  config.privacy.update(
    {
      "num_examples": _UNITS,
      "expected_batch_size": _UNITS,
      "num_steps": 2,
      "target_epsilon": None,
      "noise_multiplier": 1.5,
      "target_delta": 1e-5,
      **privacy,
    }
  )
  return config


@functools.cache
def _program(name="entry", fsdp=1):
  config = _config()
  if name == "sampled":
    # RDP's profile takes no time, and is far from tight.
    config = _config(
      expected_batch_size=_UNITS // 4,
      num_steps=4,
      noise_multiplier=0.6,
      accountant="rdp",
    )
  if name == "example":
    config = _config(num_steps=1, noise_multiplier=0.3)
  if name == "exchanged":
    config = _config(neighboring_relation="replace_one")
  config.mesh.fsdp = fsdp
  config.data.prefetch = 0
  if name == "frozen":
    given = parts.of(task=_adapted())
    return canaries.prepare(config, parts=given)
  return canaries.prepare(
    config, canary="example" if name == "example" else "entry"
  )


def _adapted():
  """A frozen layer that is read from disk, and a trained one beside it."""
  shapes = {"base": (64, 10), "adapter": (64, 10)}
  return dpdist.tasks.classification(
    (
      lambda key, x: {name: jnp.ones(shape) for name, shape in shapes.items()},
      lambda params, x: x.reshape(-1) @ (params["base"] + params["adapter"]),
    ),
    pretrained=lambda: {"base": np.ones((64, 10), np.float32)},
    trainable="adapter",
  )


def _changed(program, **changes):
  """With a mechanism that is not the plan's."""
  bound = program.step.mechanism
  norm = changes.pop("l2_clip_norm", None)
  if norm is not None:
    changes["clipped_grad"] = dataclasses.replace(
      bound.clipped_grad, l2_clip_norm=norm
    )
  step = dataclasses.replace(
    program.step, mechanism=dataclasses.replace(bound, **changes)
  )
  # The half that knows nothing of the change is not compiled again.
  same = "apply" if norm is not None else "accumulate"
  step.__dict__[same] = getattr(program.step, same)
  return program._replace(step=step)


def _bites(result):
  claimed = result.epsilon_claimed
  return claimed / 2 < result.epsilon_lower_bound <= claimed


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_right_step_shows_more_than_half_of_its_claim(seed):
  result = audit.audit(_program(), num_trials=2000, seed=seed)
  assert _bites(result)
  assert not result.is_refuted


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "fsdp"), [("entry", 4), ("exchanged", 1), ("frozen", 1)]
)
def test_so_it_does_with_other_parameters_and_units(name, fsdp):
  assert _bites(audit.audit(_program(name, fsdp), num_trials=2000, seed=1))


@pytest.mark.slow
def test_so_it_does_one_at_a_time_with_a_gradient_of_the_model():
  result = audit.audit(_program("example"), num_trials=100, seed=1)
  assert (result.num_runs, result.num_canaries) == (100, 1)
  assert _bites(result)


def test_one_run_shows_less_and_never_too_much():
  for seed in range(5):
    result = audit.audit(_program(), mode="one_run", seed=seed)
    assert result.num_canaries == _UNITS
    assert 0.1 < result.epsilon_lower_bound / result.epsilon_claimed < 1


@pytest.mark.parametrize(
  "changes",
  [
    {"noise_stddev": 0.5 * 1.5 * 0.1},  # Half of the noise.
    pytest.param(
      {"noise_stddev": 1.5 * 0.1 / np.sqrt(8)},  # A device's part of it.
      marks=pytest.mark.slow,
    ),
    {"l2_clip_norm": 1e3},  # No clip.
  ],
)
def test_a_broken_mechanism_is_refuted(changes):
  program = _changed(_program(), **changes)
  assert audit.audit(program, num_trials=2000, seed=1).is_refuted


@pytest.mark.slow
def test_beside_frozen_parameters_only_trained_ones_are_canaries():
  program = _program("frozen")
  assert program.num_entries == 64 * 10
  broken = _changed(program, l2_clip_norm=1e3)
  assert audit.audit(broken, num_trials=2000, seed=1).is_refuted


@pytest.mark.slow
def test_a_sampler_that_draws_more_than_it_says_is_refuted(monkeypatch):
  right = audit.audit(_program("sampled"), num_trials=2000, seed=1)
  assert 0.3 < right.epsilon_lower_bound / right.epsilon_claimed < 1
  everyone = sampling.PoissonSampler(
    num_examples=_UNITS, sampling_probability=1.0, seed=1
  )
  make = lambda *args, **kwargs: everyone
  monkeypatch.setattr(poisson.Poisson, "make", make)
  assert audit.audit(_program("sampled"), num_trials=2000, seed=1).is_refuted


def _guesses(n=200):
  """Scores that tell something, all different, of canaries that are in."""
  rng = np.random.default_rng(5)
  is_in = rng.integers(0, 2, n).astype(bool)
  return is_in + rng.normal(size=n), is_in


def _listen(monkeypatch, owner, name):
  """Notes what a function is called with, and what it gives."""
  calls, inner = [], getattr(owner, name)

  def note(*args, **kwargs):
    found = inner(*args, **kwargs)
    calls.append((args, kwargs, found))
    return found

  monkeypatch.setattr(owner, name, note)
  return calls


def test_what_all_bounds_may_miss_is_no_more_than_what_is_said(monkeypatch):
  plan = plan_lib.make_plan(config_lib.privacy_config(_config()))
  by_rates = _listen(monkeypatch, bounds, "clopper_pearson")
  by_plan = _listen(monkeypatch, audit, "trade_off")
  found = audit._worst_case(plan, 1, *_guesses(), 0.9)
  # The last is the one that is told; those before it choose the threshold.
  told = {
    "clopper_pearson": (by_rates[-1][1]["confidence"], by_rates[-1][2]),
    "trade_off": (by_plan[-1][0][-1], by_plan[-1][2]),
  }
  assert {name: bound for name, (_, bound) in told.items()} == found
  missed = sum(1 - confidence for confidence, _ in told.values())
  assert missed <= (1 - 0.9) * (1 + 1e-9)


def test_no_score_that_chooses_a_threshold_is_counted_at_it(monkeypatch):
  plan = plan_lib.make_plan(config_lib.privacy_config(_config()))
  chosen = _listen(monkeypatch, bounds, "best_threshold")
  counted = _listen(monkeypatch, bounds, "count")
  audit._worst_case(plan, 1, *_guesses(), 0.9)
  ((chose_by, _, threshold),) = chosen
  told = [args for args, *_ in counted if args[2] == threshold][-1]
  assert len(set(told[0])) == 100
  assert not set(told[0]) & set(chose_by[0])


def test_one_run_pays_for_each_of_its_canaries(monkeypatch):
  plan = plan_lib.make_plan(config_lib.privacy_config(_config()))
  calls = _listen(monkeypatch, bounds, "one_run")
  scores, is_in = _guesses()
  audit._bound_of_guesses(plan, scores, is_in, 20, 0.9)
  ((_, given, _),) = calls
  assert given["num_canaries"] == len(scores)
  # The surest, by their scores alone.
  surest = np.sort(np.abs(scores))[-20]
  is_right = (scores > 0) == is_in
  assert given["num_guesses"] == 20
  assert given["num_correct"] == np.sum(is_right[np.abs(scores) >= surest])


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"mode": "best_case"}, r"mode must be one of .* got 'best_case'"),
    ({"num_trials": 1}, "num_trials must be an integer >= 2, got 1"),
    ({"num_steps": 3}, r"num_steps must be an integer in \[1, 2\], got 3"),
    ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
    ({"canaries_per_run": 401}, "canaries_per_run must be at most 400"),
    (
      {"mode": "one_run", "num_trials": 401},
      "num_trials must be at most 400",
    ),
  ],
)
def test_what_cannot_be_audited_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    audit.audit(_program(), **settings)


def test_a_config_that_cannot_be_audited_is_refused():
  with pytest.raises(ValueError, match=r"examples_per_user must be 1 .* got 2"):
    canaries.prepare(_config(examples_per_user=2))
  with pytest.raises(ValueError, match=r"canary must be one of .* got 'bird'"):
    canaries.prepare(_config(), canary="bird")


def test_what_private_statistics_cost_is_not_claimed_of_the_step():
  """Canaries see no statistics, and a fault could hide in that much more."""
  program = _program()
  plan = dataclasses.replace(program.plan, statistics_noise_multiplier=0.2)
  paid = program._replace(
    experiment=dataclasses.replace(program.experiment, plan=plan)
  )
  plain, other = (
    audit.audit(each, num_trials=200, seed=0) for each in (program, paid)
  )
  assert plan.epsilon() > 2 * program.plan.epsilon()
  assert other.epsilon_claimed == plain.epsilon_claimed
  assert other.epsilon_lower_bound == plain.epsilon_lower_bound
