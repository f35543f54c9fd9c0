"""Sums of float arrays in integers, equal for every order of additions.

A number is a tuple of int32 limbs, most significant first:

  value = (limbs[0] + limbs[1] / 2**20 + limbs[2] / 2**40 + ...) / 2**exponent

After `carry` every limb but the first is in [0, 2**20), so each value has one
form. Scaling by a power of two, truncation, and the part cut off are all exact
in floating point: they give the same bits in every compiled program.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# 2048 devices, each with a limb of less than 2**20, sum to less than 2**31.
_LIMB_BITS = 20
MOST_DEVICES = 2048
# Bits of the first limb. The 31st is room for what `choose` does not know of.
_SUM_BITS = 30

Limbs = tuple[jax.Array, ...]


class Format(NamedTuple):
  """The layout of numbers."""

  exponent: int  # The first limb counts units of 2**-exponent.
  num_limbs: int  # At least 2.

  @property
  def unit(self) -> float:
    """Returns the unit of the last limb; truncation moves an entry by less."""
    return math.ldexp(1.0, -self.exponent - _LIMB_BITS * (self.num_limbs - 1))


def choose(
  *, largest: float, num_terms: int, num_entries: int, tolerance: float
) -> Format:
  """Chooses a format that cannot overflow and rounds little.

  Guarantees:
    * A sum never overflows if the magnitudes of its terms add up to at most
      `largest` in every entry, and if it is made with `add` on each of up to
      2048 devices and with `carry` after a plain sum over devices, however the
      terms are spread over them. A device's first limb is the floor of its sum
      in units of 2**-exponent, at most 2**30 in magnitude; 2048 floors are off
      by at most 2048, and 2048 of the other limbs are less than 2**31: all is
      below 2**31.
    * Truncation moves two sums of `num_terms` arrays each apart by at most
      `tolerance` in l2: an entry of a term moves by less than `unit`, so a sum
      by less than num_terms * sqrt(num_entries) * unit, and both sums by twice
      that.

  `largest` and `tolerance` are above 0; `num_entries` are those of an array.
  Returns the format with the fewest limbs that guarantees this.
  """
  # largest < 2**power, exactly.
  power = math.frexp(largest)[1]
  form = Format(_SUM_BITS - power, 2)
  while 2 * num_terms * math.sqrt(num_entries) * form.unit > tolerance:
    form = form._replace(num_limbs=form.num_limbs + 1)
  return form


def zeros(form: Format, shape: Sequence[int]) -> Limbs:
  """Returns the number 0 in every entry."""
  return tuple(jnp.zeros(shape, jnp.int32) for _ in range(form.num_limbs))


def split(
  form: Format, x: jax.Array, bound: float, *, is_floored: bool = False
) -> Limbs:
  """Returns limbs of x, truncated towards zero and not carried yet.

  Truncation makes no entry larger, and so no norm. x is float32 or wider.
  Entries beyond +-bound become +-bound, and NaN becomes 0: neither occurs, but
  a sum must not overflow even if it did.

  `is_floored` rounds down instead. Then adding x to a number of this format
  gives what rounding their exact sum gives. So noise can be split alone, and
  rounding still comes after noise.
  """
  x = jnp.clip(jnp.where(jnp.isnan(x), 0, x), -bound, bound)
  rest = x * math.ldexp(1.0, form.exponent)
  limbs = []
  for i in range(form.num_limbs):
    is_last = i == form.num_limbs - 1
    whole = jnp.floor(rest) if is_last and is_floored else jnp.trunc(rest)
    limbs.append(whole.astype(jnp.int32))
    rest = (rest - whole) * (1 << _LIMB_BITS)
  return tuple(limbs)


def carry(limbs: Limbs) -> Limbs:
  """Returns the same number in its one form."""
  first, *others = limbs
  over = jnp.zeros_like(first)
  carried = []
  for limb in reversed(others):
    limb = limb + over
    # Arithmetic shift and mask: floor and remainder, for negative limbs too.
    over = limb >> _LIMB_BITS
    carried.append(limb & ((1 << _LIMB_BITS) - 1))
  return (first + over, *reversed(carried))


def add(x: Limbs, y: Limbs) -> Limbs:
  """Returns the sum of two numbers, carried."""
  return carry(tuple(a + b for a, b in zip(x, y, strict=True)))


def to_float(form: Format, limbs: Limbs, dtype: jnp.dtype) -> jax.Array:
  """Returns a carried number as a float, rounded alike in every program.

  Products with powers of two are exact, so it does not matter whether a
  compiler fuses multiplications with additions.
  """
  value = jnp.zeros_like(limbs[0], dtype)
  for limb in reversed(limbs):
    value = value * 2.0**-_LIMB_BITS + limb.astype(dtype)
  return value * math.ldexp(1.0, -form.exponent)
