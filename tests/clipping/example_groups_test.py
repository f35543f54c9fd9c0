"""Groups of examples are averaged, and clipped as one."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from dpdist import clipping

pytestmark = pytest.mark.usefixtures("quick_compiles")


def _loss(params, x):
  return 0.5 * jnp.sum((params - x) ** 2)


def _batch(size):
  rng = np.random.default_rng(size)
  return jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)


@functools.cache
def _fn(norm, method):
  fn = clipping.clipped_grad(
    clipping.mean_of_group(_loss), l2_clip_norm=norm, method=method
  )
  return jax.jit(fn)


def _sum(batch, size, *, norm=1.0, padding=None, method="auto"):
  groups, is_padding = clipping.into_groups(
    batch, size, is_padding_example=padding
  )
  return _fn(norm, method)(jnp.zeros(3), groups, is_padding_example=is_padding)


@pytest.mark.parametrize("method", ["bookkeeping", "two_pass", "vmap"])
def test_the_mean_of_a_group_is_clipped(method):
  batch = 2 * _batch(8)
  means = -np.asarray(batch).reshape(4, 2, 3).mean(1)
  norms = np.linalg.norm(means, axis=1)
  assert np.any(norms > 1)
  got = _sum(batch, 2, method=method)
  np.testing.assert_allclose(got.grad_norms, norms, rtol=1e-5)
  expected = (means * np.minimum(1, 1 / norms)[:, None]).sum(0)
  np.testing.assert_allclose(got.sum, expected, rtol=1e-5)


@pytest.mark.parametrize("method", ["bookkeeping", "two_pass", "vmap"])
def test_padding_has_no_share_in_a_mean(method):
  batch = _batch(8)
  # One group of half padding, one of nothing else.
  padding = np.array([0, 0, 1, 0, 1, 1, 0, 0], bool)
  got = _sum(
    jnp.where(padding[:, None], jnp.nan, batch),
    2,
    norm=100.0,
    padding=padding,
    method=method,
  )
  x = np.asarray(batch)
  expected = -(x[:2].mean(0) + x[3] + x[6:].mean(0))
  np.testing.assert_allclose(got.sum, expected, rtol=1e-5)


def test_a_group_may_turn_over_when_one_example_is_another():
  # What a group of several costs: twice the clip norm, where one example alone
  # and missing costs it once.
  one = jnp.array([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 0], [0, 0, 0]])
  moved = [
    jnp.linalg.norm(_sum(one.at[0].set(x), 2).sum - _sum(one, 2).sum)
    for x in (1e6 * jnp.array([-1.0, 0, 0]), jnp.zeros(3))
  ]
  np.testing.assert_allclose(moved[0], 2.0, rtol=1e-5)
  assert max(moved) <= 2 * (1 + 1e-5)
  padded = _sum(
    one.at[0].set(-1e6), 2, padding=np.array([True, False, False, False])
  )
  assert float(jnp.linalg.norm(padded.sum - _sum(one, 2).sum)) < 1e-6


def test_each_example_of_a_group_has_its_own_randomness():
  loss = lambda p, x, rng: (p * x, jax.random.normal(rng))
  fn = clipping.clipped_grad(
    clipping.mean_of_group(loss, has_aux=True), l2_clip_norm=1.0, has_aux=True
  )
  groups, _ = clipping.into_groups(jnp.ones(8), 4)
  got = jax.jit(fn)(jnp.ones(()), groups, rng=jax.random.key(0))
  assert got.aux.shape == (2, 4)
  assert np.unique(got.aux).size == 8


def test_groups_on_eight_devices():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows = PartitionSpec("data")
  padding = np.arange(32) % 7 == 2

  def call(batch, padding):
    total = _sum(batch, 2, norm=0.5, padding=padding).sum
    return jax.lax.psum(total, "data")

  run = jax.shard_map(
    call, mesh=mesh, in_specs=(rows, rows), out_specs=PartitionSpec()
  )
  expected = _sum(_batch(32), 2, norm=0.5, padding=padding).sum
  got = jax.jit(run)(_batch(32), padding)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_a_group_size_is_a_count(size):
  with pytest.raises(
    ValueError, match=rf"group_size must be an integer .*{size}"
  ):
    clipping.into_groups(jnp.ones(8), size)


def test_a_group_size_divides_the_batch():
  with pytest.raises(ValueError, match=r"group_size must divide .* 8, got 3"):
    clipping.into_groups(jnp.ones(8), 3)
  with pytest.raises(ValueError, match=r"is_padding_example .*\(8,\).*\(4,\)"):
    clipping.into_groups(jnp.ones(8), 2, is_padding_example=np.zeros(4, bool))


def test_a_loss_that_is_no_number_is_refused():
  loss = clipping.mean_of_group(lambda p, x: p * x)
  fn = clipping.clipped_grad(loss, l2_clip_norm=1.0)
  groups, _ = clipping.into_groups(jnp.ones((4, 3)), 2)
  with pytest.raises(ValueError, match=r"loss_fn must .* one .*\(3,\)"):
    fn(jnp.ones(()), groups)
