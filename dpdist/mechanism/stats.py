"""What the drawn examples of a step did; sensitive, all of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpdist import clipping
from dpdist.mechanism import mechanism as mechanism_lib


class Stats(NamedTuple):
  """What the drawn examples did; sensitive, and never released by itself.

  Attributes:
    num_examples: examples drawn.
    num_clipped: those whose gradient was longer than the clip norm.
    num_nonfinite: those left out because their gradient norm was not finite.
    loss: sum of the finite examples' losses.
  """

  num_examples: jax.Array
  num_clipped: jax.Array
  num_nonfinite: jax.Array
  loss: jax.Array


def no_stats(shards: int) -> Stats:
  """Of no example, for each device that divides the examples."""
  count = lambda: jnp.zeros((shards,), jnp.int32)
  return Stats(count(), count(), count(), jnp.zeros((shards,)))


def count(
  mechanism: mechanism_lib.Mechanism,
  grads: clipping.ClippedGrads,
  is_padding_example: jax.Array,
) -> Stats:
  """Stats, scalars, of the examples whose gradients are given."""
  real = ~is_padding_example
  finite = jnp.isfinite(grads.grad_norms)
  clipped = grads.grad_norms > mechanism.clipped_grad.l2_clip_norm
  loss = jnp.where(real & jnp.isfinite(grads.loss), grads.loss, 0)
  return Stats(
    num_examples=jnp.sum(real, dtype=jnp.int32),
    num_clipped=jnp.sum(real & finite & clipped, dtype=jnp.int32),
    num_nonfinite=jnp.sum(real & ~finite, dtype=jnp.int32),
    loss=jnp.sum(loss, dtype=jnp.float32),
  )
