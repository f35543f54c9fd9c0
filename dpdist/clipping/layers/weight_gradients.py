"""Gradients of a site's weight, from its data operand and its cotangent."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

from dpdist.clipping.layers import convolution
from dpdist.clipping.layers import dense
from dpdist.clipping.layers import norms
from dpdist.clipping.trace import program
from dpdist.clipping.trace import varying_axes
from dpdist.clipping.trace.program import Site

Key = tuple[int, ...]


def terms(site: Site, x: jax.Array, g: jax.Array) -> jax.Array:
  """Bounds the sum of the norms of the terms that a product adds up."""
  if site.name == "gather":
    # Nothing is multiplied, so nothing is rounded.
    return jnp.zeros((), norms.wide(g.dtype))
  if site.name == "dot_general":
    return dense.sum_of_norms(dense.dense(site, x, g))
  offsets = convolution.sizes(site).offsets
  product, power = norms.products(offsets**0.5 * norms.of(x), norms.of(g))
  return norms.times_power_of_two(product, power)


def magnitude(site: Site, x: jax.Array | None, g: jax.Array) -> jax.Array:
  """Bounds the sum of the norms of the terms that a gradient adds up."""
  if site.eqn is None or site.name == "gather":
    return positions(site, x) ** 0.5 * norms.of(g)
  assert x is not None
  return terms(site, x, g)


def positions(site: Site, x: jax.Array | None) -> int:
  """Returns the most terms that a gradient adds up."""
  if x is None:
    return math.prod(site.lengths)
  if site.name == "gather":
    return x.size
  if site.name == "dot_general":
    return dense.sizes(site)[1]
  return convolution.sizes(site).positions * math.prod(site.lengths)


def weight_gradient(
  site: Site,
  operand: jax.Array | None,
  cotangent: jax.Array,
  platform: str,
) -> jax.Array:
  """Returns one example's gradient of a site's weight, of its weight_shape."""
  shared = tuple(i for i, each in enumerate(site.weight.loops) if not each)
  if site.eqn is None:
    return jnp.sum(widen(cotangent), axis=shared)
  assert operand is not None
  if site.name == "conv_general_dilated":
    one = lambda x, g: convolution.instantiate(site, x, g, platform)
    for _ in site.lengths:
      one = jax.vmap(one)
    return jnp.sum(one(operand, cotangent), axis=shared)
  return product_gradient(site, operand, cotangent, site.weight.loops)


def product_gradient(
  site: Site,
  operand: jax.Array,
  cotangent: jax.Array,
  each: Sequence[bool],
) -> jax.Array:
  """Returns the gradient of a product's weight, float32 or wider.

  Args:
    site: a product.
    operand: what the weight was multiplied with; with leading axes.
    cotangent: the gradient of the output, with the same leading axes.
    each: for each leading axis, whether every entry has its own weight; the
      gradients are summed along the others.

  Returns:
    The gradient, with those leading axes for which each is True.
  """
  cotangent = widen(cotangent)
  changed = {}
  if site.name != "gather":
    operand = operand.astype(cotangent.dtype)
    changed = {"preferred_element_type": cotangent.dtype}

  def product(weight: jax.Array, operand: jax.Array) -> jax.Array:
    values = [operand, weight] if site.operand else [weight, operand]
    return program.bind(site.eqn, values, **changed)[0]

  for own in reversed(each):
    product = jax.vmap(product, in_axes=(0 if own else None, 0))
  lead = (n for n, own in zip(operand.shape, each, strict=False) if own)
  weight = varying_axes.cast_to_varying(
    jnp.zeros((*lead, *site.var.aval.shape), cotangent.dtype),
    varying_axes.varying_axes((operand, cotangent)),
  )
  # The product is linear in the weight, so the weight's value does not matter.
  _, pull = jax.vjp(lambda w: product(w, operand), weight)
  return pull(cotangent)[0]


def placed(site: Site, x: jax.Array, first: Site) -> jax.Array:
  """Permutes the axes of a weight's gradient to those of `first`'s weight."""
  axes = list(range(x.ndim))
  lead = x.ndim - len(site.var.aval.shape)
  for one, invert in ((site, True), (first, False)):
    assert one.weight.origin is not None
    trailing = []
    for step in reversed(one.weight.origin.steps):
      if step[0] != "transpose":
        break
      trailing.append(step[1])
    for permutation in trailing if invert else reversed(trailing):
      if invert:
        order = [permutation.index(a) for a in range(len(permutation))]
      else:
        order = list(permutation)
      axes = [*axes[:lead], *(axes[lead + a] for a in order)]
  return jnp.transpose(x, axes)


def factor(
  site: Site,
  first: Site,
  operands: dict[Key, jax.Array],
  cotangents: dict[Key, jax.Array],
) -> dense.Dense | dense.Lookup:
  """Returns the factors of one example's gradient, in the first's layout."""
  operand, cotangent = operands[site.key], cotangents[site.key]
  mine, theirs = dense.layout(site), dense.layout(first)
  assert mine is not None
  assert theirs is not None
  is_swapped = dense.swapped(mine, theirs)
  if site.name == "gather":
    # Its rows are one-hot, so the other factors are swapped instead.
    assert not is_swapped
    return dense.lookup(site, operand, cotangent)
  factor = dense.dense(site, operand, cotangent)
  return dense.transposed(factor) if is_swapped else factor


def widen(x: jax.Array) -> jax.Array:
  """Casts to float32, unless the dtype is wider."""
  return x.astype(norms.wide(x.dtype))
