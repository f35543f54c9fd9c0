"""Low-rank adapters (Hu et al. 2021, "LoRA", equation 3).

A layer x W becomes x W + (x A) B alpha / rank. B begins at zero, so the model
begins unchanged. The names of A and B contain "lora", for model.trainable.

Under an optimizer that scales each entry by itself, such as Adam, noise moves
every entry of B equally far for any alpha, so it moves the layer in proportion
to alpha.
"""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp


class Dense(nn.Module):
  """A dense layer, [..., in] to [..., features], with an adapter."""

  features: int
  rank: int = 0  # Of the adapter; 0: there is none.
  alpha: float = 16.0  # Scale of the adapter, times its rank.
  dtype: jnp.dtype = jnp.dtype("float32")  # Of the computation.
  kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    y = x @ kernel.astype(self.dtype) + bias.astype(self.dtype)
    if not self.rank:
      return y
    down = self.param(
      "lora_down", nn.initializers.lecun_normal(), (shape[0], self.rank)
    )
    up = self.param("lora_up", nn.initializers.zeros, (self.rank, shape[1]))
    inner = x @ down.astype(self.dtype)
    return y + inner @ up.astype(self.dtype) * (self.alpha / self.rank)
