"""What float32 hides from a norm must not be in the sum.

Terms that cancel, vanish or overflow in the computation of a norm and not, or
not in the same way, in that of the sum would let an example pass the clip.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from dpdist import clipping

_METHODS = ("bookkeeping", "two_pass", "vmap")
_POSITIONS = 48


def _length(tree):
  return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


def _activations(params, example):
  """Large terms cancel on the way through the activations."""
  h = jnp.dot(params["w"], example["x"])
  h = (h * example["a"]) * example["b"] - h * example["c"]
  return h + jnp.dot(params["v"], example["y"])


def _positions(params, example):
  """Large terms cancel over the positions of a product."""
  return jnp.sum((example["x"] @ params["w"]) * example["g"]) + jnp.dot(
    params["v"], example["y"]
  )


def _convolution(params, example):
  """Large terms cancel over the pixels of a convolution."""
  out = jax.lax.conv_general_dilated(
    example["x"].reshape(1, 4, -1, 8),
    params["w"].reshape(1, 1, 8, 8),
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return jnp.sum(out.reshape(-1, 8) * example["g"]) + jnp.dot(
    params["v"], example["y"]
  )


def _iterations(params, example):
  """Large terms cancel over the iterations of a loop."""
  total, _ = jax.lax.scan(
    lambda total, xg: (total + jnp.dot(xg[0] @ params["w"], xg[1]), None),
    jnp.zeros_like(example["y"][0]),
    (example["x"], example["g"]),
  )
  return total + jnp.dot(params["v"], example["y"])


def _lookups(params, example):
  """Large terms cancel over the places that look up one row."""
  rows = jnp.take(params["w"], example["ids"], axis=0)
  return jnp.sum(rows * example["g"]) + jnp.dot(params["v"], example["y"])


def _cancelling(loss, size):
  """One example of gradient norm 3, but for terms of a size that cancel."""
  rng = np.random.default_rng(0)
  y = np.array([3.0, 0, 0], np.float32)
  if loss is _activations:
    a, b = np.float32(4097 * size), np.float32(3001 * size)
    c = np.float32(a * b)
    example = {"x": np.array([1.0, 0, 0]), "a": a, "b": b, "c": c, "y": y}
  else:
    x = np.zeros((_POSITIONS, 8))
    x[:, 0] = 1
    g = np.zeros((_POSITIONS, 8))
    # Whole numbers, whose sums are exact and whose thirds are not.
    one, two = rng.integers(2**16, 2**17, (2, _POSITIONS // 3, 8))
    g[::3], g[1::3], g[2::3] = one, two, -one - two
    example = {"x": x, "g": g * size, "y": y}
    if loss is _lookups:
      example["ids"] = np.zeros(_POSITIONS, np.int32)
  as_batch = lambda x: jnp.asarray(
    np.asarray(x)[None], jnp.int32 if np.asarray(x).dtype.kind == "i" else "f4"
  )
  shape = (3,) if loss is _activations else (8, 8)
  params = {"w": jnp.full(shape, 0.5), "v": jnp.ones(3)}
  return params, {name: as_batch(x) for name, x in example.items()}


@pytest.mark.parametrize(
  ("loss", "method"),
  [
    # Other ways than bookkeeping see an example's gradient as a whole.
    pytest.param(
      loss,
      method,
      marks=[pytest.mark.slow]
      * (method != "bookkeeping" and loss != _positions),
    )
    for loss in (_activations, _positions, _convolution, _iterations, _lookups)
    for method in _METHODS
  ],
)
def test_terms_that_cancel_are_not_left_in_the_sum(loss, method):
  for own in (False, True):  # The custom derivative takes another way.
    one = _own_derivative(loss) if own else loss
    fn = clipping.clipped_grad(one, l2_clip_norm=1.0, method=method)
    call = jax.jit(fn)  # One program for all sizes.
    for size in (1.0, 2.0**8, 2.0**20):
      got = call(*_cancelling(loss, size))
      assert _length(got.sum) <= 1.001, (size, own, got.grad_norms)


def _own_derivative(loss):
  same = jax.custom_vjp(lambda x: x)
  same.defvjp(lambda x: (x, None), lambda _, g: (g,))
  return lambda params, example: same(loss(params, example))


def test_remat_takes_two_passes_and_the_bound_holds():
  loss = jax.checkpoint(_activations)
  params, batch = _cancelling(_activations, 2.0**20)
  fn = clipping.clipped_grad(loss, l2_clip_norm=1.0)
  assert "two_pass" in fn.explain(params, batch)
  assert _length(jax.jit(fn)(params, batch).sum) <= 1.001


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("fsdp")])
@pytest.mark.parametrize("loss", [_activations, _positions])
def test_on_eight_devices_too(loss, spec):
  """Parameters whole, or parts; each device has an example that cancels."""
  mesh = jax.make_mesh(
    (2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
  )
  params, batch = _cancelling(loss, 2.0**12)
  batch = jax.tree.map(lambda x: jnp.concatenate([x] * 8), batch)
  fn = clipping.clipped_grad(loss, l2_clip_norm=1.0, method="two_pass")
  specs = {"w": spec if loss is _positions else PartitionSpec()}
  specs["v"] = PartitionSpec()

  def run(params, batch):
    total = fn(params, batch, param_specs=specs).sum
    axes = {"w": ("data",) if specs["w"] else ("data", "fsdp")}
    axes["v"] = ("data", "fsdp")
    return {name: jax.lax.psum(total[name], axes[name]) for name in total}

  total = jax.jit(
    jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(specs, PartitionSpec(("data", "fsdp"))),
      out_specs=specs,
    )
  )(params, batch)
  assert _length(total) <= 8 * 1.001


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize(
  "options",
  [
    {"l2_clip_norm": 1e-3, "rescale_to_unit_norm": True},
    {"l2_clip_norm": 1.0, "normalize_gamma": 1e-3},
  ],
)
def test_scales_above_one_do_not_overflow(method, options):
  loss = lambda w, e: (jnp.dot(w, e["x"]) * e["small"]) * e["large"]
  batch = {
    "x": jnp.array([[1e-3, 0], [1e-3, 1e-3]]),
    "small": jnp.array([1e-37, 1.0]),
    "large": jnp.array([1e37, 1.0]),
  }
  fn = clipping.clipped_grad(loss, method=method, **options)
  got = jax.jit(fn)(jnp.ones(2), batch)
  assert np.all(np.isfinite(got.sum))
  assert np.all(np.asarray(got.sum) > 0)


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("positions", [1, 2])
def test_rows_too_small_to_be_squared_count(positions, method):
  loss = lambda w, x: jnp.sum(x @ w) * 1e18
  x = jnp.full((1, positions, 10_000), 1e-20)
  fn = clipping.clipped_grad(loss, l2_clip_norm=1.0, method=method)
  got = jax.jit(fn)(jnp.zeros((10_000, 4)), x)
  true = positions * 1e-2 * 200
  np.testing.assert_allclose(got.grad_norms, [true], rtol=1e-3)
  assert _length(got.sum) <= 1.001


def test_parts_lie_along_axes_of_the_batch_and_of_nothing_else():
  """Flags that vary along an axis do not divide the batch along it."""
  mesh = jax.make_mesh(
    (2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
  )
  spec = PartitionSpec("fsdp")

  def run(w, x):
    flags = jax.lax.pcast(
      jnp.zeros(len(x), bool), ("data", "fsdp"), to="varying"
    )
    return clipping.clipped_grad(jnp.dot, l2_clip_norm=1.0)(
      w, x, is_padding_example=flags, param_specs=spec
    ).sum

  sharded = jax.shard_map(
    run, mesh=mesh, in_specs=(spec, PartitionSpec("data")), out_specs=spec
  )
  with pytest.raises(ValueError, match=r"param_specs .* divided, \['data'\]"):
    sharded(jnp.ones(8), jnp.ones((4, 8)))


@pytest.mark.parametrize(
  "options",
  [{"l2_clip_norm": 1e19}, {"l2_clip_norm": 1.0, "normalize_gamma": 1e-13}],
)
def test_numbers_beyond_float32_are_refused(options):
  with pytest.raises(ValueError, match=r"(l2_clip_norm|normalize_gamma) must"):
    clipping.clipped_grad(jnp.dot, **options)
