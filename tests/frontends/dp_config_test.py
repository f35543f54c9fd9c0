"""The short way to a plan."""

import pytest

import dpdist
from tests.support import without_jax

_GOOD = {
  "epsilon": 2.0,
  "delta": 1e-6,
  "clipping_norm": 1.5,
  "batch_size": 32,
  "gradient_accumulation_steps": 8,
  "train_steps": 10,
  "train_size": 1_000,
}


def _config(**changes):
  return dpdist.DPConfig(**{**_GOOD, **changes})


def test_a_plan_is_of_updates_and_effective_batches():
  config = _config()
  assert config.effective_batch_size == 256
  plan = config.make_plan()
  assert plan.expected_batch_size == 256
  assert plan.num_steps == 10
  assert plan.num_examples == 1_000
  assert plan.l2_clip_norm == 1.5
  assert plan.delta == 1e-6
  assert plan.target_epsilon == 2.0
  assert 1.9 < plan.epsilon() <= 2.0
  # As many examples in one mini-batch, or in many, are the same plan.
  other = _config(batch_size=256, gradient_accumulation_steps=1)
  assert other.make_plan() == plan


def test_a_given_noise_multiplier_may_not_overspend_at_all():
  least = _config().make_plan().noise_multiplier
  plan = _config(noise_multiplier=least).make_plan()
  assert plan.noise_multiplier == least
  assert plan.epsilon() <= 2.0
  with pytest.raises(
    ValueError, match=r"noise_multiplier .* epsilon=2\.0, got .* spend 2\.0"
  ):
    _config(noise_multiplier=least * (1 - 1e-5))


def test_to_privacy_config_is_what_the_plan_is_made_of():
  config = _config()
  assert dpdist.make_plan(config.to_privacy_config()) == config.make_plan()


def test_options_are_those_of_clipped_grad():
  config = _config(rescale_to_unit_norm=True, microbatch_size=4)
  fn = dpdist.clipped_grad(lambda p, x: p * x, **config.clipping_options())
  assert fn.l2_clip_norm == 1.5
  assert fn.rescale_to_unit_norm
  assert fn.microbatch_size == 4


def test_repr_has_no_secret():
  text = repr(_config(seed=918273))
  assert "918273" not in text
  assert "clipping_norm=1.5" in text


def test_it_needs_no_jax():
  given = {**_GOOD, "noise_multiplier": 20.0}
  code = f"import dpdist; dpdist.DPConfig(**{given}).make_plan()"
  done = without_jax.run(code)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    *(
      ({name: bad}, rf"^{name} must be .*got {bad}")
      for name in (*_GOOD, "noise_multiplier", "microbatch_size")
      for bad in (0, -1, True)
    ),
    *(
      ({name: 1.5}, rf"^{name} must be an integer >= 1, got 1\.5")
      for name in ("batch_size", "train_steps", "train_size")
    ),
    ({"epsilon": float("inf")}, r"^epsilon must be finite .*inf"),
    ({"clipping_norm": float("nan")}, r"^clipping_norm must be .*nan"),
    ({"clipping_norm": None}, r"^clipping_norm must be .*None"),
    ({"delta": 1}, r"^delta must be in \(0, 1\).* private, got 1"),
    ({"seed": "x"}, r"^seed must be an integer >= 0, got 'x'"),
    ({"rescale_to_unit_norm": 1}, r"^rescale_to_unit_norm .* False, got 1"),
    ({"train_size": 31}, r"^batch_size must be .*train_size=31, got 32"),
    ({"train_size": 255}, r"^effective_batch_size .*train_size=255, got 256"),
    ({"microbatch_size": 33}, r"^microbatch_size .*batch_size=32, got 33"),
  ],
)
def test_bad_numbers_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    _config(**changes)


def test_batches_are_drawn_as_they_are_accounted():
  plan = _config(poisson_sampling_in_fit=False).make_plan()
  assert plan.sampling == "fixed_size"
  assert plan.neighboring_relation == "replace_one"
  poisson = _config().make_plan()
  assert poisson.sampling == "poisson"
  assert plan.noise_multiplier != poisson.noise_multiplier
