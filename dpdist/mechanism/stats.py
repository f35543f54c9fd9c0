"""Holds what a step has added up so far; all of it is sensitive."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist import clipping
from dpdist.mechanism import mechanism as mechanism_lib

PyTree = Any


class Stats(NamedTuple):
  """Statistics of a step's drawn examples; sensitive, never released.

  Attributes:
    num_examples: number of examples drawn.
    num_clipped: number of those whose gradient was longer than the clip norm.
    num_nonfinite: number of those left out because their gradient norm was not
      finite.
    loss: sum of the finite examples' losses.
  """

  num_examples: jax.Array
  num_clipped: jax.Array
  num_nonfinite: jax.Array
  loss: jax.Array


class Accumulator(NamedTuple):
  """A step's sums so far, separate for each device that divides the examples.

  Attributes:
    clipped_sum: pytree like params, with any extra leaves of the clipper,
      float32 or wider, with a leading axis over those devices; where `fsdp`
      divides an array, over those along `data`.
    stats: Stats of [devices] arrays.
    low: like clipped_sum, what rounding left out of it. The true sum is
      clipped_sum + low. (): rounding left out nothing, as with integers.
    learned: what the clipper has learned before the step; (): nothing.
  """

  clipped_sum: PyTree
  stats: Stats
  low: PyTree = ()
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
