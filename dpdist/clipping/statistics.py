"""Shows what clipping does to each example's gradient, for your own eyes.

Nothing here is private: whoever sees an example's numbers learns about it.
"""

from collections.abc import Callable
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist import errors
from dpdist.clipping import checks
from dpdist.clipping import freezing
from dpdist.clipping import transform
from dpdist.clipping.engines import vmap
from dpdist.clipping.layers import norms
from dpdist.clipping.trace import varying_axes

PyTree = Any


class UnsafeStatistics(NamedTuple):
  """The statistics of one parameter, or of all together. NOT private.

  Attributes:
    name: the parameter's path, such as "encoder/0/kernel"; "" for the whole.
    clip_factor: [B] float32, the factor of the example's gradient; 0 for
      padding and where a norm is not finite. For the whole, a pytree of such
      arrays shaped like l2_clip_norm.
    threshold: the clip norm of the parameter's group; for the whole, all of
      l2_clip_norm.
    grad_norms: [B] float32, the norm of this gradient before clipping. The norm
      of a group, which gives the factor, is in `ClippedGrads.grad_norms`.
    before: [B, ...] float32 or wider, the gradient before clipping; for the
      whole, a pytree like params, None where a parameter is frozen.
    after: the gradient after clipping. Its sum over B is that of fn.
  """

  name: str
  clip_factor: PyTree
  threshold: PyTree
  grad_norms: jax.Array
  before: PyTree
  after: PyTree


def unsafe_statistics(
  fn: transform.ClippedGrad,
  params: PyTree,
  batch: PyTree,
  hook: Callable[[UnsafeStatistics], Any],
  *,
  is_padding_example: jax.Array | None = None,
  rng: jax.Array | None = None,
) -> transform.ClippedGrads:
  """Calls a hook for each trained parameter, and then once for the whole.

  None of it is private. The factors are those that fn uses, whatever its
  method. All B gradients are formed and held in memory.

  Args:
    fn: from `dpdist.clipped_grad`.
    params: as for fn.
    batch: as for fn.
    hook: called with an `UnsafeStatistics`.
    is_padding_example: as for fn.
    rng: as for fn; fn and the statistics use the same randomness.

  Returns:
    fn's own result.

  Raises:
    ValueError: fn raised it; or this is called inside `jax.shard_map`, where a
      hook would see only one device's examples.
  """
  axes = varying_axes.divided_axes((batch, is_padding_example, rng))
  if axes:
    raise errors.ArgumentError(
      "batch must be on one device for statistics, got one that is divided"
      f" along {sorted(axes)}"
    )
  size = checks.batch_size(batch)
  rng = checks.per_example_keys(rng, size, axes)
  grads = jax.jit(fn)(
    params, batch, is_padding_example=is_padding_example, rng=rng
  )

  fn = inspect.unwrap(fn)  # It may be jitted.
  parts = freezing.split(params, fn.frozen)
  scaling, groups = fn.scaling(params)
  thresholds, structure = jax.tree.flatten(fn.l2_clip_norm)
  keep = ~checks.padding(is_padding_example, size)
  factors = scaling.of_norms(jax.tree.leaves(grads.grad_norms), keep)

  examples = (batch,) if rng is None else (batch, rng)
  before = _gradients(fn, parts, examples)
  after = [
    vmap.scaled(g, factors[group])
    for g, group in zip(before, groups, strict=True)
  ]
  all_norms = [vmap.norms_of(g) for g in before]
  paths = freezing.names(parts.of_trainable(parts.trainable))
  for i, (path, group) in enumerate(zip(paths, groups, strict=True)):
    hook(
      UnsafeStatistics(
        path,
        factors[group],
        thresholds[group],
        all_norms[i],
        before[i],
        after[i],
      )
    )
  hook(
    UnsafeStatistics(
      "",
      jax.tree.unflatten(structure, factors),
      fn.l2_clip_norm,
      functools.reduce(norms.hypot, all_norms, jnp.zeros((size,))),
      parts.of_trainable(before),
      parts.of_trainable(after),
    )
  )
  return grads


def _gradients(
  fn: transform.ClippedGrad, parts: freezing.Split, examples: tuple[PyTree, ...]
) -> list[jax.Array]:
  """Returns every example's gradient, an array for each trained parameter."""

  def loss_fn(trainable: list[Any], *example: Any) -> Any:
    out = fn.loss_fn(parts.join(trainable, parts.frozen), *example)
    return out if fn.has_aux else (out, None)

  before, _, _ = jax.jit(vmap.per_example_gradients, static_argnums=0)(
    loss_fn, parts.trainable, examples
  )
  return before
