"""A small decoder-only transformer."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from dpdist.distributed import mesh


class Decoder(nn.Module):
  """Logits [length, vocabulary] of tokens [length], each from those before it.

  Pre-norm blocks of causal self-attention and a GELU layer of four times the
  width. Layer norm looks at one token of one example, so examples never mix.
  """

  task = "language_model"

  vocabulary: int
  width: int
  depth: int
  num_heads: int
  dtype: jnp.dtype

  @property
  def partitioning(self) -> mesh.Rules:
    """Divides heads, the wide layer and the vocabulary over `model`."""
    return (
      ("(query|key|value)/kernel$", (None, "model", None)),
      ("(query|key|value)/bias$", ("model", None)),
      ("out/kernel$", ("model", None, None)),
      ("_Block_.*/Dense_0/kernel$", (None, "model")),
      ("_Block_.*/Dense_0/bias$", ("model",)),
      ("_Block_.*/Dense_1/kernel$", ("model", None)),
      ("embedding$", ("model", None)),
      ("^Dense_0/kernel$", (None, "model")),
    )

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    init = nn.initializers.normal(0.02)
    x = nn.Embed(
      self.vocabulary, self.width, embedding_init=init, dtype=self.dtype
    )(inputs)
    positions = self.param("positions", init, (inputs.shape[0], self.width))
    x = x + positions.astype(self.dtype)
    for _ in range(self.depth):
      x = _Block(self.width, self.num_heads, self.dtype)(x)
    x = nn.LayerNorm(dtype=self.dtype)(x)
    return nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype)(x)


class _Block(nn.Module):
  width: int
  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.LayerNorm(dtype=self.dtype)(x)
    x = x + nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype)(
      y, mask=nn.make_causal_mask(jnp.zeros(x.shape[0]))
    )
    y = nn.LayerNorm(dtype=self.dtype)(x)
    y = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype)(y))
    return x + nn.Dense(self.width, dtype=self.dtype)(y)
