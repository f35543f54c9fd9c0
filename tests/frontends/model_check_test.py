"""What is unsafe in a model is listed, and what is not is not."""

import re

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist.frontends import keras as private_keras
from dpdist.frontends import nnx as nnx_frontend

layers = private_keras.keras.layers
_BATCH = np.ones((3, 4), np.float32)


def _of_loss(loss_fn, params, rng=None):
  return dpdist.check_model(
    loss_fn=loss_fn, params=params, batch=_BATCH, rng=rng
  )


class _Linen(nn.Module):
  kind: str

  @nn.compact
  def __call__(self, x):
    if self.kind == "batch norm":
      x = nn.BatchNorm(use_running_average=False, name="norm")(x[None])[0]
    if self.kind == "counter":
      count = self.variable("counters", "n", lambda: jnp.zeros(()))
      count.value += 1
    x = nn.Dropout(0.5, deterministic=False)(nn.GroupNorm(2)(x[None])[0])
    return nn.Dense(1)(x)


class _Nnx(nnx.Module):
  def __init__(self, norm=nnx.LayerNorm, rate=None):
    self.norm = norm(4, rngs=nnx.Rngs(0))
    if norm is nnx.LayerNorm and rate is None:
      self.count = nnx.Variable(jnp.zeros(()))
    if rate is not None:
      self.drop = nnx.Dropout(rate, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.drop(self.norm(x))


def _equinox(layer):
  return eqx.nn.Sequential([eqx.nn.Linear(4, 4, key=jax.random.key(0)), layer])


def _keras(*more):
  keras = private_keras.keras
  return keras.Sequential([keras.Input((4,)), *more, layers.Dense(1)])


def _adapted():
  layer = layers.Normalization()
  layer.adapt(_BATCH)
  return layer


_KEY = jax.random.key(0)
_MODELS = {
  "linen": (lambda: (_Linen(""), _BATCH[0]), []),
  "linen batch norm": (
    lambda: (_Linen("batch norm"), _BATCH[0]),
    ["norm: BatchNorm: .*GroupNorm"],
  ),
  "linen collection": (
    lambda: (_Linen("counter"), _BATCH[0]),
    ["mutable collection 'counters'"],
  ),
  "nnx batch norm": (
    lambda: (_Nnx(nnx.BatchNorm),),
    ["norm: BatchNorm: .*GroupNorm"],
  ),
  "nnx state": (lambda: (_Nnx(),), [r"count: state .* \(Variable\)"]),
  "nnx dropout": (
    lambda: (_Nnx(rate=0.5),),
    ["drop/rngs/count: stochastic state", "drop/rngs/key: stochastic state"],
  ),
  "equinox": (lambda: (_equinox(eqx.nn.LayerNorm(4)),), []),
  "equinox batch norm": (
    lambda: (_equinox(eqx.nn.BatchNorm(4, "b", mode="batch")),),
    [r"model.layers\[1\]: BatchNorm: .*GroupNorm"],
  ),
  "equinox stateful": (
    lambda: (
      _equinox(
        eqx.nn.SpectralNorm(eqx.nn.Linear(4, 4, key=_KEY), "weight", key=_KEY)
      ),
    ),
    [r"layers\[1\]: a stateful layer \(SpectralNorm\)"],
  ),
  "keras": (
    lambda: (
      _keras(
        layers.GroupNormalization(2),
        layers.Dropout(0.5),
        layers.BatchNormalization(trainable=False),
        layers.Normalization(mean=0.0, variance=1.0),
      ),
    ),
    [],
  ),
  "keras batch norm": (
    lambda: (_keras(layers.BatchNormalization(name="norm")),),
    ["norm: BatchNormalization: .*GroupNormalization"],
  ),
  "keras adapted": (lambda: (_keras(_adapted()),), ["public numbers"]),
  "keras spectral": (
    lambda: (_keras(layers.SpectralNormalization(layers.Dense(4))),),
    ["SpectralNormalization: it changes state"],
  ),
}


@pytest.mark.parametrize("name", _MODELS)
def test_modules(name):
  make, expected = _MODELS[name]
  found = [str(finding) for finding in dpdist.check_model(*make())]
  assert len(found) == len(expected), found
  for text, pattern in zip(found, expected, strict=True):
    assert re.search(pattern, text), text


def _linear(params, x):
  return jnp.sum(params["w"] * x)


def test_a_sound_loss():
  assert not _of_loss(_linear, {"w": jnp.ones(4)})


def test_parameters_that_no_example_touches():
  params = {"w": jnp.ones(4), "idle": jnp.ones(2)}
  (found,) = _of_loss(_linear, params)
  assert (found.where, found.what) == (
    "params['idle']",
    "parameters that no example touches",
  )
  # A gradient that is 0 at first only is none of these.
  assert not _of_loss(
    lambda p, x: jnp.sum(p["w"] * x) * jnp.sum(p["idle"]),
    {"w": jnp.ones(4), "idle": jnp.zeros(2)},
  )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_initial_values_that_are_not_finite(value):
  (found,) = _of_loss(_linear, {"w": jnp.ones(4).at[2].set(value)})
  assert "not finite" in found.what


def test_parameters_of_integers():
  (found,) = _of_loss(_linear, {"w": jnp.ones(4, jnp.int32)})
  assert "int32" in found.what
  assert "frozen" in found.instead


def test_a_named_axis():
  (found,) = _of_loss(
    lambda p, x: _linear(p, x - jax.lax.pmean(x, "batch")), {"w": jnp.ones(4)}
  )
  assert "named axis" in found.what
  assert "depends on other examples" in found.why


def test_randomness():
  params, key = {"w": jnp.ones(4)}, jax.random.key(0)

  def noisy(params, x, rng):
    return _linear(params, x * jax.random.bernoulli(rng, 0.5, x.shape))

  assert not _of_loss(noisy, params, key)
  fixed = lambda p, x: noisy(p, x, jax.random.key(3))
  (found,) = _of_loss(fixed, params)
  assert "do not come from the loss's rng" in found.what
  (found,) = _of_loss(lambda p, x, rng: fixed(p, x), params, key)
  assert "do not come from the loss's rng" in found.what


def test_state_that_changes_inside_the_loss():
  model = _Nnx(rate=0.5)
  found = _of_loss(lambda p, x: _linear(p, model(x)), {"w": jnp.ones(4)})
  assert "state that changes" in found[0].what


def test_a_loss_of_the_frontend_has_no_stochastic_state():
  model = _Nnx(rate=0.5)
  loss_fn, params = nnx_frontend.per_example_loss(
    model, lambda model, x: jnp.sum(model(x))
  )
  assert not dpdist.check_model(
    model,
    loss_fn=loss_fn,
    params=params,
    batch=_BATCH,
    rng=jax.random.key(0),
  )


def test_a_loss_that_is_no_number():
  (found,) = _of_loss(lambda p, x: p["w"] * x, {"w": jnp.ones(4)})
  assert found.what == "no single floating number"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "model or loss_fn"),
    ((3,), "got a int"),
    ((_Linen(""),), "inputs must be"),
  ],
)
def test_refuses_what_it_cannot_look_at(arguments, message):
  with pytest.raises(ValueError, match=message):
    dpdist.check_model(*arguments)
