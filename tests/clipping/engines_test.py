"""What every engine promises beside equality with the reference."""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist import clipping
from dpdist.clipping.engines import two_pass
from dpdist.clipping.layers import costs

METHODS = ("bookkeeping", "two_pass", "vmap")
_FREE_ARITHMETIC = costs.Model(1e30, 1e10, 1.0)


def _normal(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _net(params, x):
  x = jnp.tanh(x @ params["a"] + params["b"])
  return jnp.sum(jnp.tanh(x @ params["c"]))


def _params():
  return {"a": _normal(4, 6), "b": _normal(6), "c": _normal(6, 3)}


@pytest.mark.parametrize(
  ("method", "platform"),
  [*((method, "cpu") for method in METHODS), ("bookkeeping", "tpu")],
)
@pytest.mark.parametrize(
  "bad",
  [
    np.nan,
    *(pytest.param(x, marks=pytest.mark.slow) for x in (np.inf, -np.inf)),
    1e38,
  ],
)
def test_examples_that_are_not_finite_contribute_exactly_zero(
  method, platform, bad
):
  params = {"a": _normal(4, 6), "b": _normal(4), "c": _normal(4, 6, seed=1)}
  fn = _clipped_growing(method, platform)
  batch = _normal(6, 5, 4).at[2].set(bad)
  got = fn(params, batch)
  without = fn(params, batch, is_padding_example=np.arange(6) == 2)
  zeroed = fn(params, batch.at[2].set(0), is_padding_example=np.arange(6) == 2)
  for name in params:
    assert np.all(np.isfinite(got.sum[name]))
    np.testing.assert_array_equal(got.sum[name], without.sum[name])
    np.testing.assert_array_equal(got.sum[name], zeroed.sum[name])


@functools.cache
def _clipped_growing(method, platform):
  """Its programs are the same whatever is not finite."""

  def loss(params, x):
    # Grows without bound, in the forward pass already.
    loss = jnp.sum((x @ params["a"]) ** 2) + jnp.sum(params["b"] * x)
    # Used once: the sum is a product, in which either side may hold NaN.
    return loss + jnp.sum((x[0] @ params["c"]) ** 2)

  return jax.jit(
    clipping.clipped_grad(
      loss, l2_clip_norm=1.0, method=method, platform=platform
    ).__call__
  )


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_any_example_sums_to_exactly_zero(method):
  fn = jax.jit(clipping.clipped_grad(_net, l2_clip_norm=1.0, method=method))
  batch = jnp.full((4, 5, 4), jnp.nan)
  got = fn(_params(), batch, is_padding_example=np.ones(4, bool))
  for total in jax.tree.leaves(got.sum):
    np.testing.assert_array_equal(total, 0)


# A loss whose gradient is the sum of given outer products, in three places.


def _dense_products(params, example):
  return jnp.sum((example["r"] @ params) * example["c"])


def _lookups(params, example):
  return jnp.sum(params[example["i"]] * example["c"])


def _convolution_products(params, example):
  out = lax.conv_general_dilated(
    example["r"],
    params,
    (1, 1),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return jnp.sum(out * example["c"])


def _cancelling(kind, scale, left):
  """One example whose gradient is a small rest of large terms."""
  rng = np.random.default_rng(1)
  c = rng.normal(size=(1, 8))
  c = np.concatenate([c, -c * (1 - left)])
  if kind == "dense":
    r = np.repeat(rng.normal(size=(1, 5)), 2, axis=0)
    return _dense_products, _normal(5, 8), {"r": scale * r, "c": c}
  if kind == "lookup":
    return _lookups, _normal(5, 8), {"i": np.array([3, 3]), "c": scale * c}
  r = np.repeat(rng.normal(size=(1, 1, 1, 5)), 2, axis=2)
  c = c.reshape(1, 1, 2, 8)
  return _convolution_products, _normal(1, 1, 5, 8), {"r": scale * r, "c": c}


@pytest.mark.parametrize(
  "scale",
  [
    pytest.param(1e2, marks=pytest.mark.slow),
    1e4,
    pytest.param(1e6, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("kind", ["dense", "lookup", "convolution"])
@pytest.mark.parametrize("method", METHODS)
def test_terms_that_cancel_cannot_pass_the_clip(
  method, kind, scale, monkeypatch
):
  # Inner products of positions lose such a gradient in rounding.
  monkeypatch.setitem(costs.MODELS, "cpu", _FREE_ARITHMETIC)
  loss = _cancelling(kind, scale, 1.0)[0]
  fn = jax.jit(clipping.clipped_grad(loss, l2_clip_norm=1.0, method=method))
  for left in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
    _, params, example = _cancelling(kind, scale, left)
    batch = jax.tree.map(
      lambda x: jnp.asarray(
        x[None], jnp.int32 if x.dtype == int else jnp.float32
      ),
      example,
    )
    total = np.asarray(fn(params, batch).sum, np.float64)
    assert np.linalg.norm(total) <= 1 + 1e-3, left


def _cancelling_on_the_way_back(params, example):
  h = jnp.dot(params["w"], example["x"])
  h = (h * example["a"]) * example["b"] - h * example["c"]
  return h + jnp.dot(params["v"], example["y"])


@pytest.mark.parametrize(
  ("norms", "remat"),
  [
    (1.0, False),
    ({"v": 1.0, "w": 1.0}, True),
    *(
      pytest.param(*x, marks=pytest.mark.slow)
      for x in ((1.0, True), ({"v": 1.0, "w": 1.0}, False))
    ),
  ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_cancels_for_the_norm_cancels_in_the_sum(method, remat, norms):
  loss = _cancelling_on_the_way_back
  fn = clipping.clipped_grad(
    jax.checkpoint(loss) if remat else loss, l2_clip_norm=norms, method=method
  )
  call = jax.jit(fn.__call__)
  for power in (0, 10, 20, 30):
    a, b = np.float32([4097, 3001]) * np.float32(2**power)
    batch = {
      "x": jnp.eye(3)[:1],
      "y": jnp.array([[0.0, 3.0, 0.0]]),
      **{k: jnp.array([v]) for k, v in {"a": a, "b": b, "c": a * b}.items()},
    }
    got = call({"v": jnp.ones(3), "w": jnp.ones(3)}, batch)
    moved = np.linalg.norm(np.concatenate(list(got.sum.values())))
    assert moved <= fn.sensitivity() * (1 + 1e-5), power


@pytest.mark.parametrize("power", [0, 10])
@pytest.mark.parametrize("has_own_norms", [False, True])
@pytest.mark.parametrize("num_positions", [3, 600])
def test_what_a_product_sums_anew_cannot_pass_the_clip(
  num_positions, has_own_norms, power
):
  a, b = 4097 * 2.0**power, 3001 * 2.0**power
  x, g = np.zeros((2, 1, num_positions, 256), np.float32)
  x[0, :3, 0] = a, a * b, 0
  g[0, :3, 0] = b, -1, 0
  x[0, 2, 1], g[0, 2, 1] = 3, 1
  batch = {"x": x, "g": g, "y": np.zeros((1, 3), np.float32)}
  params = {"v": jnp.zeros(3), "w": jnp.zeros((256, 256))}
  total = _clipped_product(has_own_norms)(params, batch).sum
  assert np.linalg.norm(total["w"]) <= 1 + 1e-3


@functools.cache
def _clipped_product(has_own_norms):
  def loss(params, example):
    return jnp.sum((example["x"] @ params["w"]) * example["g"]) + jnp.sum(
      params["v"] * example["y"]
    )

  norms = {"v": 1.0, "w": 1.0} if has_own_norms else 1.0
  fn = clipping.clipped_grad(loss, l2_clip_norm=norms, method="two_pass")
  return jax.jit(fn.__call__)


@pytest.mark.parametrize(
  "kwargs",
  [
    {"l2_clip_norm": 1e-3, "rescale_to_unit_norm": True},
    {"l2_clip_norm": 1.0, "normalize_gamma": 1e-3},
  ],
)
@pytest.mark.parametrize("method", METHODS)
def test_scales_above_one_do_not_overflow_on_the_way_back(method, kwargs):
  loss = lambda p, x: (jnp.dot(p, x["x"]) * x["a"]) * x["b"]
  batch = {
    "x": jnp.full((1, 3), 1e-3),
    "a": jnp.array([1e-37]),
    "b": jnp.array([1e37]),
  }
  fn = jax.jit(clipping.clipped_grad(loss, method=method, **kwargs))
  total = np.asarray(fn(jnp.ones(3), batch).sum)
  assert 0.5 < np.linalg.norm(total) <= 1 + 1e-5


# What is normalised or rescaled alone, is both in another one of these.
_FACTORS = [
  {"l2_clip_norm": 0.5},
  {"l2_clip_norm": 0.5, "rescale_to_unit_norm": True},
  {"l2_clip_norm": 0.5, "normalize_gamma": 0.1},
  {
    "l2_clip_norm": 0.5,
    "normalize_gamma": 1e-12,
    "rescale_to_unit_norm": True,
  },
  {"l2_clip_norm": {"a": 0.5, "b": 2.0, "c": 0.1}},
  {
    "l2_clip_norm": {"a": 0.5, "b": 2.0, "c": 0.1},
    "rescale_to_unit_norm": True,
    "normalize_gamma": 0.01,
  },
]


@pytest.mark.parametrize(
  ("kwargs", "method"),
  [
    pytest.param(
      *(_FACTORS[i], method),
      marks=[pytest.mark.slow] * (i in (1, 2, 4) and method != "vmap"),
      id=f"kwargs{i}-{method}",
    )
    for i in range(len(_FACTORS))
    for method in METHODS
  ],
)
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(method, kwargs):
  fn = clipping.clipped_grad(_net, method=method, **kwargs)
  call = jax.jit(fn.__call__)
  flat = lambda tree: np.concatenate(
    [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]
  )
  params, batch = _params(), _normal(6, 5, 4)
  nobody = np.zeros(6, bool)
  summed = lambda batch, padding: flat(
    call(params, batch, is_padding_example=padding).sum
  )
  base = summed(batch, nobody)
  furthest = 0.0
  removed = summed(batch, np.arange(6) == 1)
  for scale in (1e-6, -1.0, -3.0, 1e3, 1e30):
    other = summed(batch.at[1].multiply(scale), nobody)
    moved = np.linalg.norm(other - base)
    assert moved <= fn.sensitivity("replace_one") * (1 + 1e-5)
    added = np.linalg.norm(other - removed)
    assert added <= fn.sensitivity() * (1 + 1e-5)
    furthest = max(furthest, moved)
  # Far enough for the bound to mean something.
  assert furthest > fn.sensitivity() / 3


def test_normalised_gradients():
  loss = lambda p, x: jnp.sum(p * x)
  fn = clipping.clipped_grad(loss, l2_clip_norm=2.0, normalize_gamma=0.5)
  got = jax.jit(fn)(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 0.0]]))
  np.testing.assert_allclose(got.sum, 2 / 5.5 * np.array([3, 4]), rtol=1e-6)
  assert fn.sensitivity() == 2.0


@pytest.mark.parametrize(
  "method",
  [
    pytest.param(x, marks=[pytest.mark.slow] * (x == "bookkeeping"))
    for x in METHODS
  ],
)
def test_norms_by_group(method):
  whole = jax.jit(clipping.clipped_grad(_net, l2_clip_norm=1.0, method=method))
  parts = jax.jit(
    clipping.clipped_grad(
      _net, l2_clip_norm={"a": 0.5, "b": 1.0, "c": 2.0}, method=method
    )
  )
  batch = _normal(6, 5, 4)
  norms = parts(_params(), batch).grad_norms
  np.testing.assert_allclose(
    np.sqrt(sum(np.square(x) for x in norms.values())),
    whole(_params(), batch).grad_norms,
    rtol=1e-5,
  )
  got = parts(_params(), batch).sum
  expected = jax.jit(
    clipping.clipped_grad(
      _net, l2_clip_norm={"a": 0.5, "b": 1.0, "c": 2.0}, method="vmap"
    )
  )(_params(), batch).sum
  for name in got:
    np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_groups_that_share_a_weight(method):
  loss = lambda p, x: jnp.sum(
    jnp.tanh(x @ jnp.concatenate([p["a"], p["b"]], axis=1))
  )
  norms = {"a": 0.1, "b": 0.3}
  params = {"a": _normal(4, 2), "b": _normal(4, 3)}
  batch = _normal(6, 5, 4)
  got, expected = (
    jax.jit(clipping.clipped_grad(loss, l2_clip_norm=norms, method=m))(
      params, batch
    )
    for m in (method, "vmap")
  )
  for name in params:
    np.testing.assert_allclose(got.sum[name], expected.sum[name], rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
  "where",
  [
    "parameters",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("casts", "widened")),
  ],
)
def test_sums_of_narrow_models_are_float32(method, where):
  narrow = jnp.bfloat16
  if where == "casts":
    loss = lambda p, x: jnp.sum(x @ p.astype(narrow)).astype(jnp.float32)
    params = jnp.zeros((1, 1))
  elif where == "widened":
    loss = lambda p, x: jnp.sum(x.astype(jnp.float32) @ p.astype(jnp.float32))
    params = jnp.zeros((1, 1), narrow)
  else:
    loss = lambda p, x: jnp.sum(x @ p)
    params = jnp.zeros((1, 1), narrow)
  fn = clipping.clipped_grad(loss, l2_clip_norm=1.0, method=method)
  got = jax.jit(fn.__call__)(params, jnp.full((1000, 1, 1), -1.0, narrow))
  assert got.sum.dtype == jnp.float32
  # A bfloat16 sum of a thousand ones stops at 256, a rounded one is 1000 too,
  # and one more must still be seen.
  assert float(got.sum[0, 0]) == -1000.0
  more = jax.jit(fn.__call__)(params, jnp.full((1001, 1, 1), -1.0, narrow))
  assert float(more.sum[0, 0]) == -1001.0


def _rounded(x):
  return x.astype(jnp.bfloat16).astype(jnp.float32)


def _rounded_dot(w, x):
  return jnp.sum(_rounded(w.astype(jnp.bfloat16) * x.astype(jnp.bfloat16)))


_custom_jvp = jax.custom_jvp(_rounded_dot)
_custom_jvp.defjvp(
  lambda primals, tangents: (
    _rounded_dot(*primals),
    _rounded_dot(tangents[0], primals[1])
    + _rounded_dot(primals[0], tangents[1]),
  )
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
  "loss",
  [
    lambda w, x: jnp.dot(jax.checkpoint(_rounded)(w), x),
    lambda w, x: jnp.dot(
      lax.scan(lambda c, row: (c, _rounded(row)), 0.0, w)[1], x
    ),
    lambda w, x: jax.checkpoint(_custom_jvp)(w, x),
  ],
  ids=["checkpoint", "scan", "custom_jvp in checkpoint"],
)
def test_sums_are_float32_where_what_is_narrow_is_out_of_sight(loss, method):
  fn = clipping.clipped_grad(loss, l2_clip_norm=1.0, method=method)
  got = jax.jit(fn.__call__)(jnp.ones(2), jnp.tile(jnp.eye(2)[:1], (1001, 1)))
  assert float(got.sum[0]) == 1001.0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_narrow_models_agree_with_the_reference(method):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x[None])
      x = nn.LayerNorm(dtype=jnp.bfloat16)(x)
      x = nn.Dense(8, dtype=jnp.bfloat16)(nn.tanh(x).mean((1, 2)))
      return jnp.sum(nn.tanh(x)).astype(jnp.float32)

  net, batch = Net(), _normal(8, 5, 5, 3)
  params = net.init(jax.random.key(0), batch[0])
  got, expected = (
    jax.jit(clipping.clipped_grad(net.apply, l2_clip_norm=0.5, method=m))(
      params, batch
    )
    for m in (method, "vmap")
  )
  np.testing.assert_allclose(got.grad_norms, expected.grad_norms, rtol=2e-2)
  for mine, theirs in zip(
    jax.tree.leaves(got.sum), jax.tree.leaves(expected.sum), strict=True
  ):
    assert mine.dtype == jnp.float32
    np.testing.assert_allclose(mine, theirs, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("method", ["bookkeeping", "two_pass"])
def test_accelerators_leave_room_for_the_rounding_of_their_products(
  method, platform
):
  batch = _normal(8, 5, 4)
  got, expected = (
    jax.jit(
      clipping.clipped_grad(_net, l2_clip_norm=0.5, method=method, platform=p)
    )(_params(), batch)
    for p in (platform, "cpu")
  )
  assert np.all(np.asarray(got.grad_norms) >= np.asarray(expected.grad_norms))
  np.testing.assert_allclose(got.grad_norms, expected.grad_norms, rtol=0.05)
  with jax.default_matmul_precision("highest"):
    exact = jax.jit(
      clipping.clipped_grad(
        _net, l2_clip_norm=0.5, method=method, platform=platform
      )
    )(_params(), batch)
  np.testing.assert_allclose(exact.grad_norms, expected.grad_norms, rtol=1e-5)


_PRESET = lax.DotAlgorithmPreset


@pytest.mark.parametrize(
  ("platform", "precision", "dtype"),
  [
    ("tpu", None, jnp.bfloat16),
    ("tpu", (lax.Precision.HIGHEST, lax.Precision.DEFAULT), jnp.bfloat16),
    ("cpu", _PRESET.BF16_BF16_F32, jnp.bfloat16),
    ("gpu", _PRESET.BF16_BF16_F32_X3, jnp.bfloat16),
    ("cpu", _PRESET.F16_F16_F32, jnp.float16),
    ("cpu", _PRESET.ANY_F8_ANY_F8_F32, jnp.float8_e5m2),
    (
      "cpu",
      lax.DotAlgorithm(jnp.bfloat16, jnp.bfloat16, jnp.float32),
      jnp.bfloat16,
    ),
  ],
)
def test_the_room_for_rounding_is_that_of_the_worst_number(
  platform, precision, dtype
):
  numbers = jnp.linspace(1, 2, 2**16 + 1)
  rounded = numbers.astype(dtype).astype(jnp.float32)
  worst = float(jnp.max(jnp.abs(rounded / numbers - 1)))
  room = costs.unit_roundoff(platform, precision)
  assert worst <= room <= 1.1 * worst + 1e-2 * (room > 0.1)


def test_products_that_do_not_round_need_no_room():
  for precision in ("highest", lax.Precision.HIGHEST, _PRESET.F32_F32_F32):
    assert costs.unit_roundoff("tpu", precision) == 0
  assert costs.unit_roundoff("cpu", None) == 0
  with jax.default_matmul_precision("BF16_BF16_F32"):
    assert costs.unit_roundoff("cpu", None) == 2.0**-8


@pytest.mark.parametrize(
  "method",
  [pytest.param("bookkeeping", marks=pytest.mark.slow), "two_pass"],
)
def test_a_product_that_asks_to_be_rounded_gets_room(method):
  def loss(params, x, precision):
    return jnp.sum(jnp.tanh(jnp.dot(x, params["a"], precision=precision)) ** 2)

  def norms(precision):
    fn = jax.jit(
      clipping.clipped_grad(
        functools.partial(loss, precision=precision),
        l2_clip_norm=0.5,
        method=method,
      )
    )
    return np.asarray(fn(_params(), _normal(8, 5, 4)).grad_norms)

  exact, rounded = norms(None), norms("BF16_BF16_F32")
  # Rounding changes the norms too, so that some room may be taken back.
  assert np.all(rounded > (1 + 2.0**-9) * exact)
  np.testing.assert_allclose(rounded, exact, rtol=0.1)


@pytest.mark.slow
def test_the_lean_engine_rounds_no_product_without_room(monkeypatch):
  passes = []
  monkeypatch.setattr(
    two_pass,
    "_weighted_gradient",
    lambda problem, *args, run=two_pass._weighted_gradient: (
      passes.append(problem.platform) or run(problem, *args)
    ),
  )

  # Norms of a weight that is normalised come from its whole gradient.
  def loss(params, x):
    weight = params["a"] / jnp.linalg.norm(params["a"])
    return jnp.sum(jnp.tanh(x @ weight) ** 2)

  def run(loss, platform):
    passes.clear()
    fn = jax.jit(
      clipping.clipped_grad(
        loss, l2_clip_norm=0.5, method="two_pass", platform=platform
      )
    )
    return fn(_params(), _normal(8, 5, 4)).sum["a"]

  np.testing.assert_allclose(run(loss, "tpu"), run(loss, "cpu"), atol=1e-5)
  assert passes == ["cpu"]
  run(loss, "tpu")
  assert not passes
  run(_net, "tpu")  # Room for each of its products is in the norms.
  assert passes == ["tpu"]


def _layers(params, x):
  def layer(x, w):
    return x + jnp.tanh(jnp.tanh(x @ w["in"]) @ w["out"]), None

  return jnp.sum(lax.scan(jax.checkpoint(layer), x, params)[0] ** 2)


@pytest.mark.slow
def test_the_lean_engine_needs_less_memory_and_auto_takes_it_for_remat():
  params = {"in": _normal(8, 32, 128), "out": _normal(8, 128, 32)}
  batch = _normal(8, 64, 32)
  memory = {}
  for method in ("auto", "bookkeeping", "two_pass"):
    fn = clipping.clipped_grad(
      _layers, l2_clip_norm=1.0, method=method, microbatch_size=8
    )
    compiled = jax.jit(fn.__call__).lower(params, batch).compile()
    memory[method] = compiled.memory_analysis().temp_size_in_bytes
  assert memory["two_pass"] < 0.6 * memory["bookkeeping"]
  assert memory["auto"] == memory["two_pass"]


def test_explain_says_what_is_done_and_why(capsys):
  def loss(params, x):
    x = x @ lax.stop_gradient(params["frozen"])
    return _net(params, x)

  fn = clipping.clipped_grad(loss, l2_clip_norm=1.0)
  params = _params() | {"frozen": jnp.eye(4)}
  shapes = jax.eval_shape(lambda: (params, _normal(8, 5, 4)))
  text = fn.explain(*shapes)
  assert text == capsys.readouterr().out.rstrip("\n")
  assert "method: bookkeeping (the fastest" in text
  rows = {line.split()[0]: line for line in text.splitlines()[2:]}
  assert set(rows) == {f"['{name}']" for name in params}
  assert "dot_general 4x6" in rows["['a']"]
  assert "per-example fallback 6" in rows["['b']"]
  # Nothing is done, and no memory spent, for a frozen parameter.
  assert rows["['frozen']"].split()[-3:] == ["0", "0", "0"]
  vmap = clipping.clipped_grad(loss, l2_clip_norm=1.0, method="vmap")
  assert "method: vmap (as asked for)" in vmap.explain(*shapes)


def test_automatic_microbatches_divide_the_batch_and_change_nothing():
  batch = _normal(12, 900, 4)
  whole, parts = (
    jax.jit(
      clipping.clipped_grad(_net, l2_clip_norm=0.5, microbatch_size=size)
    )(_params(), batch)
    for size in (12, 3)
  )
  automatic = jax.jit(clipping.clipped_grad(_net, l2_clip_norm=0.5))(
    _params(), batch
  )
  for got in (parts, automatic):
    np.testing.assert_allclose(got.grad_norms, whole.grad_norms, rtol=1e-5)
    for name in whole.sum:
      np.testing.assert_allclose(
        got.sum[name], whole.sum[name], rtol=1e-4, atol=1e-5
      )


def test_statistics_over_a_named_axis_are_refused():
  def loss(params, x):
    return jnp.sum(params["a"] * (x - lax.pmean(x, "batch")))

  fn = jax.jit(clipping.clipped_grad(loss, l2_clip_norm=1.0))
  with pytest.raises(
    ValueError, match=r"loss_fn .* one example .* named axis .*batch"
  ):
    fn({"a": jnp.ones(4)}, _normal(3, 4))


def test_parameters_that_are_not_floating_are_named():
  loss = lambda p, x: jnp.sum(p["a"] * x)
  fn = jax.jit(clipping.clipped_grad(loss, l2_clip_norm=1.0))
  with pytest.raises(ValueError, match=r"params .* int32 at params\['n'\]"):
    fn({"a": jnp.ones(4), "n": jnp.int32(3)}, _normal(3, 4))


@pytest.mark.parametrize("gamma", [0.0, -1.0, np.nan, np.inf, True, "1"])
def test_bad_gammas_are_named(gamma):
  with pytest.raises(ValueError, match=r"normalize_gamma .* got"):
    jax.jit(
      clipping.clipped_grad(_net, l2_clip_norm=1.0, normalize_gamma=gamma)
    )


def test_other_mesh_axes_take_the_reference():
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  spec = jax.sharding.PartitionSpec

  def loss(p, x):
    i = lax.axis_index("model")
    return lax.psum(jnp.sum((x * (i + 1)) @ p), "model")

  def total(method):
    fn = jax.jit(clipping.clipped_grad(loss, l2_clip_norm=1.0, method=method))
    run = jax.shard_map(
      lambda p, x: lax.psum(fn(p, x).sum, "data"),
      mesh=mesh,
      in_specs=(spec(), spec("data")),
      out_specs=spec(),
    )
    return jax.jit(run)(100 * _normal(4, 3), jnp.ones((4, 4)).at[1:].set(0))

  np.testing.assert_allclose(np.linalg.norm(total("auto")), 1.0, rtol=1e-5)
  with pytest.raises(ValueError, match=r"method must .*\['model'\].*two_pass"):
    total("two_pass")
