"""Multinomial logistic regression on features that are given."""

from flax import linen as nn
import jax
import jax.numpy as jnp


class Linear(nn.Module):
  """Logits [classes] of inputs of any shape, channels last.

  The kernel starts at 0, so that the loss is convex and needs no lucky init.

  Attributes:
    num_outputs: classes.
    num_groups: each of so many groups of neighbouring channels has its mean
      taken off and is divided by its deviation, within the example alone (group
      normalisation, Wu & He 2018, without parameters); it costs no privacy,
      where statistics of the data set would. 0: inputs are used as they are.
    dtype: of the computation.
  """

  num_outputs: int
  num_groups: int
  dtype: jnp.dtype

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
    # A bias would be lost among so many features; who wants one adds a 1.
    return nn.Dense(
      self.num_outputs,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.zeros_init(),
    )(x.reshape(-1))
