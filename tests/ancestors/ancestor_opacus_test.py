"""What users of Opacus's PerSampleGradientClipper could do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist import clipping

pytestmark = pytest.mark.usefixtures("quick_compiles")


def _loss(params, x):
  return jnp.sum(params["a"] * x[:2]) + jnp.sum(params["b"] * x[2:])


_PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
# Gradients of norms 5 and 12 in the layers, 13 in all; and none too long.
_BATCH = jnp.array([[3.0, 4, 0, 12], [0.6, 0, 0, 0.8]])
_LAYERS = {"a": 3.0, "b": 4.0}


def test_flat_clipping_has_one_threshold():
  fn = clipping.clipped_grad(_loss, l2_clip_norm=1.0)
  got = jax.jit(fn)(_PARAMS, _BATCH)
  np.testing.assert_allclose(got.grad_norms, [13, 1], rtol=1e-6)
  expected = _BATCH[0] / 13 + _BATCH[1]
  np.testing.assert_allclose(got.sum["a"], expected[:2], rtol=1e-6)
  np.testing.assert_allclose(got.sum["b"], expected[2:], rtol=1e-6)


def test_layers_have_their_own_and_noise_is_of_the_root_of_their_squares():
  fn = clipping.clipped_grad(_loss, l2_clip_norm=_LAYERS)
  got = jax.jit(fn)(_PARAMS, _BATCH)
  np.testing.assert_allclose(got.sum["a"], [1.8 + 0.6, 2.4], rtol=1e-6)
  np.testing.assert_allclose(got.sum["b"], [0, 4.8], rtol=1e-6)
  assert fn.sensitivity() == 5.0


@pytest.mark.parametrize("norms", [[1.0], [1.0, 1.0, 1.0], {"a": 1.0}])
def test_thresholds_must_match_the_layers(norms):
  loss = lambda p, x: _loss({"a": p[0], "b": p[1]}, x)
  params = [_PARAMS["a"], _PARAMS["b"]]
  fn = clipping.clipped_grad(loss, l2_clip_norm=norms)
  with pytest.raises(ValueError, match="l2_clip_norm must be a number or a"):
    fn(params, _BATCH)


@pytest.mark.parametrize(("reduction", "size"), [("sum", None), ("mean", 8.0)])
def test_virtual_steps_add_up_to_one(reduction, size):
  fn = clipping.clipped_grad(_loss, l2_clip_norm=1.0)
  step = clipping.VirtualStep(fn, reduction, size)
  step.add(_PARAMS, 100 * _BATCH)  # Left over from an interruption.
  step.clear()
  with pytest.raises(RuntimeError, match="nothing accumulated"):
    step.finish()
  step.add(_PARAMS, _BATCH[:1])
  step.add(_PARAMS, _BATCH[1:], l2_clip_norm=0.5)
  got = step.finish()
  expected = (_BATCH[0] / 13 + _BATCH[1] / 2) / (size or 1)
  np.testing.assert_allclose(got.value["b"], expected[2:], rtol=1e-6)
  assert got.sensitivity == 1.0 / (size or 1)


def test_frozen_layers_are_in_no_norm_no_sum_and_no_noise():
  fn = clipping.clipped_grad(
    _loss, l2_clip_norm=1.0, frozen=lambda path: path == "b"
  )
  got = fn(_PARAMS, _BATCH)
  np.testing.assert_allclose(got.grad_norms, [5, 0.6], rtol=1e-6)
  np.testing.assert_allclose(got.sum["a"], [1.2, 0.8], rtol=1e-6)
  assert got.sum["b"] is None


def test_the_hook_sees_every_layer_and_then_the_whole():
  fn = clipping.clipped_grad(_loss, l2_clip_norm=_LAYERS)
  seen = []
  clipping.unsafe_statistics(fn, _PARAMS, _BATCH, seen.append)
  assert [s.name for s in seen] == ["a", "b", ""]
  assert [s.threshold for s in seen] == [3.0, 4.0, _LAYERS]
  np.testing.assert_allclose(seen[0].clip_factor, [0.6, 1], rtol=1e-6)
  np.testing.assert_allclose(seen[1].clip_factor, [1 / 3, 1], rtol=1e-6)
  np.testing.assert_allclose(seen[1].grad_norms, [12, 0.8], rtol=1e-6)
  np.testing.assert_allclose(seen[2].grad_norms, [13, 1], rtol=1e-6)
  np.testing.assert_allclose(seen[0].before, _BATCH[:, :2])
  np.testing.assert_allclose(
    seen[0].after, [[1.8, 2.4], [0.6, 0]], rtol=1e-6, atol=1e-7
  )
