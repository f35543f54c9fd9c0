"""Sums of float arrays that keep what their additions round away.

A sum is two arrays, high and low, whose exact sum is meant; high is that
rounded. Plain float32 sums drift: someone who chooses the examples can make
each addition round one way, and move a sum of many parts by several clip norms
(`dpdist.privacy.rounding` has the bound).

The algorithm is DWPlusFP of Joldes, Muller and Popescu 2017, "Tight and
Rigorous Error Bounds for Basic Building Blocks of Double-Word Arithmetic": an
addition errs by at most 2 u^2 of its result, u = 2^-24 for float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Sum(NamedTuple):
  """Two pytrees of float arrays; the sum of both is meant.

  Attributes:
    high: the sum, rounded.
    low: what rounding left out of it.
  """

  high: PyTree
  low: PyTree


def zeros_like(tree: PyTree) -> Sum:
  """An empty sum of such arrays."""
  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
  return Sum(zeros(), zeros())


def of(x: PyTree, low: PyTree | None = None) -> Sum:
  """Arrays as a sum; low as for `add`."""
  zeros = jax.tree.map(jnp.zeros_like, x)
  return Sum(x, zeros if low is None else low)


def add(total: Sum, x: PyTree, low: PyTree | None = None) -> Sum:
  """Adds arrays.

  Args:
    total: the sum so far.
    x: pytree like total.high, of the same dtypes.
    low: what rounding left out of x, likewise; None: nothing.
  """
  # A product that is fused into the addition is not rounded there, and is where
  # the error of the addition is computed: what is added must be one value.
  x, low = jax.lax.optimization_barrier((x, low))
  total = add_once(total, x)
  return total if low is None else add_once(total, low)


def add_once(total: Sum, x: PyTree) -> Sum:
  """Adds arrays that are computed nowhere near, or once after all others.

  Fused with what computes x, the error may be off by the rounding of that; it
  is then still what makes high + low right, to 2^-46.
  """
  pairs = jax.tree.map(_add, total.high, total.low, x)
  return Sum(*jax.tree.transpose(jax.tree.structure(x), _PAIR, pairs))


def over_devices(total: Sum, axes: PyTree, units: tuple[float, ...]) -> Sum:
  """Adds up the sums of devices, inside `jax.shard_map`.

  Multiples of a power of two add up exactly, in any order, while their sum is
  at most 2^24 units: so the sums of devices lose no more than what their rests
  round.

  Args:
    total: a device's own.
    axes: pytree like total.high of the mesh axes to add up over, tuples.
    units: powers of two, falling; see `dpdist.privacy.rounding.grid`.
  """
  # mypy takes JAX's own class of tree structures for a mere name.
  structure: Any = jax.tree.structure(total.high)
  leaves = [
    _split(high, low, units)
    for high, low in zip(*map(jax.tree.leaves, total), strict=True)
  ]
  along = structure.flatten_up_to(axes)
  # Together, so that it is one reduction, for all along the same axes.
  for over in dict.fromkeys(along):
    chosen = [i for i, mine in enumerate(along) if mine == over]
    sums = jax.lax.psum([leaves[i] for i in chosen], over)
    for i, x in zip(chosen, sums, strict=True):
      leaves[i] = x
  joined = [_joined(pieces) for pieces in leaves]
  return Sum(*(structure.unflatten(x) for x in zip(*joined, strict=True)))


_PAIR = jax.tree.structure((0, 0))


def _add(
  high: jax.Array, low: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  total, error = _two_sum(high, x)
  # Dekker's, for a second number that is the smaller one.
  rest = low + error
  rounded = total + rest
  return rounded, rest - (rounded - total)


def _two_sum(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x + y rounded, and what that leaves out, exactly (Knuth)."""
  total = x + y
  part = total - x
  return total, (x - (total - part)) + (y - part)


def _split(
  high: jax.Array, low: jax.Array, units: tuple[float, ...]
) -> tuple[jax.Array, ...]:
  """Cuts a number into multiples of each unit and a rest."""
  pieces = []
  rest, left = high, low
  for unit in units:
    piece = jnp.round(rest * (1 / unit)) * unit
    pieces.append(piece)
    rest, left = _two_sum(rest - piece, left)
  return (*pieces, rest)


def _joined(pieces: tuple[jax.Array, ...]) -> Sum:
  """The sum of arrays of one shape, the largest first."""
  first, *others = pieces
  total = of(first)
  for piece in others:
    total = add_once(total, piece)
  return total
