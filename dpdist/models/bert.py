"""A BERT encoder for classification, with adapters."""

from collections.abc import Mapping

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpdist.models import lora

# The token that pads shorter texts.
PADDING = 0


class Bert(nn.Module):
  """Logits [classes] of tokens [length] (Devlin et al. 2018, "BERT").

  No other token attends to `PADDING`, and it counts nowhere. The mean of the
  last layer over the other tokens, scaled to length `width` ** 0.5, gives the
  features of a linear head, which begins at zero. Layer norm looks at one token
  of one example, so examples never mix. There is no dropout.

  Lower blocks that are not trained can be run once, before all steps: a model
  of these blocks returns states, and one with `first_block` takes them.
  """

  classes: int  # 0: the features are returned.
  vocabulary: int
  positions: int  # Most tokens of an example.
  width: int  # Of the residual stream.
  depth: int  # Number of blocks.
  num_heads: int  # Divides width.
  hidden: int  # Width of the inner layer of a block.
  # Rank of the adapters of queries and values, as in section 4.2 of Hu et al.;
  # 0: none.
  lora_rank: int
  dtype: jnp.dtype  # Of the computation.
  lora_alpha: float = 16.0  # See `dpdist.models.lora`.
  # Blocks before it, and the embeddings, were run before: inputs are states
  # [length, width]; 0: inputs are tokens.
  first_block: int = 0
  # Whether to return the last block's states [length, width], with 0 for
  # padding, without mean and head.
  returns_states: bool = False

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    if inputs.shape[0] > self.positions:
      raise ValueError(
        f"data.sequence_length must be at most the {self.positions} of"
        f" model.positions, got {inputs.shape[0]}"
      )
    if self.first_block:
      # After a layer norm, only the state of padding is 0 throughout.
      seen = jnp.any(inputs != 0, axis=-1)
      x = inputs.astype(self.dtype)
    else:
      seen = inputs != PADDING
      x = _Embeddings(
        self.vocabulary,
        self.positions,
        self.width,
        self.dtype,
        name="embeddings",
      )(inputs)
    for i in range(self.first_block, self.depth):
      x = _Block(
        self.num_heads,
        self.hidden,
        self.lora_rank,
        self.lora_alpha,
        self.dtype,
        name=f"block_{i}",
      )(x, seen)
    x = jnp.where(seen[:, None], x.astype(jnp.float32), 0)
    if self.returns_states:
      return x
    mean = jnp.sum(x, 0)
    # The mean over no token is 0, which has no direction.
    square = jnp.maximum(jnp.sum(mean**2), 1e-12)
    features = mean * jax.lax.rsqrt(square) * self.width**0.5
    if not self.classes:
      return features
    return nn.Dense(
      self.classes, kernel_init=nn.initializers.zeros, name="head"
    )(features)

  def from_disk(
    self, arrays: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """Returns parameters by their paths, from a Hugging Face BertModel."""
    arrays = {name.removeprefix("bert."): x for name, x in arrays.items()}
    named: dict[str, np.ndarray] = {}

    def take(path: str, name: str, *, is_kernel: bool = False) -> None:
      if name not in arrays:
        raise ValueError(
          f"model.weights must hold {name!r} for model.name='bert', got"
          f" {sorted(arrays)[:8]} and {max(0, len(arrays) - 8)} more"
        )
      array = np.asarray(arrays[name], np.float32)
      named[path] = array.T if is_kernel else array

    def take_norm(path: str, name: str) -> None:
      take(f"{path}/scale", f"{name}.LayerNorm.weight")
      take(f"{path}/bias", f"{name}.LayerNorm.bias")

    if not self.first_block:
      for part in ("word", "position", "token_type"):
        take(f"embeddings/{part}", f"embeddings.{part}_embeddings.weight")
      take_norm("embeddings/norm", "embeddings")
    for i in range(self.first_block, self.depth):
      path, name = f"block_{i}", f"encoder.layer.{i}"
      for mine, theirs in _LAYERS.items():
        take(f"{path}/{mine}/kernel", f"{name}.{theirs}.weight", is_kernel=True)
        take(f"{path}/{mine}/bias", f"{name}.{theirs}.bias")
      take_norm(f"{path}/attention_norm", f"{name}.attention.output")
      take_norm(f"{path}/output_norm", f"{name}.output")
    return named


_LAYERS = {
  "query": "attention.self.query",
  "key": "attention.self.key",
  "value": "attention.self.value",
  "attention_out": "attention.output.dense",
  "up": "intermediate.dense",
  "down": "output.dense",
}


def _norm(name: str, dtype: jnp.dtype) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-12, dtype=dtype, name=name)


class _Embeddings(nn.Module):
  vocabulary: int
  positions: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    init = nn.initializers.normal(0.02)
    word = self.param("word", init, (self.vocabulary, self.width))
    position = self.param("position", init, (self.positions, self.width))
    # The only text counts as the first of a pair.
    kind = self.param("token_type", init, (2, self.width))[0]
    x = jnp.take(word, inputs, axis=0) + position[: inputs.shape[0]] + kind
    return _norm("norm", self.dtype)(x.astype(self.dtype))


class _Block(nn.Module):
  num_heads: int
  hidden: int
  rank: int
  alpha: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
    y = _norm("attention_norm", self.dtype)(x + self._attention(x, seen))
    inner = nn.gelu(self._dense("up", self.hidden, y), approximate=False)
    z = self._dense("down", x.shape[-1], inner)
    return _norm("output_norm", self.dtype)(y + z)

  def _dense(self, name: str, features: int, x: jax.Array) -> jax.Array:
    rank = self.rank if name in ("query", "value") else 0
    return lora.Dense(features, rank, self.alpha, self.dtype, name=name)(x)

  def _attention(self, x: jax.Array, seen: jax.Array) -> jax.Array:
    length, width = x.shape
    heads = (length, self.num_heads, width // self.num_heads)
    q, k, v = (
      self._dense(name, width, x).reshape(heads)
      for name in ("query", "key", "value")
    )
    scores = jnp.einsum("thd,shd->hts", q, k) * heads[-1] ** -0.5
    # Finite, so that an example of only padding has a gradient of 0, not NaN.
    scores = jnp.where(seen, scores.astype(jnp.float32), -1e9)
    weights = jax.nn.softmax(scores).astype(self.dtype)
    mixed = jnp.einsum("hts,shd->thd", weights, v).reshape(x.shape)
    return self._dense("attention_out", width, mixed)
