"""A decoder-only transformer whose blocks are one loop, for large models.

A block is compiled once for any depth, and rematerialised: a backward pass
keeps only the input of each block. A mesh that divides the parameters gathers
one block at a time.
"""

from collections.abc import Mapping

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpdist.distributed import mesh


class StackedDecoder(nn.Module):
  """Logits [length, vocabulary] of tokens [length], each from those before it.

  Pre-norm blocks of causal grouped-query attention (Ainslie et al. 2023, "GQA")
  with rotary positions (Su et al. 2021, "RoFormer") and a gated layer (Shazeer
  2020, "GLU Variants Improve Transformer"), without biases. Embedding and
  output share a table. RMS norm looks at one token of one example, so examples
  never mix.
  """

  task = "language_model"

  vocabulary: int
  width: int  # Of the residual stream.
  depth: int  # Number of blocks.
  num_heads: int  # Of queries.
  num_kv_heads: int  # Of keys and values; divides num_heads.
  head_dim: int  # Even.
  hidden: int  # Width of the gated layer.
  dtype: jnp.dtype  # Of the computation.
  rope_theta: float = 10_000.0  # Base of the angles of rotary positions.
  norm_epsilon: float = 1e-6  # Added to mean squares.
  # Rank of the adapters of queries and values; 0: there are none.
  lora_rank: int = 0
  lora_alpha: float = 16.0  # See `dpdist.models.lora`.

  @property
  def partitioning(self) -> mesh.Rules:
    """Divides heads, the gated layer and the vocabulary over `model`."""
    # With one head of keys, all heads of queries share it.
    shared = self.num_kv_heads == 1
    heads = (None, "model") if shared else ("model", None)
    keys = (None, None, None) if shared else (None, "model", None)
    return (
      ("query$", (None, *heads, None)),
      ("key$|value$", keys),
      ("attention_out$", (*heads, None, None)),
      ("gate$|up$", (None, "model")),
      ("down$", ("model", None)),
      ("embedding$", ("model", None)),
    )

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    table = self.param(
      "embedding",
      nn.initializers.normal(0.02),
      (self.vocabulary, self.width),
    )
    x = jnp.take(table, inputs, axis=0).astype(self.dtype)
    # Inside a loop, common subexpressions cannot undo the rematerialisation.
    block = nn.remat(_Block, prevent_cse=False)
    blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.depth,
    )
    x, _ = blocks(
      self.num_heads,
      self.num_kv_heads,
      self.head_dim,
      self.hidden,
      self.dtype,
      self.rope_theta,
      self.norm_epsilon,
      self.lora_rank,
      self.lora_alpha,
      name="blocks",
    )(x, None)
    x = nn.RMSNorm(self.norm_epsilon, dtype=self.dtype)(x)
    return x @ table.astype(self.dtype).T

  def from_disk(
    self, arrays: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """Returns parameters by their paths, from the arrays of a Llama in GGUF.

    Raises ValueError if an array is missing, or the output has its own table.
    """
    if "output.weight" in arrays:
      raise ValueError(
        "model.weights must be of a model whose embedding and output are one"
        " table for model.name='stacked_decoder', got 'output.weight'"
      )
    width, kv, size = self.width, self.num_kv_heads, self.head_dim
    groups = self.num_heads // kv

    def take(name: str) -> np.ndarray:
      if name not in arrays:
        raise ValueError(
          f"model.weights must hold {name!r} for model.name='stacked_decoder',"
          f" got {sorted(arrays)[:8]} and {max(0, len(arrays) - 8)} more"
        )
      return np.asarray(arrays[name], np.float32)

    def stack(name: str) -> np.ndarray:
      each = [take(f"blk.{i}.{name}.weight") for i in range(self.depth)]
      return np.stack(each)

    def turned(name: str) -> np.ndarray:
      # GGUF rotates neighbouring entries; here entry i of a head's first half
      # is rotated with entry i of its second half.
      x = stack(name).reshape(self.depth, -1, size // 2, 2, width)
      return x.swapaxes(2, 3).reshape(self.depth, -1, width).swapaxes(1, 2)

    plain = lambda name: stack(name).swapaxes(1, 2)
    heads = (self.depth, width, kv, groups, size)
    return {
      "embedding": take("token_embd.weight"),
      "RMSNorm_0/scale": take("output_norm.weight"),
      "blocks/RMSNorm_0/scale": stack("attn_norm"),
      "blocks/RMSNorm_1/scale": stack("ffn_norm"),
      "blocks/query": turned("attn_q").reshape(heads),
      "blocks/key": turned("attn_k").reshape(self.depth, width, kv, size),
      "blocks/value": plain("attn_v").reshape(self.depth, width, kv, size),
      "blocks/attention_out": plain("attn_output").reshape(
        self.depth, kv, groups, size, width
      ),
      "blocks/gate": plain("ffn_gate"),
      "blocks/up": plain("ffn_up"),
      "blocks/down": plain("ffn_down"),
    }


class _Block(nn.Module):
  num_heads: int
  num_kv_heads: int
  head_dim: int
  hidden: int
  dtype: jnp.dtype
  rope_theta: float
  norm_epsilon: float
  lora_rank: int
  lora_alpha: float

  @nn.compact
  def __call__(self, x: jax.Array, unused: None) -> tuple[jax.Array, None]:
    del unused
    x = x + self._attention(self._norm()(x))
    x = x + self._gated(self._norm()(x))
    return x, None

  def _norm(self) -> nn.RMSNorm:
    return nn.RMSNorm(self.norm_epsilon, dtype=self.dtype)

  def _weight(
    self, name: str, shape: tuple[int, ...], num_in: int = 1
  ) -> jax.Array:
    init = nn.initializers.lecun_normal(
      in_axis=tuple(range(num_in)), out_axis=tuple(range(num_in, len(shape)))
    )
    return self.param(name, init, shape).astype(self.dtype)

  def _attention(self, x: jax.Array) -> jax.Array:
    length, width = x.shape
    groups = self.num_heads // self.num_kv_heads
    heads = (self.num_kv_heads, self.head_dim)
    queries = (self.num_kv_heads, groups, self.head_dim)
    q = jnp.einsum("td,dkgh->tkgh", x, self._weight("query", (width, *queries)))
    q += self._adapted("query", x, queries)
    k = jnp.einsum("td,dkh->tkh", x, self._weight("key", (width, *heads)))
    v = jnp.einsum("td,dkh->tkh", x, self._weight("value", (width, *heads)))
    v += self._adapted("value", x, heads)
    q, k = _rotated(q, self.rope_theta), _rotated(k, self.rope_theta)
    scores = jnp.einsum("tkgh,skh->kgts", q, k) * self.head_dim**-0.5
    seen = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(seen, scores.astype(jnp.float32), -jnp.inf)
    weights = jax.nn.softmax(scores).astype(self.dtype)
    mixed = jnp.einsum("kgts,skh->tkgh", weights, v)
    return jnp.einsum(
      "tkgh,kghd->td",
      mixed,
      self._weight("attention_out", (*queries, width), num_in=3),
    )

  def _adapted(
    self, name: str, x: jax.Array, shape: tuple[int, ...]
  ) -> jax.Array | float:
    """Returns what an adapter adds, [length, *shape]; 0 without an adapter."""
    if not self.lora_rank:
      return 0.0
    down = self._weight(f"{name}_lora_down", (x.shape[-1], self.lora_rank))
    up = self.param(
      f"{name}_lora_up", nn.initializers.zeros, (self.lora_rank, *shape)
    )
    added = jnp.tensordot(x @ down, up.astype(self.dtype), 1)
    return added * (self.lora_alpha / self.lora_rank)

  def _gated(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    gate = x @ self._weight("gate", (width, self.hidden))
    up = x @ self._weight("up", (width, self.hidden))
    return (nn.silu(gate) * up) @ self._weight("down", (self.hidden, width))


def _rotated(x: jax.Array, theta: float) -> jax.Array:
  """Rotates each pair of entries by an angle that grows with the position."""
  length, half = x.shape[0], x.shape[-1] // 2
  turns = jnp.arange(length)[:, None] * theta ** (-jnp.arange(half) / half)
  turns = turns.reshape((length, *(1,) * (x.ndim - 2), half))
  sin, cos = jnp.sin(turns).astype(x.dtype), jnp.cos(turns).astype(x.dtype)
  one, two = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([one * cos - two * sin, one * sin + two * cos], -1)
