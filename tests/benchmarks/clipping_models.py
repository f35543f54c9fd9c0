"""The five models that clipping is timed on: in Flax, with made-up data.

Sizes are those of common private-training papers: the convolutional network of
the Opacus and TF Privacy tutorials, WRN-16-4 with group norm (De et al. 2022),
and a small decoder with long and with short sequences.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Problem:
  """A model with its data.

  Attributes:
    params: pytree.
    batch: {"inputs", "targets"} with a leading axis.
    losses: (params, batch) -> [B], as one would write them without privacy.
  """

  params: PyTree
  batch: dict[str, jax.Array]
  losses: Callable[[PyTree, PyTree], jax.Array]

  def loss(self, params: PyTree, example: PyTree) -> jax.Array:
    """The loss of one example."""
    return self.losses(params, jax.tree.map(lambda x: x[None], example))[0]


class Mlp(nn.Module):
  """784-512-512-10."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0], -1)
    for _ in range(2):
      x = nn.relu(nn.Dense(512)(x))
    return nn.Dense(10)(x)


class Cnn(nn.Module):
  """Two strided convolutions with overlapping pools, two dense layers."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(nn.Conv(16, (8, 8), 2, padding=3)(x))
    x = nn.max_pool(x, (2, 2), (1, 1))
    x = nn.relu(nn.Conv(32, (4, 4), 2, padding="VALID")(x))
    x = nn.max_pool(x, (2, 2), (1, 1))
    x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
    return nn.Dense(10)(x)


class StandardisedConv(nn.Module):
  """A convolution whose kernel has mean 0 and norm `gain` for each output.

  Weight standardisation as in Brock et al. 2021, "Characterizing signal
  propagation to close the performance gap in unnormalized ResNets", equation 1.
  """

  features: int
  kernel_size: tuple[int, int]
  strides: int = 1
  padding: int = 0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (*self.kernel_size, x.shape[-1], self.features)
    w = self.param("kernel", nn.initializers.lecun_normal(), shape)
    gain = self.param("gain", nn.initializers.ones, shape[-1:])
    w = w - w.mean((0, 1, 2))
    square = jnp.maximum(jnp.square(w).sum((0, 1, 2)), 1e-4)
    return jax.lax.conv_general_dilated(
      x,
      w * jax.lax.rsqrt(square) * gain,
      (self.strides, self.strides),
      [(self.padding, self.padding)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class WideResNet(nn.Module):
  """WRN-16-4, pre-activation, with group norm of 16 groups."""

  standardised: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    plain = functools.partial(nn.Conv, use_bias=False)
    module = StandardisedConv if self.standardised else plain
    conv = lambda n, k, s=1: module(n, (k, k), s, padding=k // 2)
    x = conv(16, 3)(x)
    for width, first_stride in ((64, 1), (128, 2), (256, 2)):
      for stride in (first_stride, 1):
        y = nn.relu(nn.GroupNorm(16)(x))
        if x.shape[-1] != width:
          x = conv(width, 1, stride)(y)
        y = nn.relu(nn.GroupNorm(16)(conv(width, 3, stride)(y)))
        x = x + conv(width, 3)(y)
    x = nn.relu(nn.GroupNorm(16)(x)).mean((1, 2))
    return nn.Dense(10)(x)


class Gpt(nn.Module):
  """Width 256, four blocks of four heads, 4,096 tokens, separate head."""

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    length = tokens.shape[-1]
    normal = nn.initializers.normal(0.02)
    x = nn.Embed(4096, 256, embedding_init=normal)(tokens)
    x = x + self.param("positions", normal, (length, 256))
    causal = np.tril(np.ones((length, length), bool))
    for _ in range(4):
      y = nn.LayerNorm()(x)
      q, k, v = (nn.DenseGeneral((4, 64))(y) for _ in range(3))
      scores = jnp.einsum("bthd,bshd->bhts", q, k) / 8
      weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
      y = jnp.einsum("bhts,bshd->bthd", weights, v)
      x = x + nn.DenseGeneral(256, axis=(-2, -1))(y)
      y = nn.Dense(1024)(nn.LayerNorm()(x))
      x = x + nn.Dense(256)(nn.gelu(y))
    return nn.Dense(4096, use_bias=False)(nn.LayerNorm()(x))


# name -> (model, shape of one input, classes, batch size)
_MODELS = {
  "mlp": (Mlp(), (28, 28, 1), 10, 256),
  "cnn": (Cnn(), (28, 28, 1), 10, 512),
  "wrn-16-4": (WideResNet(), (32, 32, 3), 10, 32),
  "gpt, 128 tokens": (Gpt(), (128,), 4096, 16),
  "gpt, 32 tokens": (Gpt(), (32,), 4096, 64),
}
NAMES = tuple(_MODELS)
# Beyond those: with weights that are computed from parameters.
_MODELS["wrn-16-4, standardised"] = (
  WideResNet(standardised=True),
  (32, 32, 3),
  10,
  32,
)
ALL = tuple(_MODELS)


def make(name: str) -> Problem:
  """Makes the model and a batch of the size that it is timed with."""
  model, shape, classes, size = _MODELS[name]
  rng = np.random.default_rng(0)
  if len(shape) == 1:
    inputs = rng.integers(0, classes, (size, *shape))
    targets = rng.integers(0, classes, (size, *shape))
  else:
    inputs = rng.normal(size=(size, *shape)).astype(np.float32)
    targets = rng.integers(0, classes, size)
  batch = {"inputs": jnp.asarray(inputs), "targets": jnp.asarray(targets)}
  params = jax.jit(model.init)(jax.random.key(0), batch["inputs"][:1])["params"]

  def losses(params: PyTree, batch: PyTree) -> jax.Array:
    logits = model.apply({"params": params}, batch["inputs"])
    logs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logs, batch["targets"][..., None], axis=-1)
    return -picked.reshape(picked.shape[0], -1).mean(axis=1)

  return Problem(params, batch, losses)
