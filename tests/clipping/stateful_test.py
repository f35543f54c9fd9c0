"""Losses with a network state, randomness and metrics."""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import dpdist
from dpdist.clipping import stateful
from dpdist.clipping.trace import dependence

pytestmark = pytest.mark.usefixtures("quick_compiles")

_AGGREGATE = {"each": "stack", "hit": "sum", "size": "mean"}


def _loss(params, state, rng, x):
  noise = jax.random.normal(rng)
  loss = jnp.sum((params["w"] - x) ** 2) * params["b"] * state["scale"]
  state = {"count": state["count"] + 1, "scale": 0.5 * state["scale"]}
  metrics = {"each": noise, "hit": x[0] > 0, "size": {"x": jnp.abs(x)}}
  return loss, (state, metrics)


def _params():
  return {"b": jnp.ones(()), "w": jnp.zeros(3)}


def _state():
  return {"count": jnp.int32(7), "scale": jnp.float32(2.0)}


def _batch():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)


_PADDING = np.arange(16) % 5 == 3
_KEYS = jax.random.split(jax.random.key(0), 16)


def _make(**kwargs):
  given = {"l2_clip_norm": 1.0, "aggregate": _AGGREGATE} | kwargs
  return dpdist.with_state(_loss, **given)


@functools.cache
def _expected():
  closed = lambda p, x: jnp.sum((p["w"] - x) ** 2) * p["b"] * 2.0
  fn = dpdist.clipped_grad(closed, l2_clip_norm=1.0)
  return jax.jit(fn)(_params(), _batch(), is_padding_example=_PADDING)


def _check(got):
  np.testing.assert_allclose(got.grad_norms, _expected().grad_norms, rtol=1e-5)
  for name in "bw":
    np.testing.assert_allclose(
      got.sum[name], _expected().sum[name], rtol=1e-4, atol=1e-5
    )
  assert got.network_state == {"count": 8, "scale": 1.0}
  assert got.network_state["count"].dtype == jnp.int32
  x = np.asarray(_batch())[~_PADDING]
  assert int(got.metrics["hit"]) == np.sum(x[:, 0] > 0)
  np.testing.assert_allclose(
    got.metrics["size"]["x"], np.abs(x).mean(0), rtol=1e-5
  )
  np.testing.assert_allclose(
    got.metrics["each"], [jax.random.normal(k) for k in _KEYS], rtol=1e-5
  )


@pytest.mark.parametrize(
  "options",
  [{"method": "two_pass"}, {"microbatch_size": 4}],
  ids=["two_pass", "microbatches"],
)
def test_sum_state_and_metrics(options):
  batch = jnp.where(_PADDING[:, None], jnp.nan, _batch())
  fn = jax.jit(_make(**options))
  got = fn(_params(), _state(), batch, rng=_KEYS, is_padding_example=_PADDING)
  # Norms of padding are its own.
  _check(got._replace(grad_norms=_expected().grad_norms))


def test_sum_state_and_metrics_on_eight_devices():
  fn = _make()
  rows = PartitionSpec("data")
  whole = PartitionSpec()

  def call(batch, keys, padding):
    got = fn(_params(), _state(), batch, rng=keys, is_padding_example=padding)
    return got._replace(sum=lax.psum(got.sum, "data"))

  # Devices have different numbers of padding: a mean of their means is wrong.
  run = jax.shard_map(
    call,
    mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
    in_specs=(rows, rows, rows),
    out_specs=stateful.StatefulGrads(
      sum=whole,
      loss=rows,
      grad_norms=rows,
      network_state=whole,
      metrics={"each": rows, "hit": whole, "size": whole},
    ),
  )
  _check(jax.jit(run)(_batch(), _KEYS, _PADDING))


def test_frozen_and_by_layer():
  for frozen in ({"b": True, "w": False}, lambda path: path == "b"):
    fn = _make(frozen=frozen, l2_clip_norm={"b": None, "w": 0.5})
    assert fn.sensitivity("replace_one") == 1.0
    one = jax.jit(fn)(_params(), _state(), _batch()[:1], rng=jax.random.key(1))
    assert one.sum["b"] is None
    assert list(one.grad_norms) == ["b", "w"]
    np.testing.assert_allclose(np.linalg.norm(one.sum["w"]), 0.5, rtol=1e-5)


class _Net(nn.Module):
  norm: str

  @nn.compact
  def __call__(self, x):
    count = self.variable("state", "count", lambda: jnp.zeros((), jnp.int32))
    count.value = count.value + 1
    x = nn.Dense(4)(x)
    if self.norm == "batch":
      x = nn.BatchNorm(use_running_average=False)(x)
    else:
      x = nn.GroupNorm(2)(x)
    return jnp.sum(x**2)


def _run_net(norm):
  net, batch = _Net(norm), jnp.ones((4, 6, 3))
  state = net.init(jax.random.key(0), batch[0])
  params = state.pop("params")

  def loss_fn(params, state, rng, x):
    del rng
    return_value, state = net.apply(
      {"params": params, **state}, x, mutable=list(state)
    )
    return return_value, (state, {})

  fn = dpdist.with_state(loss_fn, l2_clip_norm=1.0, aggregate={})
  return jax.jit(fn)(params, state, batch, rng=jax.random.key(0))


def test_batch_norm_is_refused_and_group_norm_is_not():
  assert int(_run_net("group").network_state["state"]["count"]) == 2
  with pytest.raises(
    ValueError,
    match=r"network_state .*batch_stats/BatchNorm_0/mean.*GroupNorm",
  ) as error:
    _run_net("batch")
  assert "count" not in str(error.value)


def _refused(new_state):
  """Which leaves of a new state are refused."""

  def loss_fn(params, state, rng, x):
    return jnp.sum(params * x), (new_state(params, state, rng, x), {})

  fn = dpdist.with_state(loss_fn, l2_clip_norm=1.0, aggregate={})
  state = {"a": jnp.ones(3), "b": jnp.ones(3)}
  try:
    fn(jnp.ones(3), state, jnp.ones((2, 3)), rng=jax.random.key(0))
  except ValueError as error:
    text = str(error).removeprefix("network_state must not depend on")
    return [name for name in "ab" if f"'{name}'" in text]
  return []


def _loop(p, s, k, x):
  # An example reaches b in the second iteration, and never a.
  step = lambda c, _: ((c[0] * 2, c[2] + c[1], c[2] + x), None)
  (a, b, _), _ = lax.scan(step, (s["a"], s["b"], s["a"]), length=2)
  return {"a": a, "b": b}


def _branch(p, s, k, x):
  a = lax.cond(
    jnp.sum(s["a"]) > 0, lambda s, x: s, lambda s, x: 2 * s, s["a"], x
  )
  b = lax.cond(x[0] > 0, lambda s: s, lambda s: 2 * s, s["b"])
  return {"a": a, "b": b}


@pytest.mark.parametrize(
  ("new_state", "refused"),
  [
    (lambda p, s, k, x: s, []),
    (lambda p, s, k, x: {"a": s["b"], "b": s["a"] + 1}, []),
    (lambda p, s, k, x: {"a": p, "b": p / jnp.linalg.norm(p)}, []),
    (lambda p, s, k, x: {"a": jax.jit(jnp.sin)(s["a"]), "b": x}, ["b"]),
    (lambda p, s, k, x: {"a": s["a"], "b": s["b"] + 0 * x}, ["b"]),
    (lambda p, s, k, x: {"a": lax.stop_gradient(x), "b": s["b"]}, ["a"]),
    (lambda p, s, k, x: {"a": s["a"] + jax.random.normal(k), "b": p}, ["a"]),
    (
      lambda p, s, k, x: dict(
        zip("ab", jax.jit(lambda s, x: (s, s + x))(s["a"], x), strict=True)
      ),
      ["b"],
    ),
    (
      lambda p, s, k, x: dict(
        zip("ab", jax.checkpoint(lambda s, x: (x, s))(s["a"], x), strict=True)
      ),
      ["a"],
    ),
    (_loop, ["b"]),
    (_branch, ["b"]),
    (
      lambda p, s, k, x: {
        "a": lax.while_loop(lambda c: c[0] < x[0], lambda c: c + 1, s["a"]),
        "b": s["b"],
      },
      ["a"],
    ),
  ],
)
def test_a_state_may_depend_on_what_is_released_and_on_no_example(
  new_state, refused
):
  assert _refused(new_state) == refused


def test_what_is_not_known_depends_on_everything():
  unknown = lambda a, b: lax.linalg.qr(jnp.stack([a, b])) + (a,)
  jaxpr = jax.make_jaxpr(unknown)(jnp.ones(2), jnp.ones(2)).jaxpr
  assert dependence.dependent(jaxpr, [False, True]) == [True, True, False]


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match=r"aggregate .*'max' for 'hit'"):
    _make(aggregate=_AGGREGATE | {"hit": "max"})
  call = lambda fn: fn(_params(), _state(), _batch(), rng=_KEYS)
  with pytest.raises(
    ValueError, match=r"aggregate .* no other.*\['hit'\].*each"
  ):
    call(_make(aggregate={"hit": "sum"}))
  other = dpdist.with_state(
    lambda p, s, k, x: (p["b"] * x[0], (s | {"new": 1.0}, {})),
    l2_clip_norm=1.0,
    aggregate={},
  )
  with pytest.raises(ValueError, match="network_state must keep"):
    call(other)
  other = dpdist.with_state(
    lambda p, s, k, x: p["b"] * x[0], l2_clip_norm=1.0, aggregate={}
  )
  with pytest.raises(ValueError, match=r"loss_fn must return \(loss, \(new"):
    call(other)
