"""The reference engine: instantiate every per-example gradient, clip, sum.

It holds one gradient per example in memory. It is the definition that faster
engines are compared with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpdist.clipping.engines import sharing
from dpdist.clipping.engines.clip_norms import Scaling
from dpdist.clipping.layers import norms

PyTree = Any


def clipped_sum(
  loss_fn: Callable[..., tuple[jax.Array, Any]],
  params: PyTree,
  examples: tuple[PyTree, ...],
  keep: jax.Array,
  groups: Sequence[int],
  scaling: Scaling,
) -> tuple[list[jax.Array], jax.Array, list[jax.Array], Any]:
  """Sums clipped per-example gradients.

  `loss_fn` maps (params, *example) to (scalar loss, aux), for one example.
  `keep` is [B] bool; an example that is not kept contributes exactly 0.
  `groups` has for each leaf of params the number of the group it is clipped
  with.

  Returns the sum, a list like the leaves of params in float32 or wider; the
  losses [B]; the gradient norms before clipping, [B] for each group; and aux
  stacked along B.
  """
  leaves, loss, aux = per_example_gradients(loss_fn, params, examples)
  leaves = [sharing.computed_once(g) for g in leaves]
  total = [jnp.zeros(keep.shape, jnp.float32)] * len(scaling.l2_clip_norms)
  for group, g in zip(groups, leaves, strict=True):
    total[group] = norms.hypot(total[group], norms_of(g))
  scales, total = scaling.scales(total, keep)
  sums = [
    weighted_sum(g, scales[group])
    for group, g in zip(groups, leaves, strict=True)
  ]
  return scaling.enlarged(sums, groups), loss, total, aux


def per_example_gradients(
  loss_fn: Callable[..., tuple[jax.Array, Any]],
  params: PyTree,
  examples: tuple[PyTree, ...],
) -> tuple[list[jax.Array], jax.Array, Any]:
  """Returns gradients [B, ...], float32 or wider; losses [B]; stacked aux."""
  grad_fn = jax.vmap(
    jax.value_and_grad(loss_fn, has_aux=True),
    in_axes=(None, *[0] * len(examples)),
  )
  (loss, aux), grads = grad_fn(params, *examples)
  # In a narrow dtype, norms and sums would overflow or lose examples.
  leaves = [
    g.astype(jnp.promote_types(g.dtype, jnp.float32))
    for g in jax.tree.leaves(grads)
  ]
  return leaves, loss, aux


def norms_of(grads: jax.Array) -> jax.Array:
  """Returns the norm of each row, [B]."""
  return norms.of(grads, tuple(range(1, grads.ndim)))


def scaled(grads: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns scale[b] * grads[b]; rows of scale 0 may hold anything."""
  rows = _rows(scale, grads).astype(grads.dtype)
  return rows * jnp.where(rows != 0, grads, 0)


def weighted_sum(grads: jax.Array, scale: jax.Array) -> jax.Array:
  """Sums scale[b] * grads[b] over b; rows of scale 0 may hold anything."""
  # Selected, not multiplied by 0: the gradient may hold NaN or inf.
  grads = jnp.where(_rows(scale, grads) != 0, grads, 0)
  # Accelerators multiply float32 in bfloat16 by default, which would move a
  # clipped gradient past its bound.
  return jnp.einsum(
    "b,b...->...",
    scale.astype(grads.dtype),
    grads,
    precision=jax.lax.Precision.HIGHEST,
  )


def _rows(scale: jax.Array, grads: jax.Array) -> jax.Array:
  return scale.reshape(scale.shape + (1,) * (grads.ndim - 1))
