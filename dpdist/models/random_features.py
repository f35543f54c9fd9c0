"""Multinomial logistic regression on random Fourier features."""

from flax import linen as nn
import jax
import jax.numpy as jnp


class RandomFeatures(nn.Module):
  """Logits [classes] of inputs of any shape, through fixed random features.

  cos(W x + b) with Gaussian W and uniform b approximates a Gaussian kernel
  (Rahimi & Recht 2007, "Random Features for Large-Scale Kernel Machines"). W
  and b are public constants: only the linear layer on top is trained, so the
  loss is convex and needs no lucky init. Centering and scaling use only one
  example and cost no privacy. Features of unit norm give per-example gradients
  similar norms, with which clipping works well.
  """

  num_outputs: int
  width: int  # Number of features.
  dtype: jnp.dtype  # Of the computation.
  bandwidth: float = 1.5  # Standard deviation of W, for inputs of unit norm.

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    x = inputs.reshape(-1).astype(self.dtype)
    x = x - jnp.mean(x)
    x = x / jnp.maximum(jnp.linalg.norm(x), 1e-6)
    weights_key, phases_key = jax.random.split(jax.random.key(0))
    weights = jax.random.normal(weights_key, (x.size, self.width), self.dtype)
    phases = jax.random.uniform(
      phases_key, (self.width,), self.dtype, maxval=2 * jnp.pi
    )
    features = jnp.cos(self.bandwidth * x @ weights + phases)
    features = features / jnp.linalg.norm(features)
    # A bias would be a feature as long as all others together, and would take
    # up half of every clipped gradient.
    return nn.Dense(
      self.num_outputs,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.zeros_init(),
    )(features)
