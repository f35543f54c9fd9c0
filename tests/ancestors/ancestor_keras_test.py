"""What users of jax_privacy's DPKerasConfig could do, with its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist import clipping
from dpdist.noise import noise

pytestmark = pytest.mark.usefixtures("quick_compiles")


def _config(**changes):
  given = {
    "epsilon": 1000.0,
    "delta": 1e-5,
    "clipping_norm": 1.0,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "train_steps": 2,
    "train_size": 40,
    "noise_multiplier": 1.0,
  }
  return dpdist.DPConfig(**{**given, **changes})


def _loss(a, x):
  return (a @ x - 4) ** 2


@pytest.mark.parametrize(
  ("norm", "rescale", "expected"),
  [
    (1.0, False, (-0.44721362, -0.89442724)),
    (100.0, False, (-10, -20)),
    (100.0, True, (-0.1, -0.2)),
  ],
)
def test_gradient_of_a_quadratic(norm, rescale, expected):
  config = _config(clipping_norm=norm, rescale_to_unit_norm=rescale)
  fn = dpdist.private_gradients(
    _loss, config.make_plan(), seed=1, **config.clipping_options()
  )
  a, x = jnp.array([3.0, -2.0]), jnp.array([[1.0, 2.0]])
  state = fn.init(a)
  got, _ = jax.jit(fn)(a, x, state)
  drawn, _ = noise.gaussian_noise(1.0 if rescale else norm, 1).update(
    jnp.zeros(2), state
  )
  # Over the effective, expected batch; the one drawn was of one example.
  total = got.gradient * config.effective_batch_size - drawn
  np.testing.assert_allclose(total, expected, atol=2e-7 * norm + 1e-6)


def test_an_update_is_one_draw_whatever_its_mini_batches():
  config = _config(batch_size=4, gradient_accumulation_steps=5)
  plan = config.make_plan()
  assert plan.num_steps == config.train_steps
  assert plan.expected_batch_size == config.effective_batch_size == 20
  draw = dpdist.PoissonSampler(
    num_examples=plan.num_examples,
    sampling_probability=plan.sampling_probability,
    seed=3,
  )(0)
  assert len(draw) > config.batch_size

  # As if each example's gradient were a unit of its own: how often it came.
  counts = clipping.clipped_grad(lambda p, x: p[x], **config.clipping_options())
  step = clipping.VirtualStep(counts)
  for start in range(0, len(draw), config.batch_size):
    part = jnp.asarray(draw[start : start + config.batch_size], jnp.int32)
    step.add(jnp.zeros(plan.num_examples), part)
  total = np.asarray(step.finish().value)
  np.testing.assert_array_equal(np.flatnonzero(total), draw)
  np.testing.assert_array_equal(total[draw], 1)


def test_training_past_the_last_step_is_refused():
  config = _config()
  fn = dpdist.private_gradients(_loss, config.make_plan(), seed=1)
  a, x = jnp.zeros(2), jnp.ones((4, 2))
  state = fn.init(a)
  compiled = jax.jit(fn)
  for _ in range(config.train_steps):
    _, state = compiled(a, x, state)
  with pytest.raises(ValueError, match=r"last step, 2, got 2 draws"):
    fn(a, x, state)


def test_a_noise_multiplier_that_overspends_is_refused():
  with pytest.raises(ValueError, match=r"noise_multiplier .* epsilon=0\.01"):
    _config(epsilon=0.01)
