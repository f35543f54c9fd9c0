"""Sums of float arrays that keep what their additions round away.

A sum is represented by two arrays, high and low, that add up to it exactly;
high is the sum rounded. Plain float32 sums drift: someone who chooses the
examples can make each addition round the same way, and move a sum of many parts
by several clip norms (`dpdist.privacy.rounding` has the bound).

The algorithm is DWPlusFP of Joldes, Muller and Popescu 2017, "Tight and
Rigorous Error Bounds for Basic Building Blocks of Double-Word Arithmetic": an
addition errs by at most 2 u^2 of its result, u = 2^-24 for float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Sum(NamedTuple):
  """Two pytrees of float arrays, whose sum is the value."""

  high: PyTree  # The value, rounded.
  low: PyTree  # What rounding left out of it.


def zeros_like(tree: PyTree) -> Sum:
  """Returns an empty sum of arrays like those of tree."""
  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
  return Sum(zeros(), zeros())


def of(x: PyTree, low: PyTree | None = None) -> Sum:
  """Returns arrays as a sum; low is as for `add`."""
  zeros = jax.tree.map(jnp.zeros_like, x)
  return Sum(x, zeros if low is None else low)


def add(total: Sum, x: PyTree, low: PyTree | None = None) -> Sum:
  """Adds arrays like total.high, and `low`, what rounding left out of them."""
  # A compiler may fuse a product into the addition, where it is not rounded,
  # and round it where the error of the addition is computed. The barrier makes
  # both use the same value.
  x, low = jax.lax.optimization_barrier((x, low))
  total = add_once(total, x)
  return total if low is None else add_once(total, low)


def add_once(total: Sum, x: PyTree) -> Sum:
  """Adds arrays that are computed elsewhere, or once after all others.

  If x's computation is fused with the addition, its rounding may be missing
  from the error; high + low is still right to 2^-46.
  """
  pairs = jax.tree.map(_add, total.high, total.low, x)
  return Sum(*jax.tree.transpose(jax.tree.structure(x), _PAIR, pairs))


def over_devices(total: Sum, axes: PyTree, units: tuple[float, ...]) -> Sum:
  """Adds up the sums of devices, inside `jax.shard_map`.

  Multiples of a power of two add up exactly, in any order, while their sum is
  at most 2^24 units. So the only error is the rounding of the devices' rests.
  `axes` is a pytree like total.high of tuples of mesh axes; `units` are powers
  of two, falling; see `dpdist.privacy.rounding.grid`.
  """
  # mypy does not accept JAX's class of tree structures as a type.
  structure: Any = jax.tree.structure(total.high)
  leaves = [
    _split(high, low, units)
    for high, low in zip(*map(jax.tree.leaves, total), strict=True)
  ]
  along = structure.flatten_up_to(axes)
  # All arrays along the same axes together, so that it is one reduction.
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
  # Dekker's sum, for a second number that is the smaller one.
  rest = low + error
  rounded = total + rest
  return rounded, rest - (rounded - total)


def _two_sum(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns x + y rounded, and exactly what rounding left out (Knuth)."""
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
  """Adds up arrays of one shape, the largest first."""
  first, *others = pieces
  total = of(first)
  for piece in others:
    total = add_once(total, piece)
  return total
