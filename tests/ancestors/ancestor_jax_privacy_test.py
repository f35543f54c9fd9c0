"""What users of jax_privacy's JAX & Flax API could do with gradients.

Its accounting is in `accounting_test`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist.noise import noise

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("norm", [None, float("inf")])
def test_no_clipping_is_refused(norm):
  # There only together with noise or rescaling; here there is always noise.
  with pytest.raises(ValueError, match=f"l2_clip_norm must .* got {norm}"):
    dpdist.clipped_grad(lambda p, x: p * x, l2_clip_norm=norm)


@pytest.mark.parametrize(("rescale", "expected"), [(False, -3.5), (True, -1.4)])
def test_clip_and_rescale_to_unit_norm(rescale, expected):
  fn = dpdist.clipped_grad(
    lambda p, x: 0.5 * (p - x) ** 2,
    l2_clip_norm=2.5,
    rescale_to_unit_norm=rescale,
  )
  got = jax.jit(fn)(jnp.float32(2.0), jnp.array([1.0, 4.0, 7.0]))
  np.testing.assert_allclose(got.sum, expected, rtol=1e-6)
  assert fn.sensitivity() == (1.0 if rescale else 2.5)


def test_noise_is_float32_with_a_known_deviation_and_a_key_for_each_leaf():
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=100,
      expected_batch_size=10,
      num_steps=1,
      l2_clip_norm=0.5,
      target_delta=1e-5,
      noise_multiplier=3.0,
    )
  )
  loss = lambda p, x: jnp.sum(p["a"] * x) + jnp.sum(p["b"] * x)
  fn = dpdist.private_gradients(loss, plan, seed=1)
  assert fn.noise_stddev == 1.5
  params = {name: jnp.zeros(50, jnp.bfloat16) for name in "ab"}
  got, _ = jax.jit(fn)(
    params, jnp.zeros((4, 50), jnp.bfloat16), fn.init(params)
  )
  a, b = (np.asarray(got.gradient[name]) for name in "ab")
  assert a.dtype == b.dtype == np.float32
  assert np.unique([a, b]).size == 100
  drawn, _ = noise.gaussian_noise(1.5, 1).update(
    {name: jnp.zeros(50) for name in "ab"}, fn.init(params)
  )
  np.testing.assert_allclose(a, drawn["a"] / 10, rtol=1e-5)


def test_a_loss_with_network_state_rng_and_metrics():
  def loss_fn(params, network_state, rng, inputs):
    loss = params["w"] * inputs
    metrics = {"loss": loss, "inputs": inputs, "rng": jax.random.normal(rng)}
    return loss, ({"calls": network_state["calls"] + 1}, metrics)

  fn = dpdist.with_state(
    loss_fn,
    l2_clip_norm=1.0,
    aggregate={"loss": "mean", "inputs": "sum", "rng": "stack"},
  )
  got = jax.jit(fn)(
    {"w": jnp.float32(2.0)},
    {"calls": jnp.int32(4)},
    jnp.array([0.5, 1.5, -3.0, 100.0]),
    rng=jax.random.key(0),
    is_padding_example=np.array([False, False, False, True]),
  )
  np.testing.assert_allclose(got.sum["w"], 0.5 + 1 - 1)
  assert got.network_state == {"calls": 5}
  np.testing.assert_allclose(got.metrics["loss"], 2 * -1 / 3, rtol=1e-6)
  np.testing.assert_allclose(got.metrics["inputs"], -1.0)
  assert np.unique(got.metrics["rng"]).size == 4


def test_a_network_state_that_mixes_examples_is_refused():
  def loss_fn(params, network_state, rng, inputs):
    del rng
    mean = 0.9 * network_state["mean"] + 0.1 * inputs
    return params * (inputs - mean), ({"mean": mean}, {})

  fn = dpdist.with_state(loss_fn, l2_clip_norm=1.0, aggregate={})
  with pytest.raises(ValueError, match=r"network_state .*'mean'.*GroupNorm"):
    fn(1.0, {"mean": jnp.zeros(())}, jnp.ones(3), rng=jax.random.key(0))
