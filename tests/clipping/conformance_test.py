"""Every kind of model, by every method, sharded or not: the reference's answer.

To cover a new layer, add a row to `CASES`: a function that returns the loss of
one example, parameters, and a batch of 16. The loss takes a key if its third
argument is called rng.
"""

import functools
import inspect

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from dpdist import clipping
from dpdist.clipping.layers import convolution
from dpdist.clipping.layers import costs
from dpdist.clipping.layers import kernel_gradients
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.layers import rules

_BATCH = 16
CASES = {}


def _case(function):
  CASES[function.__name__] = function
  return function


def _normal(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _ids(*shape, below=7):
  rng = np.random.default_rng(shape)
  return jnp.asarray(rng.integers(0, below, shape), jnp.int32)


def _square(x):
  return jnp.sum(jnp.square(jnp.tanh(x))) + jnp.sum(x) / 3


# Dense products.


@_case
def dense():
  loss = lambda p, x: _square(jnp.tanh(x @ p["a"] + p["b"]) @ p["c"])
  return (
    loss,
    {"a": _normal(5, 6), "b": _normal(6), "c": _normal(6, 3)},
    (_normal(_BATCH, 5)),
  )


@_case
def dense_at_many_positions():
  loss = lambda p, x: _square(jnp.tanh(x @ p["a"] + p["b"]) @ p["c"])
  return (
    loss,
    {"a": _normal(5, 6), "b": _normal(6), "c": _normal(6, 3)},
    (_normal(_BATCH, 9, 5)),
  )


@_case
def weight_on_the_left():
  loss = lambda p, x: (
    _square(p @ x) + _square(jnp.einsum("ab,cbd->dca", p, x[None]))
  )
  return loss, _normal(4, 5), _normal(_BATCH, 5, 3)


@_case
def einsum_with_batched_weights():
  loss = lambda p, x: _square(jnp.einsum("tehd,ehdk->tek", x, p))
  return loss, _normal(3, 2, 4, 5), _normal(_BATCH, 6, 3, 2, 4)


@_case
def experts():
  def loss(p, x):
    gates = jax.nn.softmax(x @ p["gate"])
    hidden = jax.nn.gelu(jnp.einsum("td,edh->teh", x, p["in"]))
    return _square(jnp.einsum("teh,ehd,te->td", hidden, p["out"], gates))

  return (
    loss,
    {"gate": _normal(4, 3), "in": _normal(3, 4, 5), "out": _normal(3, 5, 4)},
    _normal(_BATCH, 6, 4),
  )


@_case
def attention():
  def loss(p, x):
    q, k, v = (jnp.einsum("td,dhe->the", x, p[n]) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("the,she->hts", q, k), axis=-1)
    out = jnp.einsum("hts,she->the", weights, v)
    return _square(jnp.einsum("the,hed->td", out, p["o"]))

  shapes = {"q": (4, 2, 3), "k": (4, 2, 3), "v": (4, 2, 3), "o": (2, 3, 4)}
  return (
    loss,
    {n: _normal(*s, seed=ord(n)) for n, s in shapes.items()},
    (_normal(_BATCH, 5, 4)),
  )


@_case
def used_several_times():
  def loss(p, x):
    for _ in range(3):
      x = jnp.tanh(x @ p)
    return _square(x @ p.T)

  return loss, _normal(4, 4), _normal(_BATCH, 5, 4)


@_case
def both_operands_depend_on_parameters():
  loss = lambda p, x: _square((x * p["s"]) @ (p["a"] * p["s"]))
  return loss, {"s": _normal(4, 1), "a": _normal(4, 4)}, _normal(_BATCH, 4, 4)


# Convolutions.


def _convolution(kernel, size, *, channels=4, ndim=2, layout=None, **kwargs):
  layout = (
    layout
    or {
      1: ("NWC", "WIO", "NWC"),
      2: ("NHWC", "HWIO", "NHWC"),
      3: ("NDHWC", "DHWIO", "NDHWC"),
    }[ndim]
  )
  kwargs = {"window_strides": (1,) * ndim, "padding": "SAME"} | kwargs
  shape = {"N": 1, "C": channels, "H": size, "W": size + 1, "D": size}

  def loss(p, x):
    return _square(
      lax.conv_general_dilated(x, p, dimension_numbers=layout, **kwargs)
    )

  x = _normal(_BATCH, *(shape[a] for a in layout[0]))
  return loss, _normal(*kernel), x


for _name, _arguments in {
  "convolution": {"kernel": (3, 3, 4, 5), "size": 6},
  "convolution_one_by_one": {"kernel": (1, 1, 4, 5), "size": 5},
  "convolution_stride": {
    "kernel": (3, 2, 4, 5),
    "size": 7,
    "window_strides": (2, 3),
    "padding": "VALID",
  },
  "convolution_dilation": {
    "kernel": (3, 3, 4, 5),
    "size": 7,
    "rhs_dilation": (2, 1),
  },
  "convolution_transposed": {
    "kernel": (3, 3, 4, 5),
    "size": 4,
    "lhs_dilation": (2, 2),
    "padding": ((1, 2), (2, 1)),
  },
  "convolution_negative_padding": {
    "kernel": (2, 2, 4, 5),
    "size": 6,
    "padding": ((-1, 0), (0, -1)),
  },
  "convolution_groups": {
    "kernel": (3, 3, 2, 6),
    "size": 5,
    "feature_group_count": 2,
  },
  "convolution_depthwise": {
    "kernel": (3, 3, 1, 8),
    "size": 5,
    "feature_group_count": 4,
  },
  "convolution_channels_first": {
    "kernel": (5, 4, 3, 3),
    "size": 5,
    "layout": ("NCHW", "OIHW", "NCHW"),
  },
  "convolution_many_channels": {
    "kernel": (3, 3, 16, 16),
    "size": 4,
    "channels": 16,
  },
  "convolution_many_channels_stride": {
    "kernel": (3, 3, 16, 8),
    "size": 6,
    "channels": 16,
    "window_strides": (1, 2),
    "rhs_dilation": (1, 2),
  },
  "convolution_1d": {"kernel": (3, 4, 5), "size": 8, "ndim": 1},
  "convolution_3d": {"kernel": (2, 3, 2, 4, 3), "size": 4, "ndim": 3},
}.items():
  CASES[_name] = functools.partial(_convolution, **_arguments)


@_case
def convolution_weight_standardised():
  def loss(p, x):
    centred = p["w"] - jnp.mean(p["w"], axis=(0, 1, 2))
    w = p["gain"] * centred / (jnp.std(p["w"], axis=(0, 1, 2)) + 1e-3)
    return _square(
      lax.conv_general_dilated(
        x[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
      )
    )

  params = {"w": _normal(3, 3, 4, 5), "gain": _normal(5)}
  return loss, params, _normal(_BATCH, 5, 5, 4)


@_case
def convolution_used_twice():
  def loss(p, x):
    for _ in range(2):
      x = jnp.tanh(nn.Conv(4, (3, 3)).apply({"params": p}, x))
    return _square(x)

  return (
    loss,
    {"kernel": _normal(3, 3, 4, 4), "bias": _normal(4)},
    (_normal(_BATCH, 4, 4, 4)),
  )


# Embeddings.


@_case
def embedding():
  loss = lambda p, ids: _square(p[ids]) + _square(jnp.take(p, ids[:2], axis=0))
  return loss, _normal(7, 4), _ids(_BATCH, 9)


@_case
def embedding_out_of_range():
  def loss(p, ids):
    taken = jnp.take(p, ids, axis=0, mode="fill", fill_value=0)
    return _square(taken) + _square(jnp.take(p, ids, axis=0, mode="clip"))

  return loss, _normal(7, 4), _ids(_BATCH, 9, below=12)


@_case
def embedding_indexed_out_of_range():
  # What is out of range is read from the nearest row, but has no gradient.
  loss = lambda p, ids: _square(p[ids])
  return loss, _normal(70, 4), _ids(_BATCH, 4, below=210) - 105


@_case
def ids_of_every_dtype():
  # As many rows as a dtype has ids, which is a number that it may not hold.
  rows = {"u1": 256, "i1": 128, "u2": 65536, "i2": 32768, "i4": 9, "u4": 9}

  def loss(p, ids):
    return _square(
      jnp.stack([jnp.take(p[dtype], ids[dtype], axis=0) for dtype in rows])
    )

  params = {dtype: _normal(n, 2) for dtype, n in rows.items()}
  ids = {
    dtype: (_ids(_BATCH, 3, below=9) + n - 9).astype(dtype)
    for dtype, n in rows.items()
  }
  return loss, params, ids


@_case
def inputs_of_every_dtype():
  def loss(p, inputs):
    return _square(jnp.stack([x @ p for x in inputs.values()]))

  dtypes = ["bool", "u1", "i2", "i4", "f2", "bfloat16", "f4"]
  ones = {x: _ids(_BATCH, 3, 4, below=2).astype(x) for x in dtypes}
  return loss, _normal(4, 4), ones


@_case
def tied_embedding():
  def loss(p, ids):
    x = jnp.tanh(p["table"][ids] @ p["w"])
    return -jnp.sum(jax.nn.log_softmax(x @ p["table"].T)[:, 0])

  return loss, {"table": _normal(7, 4), "w": _normal(4, 4)}, _ids(_BATCH, 5)


@_case
def rows_chosen_by_data():
  def loss(p, ids):
    row = lax.dynamic_slice(p, (ids[0], 0), (2, 4))
    return _square(row) + _square(jnp.take_along_axis(p, ids[:1, None], axis=0))

  return loss, _normal(9, 4), _ids(_BATCH, 3)


# Elementwise.


@_case
def layer_norm():
  def loss(p, x):
    x = (x - jnp.mean(x, -1, keepdims=True)) / (
      jnp.std(x, -1, keepdims=True) + 1
    )
    return _square(x * (1 + p["scale"]) + p["bias"])

  return loss, {"scale": _normal(4), "bias": _normal(4)}, _normal(_BATCH, 5, 4)


@_case
def positions():
  loss = lambda p, x: _square(x + p)
  return loss, _normal(5, 4), _normal(_BATCH, 5, 4)


@_case
def scalar_parameter():
  loss = lambda p, x: _square(x / jax.nn.softplus(p))
  return loss, _normal(), _normal(_BATCH, 5)


@_case
def penalty_on_the_parameters():
  loss = lambda p, x: _square(x @ p) + 0.1 * jnp.sum(p**2)
  return loss, _normal(4, 3), _normal(_BATCH, 4)


@_case
def selected_by_data():
  loss = lambda p, x: _square(jnp.where(x > 0, p["a"], p["b"]) * x)
  return loss, {"a": _normal(4), "b": _normal(4)}, _normal(_BATCH, 4)


# How parameters are seen.


@_case
def reshaped_and_transposed():
  def loss(p, x):
    return _square(x @ p.reshape(4, 6).T.reshape(6, 2, 2).transpose(1, 2, 0)[0])

  return loss, _normal(2, 12), _normal(_BATCH, 5, 2)


@_case
def joined():
  def loss(p, x):
    w = jnp.concatenate([p["q"], p["k"].T, -p["v"]], axis=1)
    return _square(x @ w)

  return (
    loss,
    {"q": _normal(4, 3), "k": _normal(2, 4), "v": _normal(4, 4)},
    (_normal(_BATCH, 5, 4)),
  )


@_case
def joined_with_itself():
  loss = lambda p, x: _square(x @ jnp.concatenate([p, p], axis=1))
  return loss, _normal(4, 3), _normal(_BATCH, 5, 4)


@_case
def divided():
  def loss(p, x):
    q, k, v = jnp.split(p, 3, axis=1)
    return _square((x @ q) * jnp.tanh(x @ k)) + _square(x @ v)

  return loss, _normal(4, 9), _normal(_BATCH, 5, 4)


@_case
def slices_that_overlap():
  loss = lambda p, x: _square(x @ p[:, :3]) + _square(x @ p[:, 2:5])
  return loss, _normal(4, 5), _normal(_BATCH, 5, 4)


@_case
def stacked():
  def loss(p, x):
    for i in range(3):
      x = jnp.tanh(x @ p[i])
    return _square(x)

  return loss, _normal(3, 4, 4), _normal(_BATCH, 5, 4)


@_case
def low_rank_product():
  loss = lambda p, x: _square(x @ (p["w"] + p["a"] @ p["b"]))
  return (
    loss,
    {"w": _normal(4, 5), "a": _normal(4, 2), "b": _normal(2, 5)},
    (_normal(_BATCH, 6, 4)),
  )


@_case
def low_rank_adapter_on_a_frozen_weight():
  frozen = _normal(4, 5, seed=1)
  loss = lambda p, x: _square(x @ frozen + (x @ p["a"]) @ p["b"])
  return loss, {"a": _normal(4, 2), "b": _normal(2, 5)}, _normal(_BATCH, 6, 4)


@_case
def masked():
  mask = jnp.asarray(np.random.default_rng(0).random((4, 5)) < 0.5)
  loss = lambda p, x: _square(x @ jnp.where(mask, 2 * p, 0))
  return loss, _normal(4, 5), _normal(_BATCH, 6, 4)


@_case
def frozen():
  loss = lambda p, x: _square((x @ lax.stop_gradient(p["w"])) * p["s"])
  return loss, {"w": _normal(4, 5), "s": _normal(5)}, _normal(_BATCH, 4)


@_case
def unused():
  loss = lambda p, x: _square(x @ p["w"])
  return loss, {"w": _normal(4, 5), "not": _normal(3)}, _normal(_BATCH, 4)


# Control flow.


@_case
def scan_over_layers():
  def loss(p, x):
    def layer(x, p):
      return jnp.tanh(x @ p["w"].T + p["b"]), jnp.sum(p["b"])

    x, sums = lax.scan(layer, x, p, reverse=True)
    return _square(x) + jnp.sum(sums)

  return (
    loss,
    {"w": _normal(3, 4, 4), "b": _normal(3, 4)},
    _normal(_BATCH, 5, 4),
  )


@_case
def scan_of_convolutions():
  def loss(p, x):
    conv = lambda x, w: (
      jnp.tanh(
        lax.conv_general_dilated(
          x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
      ),
      None,
    )
    return _square(lax.scan(conv, x[None], p)[0])

  return loss, _normal(2, 3, 3, 4, 4), _normal(_BATCH, 4, 4, 4)


@_case
def scan_over_time():
  def loss(p, x):
    def cell(h, x):
      h = jnp.tanh(x @ p["in"] + h @ p["rec"] + p["b"])
      return h, h @ p["out"]

    return _square(lax.scan(cell, p["h0"], x)[1])

  params = {
    "in": _normal(3, 4),
    "rec": _normal(4, 4),
    "b": _normal(4),
    "h0": _normal(4, seed=2),
    "out": _normal(4, 2),
  }
  return loss, params, _normal(_BATCH, 6, 3)


@_case
def scan_with_weights_that_differ_by_a_constant():
  masks = jnp.asarray(np.random.default_rng(0).random((3, 4, 4)), jnp.float32)

  def loss(p, x):
    layer = lambda x, mask: (jnp.tanh(x @ (p * mask)), None)
    return _square(lax.scan(layer, x, masks)[0])

  return loss, _normal(4, 4), _normal(_BATCH, 5, 4)


@_case
def scan_with_parameters_as_carry():
  def loss(p, x):
    def body(w, x):
      return 0.9 * w, jnp.tanh(x @ w)

    return _square(lax.scan(body, p, x)[1])

  return loss, _normal(4, 3), _normal(_BATCH, 5, 4)


@_case
def scan_in_scan():
  def loss(p, x):
    def layer(x, p):
      cell = lambda h, x: (jnp.tanh(h @ p["rec"] + x @ p["in"]),) * 2
      return lax.scan(cell, jnp.zeros_like(x[0]), x)[1], None

    return _square(lax.scan(layer, x, p)[0])

  return (
    loss,
    {"in": _normal(2, 4, 4), "rec": _normal(2, 4, 4, seed=1)},
    (_normal(_BATCH, 5, 4)),
  )


@_case
def remat_in_scan():
  def loss(p, x):
    @jax.checkpoint
    def layer(x, p):
      x = x + jnp.tanh(x * p["s"] @ p["in"]) @ p["out"]
      return x, None

    return _square(lax.scan(layer, x, p)[0])

  params = {"s": _normal(2, 4), "in": _normal(2, 4, 6), "out": _normal(2, 6, 4)}
  return loss, params, _normal(_BATCH, 5, 4)


@_case
def remat_of_tied_weights():
  block = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]))
  loss = lambda p, x: _square(block(p, block(p, x)))
  return loss, {"w": _normal(4, 4), "b": _normal(4)}, _normal(_BATCH, 5, 4)


@_case
def vmapped_and_jitted():
  inner = jax.jit(jax.vmap(lambda w, x: jnp.tanh(x @ w)))
  loss = lambda p, x: _square(inner(p, x))
  return loss, _normal(3, 4, 5), _normal(_BATCH, 3, 6, 4)


@_case
def branches():
  def loss(p, x):
    x = lax.cond(x[0] > 0, lambda: x @ p["w"], lambda: jnp.sin(x * p["b"]))
    return _square(
      lax.switch(jnp.int32(x[1] > 0), [jnp.sin, lambda y: y @ p["w"]], x)
    )

  return loss, {"w": _normal(4, 4), "b": _normal(4)}, _normal(_BATCH, 4)


@_case
def loop_that_data_ends():
  def loss(p, x):
    n = lax.while_loop(lambda n: x[n] > 0, lambda n: n + 1, 0)
    return _square((x @ p) * n)

  return loss, _normal(4, 3), _normal(_BATCH, 4).at[:, 3].set(-1.0)


@_case
def derivatives_of_the_user():
  @jax.custom_vjp
  def layer(w, x):
    return x @ w

  # On purpose not the derivative: it must be taken as it is written.
  layer.defvjp(
    lambda w, x: (x @ w, (w, x)),
    lambda res, g: (3 * res[1].T @ g, 2 * g @ res[0].T),
  )

  @jax.custom_jvp
  def scale(s, x):
    return s * x

  scale.defjvp(
    lambda primals, tangents: (
      primals[0] * primals[1],
      5 * tangents[0] * primals[1] + primals[0] * tangents[1],
    )
  )
  loss = lambda p, x: _square(scale(p["s"], layer(p["w"], x)))
  return loss, {"w": _normal(4, 3), "s": _normal(3)}, _normal(_BATCH, 5, 4)


@jax.custom_vjp
def _clip_gradient(x):
  return x


_clip_gradient.defvjp(
  lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),)
)


@_case
def derivative_that_is_not_linear_on_data():
  loss = lambda p, x: 100 * _square(_clip_gradient(x @ p))
  return loss, _normal(4, 3), _normal(_BATCH, 5, 4)


@_case
def derivative_that_is_not_linear_on_parameters():
  def loss(p, x):
    step = lambda c, _: (jnp.tanh(c @ _clip_gradient(p)), None)
    return 10 * _square(lax.scan(step, x @ p, length=3)[0])

  return loss, _normal(4, 4), _normal(_BATCH, 5, 4)


@_case
def complex_numbers():
  def loss(p, x):
    wave = jnp.exp(1j * x)
    part = jnp.real(jnp.sum(p.astype(jnp.complex64)[:2, 0] * wave[:2]))
    return part * 10 + jnp.sum(jnp.abs(wave[None] @ p.astype(jnp.complex64)))

  return loss, _normal(4, 3), _normal(_BATCH, 4)


@_case
def rounded_then_not_linear():
  def loss(p, x):
    p = p.astype(jnp.bfloat16).astype(jnp.float32)
    return _square(x @ jnp.maximum(p - 1, 0))

  # Some of the weights round to exactly 1, where the derivative is a half.
  p = jnp.where(_ids(4, 3, below=2) > 0, 1.001, 1.5)
  return loss, p, _normal(_BATCH, 5, 4)


@_case
def sorted_and_accumulated():
  loss = lambda p, x: _square(jnp.cumsum(jnp.sort(x * p), axis=0)) + jnp.max(p)
  return loss, _normal(4), _normal(_BATCH, 5, 4)


@_case
def dropout():
  def loss(p, x, rng):
    keep = jax.random.bernoulli(rng, 0.5, (6,))
    return _square(jnp.where(keep, jnp.tanh(x @ p["a"]), 0) @ p["b"])

  return loss, {"a": _normal(4, 6), "b": _normal(6, 2)}, _normal(_BATCH, 4)


# The libraries' own layers.


@_case
def linen():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3), (2, 2))(x[None])))
      x = nn.ConvTranspose(4, (2, 2))(x)
      x = nn.LayerNorm()(x.reshape(1, -1, 4))
      x = nn.MultiHeadDotProductAttention(2)(x)
      return nn.Dense(3)(x.mean(1))[0]

  net = Net()
  x = _normal(_BATCH, 6, 6, 2)
  params = net.init(jax.random.key(0), x[0])["params"]
  return lambda p, x: _square(net.apply({"params": p}, x)), params, x


@_case
def nnx_model():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(7, 4, rngs=rngs)
      self.norm = nnx.RMSNorm(4, rngs=rngs)
      self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, ids):
      x = nnx.gelu(self.dense(self.norm(self.embed(ids))))
      return self.embed.attend(x)

  graph, params = nnx.split(Net(nnx.Rngs(0)))
  loss = lambda p, ids: _square(nnx.merge(graph, p)(ids))
  return loss, params, _ids(_BATCH, 5)


@_case
def equinox_model():
  model = eqx.nn.MLP(4, 2, 6, 2, key=jax.random.key(0))
  params, static = eqx.partition(model, eqx.is_inexact_array)
  loss = lambda p, x: _square(eqx.combine(p, static)(x))
  return loss, params, _normal(_BATCH, 4)


# Prices that make each way to a norm the cheapest where there is a choice.
_PRICES = {
  "default": costs.MODELS["cpu"],
  "arithmetic is free": costs.Model(1e30, 1e10, 1.0),
  "memory is free": costs.Model(1e10, 1e30, 1.0),
}
_CLIP = 0.7


def _problem(name):
  loss, params, batch = CASES[name]()
  wants_key = "rng" in inspect.signature(loss).parameters
  keys = jax.random.split(jax.random.key(1), _BATCH) if wants_key else None
  return loss, params, batch, keys


# Of the reference alone, which nobody runs for its speed.
_QUICKLY = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


def _compute(
  loss, params, batch, keys, *, sharded=False, options=None, **kwargs
):
  """Clipped sums and norms, scaled so that some examples are clipped."""
  fn = clipping.clipped_grad(loss, l2_clip_norm=_CLIP, **kwargs)

  def call(params, batch, keys, is_padding_example):
    got = fn(params, batch, is_padding_example=is_padding_example, rng=keys)
    return got.sum, got.grad_norms, got.loss

  is_padding_example = np.arange(_BATCH) % 5 == 3
  if sharded:
    rows = PartitionSpec("data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inner = call

    @functools.partial(
      jax.shard_map,
      mesh=mesh,
      in_specs=(PartitionSpec(), rows, rows, rows),
      out_specs=(PartitionSpec(), rows, rows),
    )
    def call(*args):
      total, *rest = inner(*args)
      return lax.psum(total, "data"), *rest

  compiled = jax.jit(call, compiler_options=options)
  return compiled(params, batch, keys, is_padding_example)


def _assert_close(got, expected, tolerance=1e-5):
  """To a tolerance relative to the norm of the whole."""
  got, expected = (
    np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(t)])
    for t in (got, expected)
  )
  error = np.linalg.norm(got - expected)
  assert error <= tolerance * np.linalg.norm(expected)


@functools.cache
def _reference(name):
  return _compute(*_problem(name), method="vmap", options=_QUICKLY)


# What takes longest to compile is apart; so are, below, ways that are the same
# for every device, and those of other devices. Each kind of layer is held in
# one pass and on one device in every run; its variants, two passes and eight
# devices come in turn, but for those that stand for the kinds of rules.
_FOR_ALL = ("dense", "tied_embedding", "dropout")
_VARIANTS = (
  *("convolution_negative_padding", "convolution_3d", "convolution_dilation"),
  *("convolution_channels_first", "convolution_many_channels_stride"),
  *("convolution_1d", "convolution_one_by_one", "convolution_transposed"),
  *("embedding_indexed_out_of_range", "dense_at_many_positions"),
  *("weight_on_the_left", "scan_of_convolutions", "remat_in_scan"),
  *("remat_of_tied_weights", "scan_in_scan", "vmapped_and_jitted"),
  *("derivative_that_is_not_linear_on_parameters", "equinox_model"),
  *("loop_that_data_ends", "sorted_and_accumulated", "divided", "stacked"),
  "scan_with_weights_that_differ_by_a_constant",
  *("convolution_depthwise", "convolution_many_channels", "joined_with_itself"),
  *("inputs_of_every_dtype", "complex_numbers"),
  *("convolution_weight_standardised", "convolution_used_twice", "branches"),
  *("convolution_stride", "scan_with_parameters_as_carry"),
  *("experts", "nnx_model", "embedding_out_of_range", "positions", "masked"),
)


def _comes_in_turn(name, method, sharded):
  if name == "linen" or name in _VARIANTS:
    return True
  if method == "two_pass" and sharded:  # Each is shown by itself.
    return name != "dense"
  return (sharded or method == "two_pass") and name not in _FOR_ALL


_QUICK_FIRST = [
  pytest.param(
    *(name, method, sharded),
    marks=[pytest.mark.slow] * _comes_in_turn(name, method, sharded),
    id=f"{name}-{method}-{'8 devices' if sharded else 'one'}",
  )
  for name in CASES
  for method in ("bookkeeping", "two_pass")
  for sharded in (False, True)
]


@pytest.mark.parametrize(("name", "method", "sharded"), _QUICK_FIRST)
def test_equals_the_reference(name, method, sharded):
  expected = _reference(name)
  assert np.count_nonzero(np.asarray(expected[1]) > _CLIP) > _BATCH / 2
  got = _compute(*_problem(name), method=method, sharded=sharded)
  for mine, theirs in zip(got, expected, strict=True):
    _assert_close(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_same_sharded(name):
  got = _compute(*_problem(name), method="vmap", sharded=True)
  for mine, theirs in zip(got, _reference(name), strict=True):
    _assert_close(mine, theirs)


# Where a TPU has ways of its own.
_CONVOLVES = [name for name in CASES if "conv" in name or name == "linen"]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("method", "min_groups", "sharded"),
  [
    ("bookkeeping", 1, True),
    ("bookkeeping", 1000, True),
    ("two_pass", 1000, False),
  ],
  ids=["groups, 8 devices", "axis, 8 devices", "axis, two passes"],
)
@pytest.mark.parametrize("name", _CONVOLVES)
def test_convolutions_as_for_a_tpu(
  name, min_groups, method, sharded, monkeypatch
):
  # Both ways to form a gradient, and no rounding, for which norms get room.
  monkeypatch.setattr(kernel_gradients, "_MIN_GROUPS", min_groups)
  monkeypatch.setitem(costs.MODELS, "tpu", _PRICES["memory is free"])
  with jax.default_matmul_precision("highest"):
    got = _compute(
      *_problem(name), method=method, sharded=sharded, platform="tpu"
    )
  for mine, theirs in zip(got, _reference(name), strict=True):
    _assert_close(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
  "strategy", [layer_rule.GRAM, convolution.DIAGONAL_GRAM], ids=lambda s: s.text
)
@pytest.mark.parametrize("name", _CONVOLVES)
def test_norms_of_convolutions_that_are_never_formed(
  name, strategy, monkeypatch
):
  # No price makes these the cheapest for kernels as small as here.
  taken = []
  offered = rules._strategies

  def strategies(*args):
    found = offered(*args)
    if strategy in found:
      taken.append(strategy)
      return {strategy: found[strategy]}
    return found

  monkeypatch.setattr(rules, "_strategies", strategies)
  got = _compute(*_problem(name), method="bookkeeping", sharded=True)
  expected = _reference(name)
  # These norms have room for what rounding may hide: they are never less.
  for mine, theirs in zip(got, expected, strict=True):
    _assert_close(mine, theirs, 1e-3)
  real = np.arange(_BATCH) % 5 != 3
  norms, right = np.asarray(got[1])[real], np.asarray(expected[1])[real]
  assert np.all(norms >= right * (1 - 1e-5))
  # Not where the kernel is used twice, inside a loop, or computed.
  formed = ("used_twice", "scan_of", "standardised")
  assert taken or any(part in name for part in formed)


# Whose gradients with respect to weights say nothing yet about norms.
_COMPUTED = [
  "convolution_weight_standardised",
  "joined_with_itself",
  "low_rank_product",
  "rounded_then_not_linear",
  "scan_with_weights_that_differ_by_a_constant",
]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bookkeeping", "two_pass"])
@pytest.mark.parametrize("name", _COMPUTED)
def test_gradients_that_reach_the_parameters_one_by_one(
  name, method, monkeypatch
):
  # As where those of a batch do not fit in the cache.
  monkeypatch.setitem(costs.CACHE_BYTES, "cpu", 0)
  loops = []
  loop = jax.lax.map
  monkeypatch.setattr(
    jax.lax, "map", lambda *args: loops.append(name) or loop(*args)
  )
  got = _compute(*_problem(name), method=method, sharded=True)
  assert loops
  for mine, theirs in zip(got, _reference(name), strict=True):
    _assert_close(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
  "prices", [name for name in _PRICES if name != "default"]
)
@pytest.mark.parametrize("name", CASES)
def test_every_way_to_a_norm(name, prices, monkeypatch):
  monkeypatch.setitem(costs.MODELS, "cpu", _PRICES[prices])
  got = _compute(*_problem(name), method="bookkeeping", microbatch_size=8)
  for mine, theirs in zip(got, _reference(name), strict=True):
    _assert_close(mine, theirs)
