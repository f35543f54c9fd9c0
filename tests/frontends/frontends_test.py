"""Models of several frameworks: one loss each, and what is refused."""

import subprocess
import sys

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist.frontends import equinox as equinox_frontend
from dpdist.frontends import linen as linen_frontend
from dpdist.frontends import nnx as nnx_frontend

pytestmark = pytest.mark.usefixtures("quick_compiles")

_SIZE = 6


class _Linen(nn.Module):
  norm: str = ""
  rate: float = 0.0

  @nn.compact
  def __call__(self, x):
    if self.norm == "batch":
      x = nn.BatchNorm(use_running_average=False)(x[None])[0]
    x = nn.LayerNorm()(nn.Dense(_SIZE)(x))
    x = nn.Dropout(self.rate, deterministic=False)(x)
    return nn.Dense(2)(nn.tanh(x))


class _Nnx(nnx.Module):
  def __init__(self, rate=0.0, norm=nnx.LayerNorm):
    rngs = nnx.Rngs(0)
    self.first = nnx.Linear(_SIZE, _SIZE, rngs=rngs)
    self.norm = norm(_SIZE, rngs=rngs)
    self.drops = nnx.List([nnx.Dropout(rate, rngs=rngs) for _ in range(2)])
    self.last = nnx.Linear(_SIZE, 2, rngs=rngs)

  def __call__(self, x):
    x = self.norm(self.first(x))
    for drop in self.drops:
      x = drop(x)
    return self.last(nnx.tanh(x))


class _Equinox(eqx.Module):
  first: eqx.nn.Linear
  dropout: eqx.nn.Dropout
  last: eqx.nn.Linear
  size: int  # Not an array: no parameter.

  def __init__(self, rate=0.0):
    keys = jax.random.split(jax.random.key(0))
    self.first = eqx.nn.Linear(_SIZE, _SIZE, key=keys[0])
    self.dropout = eqx.nn.Dropout(rate)
    self.last = eqx.nn.Linear(_SIZE, 2, key=keys[1])
    self.size = _SIZE

  def __call__(self, x, key=None):
    x = self.dropout(self.first(x), key=key)
    return self.last(jnp.tanh(x))


def _square(out, target):
  return jnp.sum((out - target) ** 2)


def _linen(rate):
  model = _Linen(rate=rate)
  loss = lambda out, example: _square(out, example[1])
  keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  params = model.init(keys, jnp.ones(_SIZE))["params"]
  apply = lambda p, x: model.apply(
    {"params": p}, x, rngs={"dropout": jax.random.key(0)}
  )
  return linen_frontend.per_example_loss(model, loss), params, apply


def _nnx(rate):
  model = _Nnx(rate)
  loss_fn, params = nnx_frontend.per_example_loss(
    model, lambda model, example: _square(model(example[0]), example[1])
  )

  def apply(params, x):
    fresh = _Nnx(rate)
    nnx.update(fresh, params)
    return fresh(x)

  return loss_fn, params, apply


def _equinox(rate):
  model = _Equinox(rate)
  loss_fn, params = equinox_frontend.per_example_loss(
    model,
    lambda model, example, key: _square(model(example[0], key), example[1]),
  )
  key = jax.random.key(0)
  return loss_fn, params, lambda p, x: eqx.combine(p, model)(x, key)


_FRONTENDS = {"equinox": _equinox, "linen": _linen, "nnx": _nnx}


def _batch(size=5):
  rng = np.random.default_rng(0)
  shapes = ((size, _SIZE), (size, 2))
  return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize("name", _FRONTENDS)
@pytest.mark.slow
def test_the_sum_is_that_of_the_reference(name):
  """Against gradients of the framework's own call, one by one."""
  loss_fn, params, apply = _FRONTENDS[name](0.0)
  batch = _batch()

  def alone(params, x, y):
    return _square(apply(params, x), y)

  gradients = jax.jit(jax.vmap(jax.grad(alone), (None, 0, 0)))(params, *batch)
  leaves = jax.tree.leaves(gradients)
  norms = jnp.sqrt(sum(jnp.sum(g.reshape(5, -1) ** 2, 1) for g in leaves))
  clip_norm = float(jnp.median(norms))
  scale = jnp.minimum(1, clip_norm / norms)
  fn = jax.jit(dpdist.clipped_grad(loss_fn, l2_clip_norm=clip_norm))
  got = fn(params, batch, rng=jax.random.key(0))
  assert jax.tree.structure(got.sum) == jax.tree.structure(params)
  for found, gradient in zip(jax.tree.leaves(got.sum), leaves, strict=True):
    expected = jnp.tensordot(scale, gradient, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", _FRONTENDS)
def test_dropout_is_each_examples_own(name):
  loss_fn, params, _ = _FRONTENDS[name](0.5)
  batch = jax.tree.map(lambda x: np.repeat(x, 8, axis=0), _batch(1))
  fn = jax.jit(jax.vmap(loss_fn, (None, 0, 0)))
  one, again, other = (
    np.asarray(fn(params, batch, jax.random.split(jax.random.key(i), 8)))
    for i in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, again)
  assert len({*one.tolist(), *other.tolist()}) > 8


def test_nnx_streams_are_apart():
  """Two Dropouts that share a stream's key would drop the same entries."""

  class Net(nnx.Module):
    def __init__(self):
      self.one = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
      self.two = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
      self.w = nnx.Param(jnp.ones(()))

    def __call__(self, x):
      return self.one(x) * self.two(x) * self.w

  loss_fn, params = nnx_frontend.per_example_loss(
    Net(), lambda model, x: jnp.mean(model(x) != 0)
  )
  kept = loss_fn(params, jnp.ones(4000), jax.random.key(0))
  assert float(kept) == pytest.approx(0.25, abs=0.05)


def test_linen_modules_that_expect_a_batch():
  model = _Linen()
  params = model.init(jax.random.key(0), jnp.ones(_SIZE))["params"]
  example = jax.tree.map(lambda x: x[0], _batch())
  loss = lambda out, example: _square(out, example[1])
  one, two = (
    linen_frontend.per_example_loss(model, loss, has_batch_axis=has_batch_axis)(
      params, example
    )
    for has_batch_axis in (False, True)
  )
  np.testing.assert_allclose(one, two, rtol=1e-5)


def test_linen_refuses_state():
  model = _Linen("batch")
  variables = model.init(jax.random.key(0), jnp.ones(_SIZE))
  loss = lambda out, example: jnp.sum(out)
  loss_fn = linen_frontend.per_example_loss(model, loss)
  fn = dpdist.clipped_grad(loss_fn, l2_clip_norm=1.0)
  with pytest.raises(ValueError, match="GroupNorm"):
    fn(variables["params"], _batch())
  with pytest.raises(ValueError, match=r"the collections .*batch_stats"):
    fn(variables, _batch())


def test_nnx_refuses_state():
  loss = lambda model, example: jnp.sum(model(example[0]))
  with pytest.raises(ValueError, match=r"norm/mean \(BatchStat\).*GroupNorm"):
    nnx_frontend.per_example_loss(_Nnx(norm=nnx.BatchNorm), loss)
  loss_fn, params = nnx_frontend.per_example_loss(_Nnx(0.5), loss)
  fn = dpdist.clipped_grad(loss_fn, l2_clip_norm=1.0)
  with pytest.raises(ValueError, match="rng must be given"):
    fn(params, _batch())


def test_equinox_refuses_state():
  model = eqx.nn.Sequential(
    [
      eqx.nn.Linear(2, 2, key=jax.random.key(0)),
      eqx.nn.BatchNorm(2, "batch", mode="batch"),
    ]
  )
  with pytest.raises(ValueError, match=r"layers\[1\]: BatchNorm.*GroupNorm"):
    equinox_frontend.per_example_loss(model, lambda *args: 0.0)


@pytest.mark.slow
def test_the_core_imports_no_frontend():
  code = (
    "import sys, dpdist, dpdist.training.train, dpdist.frontends.linen,"
    " dpdist.frontends.nnx\n"
    "dpdist.check_model, dpdist.private_gradients\n"
    "print([x for x in ('keras', 'equinox') if x in sys.modules])"
  )
  told = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert told.stdout == "[]\n"
