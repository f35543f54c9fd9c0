"""Norms of convolution kernels' gradients from inner products of pixels.

The gradient is never formed. Instead, the inner products of all pairs of pixels
are summed along the diagonals that belong to the kernel's offsets. For few
positions and many channels this is far cheaper.
"""

from collections.abc import Callable, Sequence
import functools
import math

import jax
import jax.numpy as jnp

from dpdist.clipping.layers import inner_products
from dpdist.clipping.layers import kernel_gradients
from dpdist.clipping.layers import norms
from dpdist.clipping.trace.program import WeightUse

# With the largest pixel scaled to about 1, inner products of a patch with a
# larger norm can be trusted: squares are far above what underflows.
_SMALLEST_PATCH = 2.0**-40


def norm(
  use: WeightUse, x: jax.Array, cotangent: jax.Array, unit_roundoff: float
) -> jax.Array:
  """Returns the norm of that gradient, never too small; see `factors.norm`.

  An offset of the kernel moves both pixels of a pair. With the pixels of the
  padded input in one row, that is a shift along a diagonal. With strides, the
  pixels are first sorted into phases, of which each offset meets one. The input
  and the cotangent are without loops. The result is a scalar, float32 or wider.
  """
  g = kernel_gradients.geometry(use)
  x, cotangent = kernel_gradients.arrange(g, x, cotangent)
  x, cells = _phases(g, x)
  room = [(0, n - size) for n, size in zip(cells, g.output, strict=True)]
  cotangent = jnp.pad(cotangent, [(0, 0), *room, (0, 0), (0, 0)])
  outs = jnp.moveaxis(cotangent.reshape(-1, *cotangent.shape[-2:]), 1, 0)
  patches = _sum_of_shifts(g, norms.of(x, -1), cells, 1, norms.hypot)
  outs = outs[:, : patches.shape[-1]]  # Cuts off only padding.
  terms, power = norms.products(patches, norms.of(outs, -1))

  # A pixel is in many patches, so the input has one scale for each group.
  # Patches that vanish at this scale are not squared; their terms are added.
  groups = x.ndim - 3
  x, of_x = norms.scaled(x, [a for a in range(x.ndim) if a != groups])
  of_x = of_x.reshape(-1, 1)
  patches = norms.times_power_of_two(patches, -of_x)
  squared = patches > _SMALLEST_PATCH
  rest = jnp.sum(jnp.where(squared, 0, terms), axis=-1)
  outs, of_outs = norms.scaled(outs, -1)
  of_outs = of_outs + of_x[..., None] - power
  outs = norms.times_power_of_two(outs, of_outs)
  outs = jnp.where(squared[..., None], outs, jnp.zeros((), outs.dtype))
  # Otherwise the compiler would move powers of two out of the products again.
  x, outs = jax.lax.optimization_barrier((x, outs))

  precision = use.eqn.params["precision"]
  pairs, of_pairs = inner_products.gram(x, x, precision)
  of_pairs += sum(g.kernel) * float(jnp.finfo(pairs.dtype).eps) / 2
  pairs = _sum_of_shifts(g, pairs, cells, 2, jnp.add)
  inner, of_inner = inner_products.gram(outs, outs, precision)
  columns = norms.of(outs, -1)
  square, error = inner_products.sum_of_products(
    inner_products.InnerProducts(pairs, patches, patches, of_pairs),
    inner_products.InnerProducts(inner, columns, columns, of_inner),
  )
  terms = jnp.sum(terms, axis=-1)
  root = inner_products.from_inner_products(square, error, terms) + rest
  length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
  root = inner_products.with_room(
    length(root),
    length(terms),
    kernel_gradients.sizes(use).positions,
    unit_roundoff,
  )
  return norms.times_power_of_two(root, power)


def _phases(
  g: kernel_gradients.Geometry, x: jax.Array
) -> tuple[jax.Array, list[int]]:
  """Sorts the pixels of [rows, *space, groups, channels] into phases.

  Returns [*phases, groups, rows and cells of space, channels], and the number
  of cells along each axis of space.
  """
  ndim = len(g.kernel)
  cells = [
    -(-size // step) for size, step in zip(x.shape[1:], g.strides, strict=False)
  ]
  room = [
    (0, n * step - size)
    for n, step, size in zip(cells, g.strides, x.shape[1:], strict=False)
  ]
  x = jnp.pad(x, [(0, 0), *room, (0, 0), (0, 0)])
  split = [n for pair in zip(cells, g.strides, strict=True) for n in pair]
  x = x.reshape(x.shape[0], *split, *x.shape[-2:])
  phases = range(2, 2 * ndim + 1, 2)
  space = range(1, 2 * ndim + 1, 2)
  x = jnp.transpose(x, (*phases, 2 * ndim + 1, 0, *space, 2 * ndim + 2))
  return x.reshape(*g.strides, g.groups, -1, x.shape[-1]), cells


def _sum_of_shifts(
  g: kernel_gradients.Geometry,
  x: jax.Array,
  cells: Sequence[int],
  moved: int,
  add: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Sums over the offsets of the kernel; x is [*phases, groups, pixels].

  Its last axes, of which there are `moved`, hold pixels and move together.
  There are `cells` along each axis of space. Returns [groups, pixels] or
  [groups, pixels, pixels], with those pixels that all offsets have.
  """
  for axis in reversed(range(len(g.kernel))):
    pitch = math.prod(cells[axis + 1 :])
    at = [
      divmod(k * g.dilation[axis], g.strides[axis])
      for k in range(g.kernel[axis])
    ]
    size = x.shape[-1] - max(shift for shift, _ in at) * pitch
    parts = []
    for shift, phase in at:
      part = jax.lax.index_in_dim(x, phase, axis, keepdims=False)
      for a in range(part.ndim - moved, part.ndim):
        start = shift * pitch
        part = jax.lax.slice_in_dim(part, start, start + size, axis=a)
      parts.append(part)
    x = functools.reduce(add, parts)
  return x
