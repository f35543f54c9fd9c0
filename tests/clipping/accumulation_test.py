"""Several mini-batches are one logical batch."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from dpdist import clipping

pytestmark = pytest.mark.usefixtures("quick_compiles")


def _loss(params, x):
  return 0.5 * jnp.sum((params["w"] - x) ** 2) * params["scale"]


_PARAMS = {"w": jnp.zeros(3), "scale": jnp.float32(1.0)}
_FN = clipping.clipped_grad(
  _loss, l2_clip_norm=1.0, frozen={"w": False, "scale": True}
)


# One object, since each has its own compiled functions; empty between tests.
_STEP = clipping.VirtualStep(_FN)
_WHOLE = jax.jit(_FN)


def _batch(size, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)


def test_parts_of_a_batch_are_the_batch():
  step, batch = _STEP, _batch(8)
  is_padding_example = np.arange(8) == 5
  for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
    step.add(_PARAMS, batch[part], is_padding_example=is_padding_example[part])
  assert step.num_added == 3
  got = step.finish()
  whole = _WHOLE(_PARAMS, batch, is_padding_example=is_padding_example).sum
  np.testing.assert_allclose(got.value["w"], whole["w"], rtol=1e-5)
  assert got.value["scale"] is None
  assert got.sensitivity == 1.0


def test_a_mean_is_over_the_expected_batch():
  step = clipping.VirtualStep(_FN, "mean", expected_batch_size=10)
  step.add(_PARAMS, _batch(4))
  got = step.finish("replace_one")
  whole = _WHOLE(_PARAMS, _batch(4)).sum
  np.testing.assert_allclose(got.value["w"], whole["w"] / 10, rtol=1e-6)
  assert got.sensitivity == 0.2


def test_different_norms_combine_by_maximum():
  step, batch = _STEP, 100 * _batch(2)
  step.add(_PARAMS, batch[:1], l2_clip_norm=0.5)
  step.add(_PARAMS, batch[1:], l2_clip_norm={"w": 3.0, "scale": None})
  step.add_nothing(_PARAMS)
  got = step.finish()
  assert got.sensitivity == 3.0
  units = batch / jnp.linalg.norm(batch, axis=1, keepdims=True)
  expected = -(0.5 * units[0] + 3.0 * units[1])
  np.testing.assert_allclose(got.value["w"], expected, rtol=1e-5)


def test_a_norm_counts_whether_or_not_anybody_was_drawn_with_it():
  """Or the sensitivity, and with it the noise, would tell of the draw."""
  for somebody in range(1, 8):
    for i, norm in enumerate((0.5, 3.0, 2.0)):
      if somebody >> i & 1:
        _STEP.add(_PARAMS, _batch(1), l2_clip_norm=norm)
      else:
        _STEP.add_nothing(_PARAMS, l2_clip_norm=norm)
    assert _STEP.finish("replace_one").sensitivity == 6.0


def test_an_empty_draw_is_zero_with_the_sensitivity_of_any_other():
  step = _STEP
  step.add_nothing(jax.eval_shape(lambda: _PARAMS))
  got = step.finish()
  np.testing.assert_array_equal(got.value["w"], np.zeros(3))
  assert got.value["scale"] is None
  assert got.sensitivity == 1.0


def test_nothing_is_left_after_the_end():
  step = _STEP
  for end in (step.finish, step.clear):
    step.add(_PARAMS, _batch(4))
    end()
    assert step.num_added == 0
    with pytest.raises(RuntimeError, match=r"finish .* add.*add_nothing"):
      step.finish()
  step.add(_PARAMS, _batch(2, seed=1))
  expected = _WHOLE(_PARAMS, _batch(2, seed=1)).sum["w"]
  np.testing.assert_allclose(step.finish().value["w"], expected, rtol=1e-6)


def test_what_fails_adds_nothing():
  step = _STEP
  step.add(_PARAMS, _batch(2))
  with pytest.raises(ValueError, match="batch must hold"):
    step.add(_PARAMS, _batch(0))
  with pytest.raises(ValueError, match=r"params must be like .*\(3,\).*\(4,\)"):
    step.add({**_PARAMS, "w": jnp.zeros(4)}, _batch(2))
  with pytest.raises(ValueError, match="params must be like"):
    step.add_nothing({**_PARAMS, "w": [jnp.zeros(3)]})
  with pytest.raises(ValueError, match=r"l2_clip_norm .* 0\.0"):
    step.add(_PARAMS, _batch(2), l2_clip_norm=0.0)
  with pytest.raises(ValueError, match="neighboring_relation"):
    step.finish("swap")
  assert step.num_added == 1
  expected = _WHOLE(_PARAMS, _batch(2)).sum["w"]
  np.testing.assert_allclose(step.finish().value["w"], expected, rtol=1e-6)


def test_inside_shard_map():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows = PartitionSpec("data")

  def call(params, one, two):
    step = clipping.VirtualStep(_FN)
    step.add(params, one)
    step.add(params, two)
    return jax.lax.psum(step.finish().value, "data")

  run = jax.shard_map(
    call,
    mesh=mesh,
    in_specs=(PartitionSpec(), rows, rows),
    out_specs=PartitionSpec(),
  )
  batch = 2 * _batch(24)
  got = jax.jit(run)(_PARAMS, batch[:8], batch[8:])
  expected = _WHOLE(_PARAMS, batch).sum["w"]
  np.testing.assert_allclose(got["w"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((_FN, "max"), r"reduction .*'sum', 'mean'.*'max'"),
    ((_FN, "mean"), r"expected_batch_size .* > 0, got None"),
    ((_FN, "mean", 0), r"expected_batch_size .* 0"),
    ((_FN, "mean", float("nan")), r"expected_batch_size .* nan"),
    ((_FN, "mean", True), r"expected_batch_size .* True"),
    ((_FN, "sum", 8), r"expected_batch_size must be None .* 8"),
    ((_loss,), r"fn must come from dpdist\.clipped_grad"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    clipping.VirtualStep(*arguments)
