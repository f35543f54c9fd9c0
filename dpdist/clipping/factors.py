"""Per-example gradients of dense products, kept as two factors.

The gradient of one example with respect to the weight of a product is a sum
of outer products: over all positions t at which the weight was used, of a row
(what the weight was multiplied with) and a column (the gradient of the result).
Its norm can be had from the factors without forming it,

  || sum_t r_t c_t^T ||^2 = sum_{t,u} <r_t, r_u> <c_t, c_u>

(Goodfellow 2015, "Efficient Per-Example Gradient Computations", for one
position; Li et al. 2022, "Large Language Models Can Be Strong Differentially
Private Learners", section 4, for many). An embedding is a product whose rows
are one-hot, and is kept as indices.

Guarantees:
  * A norm is never taken for much smaller than it is. The sum over t and u
    may cancel, and float32 then returns anything near 0: an example whose
    terms cancel would pass the clip unclipped. `squared_norm` therefore never
    returns less than what rounding can hide.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist.clipping.program import Site

# A squared norm below this part of the square of sum_t |r_t| |c_t| is rounding
# error. Rounding errors of the squares are near 2^-23 of it, so that a norm
# above is right to about 2^-10 at worst, and to float32 where little cancels.
TRUSTED = 2.0**-13
# The same where gradients are formed for their norm, and summed by a product of
# its own: that rounds their terms by about 2^-24 of their size.
SUMMED = 2.0**-26


class Dense(NamedTuple):
  """Rows [S, T, m] and columns [S, T, n]; S weights of m rows and n columns."""

  rows: jax.Array
  columns: jax.Array


class Lookup(NamedTuple):
  """One-hot rows, as indices [T] into a table, and columns [T, n]."""

  indices: jax.Array
  columns: jax.Array


class Layout(NamedTuple):
  """Which axes of which array the S, m and n of factors are.

  Attributes:
    steps: the array, as an image of parameters.
    batch: axes of S.
    rows: axes of m.
    columns: axes of n.
  """

  steps: tuple[Any, ...]
  batch: tuple[int, ...]
  rows: tuple[int, ...]
  columns: tuple[int, ...]


class _DotAxes(NamedTuple):
  """The roles of the axes of a dot_general's weight and of its operand."""

  weight: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
  operand: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def dot_axes(site: Site) -> _DotAxes:
  """(batch, contracted, free) axes of the weight and of the data operand."""
  contracted, batch = site.eqn.params["dimension_numbers"]
  roles = []
  for i, x in enumerate(site.eqn.invars):
    used = {*contracted[i], *batch[i]}
    free = tuple(a for a in range(len(x.aval.shape)) if a not in used)
    roles.append((tuple(batch[i]), tuple(contracted[i]), free))
  return _DotAxes(roles[site.operand], roles[1 - site.operand])


def layout(site: Site) -> Layout | None:
  """How the factors of a site's weight lie on parameters.

  Returns:
    None for a site without factors, or a weight that is no image of parameters.
  """
  origin = site.weight.origin
  if origin is None or site.name not in ("dot_general", "gather"):
    return None
  if site.name == "gather":
    if any(site.weight.loops):
      return None
    roles: tuple[tuple[int, ...], ...] = ((), (0,), (1,))
  else:
    roles = dot_axes(site).weight
  steps = origin.steps
  # A transposed weight has the same entries: tied embeddings meet here.
  while steps[-1][0] == "transpose":
    permutation = steps[-1][1]
    steps = steps[:-1]
    roles = tuple(tuple(permutation[a] for a in axes) for axes in roles)
  return Layout(steps, *roles)


def swapped(one: Layout, other: Layout) -> bool | None:
  """Whether two layouts of the same array differ by rows for columns.

  Returns:
    False if they are equal, True if rows and columns change places, None if the
    factors cannot be used together.
  """
  if one == other:
    return False
  if one == other._replace(rows=other.columns, columns=other.rows):
    return True
  return None


def sizes(site: Site) -> tuple[int, int, int, int]:
  """(S, T, m, n) of a dot's factors for one example."""
  weight = site.eqn.invars[site.operand].aval.shape
  operand = site.eqn.invars[1 - site.operand].aval.shape
  axes = dot_axes(site)
  size = lambda shape, which: math.prod(shape[a] for a in which)
  loops = list(zip(site.lengths, site.weight.loops, strict=True))
  return (
    size(weight, axes.weight[0]) * math.prod(n for n, each in loops if each),
    size(operand, axes.operand[2])
    * math.prod(n for n, each in loops if not each),
    size(weight, axes.weight[1]),
    size(weight, axes.weight[2]),
  )


def dense(site: Site, operand: jax.Array, cotangent: jax.Array) -> Dense:
  """The factors of a dot_general for one example.

  Args:
    site: a dot_general.
    operand: the data operand; a leading axis for each loop.
    cotangent: of the output, likewise.

  Returns:
    Rows of contracted entries, columns of the weight's free entries; in the
    dtype of the model. Iterations that share the weight are positions.
  """
  _, _, m, n = sizes(site)
  batch, contracted, free = dot_axes(site).operand
  num_batch, num_free = len(batch), len(free)
  num_loops = len(site.lengths)
  each = [i for i in range(num_loops) if site.weight.loops[i]]
  shared = [i for i in range(num_loops) if not site.weight.loops[i]]
  shift = lambda axes: [a + num_loops for a in axes]
  rows = jnp.transpose(
    operand,
    [*each, *shift(batch), *shared, *shift(free), *shift(contracted)],
  )
  # The output has the batch axes, then the free axes of each operand in turn.
  b = shift(range(num_batch))
  rest = shift(range(num_batch, cotangent.ndim - num_loops))
  if site.operand:
    mine, theirs = rest[:num_free], rest[num_free:]
  else:
    theirs, mine = (
      rest[: len(rest) - num_free],
      rest[len(rest) - num_free :],
    )
  columns = jnp.transpose(cotangent, [*each, *b, *shared, *mine, *theirs])
  lead = math.prod(rows.shape[: len(each) + num_batch])
  return Dense(
    rows.reshape(lead, -1, m) if m else rows.reshape(lead, 0, 0),
    columns.reshape(lead, -1, n) if n else columns.reshape(lead, 0, 0),
  )


def lookup(site: Site, indices: jax.Array, cotangent: jax.Array) -> Lookup:
  """The factors of an embedding lookup for one example, loops included."""
  table = site.eqn.invars[0].aval.shape
  indices = indices.reshape(-1)
  columns = cotangent.reshape(-1, table[1])
  inside = (indices >= 0) & (indices < table[0])
  # Plain indexing promises to stay in bounds, and reads the nearest row where
  # it does not; the gradient's scatter drops what is outside all the same.
  if site.eqn.params["mode"] != jax.lax.GatherScatterMode.CLIP:
    columns = jnp.where(inside[:, None], columns, 0)
  return Lookup(jnp.clip(indices, 0, table[0] - 1), columns)


def transposed(factor: Dense) -> Dense:
  """The factors of the transposed weight."""
  return Dense(factor.columns, factor.rows)


def squared_norm(
  factors: list[Dense | Lookup], unit_roundoff: float, precision: Any = None
) -> jax.Array:
  """The squared norm of the sum of some factors' gradients, never too small.

  Args:
    factors: of one weight, in one layout; for one example.
    unit_roundoff: relative error with which the summing product rounds its
      operands; 0 where it does not.
    precision: of the products.

  Returns:
    Scalar, float32 or wider.
  """
  total: Any = 0.0
  terms: Any = 0.0
  factors = [_balanced(factor) for factor in factors]
  for i, one in enumerate(factors):
    total = total + _inner(one, one, precision)
    terms = terms + _sum_of_norms(one)
    for other in factors[:i]:
      total = total + 2 * _inner(one, other, precision)
  if len(factors) > 1 or _positions(factors[0]) > 1:
    total = jnp.maximum(total, TRUSTED * jnp.square(terms))
  total = jnp.sum(total)
  if unit_roundoff:
    terms = jnp.sqrt(jnp.sum(jnp.square(terms)))
    total = with_slack(total, terms, unit_roundoff)
  return total


def with_slack(
  square: jax.Array, terms: jax.Array, unit_roundoff: float
) -> jax.Array:
  """A squared norm with room for what a product's rounding can add.

  Accelerators multiply float32 with 8 or 11 bits unless told otherwise. What an
  example contributes to a sum can then be longer than its gradient, by the
  rounding of both operands in every term.

  Args:
    square: squared norm.
    terms: at least the sum of the norms of the product's terms.
    unit_roundoff: relative rounding error of an operand.

  Returns:
    The square of the norm plus that.
  """
  return jnp.square(jnp.sqrt(square) + 2 * unit_roundoff * terms)


# Of floats as narrow in range as float32: integers of their size, and the bits
# of their fraction.
_LAYOUTS = {
  jnp.dtype("float32"): (jnp.int32, 23),
  jnp.dtype("bfloat16"): (jnp.int16, 7),
}


def _balanced(factor: Dense | Lookup) -> Dense | Lookup:
  """The same gradient, with rows whose largest entry is between 1 and 2.

  Squares of rows below about 1e-19 are 0, whatever columns they meet. Powers of
  two round nothing.
  """
  if isinstance(factor, Lookup) or not (
    factor.rows.dtype in _LAYOUTS and factor.columns.dtype in _LAYOUTS
  ):
    return factor  # One-hot, or never as small.
  largest = jnp.max(jnp.abs(factor.rows), axis=-1, keepdims=True, initial=0)
  power = jnp.where(largest > 0, _exponent(largest), 0)
  return Dense(
    _times_two_to_the(-power, factor.rows),
    _times_two_to_the(power, factor.columns),
  )


def _exponent(x: jax.Array) -> jax.Array:
  """The largest n with 2^n at most x, for x above 0; int32."""
  kind, fraction = _LAYOUTS[x.dtype]
  bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.int32)
  return (bits >> fraction) - 127


def _times_two_to_the(power: jax.Array, x: jax.Array) -> jax.Array:
  """x 2^power, 0 where it is too small. Not as a product: of a sum of products
  the compiler would take the factor out."""
  kind, fraction = _LAYOUTS[x.dtype]
  exponent = _exponent(jnp.abs(x)) + 127
  moved = exponent + power
  bits = jax.lax.bitcast_convert_type(x, kind)
  shifted = bits + (power << fraction).astype(kind)
  y = jax.lax.bitcast_convert_type(shifted, x.dtype)
  y = jnp.where((exponent > 0) & (moved > 0), y, jnp.zeros((), x.dtype))
  # What overflows, and what was not finite, is not.
  return jnp.where((moved > 254) | (exponent > 254), jnp.inf * jnp.sign(x), y)


def _positions(factor: Dense | Lookup) -> int:
  return factor.columns.shape[-2]


def _sum_of_norms(factor: Dense | Lookup) -> jax.Array:
  """sum_t |r_t| |c_t|, for each of the S weights."""
  columns = _norms(factor.columns)
  if isinstance(factor, Lookup):
    return jnp.sum(columns)
  return jnp.sum(_norms(factor.rows) * columns, axis=-1)


def _norms(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(x.astype(_wide(x.dtype))), axis=-1))


def _inner(
  one: Dense | Lookup, other: Dense | Lookup, precision: Any
) -> jax.Array:
  """The inner product of two gradients, for each of the S weights."""
  if isinstance(other, Lookup):
    one, other = other, one
  if isinstance(one, Lookup):
    if isinstance(other, Lookup):
      same = one.indices[:, None] == other.indices[None, :]
      gram = _gram(one.columns, other.columns, precision)
      return jnp.sum(jnp.where(same, gram, 0))
    # The one-hot rows pick entries of the other's rows.
    picked = other.rows[0][:, one.indices].T.astype(_wide(other.rows.dtype))
    return jnp.sum(picked * _gram(one.columns, other.columns[0], precision))
  assert isinstance(other, Dense)
  if one.rows.shape[-2] == other.rows.shape[-2] == 1:
    inner = lambda x, y: jnp.sum(
      x.astype(_wide(x.dtype)) * y.astype(_wide(y.dtype)), axis=(-1, -2)
    )
    return inner(one.rows, other.rows) * inner(one.columns, other.columns)
  rows = _gram(one.rows, other.rows, precision)
  columns = _gram(one.columns, other.columns, precision)
  return jnp.sum(rows * columns, axis=(-1, -2))


def _gram(x: jax.Array, y: jax.Array, precision: Any) -> jax.Array:
  return jnp.einsum(
    "...ti,...ui->...tu",
    x,
    y,
    precision=precision,
    preferred_element_type=_wide(x.dtype),
  )


def _wide(dtype: Any) -> Any:
  return jnp.promote_types(dtype, jnp.float32)
