"""A norm is an upper bound at any scale, whichever formula it comes from.

All kinds of products stand in one loss, each with a parameter and a clip norm
of its own, and all scales in one batch, so that one program shows them all. The
loss is linear in the parameters: what is left to go wrong is the norm.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from dpdist import clipping
from dpdist.clipping.layers import convolution
from dpdist.clipping.layers import inner_products
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.layers import norms
from dpdist.clipping.layers import rules

_CLIP = 1e-3
# Rounding of a norm that is not an upper bound alone may take so much.
_UNNOTICED = 1e-3
_MASK = np.random.default_rng(5).random((4, 3)) < 0.7


def _convolution(x, kernel, **kwargs):
  ndim = kernel.ndim - 2
  kwargs = {"window_strides": (1,) * ndim, "padding": "SAME"} | kwargs
  letters = "HW"[:ndim]
  return jax.lax.conv_general_dilated(
    x[None],
    kernel,
    dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    **kwargs,
  )[0]


# For each kind: the shapes of the parameter, of what it meets and of its
# product, whose gradient is given.
_KINDS = {
  "one position": ((4, 3), (1, 4), (1, 3), lambda p, x: x @ p),
  "dense": ((4, 3), (6, 4), (6, 3), lambda p, x: x @ p),
  "experts": (
    (2, 4, 3),
    (6, 2, 4),
    (6, 2, 3),
    lambda p, x: jnp.einsum("tsi,sio->tso", x, p),
  ),
  "convolution": (
    (3, 3, 3, 2),
    (4, 4, 3),
    (4, 4, 2),
    lambda p, x: _convolution(x, p),
  ),
  "groups, strides": (
    (2, 3, 2, 4),
    (5, 6, 4),
    (3, 2, 4),
    lambda p, x: _convolution(
      x, p, window_strides=(2, 3), feature_group_count=2
    ),
  ),
  "one axis": ((3, 3, 2), (7, 3), (7, 2), lambda p, x: _convolution(x, p)),
  "lookup": ((5, 3), (6,), (6, 3), lambda p, ids: p[ids]),
  "addition": ((6, 3), (6, 3), (6, 3), lambda p, x: x + p),
  "computed": (
    (4, 3),
    (6, 4),
    (6, 3),
    lambda p, x: x @ jnp.where(_MASK, 2 * p, 0),
  ),
}


def _loss(params, example):
  return sum(
    jnp.sum(product(params[kind], example[kind]["x"]) * example[kind]["g"])
    for kind, (*_, product) in _KINDS.items()
  )


def _params():
  return {kind: jnp.zeros(shapes[0]) for kind, shapes in _KINDS.items()}


# Powers of ten: of what is met, of the gradient of the product; and along what.
_SCALES = [
  *((a, b, "alike") for a, b in [(0, 0), (-37, 37), (37, -37), (-20, 22)]),
  *((a, b, "alike") for a, b in [(-30, 28), (22, -20), (30, -28), (-3, 36)]),
  *((a, b, "alike") for a, b in [(-20, 17), (18, 19), (-19, -10), (20, 20)]),
  *((a, b, "positions") for a, b in [(-37, 35), (-25, 27), (20, -20)]),
  *((a, b, "channels") for a, b in [(-37, 35), (-25, 20), (20, -18)]),
  *((a, b, "anything") for a, b in [(1, 0), (2, 0), (3, 0), (4, 0)]),
]


def _powers(shape, a, along, rng):
  if along == "alike" or not shape:
    return np.full(shape, a)
  if along == "anything":
    return rng.integers(-37, 37, shape)
  axis = -1 if along == "channels" else 0
  sign = np.where(np.arange(shape[axis]) % 2, 1, -1)
  return a * (sign if axis else sign.reshape(-1, *[1] * (len(shape) - 1)))


def _narrow(batch):
  """In the dtypes of a model. A CPU takes what has no full fraction for 0."""
  smallest = np.finfo(np.float32).smallest_normal

  def one(x):
    if x.dtype.kind == "i":
      return x.astype(np.int32)
    x = x.astype(np.float32)
    return np.where(abs(x) < smallest, 0, x)

  return jax.tree.map(one, batch)


@functools.cache
def _wide_gradients():
  return jax.jit(jax.vmap(jax.grad(_loss), in_axes=(None, 0)))


def _true_norms(batch):
  """In float64, [examples] a kind."""
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: x if x.dtype == np.int32 else x.astype(np.float64), batch
    )
    grads = _wide_gradients()(
      {k: np.zeros(s[0]) for k, s in _KINDS.items()}, wide
    )
    return {
      kind: np.sqrt(np.sum(np.square(x.reshape(len(x), -1)), axis=1))
      for kind, x in jax.tree.map(np.asarray, grads).items()
    }


@functools.cache
def _batch():
  """An example a scale; norms in float64, [examples] a kind."""
  rng = np.random.default_rng(0)
  examples = []
  for a, b, along in _SCALES:
    example = {}
    for kind, (_, of_x, of_g, _) in _KINDS.items():
      x = rng.normal(size=of_x) * 10.0 ** _powers(of_x, a, along, rng)
      g = rng.normal(size=of_g) * 10.0 ** _powers(of_g, b, along, rng)
      if kind == "lookup":
        x = rng.integers(0, 5, of_x)
      elif kind == "addition" and a + b > 0:
        g = rng.normal(size=of_g) * 10.0**a
      example[kind] = {"x": x, "g": g}
    examples.append(example)
  batch = _narrow(jax.tree.map(lambda *x: np.stack(x), *examples))
  return batch, _true_norms(batch)


_STRATEGIES = {
  "gram": layer_rule.GRAM,
  "diagonal": convolution.DIAGONAL_GRAM,
  "keep": layer_rule.STORE,
  "drop": layer_rule.RECOMPUTE,
  "": None,
}


def _take(way, monkeypatch):
  """Has rules take a strategy wherever it is offered."""
  offered, strategy = rules._strategies, _STRATEGIES[way]

  def strategies(*args):
    found = offered(*args)
    return {strategy: found[strategy]} if strategy in found else found

  monkeypatch.setattr(rules, "_strategies", strategies)


# Several clip norms are a matter of book-keeping, so that two passes get one.
_RULES = [
  ("gram", "bookkeeping"),
  ("diagonal", "bookkeeping"),
  ("keep", "bookkeeping"),
  ("drop", "bookkeeping"),
  ("drop", "two_pass"),
  ("", "vmap"),
]


@functools.cache
def _compiled(way, method):
  """One program for all tests of a rule; called while the rule is taken."""
  clip_norm = dict.fromkeys(_KINDS, _CLIP)
  if method == "two_pass":
    clip_norm = _CLIP
  fn = clipping.clipped_grad(_loss, l2_clip_norm=clip_norm, method=method)

  def call(batch, is_padding_example):
    got = fn(_params(), batch, is_padding_example=is_padding_example)
    return got.sum, got.grad_norms

  return jax.jit(call)


@pytest.mark.parametrize(
  ("way", "method"),
  [
    # A gradient that is kept is formed as one that is dropped is, and both ways
    # over positions are of inner products.
    pytest.param(
      *rule,
      marks=[pytest.mark.slow]
      * (
        rule
        in (
          ("keep", "bookkeeping"),
          ("diagonal", "bookkeeping"),
          ("drop", "two_pass"),
        )
      ),
    )
    for rule in _RULES
  ],
)
def test_a_norm_is_an_upper_bound_at_any_scale(way, method, monkeypatch):
  _take(way, monkeypatch)
  batch, true = _batch()
  call = _compiled(way, method)
  size = len(_SCALES)
  _, found = call(batch, np.zeros(size, bool))
  if method == "two_pass":
    true = {"all": functools.reduce(np.hypot, true.values())}
    found = {"all": found}
  for kind, norm in found.items():
    _assert_bounds(norm, true[kind], kind)
    np.testing.assert_allclose(norm[0], true[kind][0], rtol=1e-5)
  for i in range(size):
    total, _ = call(batch, np.arange(size) != i)
    for kind, x in total.items():
      moved = np.linalg.norm(np.asarray(x, np.float64))
      assert moved <= _CLIP * (1 + _UNNOTICED), (kind, _SCALES[i])


def _assert_bounds(norm, true, kind=""):
  """That norms are finite upper bounds, or not finite."""
  norm = np.asarray(norm, np.float64)
  # Below the smallest float32 nothing is left, of a sum neither.
  enough = norm >= true * (1 - _UNNOTICED) - 1e-36
  assert np.all(enough | ~np.isfinite(norm)), (kind, norm, true)


@np.errstate(over="ignore", invalid="ignore")
def _mutated(values, rng):
  """Children of examples of a kind: other scales, copies that cancel."""
  values = values.astype(np.float64) if values.dtype.kind == "f" else values
  if values.dtype.kind == "i":
    return rng.permuted(values, axis=-1)
  for child in values:
    flat = child.reshape(len(child), -1) if child.ndim > 1 else child[None]
    row = rng.integers(len(flat))
    change = rng.integers(4)
    if change == 0:  # Entries, each by itself.
      at = rng.random(flat.shape) < 0.2
      flat[at] *= 10.0 ** rng.normal(scale=3, size=at.sum())
    elif change == 1:  # A position.
      flat[row] *= 10.0 ** rng.normal(scale=6)
    elif change == 2:  # Another one's opposite, nearly or altogether.
      nearly = 1 - rng.choice([0, 10.0 ** rng.uniform(-7, -1)])
      flat[row] = -nearly * flat[rng.integers(len(flat))]
    else:
      flat *= 10.0 ** rng.normal(scale=8)
  limit = np.finfo(np.float32).max
  return np.clip(values, -limit, limit)


# What takes longest to compile, or is formed as another way is.
_LONG = ("keep", "diagonal")


@pytest.mark.parametrize(
  ("way", "method"),
  [
    pytest.param(*rule, marks=[pytest.mark.slow] * (rule[0] in _LONG))
    for rule in _RULES
    if rule[1] != "two_pass"
  ],
)
def test_no_search_finds_a_norm_that_is_too_small(way, method, monkeypatch):
  """Of each kind 22 examples, 40 times the third that came closest and their
  children: 7,920 tries a rule. What it finds becomes a row of _SCALES."""
  _take(way, monkeypatch)
  call, rng = _compiled(way, method), np.random.default_rng(3)
  batch, true = _batch()
  size, kept = len(_SCALES), len(_SCALES) // 3
  parents = np.arange(size) % kept
  for _ in range(40):
    _, found = call(batch, np.zeros(size, bool))
    best = {}
    for kind, norm in found.items():
      norm = np.asarray(norm, np.float64)
      # One that is not finite adds nothing.
      excess = np.where(
        np.isfinite(norm), true[kind] / np.maximum(norm, 1e-36), 0
      )
      # In float64 it may be longer than what is formed and added in float32.
      for i in np.flatnonzero(excess > 1 + _UNNOTICED):
        total, _ = call(batch, np.arange(size) != i)
        moved = np.linalg.norm(np.asarray(total[kind], np.float64))
        assert moved <= _CLIP * (1 + _UNNOTICED), (kind, moved, excess[i])
      best[kind] = np.argsort(-excess)[parents]
    batch = {
      kind: {
        name: np.concatenate(
          [x[best[kind]][:kept], _mutated(x[best[kind]][kept:], rng)]
        )
        for name, x in arrays.items()
      }
      for kind, arrays in batch.items()
    }
    batch = _narrow(batch)
    true = _true_norms(batch)


def _on_eight_devices(fn, params):
  """Compiled (batch, is_padding) -> each device's own sum, and all norms."""
  rows = PartitionSpec("data")

  def one(batch, is_padding_example):
    got = fn(params, batch, is_padding_example=is_padding_example)
    return jax.tree.map(lambda x: x[None], got.sum), got.grad_norms

  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  run = jax.shard_map(
    one, mesh=mesh, in_specs=(rows, rows), out_specs=(rows, rows)
  )
  return jax.jit(run)


def _lengths(x):
  x = np.asarray(x, np.float64)
  return np.sqrt(np.sum(np.square(x.reshape(len(x), -1)), axis=1))


def _moved(total, method):
  """How far examples moved sums, by what has a clip norm of its own."""
  found = {kind: _lengths(x) for kind, x in total.items()}
  if method == "two_pass":
    return {"all": functools.reduce(np.hypot, found.values())}
  return found


@pytest.mark.parametrize(
  ("way", "method"),
  [
    pytest.param(
      *rule,
      marks=[] if rule == ("drop", "bookkeeping") else pytest.mark.slow,
    )
    for rule in _RULES
  ],
)
def test_no_example_moves_a_sum_of_eight_devices_too_far(
  way, method, monkeypatch
):
  """One example of three on each device at a time."""
  _take(way, monkeypatch)
  batch, true = _batch()
  clip_norm = _CLIP if method == "two_pass" else dict.fromkeys(_KINDS, _CLIP)
  fn = clipping.clipped_grad(_loss, l2_clip_norm=clip_norm, method=method)
  run = _on_eight_devices(fn, _params())
  size = 24
  rows = np.arange(size) % len(_SCALES)
  batch = jax.tree.map(lambda x: x[rows], batch)
  longest = 0
  for place in range(3):
    total, found = run(batch, np.arange(size) % 3 != place)
    if method != "two_pass":
      for kind, norm in found.items():
        _assert_bounds(norm, true[kind][rows], kind)
    for kind, moved in _moved(total, method).items():
      assert np.all(moved <= _CLIP * (1 + _UNNOTICED)), (kind, place)
      longest = max(longest, *moved)
  assert longest >= _CLIP * (1 - _UNNOTICED)


# Convolutions of numbers of 16 bits.

_NARROW = tuple(
  (kind, dtype)
  for kind in ("convolution", "groups, strides", "one axis")
  for dtype in ("bfloat16", "float16")
)


def _narrow_loss(params, example):
  total = 0
  for kind, dtype in _NARROW:
    name = f"{kind}, {dtype}"
    out = _KINDS[kind][-1](params[name], example[name]["x"])
    total += jnp.sum(out.astype(example[name]["g"].dtype) * example[name]["g"])
  return total


@functools.cache
def _narrow_batch():
  """As `_batch`, of numbers that both dtypes hold; norms in float64."""
  rng = np.random.default_rng(0)
  examples = []
  for a, b, along in _SCALES:
    example = {}
    for kind, dtype in _NARROW:
      # From 1e-37 to 1e37, or from 1e-4 to 1e4.
      less = 1 if dtype == "bfloat16" else 4 / 37
      most, least = (jnp.finfo(dtype).max, jnp.finfo(dtype).smallest_normal)
      arrays = {}
      for name, shape, power in (
        ("x", _KINDS[kind][1], a),
        ("g", _KINDS[kind][2], b),
      ):
        x = rng.normal(size=shape)
        x = x * 10.0 ** (less * _powers(shape, power, along, rng))
        x = np.clip(x, -float(most), float(most)).astype(dtype)
        arrays[name] = np.where(abs(x) < least, 0, x).astype(dtype)
      # A product that it meets has the dtype of the model.
      arrays["g"] = arrays["g"].astype(np.float32)
      example[f"{kind}, {dtype}"] = arrays
    examples.append(example)
  batch = jax.tree.map(lambda *x: np.stack(x), *examples)
  with jax.enable_x64(True):
    grads = jax.jit(jax.vmap(jax.grad(_narrow_loss), in_axes=(None, 0)))(
      {
        f"{kind}, {dtype}": np.zeros(_KINDS[kind][0]) for kind, dtype in _NARROW
      },
      jax.tree.map(lambda x: x.astype(np.float64), batch),
    )
    return batch, {name: _lengths(x) for name, x in grads.items()}


@pytest.mark.parametrize(
  ("way", "method", "devices"),
  [
    pytest.param(
      *rule,
      n,
      marks=[]
      if (*rule, n) == ("drop", "bookkeeping", 1)
      else pytest.mark.slow,
    )
    for rule in _RULES
    for n in (1, 8)
  ],
)
def test_no_example_of_a_narrow_model_moves_a_sum_too_far(
  way, method, devices, monkeypatch
):
  _take(way, monkeypatch)
  batch, true = _narrow_batch()
  params = {
    f"{kind}, {dtype}": jnp.zeros(_KINDS[kind][0], dtype)
    for kind, dtype in _NARROW
  }
  clip_norm = _CLIP if method == "two_pass" else dict.fromkeys(params, _CLIP)
  fn = clipping.clipped_grad(
    _narrow_loss, l2_clip_norm=clip_norm, method=method
  )
  size = 24
  rows = np.arange(size) % len(_SCALES)
  batch = jax.tree.map(lambda x: x[rows], batch)
  if devices == 8:
    run, count = _on_eight_devices(fn, params), 3
  else:
    run, count = _one_by_one(fn, params), 1
  longest = 0
  for place in range(count):
    total, found = run(batch, np.arange(size) % count != place)
    for name, moved in _moved(total, method).items():
      assert np.all(moved <= _CLIP * (1 + _UNNOTICED)), (name, place)
      longest = max(longest, *moved)
    # Gradients that JAX forms are in the dtype of the model, sum and norm.
    if method == "bookkeeping":
      for name, norm in found.items():
        _assert_bounds(norm, true[name][rows], name)
  assert longest >= _CLIP * (1 - _UNNOTICED)


def _one_by_one(fn, params):
  """Compiled (batch, is_padding) -> each example's own sum, and norms."""

  def one(example):
    got = fn(params, jax.tree.map(lambda x: x[None], example))
    return got.sum, jax.tree.map(lambda x: x[0], got.grad_norms)

  return jax.jit(lambda batch, is_padding: jax.lax.map(one, batch))


def _moves(loss, params, batch, method):
  """How far a batch moves a sum that is clipped to 1, and its first norm; with
  book-keeping on each of eight devices, too."""
  fn = clipping.clipped_grad(loss, l2_clip_norm=1.0, method=method)

  @jax.jit
  def call(params, batch):
    got = fn(params, batch)
    return got.sum, got.grad_norms[0]

  total, norm = call(params, batch)
  moved = [np.linalg.norm(np.asarray(total, np.float64))]
  if method == "bookkeeping":
    many = jax.tree.map(lambda x: np.concatenate([x] * 8), batch)
    is_padding = np.zeros(len(jax.tree.leaves(many)[0]), bool)
    totals, norms_of_all = _on_eight_devices(fn, params)(many, is_padding)
    moved.extend(_lengths(totals))
    np.testing.assert_allclose(norms_of_all[:: len(is_padding) // 8], norm)
  return max(moved), float(norm)


@pytest.mark.parametrize("method", ["bookkeeping", "two_pass", "auto"])
@pytest.mark.parametrize("size", [4, 5])
def test_a_table_that_is_multiplied_first_and_then_looked_up(size, method):
  def dot_then_lookup(table, e):
    x, y, z, ids = e
    return jnp.sum((x @ table.T) * y) + jnp.sum(table[ids] * z)

  one = np.eye(5, dtype=np.float32)
  table = jnp.zeros((size, 4))
  batch = (
    100 * one[None, :1, :4],
    -one[None, 1:2, :size],
    100 * one[None, 1:2, :4],
    np.zeros((1, 1), np.int32),
  )
  moved, norm = _moves(dot_then_lookup, table, batch, method)
  assert norm == pytest.approx(100 * np.sqrt(2), rel=1e-3)
  assert moved <= 1 + _UNNOTICED


@pytest.mark.parametrize("method", ["bookkeeping", "two_pass", "auto"])
def test_a_table_that_is_looked_up_along_both_axes(method):
  loss = lambda table, e: (
    jnp.sum(table[e["id"]] * e["z"]) + jnp.sum(table.T[e["id"]] * e["w"])
  )
  z = 100 * np.eye(4, dtype=np.float32)[None, 1:2]
  batch = {"id": np.zeros((1, 1), np.int32), "z": z, "w": -z}
  moved, norm = _moves(loss, jnp.zeros((4, 4)), batch, method)
  assert norm == pytest.approx(100 * np.sqrt(2), rel=1e-3)
  assert moved <= 1 + _UNNOTICED


@pytest.mark.parametrize("method", ["bookkeeping", "two_pass"])
def test_ids_too_narrow_for_their_table_are_no_lookup(method):
  numbers = jax.lax.GatherDimensionNumbers((1,), (0,), (0,))

  def rows(table, ids):
    return jax.lax.gather(table, ids, numbers, (1, 3), mode="fill")

  loss = lambda table, e: (
    jnp.sum(rows(table, e["narrow"]) * e["z"])
    - jnp.sum(rows(table, e["wide"]) * e["z"])
  )
  batch = {
    "narrow": np.full((1, 1, 1), 200, np.uint8),
    "wide": np.full((1, 1, 1), 200, np.int32),
    "z": np.full((1, 1, 3), 100, np.float32),
  }
  moved, _ = _moves(loss, jnp.zeros((300, 3)), batch, method)
  assert moved <= 1 + _UNNOTICED


@pytest.mark.parametrize("method", ["bookkeeping", "two_pass", "vmap"])
@pytest.mark.parametrize("case", ["wide data", "wide result"])
def test_products_of_several_ranges_are_bounded(case, method):
  with jax.enable_x64(True):
    if case == "wide data":
      x = np.full((2, 1, 4), 1e60)
      y = np.full((2, 1, 3), 1e-30, np.float32)
      x[1], y[1] = 1, 1
      params, result = jnp.zeros((4, 3), jnp.float32), jnp.float32
    else:
      x = np.array([[[0.12], [0.11]]], np.float32)
      y = np.array([[[1.0], [-1.0]]]) * 9.5e38 / np.sqrt(2)
      y = np.concatenate([y, y], -1)
      params, result = jnp.zeros((1, 2), jnp.float32), jnp.float64
    loss = lambda p, e: jnp.sum(
      jax.lax.dot_general(
        e[0], p, (((1,), (0,)), ((), ())), preferred_element_type=result
      )
      * e[1]
    ).astype(jnp.float32)
    moved, _ = _moves(loss, params, (x, y), method)
  assert moved <= len(x) * (1 + _UNNOTICED)


def _norms(loss, params, batch, **kwargs):
  """The norms alone: what else a sum needs is not compiled."""
  fn = clipping.clipped_grad(loss, l2_clip_norm=_CLIP, **kwargs)
  found = jax.jit(lambda batch: fn(params, batch).grad_norms)(batch)
  return np.asarray(found, np.float64)


@pytest.mark.parametrize("left", [0.0, 1e-5, 1e-4, 3e-4])
@pytest.mark.parametrize(
  ("kind", "way"),
  [
    ("dense", "gram"),
    ("lookup", "gram"),
    ("convolution", "gram"),
    ("convolution", "diagonal"),
  ],
)
def test_terms_that_cancel_in_inner_products_leave_a_norm(
  kind, way, left, monkeypatch
):
  """Rounding may leave anything near 0 of a square, 0 included."""
  _take(way, monkeypatch)
  rng = np.random.default_rng(1)
  shape, of_x, of_g, product = _KINDS[kind]
  examples = 64
  if kind == "convolution":  # Of one pixel wide, at two places.
    shape, of_x, of_g = (1, 1, 3, 2), (1, 2, 3), (1, 2, 2)
  one = rng.normal(size=(examples, of_g[-1]))
  x = np.ones((examples, *of_x), np.int32)
  if kind != "lookup":
    x = np.broadcast_to(
      rng.normal(size=(examples, *[1] * (len(of_x) - 1), of_x[-1])), x.shape
    ).astype(np.float32)
  g = np.zeros((examples, *of_g))
  positions = g.reshape(examples, -1, of_g[-1])
  positions[:, 0], positions[:, 1] = one, -one * (1 - left)
  g = g.astype(np.float32)
  found = _norms(
    lambda p, e: jnp.sum(product(p, e["x"]) * e["g"]),
    jnp.zeros(shape),
    {"x": x, "g": g},
    method="bookkeeping",
  )
  row = np.ones(examples)
  if kind != "lookup":
    row = np.linalg.norm(x.reshape(examples, -1, of_x[-1])[:, 0], axis=1)
  wide = g.reshape(examples, -1, of_g[-1]).astype(np.float64)
  _assert_bounds(found, row * np.linalg.norm(wide.sum(1), axis=1))
  terms = row * np.linalg.norm(wide, axis=2).sum(1)
  # Nothing below this is taken for more than rounding error.
  assert np.all(found >= 2**-6.5 * terms * (1 - 1e-5))


def test_pixels_far_smaller_than_others_count(monkeypatch):
  """They vanish at the scale of the whole input, and meet what is large."""
  _take("diagonal", monkeypatch)
  x, g = np.full((1, 7, 3), 1e-20), np.full((1, 7, 2), 1e20)
  x[:, 0], g[:, :2] = 1e30, 0
  x, g = x.astype(np.float32), g.astype(np.float32)
  shape, _, _, product = _KINDS["one axis"]
  found = _norms(
    lambda p, e: jnp.sum(product(p, e["x"]) * e["g"]),
    jnp.zeros(shape),
    {"x": x, "g": g},
    method="bookkeeping",
  )
  # Each of three offsets, of which the last misses one of five outputs.
  true = np.sqrt((2 * 5**2 + 4**2) * 3 * 2)
  assert true * (1 - _UNNOTICED) <= found <= 2 * true


@pytest.mark.parametrize("length", [2048, 1500])
def test_long_vectors_of_equal_entries_leave_a_norm(length, monkeypatch):
  """Each addition of their inner products rounds the same way."""
  _take("gram", monkeypatch)
  rng = np.random.default_rng(0)
  shape = (24, 2, 1)
  v = np.repeat(rng.uniform(1, 2, (24, 1, 1)), 2, axis=1).astype(np.float32)
  w = rng.uniform(100, 200, shape).astype(np.float32)
  left = 2.0 ** -rng.uniform(5.2, 5.5, 24).astype(np.float32)
  w[:, 1, 0] = -w[:, 0, 0] * (1 - left)
  batch = {
    "x": np.repeat(v, length, axis=2),
    "g": np.repeat(w, length, axis=2),
  }
  found = _norms(
    lambda p, e: jnp.sum((e["x"] @ p) * e["g"]),
    jnp.zeros((length, length)),
    batch,
    method="bookkeeping",
  )
  true = np.abs((v.astype(np.float64) * w).sum((1, 2))) * length
  assert np.all(found >= true * (1 - 2.0**-11))
  assert np.all(found <= true * 1.3)


@pytest.mark.parametrize("size", [24, 31, 100, 700])
def test_a_sum_over_all_pairs_is_within_its_bound(size):
  """Equal numbers, of which each addition rounds the same way; few examples,
  for which the compiler takes another order than for many."""

  @jax.jit
  def run(pairs, ones, numbers, lists):
    return inner_products.sum_of_products(
      inner_products.InnerProducts(pairs, numbers, lists, 0.0),
      inner_products.InnerProducts(ones, lists, lists, 0.0),
    )

  lists = np.ones((1, size), np.float32)
  for number in np.random.default_rng(0).uniform(1, 2, 16):
    pairs = np.full((1, size, size), number, np.float32)
    found, error = run(pairs, np.ones_like(pairs), pairs[:, 0], lists)
    missed = np.sum(pairs, dtype=np.float64) - float(found[0])
    assert abs(missed) <= error[0]
    # Where nothing cancels no room is made.
    assert error[0] <= 2.0**-11 * found[0]


def test_what_two_products_cancel_differently_has_a_floor_at_any_scale():
  positions = 64
  rng = np.random.default_rng(0)
  half = np.abs(rng.normal(size=(2, positions // 2, 1)))
  x = np.concatenate([half, half], 1) * 3e-20
  g = np.concatenate([half, -half], 1) * 1e19
  batch = {"x": x.astype(np.float32), "g": g.astype(np.float32)}
  found = _norms(
    lambda p, e: jnp.sum((e["x"] @ p) * e["g"]),
    jnp.zeros((1, 1)),
    batch,
    method="two_pass",
  )
  assert np.all(found >= 2.0**-13 * np.abs(x * g).sum((1, 2)) * (1 - 1e-5))


@pytest.mark.parametrize("method", ["bookkeeping", "two_pass", "vmap"])
def test_float64_has_norms_at_its_own_scales(method):
  with jax.enable_x64(True):
    x = np.full((2, 2, 4), 1.4e-154)
    g = np.full((2, 2, 3), 5e153)
    x[1], g[1] = 1e-300, 1e299
    found = _norms(
      lambda p, e: jnp.sum((e["x"] @ p) * e["g"]),
      jnp.zeros((4, 3)),
      {"x": x, "g": g},
      method=method,
    )
    true = [0.7 * 2 * 12**0.5, 0.1 * 2 * 12**0.5]
    np.testing.assert_allclose(found, true, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_vectors_have_norms_wherever_they_are_numbers(dtype):
  unit = np.random.default_rng(0).normal(size=5)
  powers = range(-4, 5) if dtype == "float16" else range(-36, 38)
  x = jnp.asarray([unit * 10.0**n for n in powers], dtype)
  found = np.asarray(jax.jit(lambda x: norms.of(x, -1))(x), np.float64)
  true = np.linalg.norm(np.asarray(x, np.float64), axis=1)
  np.testing.assert_allclose(found, true, rtol=1e-6)
  bad = jnp.asarray([[np.nan, 1], [np.inf, 1], [0, 0], [3e4, 3e4]], dtype)
  found = np.asarray(norms.of(bad, -1))
  assert np.isnan(found[0])
  assert np.isinf(found[1])
  assert found[2] == 0


def test_norms_are_joined_without_squares():
  a = jnp.array([0.0, 3.0, 3e-30, 3e37, np.nan, 1.0, np.inf])
  b = jnp.array([0.0, 4.0, 4e-30, 4e37, 1.0, np.nan, 1.0])
  found = np.asarray(jax.jit(norms.hypot)(a, b))
  np.testing.assert_allclose(found[:4], [0, 5, 5e-30, 5e37], rtol=1e-6)
  assert np.all(np.isnan(found[4:6]))
  assert np.isinf(found[6])
