"""The norm that clips an example is the norm of what is summed for it.

A compiler may compute a value twice, once for the norm and once for the sum,
and round it in two ways. Each test looks at compiled programs, and moves a sum
by one example at a time.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from dpdist import clipping
from dpdist.clipping.engines import sharing
from tests.support import turns

_METHODS = ("bookkeeping", "two_pass", "vmap")
_CLIP_NORM = 1e-2
_ROWS, _COLUMNS, _POSITIONS = 16, 8, 16


def _standardised(params, example):
  """Takes the mean off the columns of a weight and divides by their spread."""
  weight = (params - params.mean(0)) / jnp.sqrt(params.var(0) + 1e-5)
  return jnp.sum((example[0] @ weight) * example[1])


def _constant_rows(size):
  """An example whose gradient is constant over what has its mean taken off:
  large terms cancel, and what is left is rounding alone."""
  rng = np.random.default_rng(0)
  params = rng.normal(size=(_ROWS, _COLUMNS))
  x = np.repeat(rng.normal(size=(size, _POSITIONS, 1)), _ROWS, 2)
  g = 1e7 * rng.normal(size=(size, _POSITIONS, _COLUMNS))
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, (x, g)))


def _narrow(params, example):
  return jnp.sum(jnp.tanh(example @ params).astype(jnp.float32) ** 2)


def _narrow_examples(dtype, size):
  rng = np.random.default_rng(0)
  params = jnp.asarray(rng.normal(size=(16, 4)), dtype)
  return params, jnp.asarray(rng.normal(size=(size, 1, 16)), dtype)


def _lengths(totals):
  totals = np.asarray(totals, np.float64)
  return np.sqrt(np.sum(np.square(totals), axis=tuple(range(1, totals.ndim))))


def _each(fn, params, batch, others):
  """The sums of batches of one example and so many that are padding."""
  is_padding = jnp.arange(1 + others) > 0

  @jax.jit
  def one(params, example):
    many = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (1 + others, *x.shape)), example
    )
    return fn(params, many, is_padding_example=is_padding).sum

  examples = [
    jax.tree.map(lambda x, i=i: x[i], batch)
    for i in range(len(jax.tree.leaves(batch)[0]))
  ]
  return np.stack([one(params, example) for example in examples])


def _each_on_a_device(fn, params, batch):
  """The same, each batch of one example on a device of its own."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  run = jax.jit(
    jax.shard_map(
      lambda params, part: fn(params, part).sum[None],
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec("data")),
      out_specs=PartitionSpec("data"),
    )
  )
  parts = [
    jax.tree.map(lambda x, i=i: x[i : i + 8], batch)
    for i in range(0, len(jax.tree.leaves(batch)[0]), 8)
  ]
  return np.concatenate([run(params, part) for part in parts])


@pytest.mark.parametrize("microbatch_size", [None, 1])
@pytest.mark.parametrize("method", _METHODS)
def test_what_cancels_on_the_way_to_a_parameter_is_rounded_once(
  method, microbatch_size
):
  fn = clipping.clipped_grad(
    _standardised,
    l2_clip_norm=_CLIP_NORM,
    method=method,
    microbatch_size=microbatch_size,
  )
  params, batch = _constant_rows(40)
  sums = _each(fn, params, batch, others=0 if microbatch_size is None else 1)
  lengths = _lengths(sums)
  assert np.all(lengths <= 1.0001 * _CLIP_NORM)
  assert np.any(lengths > 0.9 * _CLIP_NORM)


@pytest.mark.parametrize("method", _METHODS)
def test_on_eight_devices_it_is_rounded_once_too(method):
  fn = clipping.clipped_grad(
    _standardised, l2_clip_norm=_CLIP_NORM, method=method
  )
  lengths = _lengths(_each_on_a_device(fn, *_constant_rows(40)))
  assert np.all(lengths <= 1.0001 * _CLIP_NORM)
  assert np.any(lengths > 0.9 * _CLIP_NORM)


@pytest.mark.parametrize(
  "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("method", _METHODS)
def test_what_a_narrow_model_rounds_is_rounded_for_norm_and_sum(method, dtype):
  fn = clipping.clipped_grad(_narrow, l2_clip_norm=_CLIP_NORM, method=method)
  params, batch = _narrow_examples(dtype, 64)
  sums = [
    _each(fn, params, batch, others=0),
    _each_on_a_device(fn, params, batch),
  ]
  if dtype == "bfloat16":
    sums.append(_each(fn, params, batch, others=2))
  for lengths in map(_lengths, sums):
    assert np.all(lengths <= 1.0001 * _CLIP_NORM)
    assert np.any(lengths > 0.999 * _CLIP_NORM)


@pytest.mark.parametrize("way", ["alone", "vmap", "scan", "eight devices"])
def test_a_shared_value_is_computed_once_in_the_compiled_program(way):
  def norm_and_scaled(x, y):
    shared = sharing.computed_once(x * y[..., :1] - y[..., 1:2])
    square = jnp.sum(jnp.square(shared))
    return square, shared.reshape(-1) / jnp.maximum(square, 1.0)

  def scanned(x, y):
    return lax.map(lambda xy: norm_and_scaled(*xy), (x, y))

  spec = PartitionSpec("data")
  run = {
    "alone": norm_and_scaled,
    "vmap": jax.vmap(norm_and_scaled),
    "scan": scanned,
    "eight devices": jax.shard_map(
      scanned,
      mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
      in_specs=(spec, spec),
      out_specs=(spec, spec),
    ),
  }[way]
  x = jnp.ones((16, 1, 100))
  compiled = jax.jit(run).lower(x, x).compile().as_text()
  assert compiled.count(" subtract(") == 1


@pytest.mark.parametrize("remat", [False, True])
def test_two_passes_keep_gradients_of_what_weights_are_computed_from(remat):
  """A sum that is taken to the parameters is rounded on another scale than the
  gradients of the examples."""
  loss = jax.checkpoint(_standardised) if remat else _standardised
  fn = clipping.clipped_grad(
    loss, l2_clip_norm=1.0, method="auto" if remat else "two_pass"
  )
  rng = np.random.default_rng(0)
  params = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
  assert "two_pass" in fn.explanation(
    params, (jnp.zeros((1, 6, 3)), jnp.zeros((1, 6, 3)))
  )
  x = np.repeat(rng.normal(size=(512, 6, 1)), 3, 2)
  g = rng.normal(size=(512, 6, 3))
  x[256:, 3:], g[256:, 3:] = x[256:, :3], -g[256:, :3] * (1 + 1e-7)
  one = lambda example: fn(params, example).sum
  run = jax.jit(jax.vmap(one))
  for size in (1e5, 1e8, 1e12):
    batch = jax.tree.map(
      lambda x: jnp.asarray(x[:, None], jnp.float32), (x, g * size)
    )
    assert np.all(_lengths(run(batch)) <= 1.0001)


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize(
  ("options", "row"),
  [
    ({"l2_clip_norm": 1e-4, "rescale_to_unit_norm": True}, 1.3e-38),
    ({"l2_clip_norm": 1e3, "normalize_gamma": 1e-9}, 1e-36),
    (
      {
        "l2_clip_norm": {"a": 1e-4, "b": 1e-3},
        "rescale_to_unit_norm": True,
      },
      1.3e-38,
    ),
  ],
)
def test_a_factor_above_one_meets_no_large_gradient(method, options, row):
  """Large gradients meet tiny rows, and cancel. Another example is ordinary."""
  loss = lambda p, e: jnp.sum((e[0] @ p["a"] + e[0] @ p["b"]) * e[1])
  params = {"a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4))}
  x, g = np.full((2, 2, 4), row), np.full((2, 2, 4), 1e36)
  g[:, 1] *= -1
  x[1], g[1] = 1, 1
  batch = jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32)
  fn = clipping.clipped_grad(loss, method=method, **options)
  run = jax.jit(fn.__call__)
  with_it = run(params, batch).sum
  without = run(params, batch, is_padding_example=jnp.array([True, False])).sum
  moved = jax.tree.map(jnp.subtract, with_it, without)
  length = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(moved)))
  assert length <= 1.0001 * fn.sensitivity()
  assert np.all(np.asarray(without["a"]) > 0)


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("columns", turns.cells([16, 64], always=[16]))
def test_what_underflows_is_not_missed_where_it_cancels(columns, method):
  """One term is lost when it is scaled, and not the one that it cancels with:
  of an operand or, where that is the smaller, of a gradient."""
  loss = lambda p, e: jnp.sum((e[0] @ p["w"]) * e[1]) + jnp.dot(p["v"], e[2])
  params = {"w": jnp.zeros((32, columns)), "v": jnp.zeros(2)}
  large, small = ([2.0**120, 2.0**50], [2.0**-30, -(2.0**40)])
  if columns > 32:
    large, small = small, large
  column = lambda numbers, n: jnp.tile(jnp.array(numbers)[None, :, None], n)
  batch = column(large, 32), column(small, columns), jnp.ones((1, 2))
  fn = clipping.clipped_grad(loss, l2_clip_norm=2.0**-33, method=method)
  got = jax.jit(fn)(params, batch).sum
  for x in (got["w"], got["v"]):
    assert np.all(np.isfinite(x))
    assert np.linalg.norm(x) <= 1.0001 * 2.0**-33
  # Where nothing is scaled nothing is lost.
  fn = clipping.clipped_grad(loss, l2_clip_norm=1e4, method=method)
  batch = batch[0], 0 * batch[1], batch[2]
  np.testing.assert_array_equal(jax.jit(fn)(params, batch).sum["v"], [1, 1])
