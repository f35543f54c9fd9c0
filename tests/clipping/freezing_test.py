"""Parameters that are not trained cost nothing and change nothing."""

import functools

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from dpdist import clipping
from dpdist.clipping import freezing
from dpdist.noise import noise

pytestmark = pytest.mark.usefixtures("quick_compiles")

METHODS = ("bookkeeping", "two_pass", "vmap")
_BATCH = 16


def _normal(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _loss(params, x):
  """Frozen weights before, between and after trained ones, and in a loop."""
  body, head = params["body"], params["head"]
  x = jnp.tanh(x @ body["in"])
  x = x + (x @ head["down"]) @ head["up"]

  def layer(x, w):
    return jnp.tanh(x @ (w["frozen"] + w["a"] * head["scale"])), None

  layers = {"frozen": body["layers"], "a": head["layers"]}
  x, _ = lax.scan(jax.checkpoint(layer), x, layers)
  x = x @ (body["out"] * head["scale"])
  return jnp.sum(x**2) + jnp.sum(head["scale"]) * body["count"]


def _params():
  return {
    "body": {
      "count": jnp.int32(3),
      "in": _normal(11, 13),
      "layers": _normal(2, 13, 13),
      "out": _normal(13, 8),
    },
    "head": {
      "down": _normal(13, 2),
      "layers": _normal(2, 13, 1),
      "scale": _normal(),
      "up": _normal(2, 13),
    },
  }


_FROZEN = {"body": True, "head": False}


def _is_body(path):
  return path.startswith("body/")


def _closed_over(head, x):
  return _loss(_params() | {"head": head}, x)


def _flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@functools.cache
def _expected():
  fn = clipping.clipped_grad(_closed_over, l2_clip_norm=5.0, method="vmap")
  got = jax.jit(fn)(_params()["head"], _batch(), is_padding_example=_padding())
  assert np.count_nonzero(np.asarray(got.grad_norms) > 5.0) > 4
  return got


def _batch():
  return _normal(_BATCH, 4, 11)


def _padding():
  return np.arange(_BATCH) % 5 == 3


@pytest.mark.parametrize(
  "method",
  [
    "bookkeeping",
    *(pytest.param(m, marks=pytest.mark.slow) for m in ("two_pass", "vmap")),
  ],
)
def test_sums_are_those_of_a_loss_that_closes_over_them(method):
  fn = clipping.clipped_grad(
    _loss, l2_clip_norm=5.0, method=method, frozen=_FROZEN
  )
  got = jax.jit(fn)(_params(), _batch(), is_padding_example=_padding())
  assert jax.tree.leaves(got.sum["body"]) == []
  np.testing.assert_allclose(got.grad_norms, _expected().grad_norms, rtol=1e-4)
  for mine, theirs in zip(
    jax.tree.leaves(got.sum), jax.tree.leaves(_expected().sum), strict=True
  ):
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


# The parameters whole everywhere, or each divided where it can be, the frozen
# ones along rows, columns and a loop's iterations.
_DIVIDED = {
  "body": {
    "count": PartitionSpec(),
    "in": PartitionSpec(),
    "layers": PartitionSpec("fsdp"),
    "out": PartitionSpec(None, "fsdp"),
  },
  "head": {
    "down": PartitionSpec(None, "fsdp"),
    "layers": PartitionSpec("fsdp"),
    "scale": PartitionSpec(),
    "up": PartitionSpec("fsdp"),
  },
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("method", "divided"),
  [("bookkeeping", False), *((method, True) for method in METHODS)],
)
def test_sums_on_eight_devices(method, divided):
  mesh = jax.make_mesh(
    (4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  fn = clipping.clipped_grad(
    _loss, l2_clip_norm=5.0, method=method, frozen=_FROZEN
  )
  rows = PartitionSpec(("data", "fsdp"))
  specs = (
    _DIVIDED if divided else jax.tree.map(lambda _: PartitionSpec(), _params())
  )

  def call(params, batch, is_padding_example):
    got = fn(
      params,
      batch,
      is_padding_example=is_padding_example,
      param_specs=specs if divided else None,
    )
    over = lambda spec: ("data",) if any(spec) else ("data", "fsdp")
    total = jax.tree.map(
      lambda x, spec: lax.psum(x, over(spec)), got.sum["head"], specs["head"]
    )
    return total, got.grad_norms

  run = jax.shard_map(
    call,
    mesh=mesh,
    in_specs=(specs, rows, rows),
    out_specs=(specs["head"], rows),
  )
  total, norms = jax.jit(run)(_params(), _batch(), _padding())
  np.testing.assert_allclose(norms, _expected().grad_norms, rtol=1e-4)
  np.testing.assert_allclose(
    _flat(total), _flat(_expected().sum), rtol=1e-3, atol=1e-4
  )


def _shapes(jaxpr):
  for eqn in jaxpr.eqns:
    for inner in core.jaxprs_in_params(eqn.params):
      yield from _shapes(inner)
    yield from (x.aval.shape for x in eqn.outvars)


def _program(method, frozen):
  """What a call computes for two layers, the first of which may be frozen."""
  loss = lambda p, x: jnp.sum(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]))
  fn = clipping.clipped_grad(
    loss, l2_clip_norm=1.0, method=method, frozen=frozen
  )
  args = {"a": _normal(64, 96), "b": _normal(96, 2)}, _normal(_BATCH, 1, 64)
  compiled = jax.jit(fn).lower(*args).compile()
  flops = compiled.cost_analysis()["flops"]
  shapes = list(_shapes(jax.make_jaxpr(fn)(*args).jaxpr))
  like_a = lambda shape: {64, 96} <= set(shape)
  return flops, [shape for shape in shapes if like_a(shape)]


@pytest.mark.parametrize(
  "method",
  [
    "bookkeeping",
    *(pytest.param(m, marks=pytest.mark.slow) for m in ("two_pass", "vmap")),
  ],
)
def test_no_gradient_of_a_frozen_weight_is_formed(method):
  flops, formed = _program(method, None)
  assert formed
  less, none = _program(method, {"a": True, "b": False})
  assert none == []
  # Forward once or twice through both layers is left, and the last's gradient.
  assert less < (0.8 if method == "two_pass" else 0.6) * flops


def test_noise_and_optax_pass_over_what_is_frozen():
  fn = clipping.clipped_grad(_loss, l2_clip_norm=1.0, frozen=_FROZEN)
  params = _params()
  trainable, rest = clipping.partition(params, _FROZEN)
  transform = optax.chain(
    noise.gaussian_noise(fn.sensitivity(), 1), optax.scale(0.1), optax.adam(0.1)
  )
  state = jax.jit(transform.init)(trainable)

  @jax.jit
  def step(params, trainable, state):
    return transform.update(fn(params, _batch()).sum, state, trainable)

  updates, state = step(params, trainable, state)
  after = clipping.merge(optax.apply_updates(trainable, updates), rest)
  assert jax.tree.structure(after) == jax.tree.structure(params)
  for name, x in params["body"].items():
    assert after["body"][name] is x
  for name, x in params["head"].items():
    assert np.all(np.asarray(after["head"][name]) != np.asarray(x))


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_group_has_no_norm_and_does_not_count(method):
  loss = lambda p, x: jnp.sum(p["a"] * x) + jnp.sum(p["b"] * p["c"] * x)
  params = {"a": _normal(3), "b": _normal(3), "c": _normal(3)}
  norms = {"a": 3.0, "b": None, "c": 4.0}
  frozen = {"a": False, "b": True, "c": False}
  fn = clipping.clipped_grad(
    loss, l2_clip_norm=norms, frozen=frozen, method=method
  )
  assert fn.sensitivity() == 5.0
  got = jax.jit(fn)(params, 1e6 * _normal(1, 3))
  assert got.grad_norms["b"] is None
  for name in "ac":
    length = np.linalg.norm(got.sum[name])
    np.testing.assert_allclose(length, norms[name], rtol=1e-5)


@pytest.mark.parametrize(
  ("frozen", "message"),
  [
    (True, r"frozen must leave .* train, got True .*'a', 'b'"),
    ({"a": True, "b": True}, r"frozen must leave .* train"),
    ({"a": True, "typo": False}, r"frozen must be .* prefix .*typo.*'a', 'b'"),
    ({"a": {"x": True}, "b": False}, r"frozen must be .* prefix"),
    ([True, False], r"frozen must be .* prefix"),
    (lambda path: path == "typo", r"frozen must be True of some .*'a', 'b'"),
    (lambda path: path.find("a"), r"frozen must return True or False, got 0"),
  ],
)
def test_what_does_not_fit_is_named(frozen, message):
  fn = clipping.clipped_grad(
    lambda p, x: p["a"] * p["b"] * x, l2_clip_norm=1.0, frozen=frozen
  )
  params = {"a": jnp.ones(()), "b": jnp.ones(())}
  with pytest.raises(ValueError, match=message):
    fn(params, jnp.ones(2))
  with pytest.raises(ValueError, match=message):
    clipping.partition(params, frozen)


@pytest.mark.parametrize("frozen", ["a", {"a": 1}, 0, {"a": "yes"}])
def test_what_is_no_bool_is_refused_before_a_call(frozen):
  with pytest.raises(ValueError, match="frozen must hold bools"):
    clipping.clipped_grad(_loss, l2_clip_norm=1.0, frozen=frozen)


def test_norms_must_fit_what_is_frozen():
  params = {"a": jnp.ones(()), "b": jnp.ones(())}
  loss = lambda p, x: p["a"] * p["b"] * x
  make = functools.partial(
    clipping.clipped_grad, loss, frozen={"a": True, "b": False}
  )
  with pytest.raises(ValueError, match=r"l2_clip_norm must hold None .* 1\.0"):
    make(l2_clip_norm={"a": 1.0, "b": 2.0})(params, jnp.ones(2))
  with pytest.raises(ValueError, match=r"l2_clip_norm must hold a norm.*None"):
    make(l2_clip_norm={"a": None, "b": None})
  with pytest.raises(ValueError, match=r"l2_clip_norm must hold a norm.*None"):
    clipping.clipped_grad(loss, l2_clip_norm={"a": None, "b": 2.0})(
      params, jnp.ones(2)
    )


def test_explain_names_what_is_frozen(capsys):
  fn = clipping.clipped_grad(_loss, l2_clip_norm=1.0, frozen=_is_body)
  text = fn.explain(*jax.eval_shape(lambda: (_params(), _batch())))
  capsys.readouterr()
  for name in _params()["body"]:
    (row,) = [x for x in text.splitlines() if f"['body']['{name}']" in x]
    assert row.split()[-4:] == ["frozen", "0", "0", "0"]
  # A constant, and not data, in the weight that it is a part of.
  assert "dot_general 2x13x13" in text


def test_a_predicate_is_on_the_path():
  parts = freezing.split(_params(), _is_body)
  assert parts.is_frozen == (True,) * 4 + (False,) * 4
  assert parts.is_frozen == freezing.split(_params(), _FROZEN).is_frozen


def test_names_are_paths():
  assert freezing.names({"a": [jnp.ones(1)] * 2, "b": 1.0}) == [
    "a/0",
    "a/1",
    "b",
  ]
