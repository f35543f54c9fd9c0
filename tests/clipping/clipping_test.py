"""Clipped sums against published numbers and a float64 closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist import clipping


def _square_loss(params, example):
  return 0.5 * (params - example) ** 2


@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
@pytest.mark.parametrize(
  ("l2_clip_norm", "rescale", "expected"),
  [(2.5, False, -3.5), (2.5, True, -1.4), (10.0, False, -6.0)],
)
def test_published_sums(l2_clip_norm, rescale, expected, microbatch_size):
  fn = jax.jit(
    clipping.clipped_grad(
      _square_loss,
      l2_clip_norm=l2_clip_norm,
      rescale_to_unit_norm=rescale,
      microbatch_size=microbatch_size,
    )
  )
  got = fn(jnp.float32(2.0), jnp.array([1.0, 4.0, 7.0]))
  np.testing.assert_allclose(got.sum, expected, rtol=1e-6)
  np.testing.assert_allclose(got.grad_norms, [1, 2, 5], rtol=1e-6)
  np.testing.assert_allclose(got.loss, [0.5, 2, 12.5], rtol=1e-6)
  assert got.aux is None


def test_published_quadratic_of_a_vector():
  # (a.x - 4)^2 at a = (3, -2), x = (1, 2): the raw gradient is (-10, -20).
  loss = lambda a, x: (a @ x - 4) ** 2
  a, batch = jnp.array([3.0, -2.0]), jnp.array([[1.0, 2.0]])
  clipped = jax.jit(clipping.clipped_grad(loss, l2_clip_norm=1.0))(a, batch).sum
  np.testing.assert_allclose(clipped, [-0.44721362, -0.89442724], rtol=1e-6)
  rescaled = jax.jit(
    clipping.clipped_grad(loss, l2_clip_norm=100.0, rescale_to_unit_norm=True)
  )(a, batch).sum
  np.testing.assert_allclose(rescaled, [-0.1, -0.2], rtol=1e-6)


def test_per_layer_clipping_takes_a_norm_for_each_group():
  loss = lambda p, x: jnp.sum(p["a"] * x[0]) + jnp.sum(p["b"] * x[1])
  fn = clipping.clipped_grad(loss, l2_clip_norm={"a": 1.0, "b": 15.0})
  params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
  batch = (jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 10.0]]))
  got = jax.jit(fn)(params, batch)
  np.testing.assert_allclose(got.sum["a"], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_allclose(got.sum["b"], [0.0, 10.0], rtol=1e-6)
  np.testing.assert_allclose(got.grad_norms["a"], [5.0], rtol=1e-6)
  np.testing.assert_allclose(fn.sensitivity(), np.sqrt(226), rtol=1e-12)


def test_sensitivity_of_each_relation():
  fn = clipping.clipped_grad(_square_loss, l2_clip_norm=2.5)
  assert fn.sensitivity() == 2.5
  assert fn.sensitivity("add_or_remove_one") == 2.5
  assert fn.sensitivity("zero_out") == 2.5
  assert fn.sensitivity("replace_one") == 5.0
  unit = clipping.clipped_grad(
    _square_loss, l2_clip_norm=2.5, rescale_to_unit_norm=True
  )
  assert unit.sensitivity("replace_one") == 2.0
  with pytest.raises(ValueError, match=r"neighboring_relation.*'swap'"):
    fn.sensitivity("swap")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_nonfinite_example_contributes_exactly_zero(bad, microbatch_size):
  fn = jax.jit(
    clipping.clipped_grad(
      _square_loss, l2_clip_norm=1.0, microbatch_size=microbatch_size
    )
  )
  params = jnp.zeros(())
  got = fn(params, jnp.array([0.25, bad, -3.0, 0.5])).sum
  without = fn(params, jnp.array([0.25, 0.0, -3.0, 0.5])).sum
  assert np.asarray(got).tobytes() == np.asarray(without).tobytes()


def test_a_gradient_whose_norm_overflows_contributes_exactly_zero():
  loss = lambda p, x: jnp.sum(p * x)
  fn = jax.jit(clipping.clipped_grad(loss, l2_clip_norm=1.0))
  got = fn(jnp.zeros(2), jnp.array([[0.25, 0.5], [3e38, 3e38]])).sum
  np.testing.assert_array_equal(got, [0.25, 0.5])


def test_a_group_that_is_not_finite_drops_the_example_from_all_groups():
  loss = lambda p, x: p["a"] * x[0] + p["b"] * x[1]
  fn = jax.jit(clipping.clipped_grad(loss, l2_clip_norm={"a": 1.0, "b": 1.0}))
  params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
  got = fn(params, (jnp.array([0.5, 0.5]), jnp.array([0.5, jnp.nan])))
  assert float(got.sum["a"]) == 0.5
  assert float(got.sum["b"]) == 0.5


def test_padding_contributes_exactly_zero_whatever_it_holds():
  fn = jax.jit(clipping.clipped_grad(_square_loss, l2_clip_norm=1.0))
  is_padding_example = jnp.array([False, True, False, True])

  def total(a, b):
    return np.asarray(
      fn(
        jnp.zeros(()),
        jnp.array([0.25, a, -3.0, b]),
        is_padding_example=is_padding_example,
      ).sum
    ).tobytes()

  assert total(np.nan, np.inf) == total(0.0, 0.0) == total(5.0, 1e30)


def test_zero_gradients_stay_zero():
  fn = jax.jit(clipping.clipped_grad(_square_loss, l2_clip_norm=1.0))
  assert float(fn(jnp.zeros(()), jnp.zeros(3)).sum) == 0.0


def test_sum_and_norms_are_float32_for_a_bfloat16_model():
  fn = jax.jit(clipping.clipped_grad(_square_loss, l2_clip_norm=1.0))
  # A bfloat16 sum of a thousand ones stops at 256.
  got = fn(jnp.zeros((), jnp.bfloat16), jnp.full(1000, -1.0, jnp.bfloat16))
  assert got.sum.dtype == jnp.float32
  assert got.grad_norms.dtype == jnp.float32
  assert float(got.sum) == 1000.0


def test_each_example_gets_its_own_randomness():
  loss = lambda p, x, rng: p * x * jax.random.normal(rng)
  fn = jax.jit(clipping.clipped_grad(loss, l2_clip_norm=1e6))
  got = fn(jnp.ones(()), jnp.ones(64), rng=jax.random.key(0))
  assert np.unique(got.loss).size == 64


def test_given_keys_are_used_as_they_are():
  loss = lambda p, x, rng: p * x * jax.random.normal(rng)
  fn = jax.jit(clipping.clipped_grad(loss, l2_clip_norm=1e6, microbatch_size=2))
  keys = jax.random.split(jax.random.key(3), 4)
  got = fn(jnp.ones(()), jnp.ones(4), rng=keys)
  np.testing.assert_allclose(
    got.loss, [jax.random.normal(key) for key in keys], rtol=1e-6
  )


def test_aux_is_stacked_in_order():
  loss = lambda p, x: (p * x, {"x": x})
  fn = jax.jit(
    clipping.clipped_grad(
      loss, l2_clip_norm=1.0, has_aux=True, microbatch_size=2
    )
  )
  got = fn(jnp.ones(()), jnp.arange(6.0))
  np.testing.assert_array_equal(got.aux["x"], np.arange(6.0))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"l2_clip_norm": 0.0}, r"l2_clip_norm .* 0\.0"),
    ({"l2_clip_norm": -1.0}, r"l2_clip_norm .* -1\.0"),
    ({"l2_clip_norm": np.nan}, "l2_clip_norm .* nan"),
    ({"l2_clip_norm": np.inf}, "l2_clip_norm .* inf"),
    ({"l2_clip_norm": 1e-20}, "l2_clip_norm .* 1e-20"),
    ({"l2_clip_norm": "1"}, "l2_clip_norm .* '1'"),
    ({"l2_clip_norm": {}}, "l2_clip_norm .*{}"),
    ({"l2_clip_norm": {"a": 1.0, "b": 0.0}}, r"l2_clip_norm .* 0\.0"),
    ({"l2_clip_norm": 1.0, "method": "magic"}, "method .* 'magic'"),
    ({"l2_clip_norm": 1.0, "platform": "npu"}, "platform .* 'npu'"),
    ({"l2_clip_norm": 1.0, "microbatch_size": 0}, "microbatch_size .* 0"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    clipping.clipped_grad(_square_loss, **arguments)


def test_bad_calls_are_named():
  fn = jax.jit(
    clipping.clipped_grad(_square_loss, l2_clip_norm=1.0, microbatch_size=2)
  )
  zero = jnp.zeros(())
  with pytest.raises(ValueError, match=r"microbatch_size .* 3.* 2"):
    fn(zero, jnp.ones(3))
  with pytest.raises(ValueError, match=r"batch must .*\(0,\)"):
    fn(zero, jnp.ones(0))
  with pytest.raises(ValueError, match=r"is_padding_example .*\(2,\)"):
    fn(zero, jnp.ones(4), is_padding_example=jnp.zeros(2, bool))
  with pytest.raises(ValueError, match=r"loss_fn must return one .*\(2,\)"):
    fn(zero, jnp.ones((4, 2)))
  with pytest.raises(ValueError, match="rng must be typed"):
    fn(zero, jnp.ones(4), rng=jax.random.PRNGKey(0))
  groups = jax.jit(clipping.clipped_grad(_square_loss, l2_clip_norm={"a": 1.0}))
  with pytest.raises(ValueError, match=r"l2_clip_norm .* prefix"):
    groups({"b": zero}, jnp.ones(4))


@pytest.mark.parametrize("method", ["bookkeeping", "two_pass", "vmap"])
def test_a_batch_may_be_a_constant_of_the_program(method):
  loss = lambda p, x: jnp.sum(jnp.tanh(x @ p))
  fn = clipping.clipped_grad(loss, l2_clip_norm=1.0, method=method)
  params, batch = np.ones((4, 2), np.float32), np.ones((3, 4), np.float32)
  got = jax.jit(lambda params: fn(params, batch).sum)(params)
  np.testing.assert_array_equal(got, jax.jit(fn)(params, batch).sum)
