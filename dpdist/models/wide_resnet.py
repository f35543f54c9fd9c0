"""The wide residual network that De et al. 2022 trained privately."""

from flax import linen as nn
import jax
import jax.numpy as jnp

_EPSILON = 1e-4
_HALVINGS = 2


class StandardizedConv(nn.Module):
  """A convolution whose kernel is standardised, with a gain and a bias.

  The mean of each output channel's weights is subtracted, and they are scaled
  to unit norm (Brock et al. 2021, "Characterizing Signal Propagation to Close
  the Performance Gap in Unnormalized ResNets", eq. 3; Qiao et al. 2019).
  """

  features: int  # Number of output channels.
  size: int  # Of the square kernel.
  stride: int  # Along both axes.
  dtype: jnp.dtype  # Of the computation.

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    gain = self.param("gain", nn.initializers.ones_init(), shape[-1:])
    bias = self.param("bias", nn.initializers.zeros_init(), shape[-1:])
    centred = kernel - jnp.mean(kernel, axis=(0, 1, 2))
    norm = jnp.sum(jnp.square(centred), axis=(0, 1, 2))
    kernel = centred * jax.lax.rsqrt(jnp.maximum(norm, _EPSILON)) * gain
    y = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      window_strides=(self.stride, self.stride),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + bias.astype(self.dtype)


class WideResNet(nn.Module):
  """Logits [classes] of one image [height, width, channels].

  WRN-depth-width (Zagoruyko & Komodakis 2016) as trained by De et al. 2022,
  "Unlocking High-Accuracy Differentially Private Image Classification through
  Scale": standardised convolutions; group normalisation after each activation;
  no batch normalisation, which mixes examples.
  """

  takes_images = True

  num_outputs: int
  depth: int  # Number of layers, 6 n + 4.
  width: int  # Factor of the channels, which are 16, 32 and 64 times it.
  num_groups: int  # Of each normalisation.
  dtype: jnp.dtype  # Of the computation.

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    def activate(x: jax.Array) -> jax.Array:
      norm = nn.GroupNorm(self.num_groups, epsilon=1e-5, dtype=self.dtype)
      return norm(nn.relu(x))

    def conv(features: int, size: int, stride: int = 1) -> nn.Module:
      return StandardizedConv(features, size, stride, self.dtype)

    x = conv(16, 3)(inputs[None])
    for stage in range(_HALVINGS + 1):
      features = 16 * 2**stage * self.width
      for block in range((self.depth - 4) // 6):
        stride = 2 if stage and not block else 1
        shortcut = x
        if not block:
          shortcut = conv(features, 1, stride)(activate(x))
        x = conv(features, 3, stride)(activate(x))
        x = conv(features, 3)(activate(x)) + shortcut
    x = jnp.mean(activate(x).astype(jnp.float32), axis=(0, 1, 2))
    return nn.Dense(self.num_outputs, dtype=self.dtype)(x)
