"""Splits a batch into microbatches and runs them one after another."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpdist import errors
from dpdist.clipping.layers import costs
from dpdist.clipping.trace import varying_axes
from dpdist.clipping.trace.program import Block
from dpdist.sums import compensated

PyTree = Any

# Each part of an unrolled batch is compiled separately, so there are few.
_MOST_PARTS = 4


def automatic_size(block: Block, batch_size: int, platform: str) -> int:
  """Chooses how many examples to work on at once."""
  if platform not in costs.CACHE_BYTES:
    return batch_size
  uses = list(block.all_uses())
  whole = 2 * 4 * batch_size * sum(math.prod(use.tap_shape) for use in uses)
  # Each part reads the weights and updates their sums once more.
  weights = 4 * sum(math.prod(use.weight_shape) for use in uses)
  parts = 1
  while (
    parts < _MOST_PARTS
    and batch_size % (2 * parts) == 0
    and whole / parts > costs.CACHE_BYTES[platform]
    and whole / (2 * parts) > weights
  ):
    parts *= 2
  return batch_size // parts


def run(
  function: Callable[..., tuple[list[jax.Array], Any, Any, Any]],
  args: PyTree,
  batch_size: int,
  size: int,
  axes: frozenset[str],
  *,
  unroll: bool,
  keep_low: bool,
) -> tuple[compensated.Sum, Any, Any, Any]:
  """Applies a function to parts of a batch, and joins what it returns.

  The function returns sums, then trees with a leading axis over examples. A
  part has `size` examples, which must divide batch_size, or be at least as
  large, which gives one part. `axes` are the mesh axes that args vary over.
  `unroll` unrolls the loop over parts: XLA for CPUs is many times slower at
  convolutions inside a loop. `keep_low` keeps what the additions round away;
  otherwise they round like those within a part.

  Returns the sums over all parts, whose low is None where it is not kept or
  there is one part; and the other results, joined.
  """
  if size >= batch_size:
    alone, loss, norms, aux = function(*args)
    return compensated.Sum(alone, None), loss, norms, aux
  if batch_size % size:
    raise errors.ArgumentError(
      f"microbatch_size must divide the batch of {batch_size}, got {size}"
    )
  parts = batch_size // size
  args = jax.tree.map(lambda x: x.reshape((parts, size) + x.shape[1:]), args)
  if unroll:
    total, rest = _unrolled(function, args, parts, keep_low)
  else:
    first = jax.tree.map(lambda x: x[0], args)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first)[0]
    )

    def body(
      total: compensated.Sum, part: PyTree
    ) -> tuple[compensated.Sum, Any]:
      more, *rest = function(*part)
      return _added(total, more), rest

    empty = compensated.Sum(zeros, None)
    if keep_low:
      empty = compensated.zeros_like(zeros)
    total, rest = jax.lax.scan(
      body, varying_axes.cast_to_varying(empty, axes), args
    )
  loss, norms, aux = jax.tree.map(
    lambda x: x.reshape((batch_size,) + x.shape[2:]), tuple(rest)
  )
  return total, loss, norms, aux


def _unrolled(
  function: Callable[..., tuple[list[jax.Array], Any, Any, Any]],
  args: PyTree,
  parts: int,
  keep_low: bool,
) -> tuple[compensated.Sum, PyTree]:
  total: compensated.Sum | None = None
  all_rest = []
  for i in range(parts):
    part = jax.tree.map(lambda x, i=i: x[i], args)
    if total is None:
      first, *rest = function(*part)
      total = compensated.Sum(first, None)
      if keep_low:
        total = compensated.of(first)
    else:
      # Forces one part after the other, so that they use the same memory.
      part, total = jax.lax.optimization_barrier((part, total))
      more, *rest = function(*part)
      total = _added(total, more)
    all_rest.append(rest)
  assert total is not None
  return total, jax.tree.map(lambda *x: jnp.stack(x), *all_rest)


def _added(
  total: compensated.Sum, part_sums: list[jax.Array]
) -> compensated.Sum:
  if total.low is None:
    return compensated.Sum(jax.tree.map(jnp.add, total.high, part_sums), None)
  return compensated.add(total, part_sums)
