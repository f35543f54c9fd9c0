"""Computes norms from inner products that may cancel; adds rounding errors.

The squared norm of a sum of outer products is a sum over all pairs of positions
of the rows' inner product times the columns'. Where these terms cancel, the
result may be only rounding error, and an example would pass unclipped. The
bounds here hold for any order in which a product is summed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist.clipping.layers import norms

# A squared norm below this part of the square of sum_t |r_t| |c_t| is treated
# as rounding error.
TRUSTED = 2.0**-13
# The same for gradients that are formed for their norm and summed by another
# product, which rounds their terms by about 2^-24 of their size.
SUMMED = 2.0**-26
# Rounding errors are added only above this part of a norm, so that norms are
# unchanged where little cancels.
_UNNOTICED = 2.0**-12
# Inner products of longer vectors are summed in parts of at most this length:
# where all entries are similar, each addition rounds the same way.
_LONGEST = 512


class InnerProducts(NamedTuple):
  """Inner products of all pairs of two lists of vectors."""

  products: jax.Array  # [..., T, U].
  one: jax.Array  # Norms of the first list, [..., T].
  other: jax.Array  # Norms of the second list, [..., U].
  # Bound on the products' errors, relative to the products of norms.
  error: float

  def of_norms(self) -> jax.Array:
    """Returns the products of the norms, [..., T, U]."""
    return self.one[..., :, None] * self.other[..., None, :]


def gram(x: jax.Array, y: jax.Array, precision: Any) -> tuple[jax.Array, float]:
  """Computes inner products of the rows of x [..., T, m] and y [..., U, m].

  Returns them, [..., T, U] in float32 or wider, and a bound on their errors,
  relative to the product of the two norms.
  """
  length = x.shape[-1]
  parts = max(1, -(-length // _LONGEST))
  wide = norms.wide(jnp.promote_types(x.dtype, y.dtype))
  product = lambda form, x, y: jnp.einsum(
    form, x, y, precision=precision, preferred_element_type=wide
  )
  if parts == 1:
    return product("...ti,...ui->...tu", x, y), length * _rounding(wide)
  short = -(-length // parts)
  room = [(0, 0)] * (x.ndim - 1) + [(0, parts * short - length)]
  x, y = (jnp.pad(z, room).reshape(*z.shape[:-1], parts, short) for z in (x, y))
  of_parts = product("...tpi,...upi->...ptu", x, y)
  # Without a barrier the compiler would turn this sum into one product.
  total = jnp.sum(jax.lax.optimization_barrier(of_parts), axis=-3)
  return total, (short + parts) * _rounding(wide)


def sum_of_products(
  rows: InnerProducts, columns: InnerProducts
) -> tuple[jax.Array, jax.Array]:
  """Sums inner products of rows times those of columns, with an error."""
  # In any order of additions, no term goes through more additions than that.
  added = sum(rows.products.shape[-2:])
  of_rows = rows.error + added * _rounding(rows.one.dtype)
  of_columns = columns.error
  error = rows.of_norms() * (
    of_rows * jnp.abs(columns.products)
    + of_rows * of_columns * columns.of_norms()
  ) + of_columns * columns.of_norms() * jnp.abs(rows.products)
  return (
    _sum_by_rows(rows.products * columns.products),
    jnp.sum(error, axis=(-1, -2)),
  )


def _sum_by_rows(x: jax.Array) -> jax.Array:
  """Sums over the last two axes one after the other, with T + U roundings."""
  # Without a barrier the compiler would make one sum of the two.
  return jnp.sum(jax.lax.optimization_barrier(jnp.sum(x, axis=-1)), axis=-1)


def _rounding(dtype: Any) -> float:
  """Returns the relative error of one addition."""
  return float(jnp.finfo(dtype).eps) / 2


def from_inner_products(
  square: jax.Array, error: jax.Array, terms: jax.Array
) -> jax.Array:
  """Returns a norm from a sum of inner products, some of them negative.

  `square` is that sum, which may be too small by `error`; `terms` is the sum of
  the norms of the terms. The result is at least the norm, except for a part of
  at most `_UNNOTICED`.
  """
  square = jnp.maximum(square, 0)
  square = square + jnp.maximum(error - 2 * _UNNOTICED * square, 0)
  return jnp.maximum(jnp.sqrt(square), TRUSTED**0.5 * terms)


def with_room(
  norm: jax.Array, terms: jax.Array, positions: int, unit_roundoff: float
) -> jax.Array:
  """Returns a norm plus what the summing product's rounding can add.

  That product adds up `positions` terms again, in another order. And
  accelerators multiply float32 with 8 or 11 bits by default: an example's
  contribution to a sum can then be longer than its gradient, by the rounding of
  both operands in every term. `terms` is at least the sum of the norms of the
  product's terms, and `unit_roundoff` the relative rounding error of an
  operand.
  """
  # Where terms cancel, a partial sum is at most half of them.
  added = positions / 2 * _rounding(norm.dtype) * terms
  norm = norm + jnp.maximum(added - _UNNOTICED * norm, 0)
  return norm + 2 * unit_roundoff * terms if unit_roundoff else norm
