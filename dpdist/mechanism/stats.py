"""Holds what a step has added up so far; all of it is sensitive."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist import clipping
from dpdist.mechanism import mechanism as mechanism_lib

PyTree = Any


class Stats(NamedTuple):
  """Statistics of a step's drawn examples; sensitive, never released."""

  num_examples: jax.Array  # Number of examples drawn.
  # Number of those whose gradient was longer than the clip norm.
  num_clipped: jax.Array
  # Number of those left out because their gradient norm was not finite.
  num_nonfinite: jax.Array
  loss: jax.Array  # Sum of the finite examples' losses.


class Accumulator(NamedTuple):
  """A step's sums so far, of each device that divides the examples."""

  # Pytree like params, with any extra leaves of the clipper, float32 or wider,
  # with a leading axis over those devices; where `fsdp` divides an array, over
  # those along `data`.
  clipped_sum: PyTree
  stats: Stats  # Stats of [devices] arrays.
  # Like clipped_sum, what rounding left out of it. The true sum is clipped_sum
  # + low. (): rounding left out nothing, as with integers.
  low: PyTree = ()
  # What the clipper has learned before the step; (): nothing.
  learned: PyTree = ()


def no_stats(shards: int) -> Stats:
  """Returns the stats of no example, for each device with examples."""
  count = lambda: jnp.zeros((shards,), jnp.int32)
  return Stats(count(), count(), count(), jnp.zeros((shards,)))


def count(
  mechanism: mechanism_lib.Mechanism,
  grads: clipping.ClippedGrads,
  is_padding_example: jax.Array,
) -> Stats:
  """Returns the stats, scalars, of the examples with these gradients."""
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
