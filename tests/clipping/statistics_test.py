"""Statistics tell what the clipped sum really did."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from dpdist import clipping

pytestmark = pytest.mark.usefixtures("quick_compiles")


def _loss(params, x, rng):
  x = x * jax.random.bernoulli(rng, 0.7, x.shape)
  x = jnp.tanh(x @ params["layer"]["w"] + params["layer"]["b"])
  return jnp.sum(x @ params["frozen"])


def _normal(*shape):
  rng = np.random.default_rng(shape)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


_PARAMS = {
  "frozen": _normal(3, 2),
  "layer": {"b": _normal(3), "w": _normal(5, 3)},
}
_FROZEN = {"frozen": True, "layer": False}
_PADDING = np.arange(6) == 4


_BY_LAYER = {"frozen": None, "layer": {"b": 0.5, "w": 1.5}}
_CASES = {
  "flat": {"l2_clip_norm": 0.9, "method": "bookkeeping"},
  "rescaled": {
    "l2_clip_norm": 2.0,
    "rescale_to_unit_norm": True,
    "method": "two_pass",
  },
  "normalised": {"l2_clip_norm": 0.9, "normalize_gamma": 0.1, "method": "vmap"},
  "by layer": {"l2_clip_norm": _BY_LAYER},
}


@functools.cache
def _run(case):
  fn = jax.jit(clipping.clipped_grad(_loss, frozen=_FROZEN, **_CASES[case]))
  batch = _normal(6, 4, 5).at[2].set(jnp.nan)
  seen = []
  grads = clipping.unsafe_statistics(
    fn,
    _PARAMS,
    batch,
    seen.append,
    is_padding_example=_PADDING,
    rng=jax.random.key(0),
  )
  return fn, grads, seen


@pytest.mark.slow
@pytest.mark.parametrize("case", _CASES)
def test_gradients_after_clipping_are_those_that_were_summed(case):
  _, grads, seen = _run(case)
  assert [s.name for s in seen] == ["layer/b", "layer/w", ""]
  whole = seen[-1]
  for got, name in zip(seen[:-1], "bw", strict=True):
    total = grads.sum["layer"][name]
    np.testing.assert_allclose(
      jnp.sum(got.after, axis=0), total, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(got.after, whole.after["layer"][name])
    np.testing.assert_array_equal(got.before, whole.before["layer"][name])
    # Of an example that is not finite, and of padding, nothing is left.
    assert np.all(np.isnan(got.grad_norms) == (np.arange(6) == 2))
    np.testing.assert_array_equal(got.clip_factor[np.array([2, 4])], 0)
    np.testing.assert_array_equal(got.after[np.array([2, 4])], 0)
  assert whole.after["frozen"] is None


@pytest.mark.slow
def test_the_whole_is_told_last_and_in_all():
  fn, grads, (b, w, whole) = _run("flat")
  real = np.array([0, 1, 3, 5])
  np.testing.assert_allclose(
    whole.grad_norms[real], grads.grad_norms[real], rtol=1e-5
  )
  np.testing.assert_allclose(
    np.hypot(b.grad_norms, w.grad_norms)[real],
    grads.grad_norms[real],
    rtol=1e-5,
  )
  expected = np.minimum(1, 0.9 / np.asarray(grads.grad_norms)[real])
  assert np.any(expected < 1)
  np.testing.assert_allclose(whole.clip_factor[real], expected, rtol=1e-5)
  np.testing.assert_array_equal(b.clip_factor, whole.clip_factor)
  assert b.threshold == w.threshold == whole.threshold == fn.l2_clip_norm


def test_each_layer_has_its_own_factor_and_threshold():
  _, grads, (b, w, whole) = _run("by layer")
  assert (b.threshold, w.threshold, whole.threshold) == (0.5, 1.5, _BY_LAYER)
  assert whole.clip_factor["frozen"] is None
  for got, name in ((b, "b"), (w, "w")):
    np.testing.assert_array_equal(
      got.clip_factor, whole.clip_factor["layer"][name]
    )
    np.testing.assert_allclose(
      got.grad_norms, grads.grad_norms["layer"][name], rtol=1e-5
    )
  assert np.any(np.asarray(b.clip_factor) != np.asarray(w.clip_factor))


def test_a_device_does_not_speak_for_all():
  fn = jax.jit(clipping.clipped_grad(lambda p, x: p * x, l2_clip_norm=1.0))
  run = jax.shard_map(
    lambda p, x: clipping.unsafe_statistics(fn, p, x, print).sum,
    mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
    in_specs=(PartitionSpec(), PartitionSpec("data")),
    out_specs=PartitionSpec("data"),
  )
  with pytest.raises(ValueError, match=r"batch must .* divided .*data"):
    run(jnp.ones(()), jnp.ones(8))
