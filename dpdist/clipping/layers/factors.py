"""Per-example gradients of dense products, kept as two factors.

The gradient of one example with respect to the weight of a product is a sum of
outer products over all positions t at which the weight was used: of a row (what
the weight was multiplied with) and a column (the gradient of the result). Its
norm can be computed from these factors without forming it,

  || sum_t r_t c_t^T ||^2 = sum_{t,u} <r_t, r_u> <c_t, c_u>

(Goodfellow 2015, "Efficient Per-Example Gradient Computations", for one
position; Li et al. 2022, "Large Language Models Can Be Strong Differentially
Private Learners", section 4, for many). An embedding is a product whose rows
are one-hot, and is kept as indices.

Guarantees:
  * A computed norm is too small by at most 2^-11 of itself, whatever finite
    numbers the factors hold. The sum over t and u may cancel, and float32 then
    returns anything near 0: an example whose terms cancel would pass unclipped.
    `norm` therefore adds what rounding can hide, and nothing is squared before
    it is scaled.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist.clipping.layers import inner_products
from dpdist.clipping.layers import norms
from dpdist.clipping.trace.program import WeightUse


class Dense(NamedTuple):
  """Rows [S, T, m] and columns [S, T, n]; S weights of m rows and n columns."""

  rows: jax.Array
  columns: jax.Array


class Lookup(NamedTuple):
  """One-hot rows, as indices [T] into a table, and columns [T, n]."""

  indices: jax.Array
  columns: jax.Array


class Layout(NamedTuple):
  """The axes of an array that the S, m and n of factors correspond to."""

  steps: tuple[Any, ...]  # The array, as an image of parameters.
  batch: tuple[int, ...]  # Axes of S.
  rows: tuple[int, ...]  # Axes of m.
  columns: tuple[int, ...]  # Axes of n.


def layout(use: WeightUse, roles: tuple[tuple[int, ...], ...]) -> Layout | None:
  """Returns how a weight's factors lie on parameters.

  `roles` are the weight's axes of S, of m and of n. Returns None for a weight
  that is no image of parameters.
  """
  if use.weight.origin is None:
    return None
  steps = use.weight.origin.steps
  # A transposed weight has the same entries, as with tied embeddings.
  while steps[-1][0] == "transpose":
    permutation = steps[-1][1]
    steps = steps[:-1]
    roles = tuple(tuple(permutation[a] for a in axes) for axes in roles)
  return Layout(steps, *roles)


def swapped(one: Layout, other: Layout) -> bool | None:
  """Returns whether a layout swaps rows and columns; None: they do not fit."""
  if one == other:
    return False
  if one == other._replace(rows=other.columns, columns=other.rows):
    return True
  return None


def transposed(factor: Dense) -> Dense:
  """Returns the factors of the transposed weight."""
  return Dense(factor.columns, factor.rows)


def norm(
  factors: Sequence[Dense | Lookup],
  unit_roundoff: float,
  precision: Any = None,
) -> jax.Array:
  """Returns the norm of the sum of some factors' gradients, never too small.

  The factors are those of one weight, in one layout, for one example.
  `unit_roundoff` is the relative error with which the summing product rounds
  its operands, 0 if it does not. The norm is a scalar, float32 or wider.
  """
  units, power = _units(factors)
  terms: Any = sum(
    jnp.sum(unit.row_norms * unit.column_norms, axis=-1) for unit in units
  )
  positions = sum(unit.columns.shape[-2] for unit in units)
  root = terms
  if positions > 1:
    square: Any = 0.0
    error: Any = 0.0
    for i, one in enumerate(units):
      for j, other in enumerate(units[: i + 1]):
        inner, inner_error = _inner(one, other, precision)
        times = 1 if i == j else 2
        square, error = square + times * inner, error + times * inner_error
    root = inner_products.from_inner_products(square, error, terms)
  length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
  root = inner_products.with_room(
    length(root), length(terms), positions, unit_roundoff
  )
  return norms.times_power_of_two(root, power)


def sum_of_norms(factor: Dense) -> jax.Array:
  """Returns sum_t |r_t| |c_t|, a scalar."""
  rows, columns = (norms.of(x, -1) for x in factor)
  products, power = norms.products(rows, columns)
  return norms.times_power_of_two(jnp.sum(products), power)


class _Unit(NamedTuple):
  """Factors whose entries can all be squared."""

  rows: jax.Array | None  # [S, T, m]; None if they are one-hot.
  indices: jax.Array | None  # [T] of one-hot rows; otherwise None.
  columns: jax.Array  # [S, T, n].
  row_norms: jax.Array  # [S, T].
  column_norms: jax.Array  # [S, T].


def _units(
  factors: Sequence[Dense | Lookup],
) -> tuple[list[_Unit], jax.Array]:
  """Scales factors, and returns the power of two that was taken out.

  Each row and each column is scaled by itself: a small row may meet a large
  column. Where terms differ much in size, the smaller ones may vanish.
  """
  scaled = []
  power = jnp.full((), norms.OF_ZERO)
  for factor in factors:
    if isinstance(factor, Lookup):
      rows, of_rows = None, jnp.zeros((), jnp.int32)
      columns, of_columns = norms.scaled(factor.columns[None], -1)
    else:
      rows, of_rows = norms.scaled(factor.rows, -1)
      columns, of_columns = norms.scaled(factor.columns, -1)
    power = jnp.maximum(
      power, jnp.max(of_rows + of_columns, initial=norms.OF_ZERO)
    )
    scaled.append((rows, columns, of_rows + of_columns))
  units = []
  for factor, (rows, columns, of_both) in zip(factors, scaled, strict=True):
    columns = norms.times_power_of_two(columns, of_both - power)
    # Otherwise the compiler would move powers of two out of the products again.
    rows, columns = jax.lax.optimization_barrier((rows, columns))
    column_norms = _norms(columns)
    if isinstance(factor, Lookup):
      one_hot = jnp.ones_like(column_norms)
      unit = _Unit(None, factor.indices, columns, one_hot, column_norms)
    else:
      unit = _Unit(rows, None, columns, _norms(rows), column_norms)
    units.append(unit)
  return units, power


def _norms(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(x.astype(norms.wide(x.dtype))), axis=-1))


def _inner(
  one: _Unit, other: _Unit, precision: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns two gradients' inner product for each of the S, and its error."""
  rows, of_rows = _inner_rows(one, other, precision)
  columns, of_columns = inner_products.gram(
    one.columns, other.columns, precision
  )
  pairs = inner_products.InnerProducts
  return inner_products.sum_of_products(
    pairs(rows, one.row_norms, other.row_norms, of_rows),
    pairs(columns, one.column_norms, other.column_norms, of_columns),
  )


def _inner_rows(
  one: _Unit, other: _Unit, precision: Any
) -> tuple[jax.Array, float]:
  if one.rows is not None and other.rows is not None:
    return inner_products.gram(one.rows, other.rows, precision)
  dtype = norms.wide(one.columns.dtype)
  # One-hot rows select entries of other rows.
  if one.rows is not None:
    return one.rows[:, :, other.indices].astype(dtype), 0.0
  assert one.indices is not None
  if other.rows is not None:
    picked = other.rows[:, :, one.indices].astype(dtype)
    return jnp.swapaxes(picked, -1, -2), 0.0
  assert other.indices is not None
  same = one.indices[:, None] == other.indices[None, :]
  return same[None].astype(dtype), 0.0
