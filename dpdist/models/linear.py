"""Multinomial logistic regression on given features."""

from flax import linen as nn
import jax
import jax.numpy as jnp


class Linear(nn.Module):
  """Logits [classes] of inputs of any shape, channels last.

  The kernel starts at 0. The loss is convex, so it needs no lucky init.
  """

  num_outputs: int
  # Groups of neighbouring channels. Each is normalised to mean 0 and deviation
  # 1 within the example (group normalisation, Wu & He 2018, without
  # parameters). That costs no privacy, unlike statistics of the data set. 0:
  # inputs are used unchanged.
  num_groups: int
  dtype: jnp.dtype  # Of the computation.

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    x = inputs.astype(self.dtype)
    if self.num_groups:
      x = nn.GroupNorm(
        self.num_groups,
        epsilon=1e-5,
        use_bias=False,
        use_scale=False,
        dtype=self.dtype,
      )(x[None])
    # A bias would be lost among so many features; for one, add a feature 1.
    return nn.Dense(
      self.num_outputs,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.zeros_init(),
    )(x.reshape(-1))
