"""The reference engine: instantiate every per-example gradient, clip, sum.

Costs one gradient per example in memory. It is the definition that faster
engines are held against.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Groups(NamedTuple):
  """Parameters partitioned into groups that are clipped apart.

  Attributes:
    split: params -> list of subtrees, one a group.
    join: list of subtrees -> params.
    norms: the l2 clip norm of each group.
  """

  split: Callable[[PyTree], list[PyTree]]
  join: Callable[[Sequence[PyTree]], PyTree]
  norms: Sequence[float]


def clipped_sum(
  loss_fn: Callable[..., tuple[jax.Array, Any]],
  params: PyTree,
  batch: PyTree,
  rng: jax.Array | None,
  keep: jax.Array,
  groups: Groups,
  *,
  rescale_to_unit_norm: bool,
) -> tuple[PyTree, jax.Array, list[jax.Array], Any]:
  """Sums clipped per-example gradients.

  Args:
    loss_fn: (params, example[, rng]) -> (scalar loss, aux), for one example.
    params: pytree of floating arrays.
    batch: pytree; every leaf has the leading axis B.
    rng: one PRNG key an example, shape [B], or None.
    keep: [B] bool; an example that is not kept contributes exactly 0.
    groups: how params split, and each group's clip norm.
    rescale_to_unit_norm: divide every group by its clip norm.

  Returns:
    The sum, a pytree like params in float32 or wider; the losses [B]; the
    gradient norms before clipping, [B] a group; aux stacked along B.
  """
  grad_fn = jax.vmap(
    jax.value_and_grad(loss_fn, has_aux=True),
    in_axes=(None, 0) if rng is None else (None, 0, 0),
  )
  examples = (batch,) if rng is None else (batch, rng)
  (loss, aux), grads = grad_fn(params, *examples)
  # Norms and sums in a narrow dtype would overflow, or swallow examples.
  grads = jax.tree.map(_at_least_float32, grads)
  subtrees = groups.split(grads)
  norms = [_per_example_norm(subtree, keep.shape) for subtree in subtrees]
  # A norm that is not finite means a gradient that cannot be scaled: inf * 0
  # is NaN, and NaN passes a comparison. Such an example is left out whole.
  for norm in norms:
    keep = keep & jnp.isfinite(norm)
  sums = []
  for subtree, norm, clip_norm in zip(
    subtrees, norms, groups.norms, strict=True
  ):
    ceiling = 1.0 if rescale_to_unit_norm else clip_norm
    scale = ceiling / jnp.maximum(norm, clip_norm)
    sums.append(
      jax.tree.map(lambda g, s=scale: _weighted_sum(g, s, keep), subtree)
    )
  return groups.join(sums), loss, norms, aux


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _per_example_norm(tree: PyTree, shape: tuple[int, ...]) -> jax.Array:
  squares = [
    jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim)))
    for g in jax.tree.leaves(tree)
  ]
  return jnp.sqrt(sum(squares, start=jnp.zeros(shape, jnp.float32)))


def _weighted_sum(
  grads: jax.Array, scale: jax.Array, keep: jax.Array
) -> jax.Array:
  # Selected, not multiplied by zero: the gradient may hold NaN or inf.
  rows = keep.reshape(keep.shape + (1,) * (grads.ndim - 1))
  grads = jnp.where(rows, grads, 0)
  scale = jnp.where(keep, scale, 0).astype(grads.dtype)
  # Accelerators multiply float32 in bfloat16 by default, which would move a
  # clipped gradient past its bound.
  return jnp.einsum(
    "b,b...->...", scale, grads, precision=jax.lax.Precision.HIGHEST
  )
