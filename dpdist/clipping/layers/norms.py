"""Euclidean norms whose computation neither underflows nor overflows.

The square of a float32 below 1e-19 is 0, and that of one above 2e19 is
infinite. So with plain squares the norm of a gradient of 1e-20 is 0, and so is
every guard that is made of squares. Here a vector is first multiplied with a
power of two that makes it neither small nor large, which rounds nothing.
Functions return norms, not their squares.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# For each dtype: an integer dtype of its size, and the bits of its fraction.
_LAYOUTS: dict[Any, tuple[Any, int]] = {
  jnp.dtype("float64"): (jnp.int64, 52),
  jnp.dtype("float32"): (jnp.int32, 23),
}
# The exponent of 0: below all others, and below any sum of two others.
OF_ZERO = -(2**14)


def wide(dtype: Any) -> Any:
  """Returns float32, or the dtype if that is wider."""
  return jnp.promote_types(dtype, jnp.float32)


def widen(x: jax.Array) -> jax.Array:
  """Casts to float32, unless the dtype is wider."""
  return x.astype(wide(x.dtype))


def of(x: jax.Array, axes: int | Sequence[int] | None = None) -> jax.Array:
  """Returns norms along axes; not finite where an entry or the norm is not."""
  unit, power = scaled(x.astype(wide(x.dtype)), axes)
  root = jnp.sqrt(jnp.sum(jnp.square(unit), axis=axes))
  return times_power_of_two(root, power.reshape(root.shape))


def products(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns a * b without a power of two, and that power.

  Where products differ much in size, the smaller ones may vanish.
  """
  powers = exponent(a), exponent(b)
  a, b = jax.lax.optimization_barrier(
    [
      x * _power_of_two(-power, x.dtype)
      for x, power in zip((a, b), powers, strict=True)
    ]
  )
  power = jnp.where((a == 0) | (b == 0), OF_ZERO, powers[0] + powers[1])
  most = jnp.max(power, initial=OF_ZERO)
  return times_power_of_two(a * b, power - most), most


def hypot(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the root of the sum of two squares; the numbers are at least 0."""
  high, low = jnp.maximum(a, b), jnp.minimum(a, b)
  some = high > 0  # False for NaN, which is returned.
  ratio = low / jnp.where(some, high, 1)
  return jnp.where(some, high * jnp.sqrt(1 + jnp.square(ratio)), high)


def scaled(
  x: jax.Array, axes: int | Sequence[int] | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns vectors that can be squared, and the powers of two taken out.

  x is of any floating dtype, or of whole numbers. A vector lies along `axes`,
  all if None.

  The scaled vectors are of a dtype with the range of float32. Their entries are
  at most 4, or not finite where they were not. The sum of their magnitudes is
  at least 1/2, unless all are 0 or subnormal. The exponents are int32, of x's
  shape but 1 along the axes; where a vector is 0, they are far below all
  others.
  """
  if x.dtype != jnp.bfloat16:
    x = x.astype(wide(x.dtype))
  # Otherwise the compiler would combine this factor with known ones and square
  # each separately. The barrier also keeps x from being computed twice.
  x = jax.lax.optimization_barrier(x)
  # Sums are several times faster than maxima on a CPU, and as good here.
  size = jnp.sum(jnp.abs(x), axis=axes, keepdims=True, dtype=wide(x.dtype))
  power = exponent(size)
  factor = jax.lax.optimization_barrier(_power_of_two(-power, size.dtype))
  return x * factor.astype(x.dtype), jnp.where(size == 0, OF_ZERO, power)


def exponent(x: jax.Array) -> jax.Array:
  """Returns the n with 2^n <= x < 2^(n + 1), int32, so that 2^-n is normal.

  If x is not finite, it is the largest one.
  """
  kind, fraction = _LAYOUTS[x.dtype]
  most = _most(x.dtype)
  stored = jax.lax.bitcast_convert_type(x, kind) >> fraction
  return jnp.clip(stored.astype(jnp.int32) - (most + 1), -most, most)


def times_power_of_two(x: jax.Array, power: jax.Array) -> jax.Array:
  """Returns x 2^power; the power is a sum of at most two exponents."""
  half = power >> 1
  for part in (half, power - half):
    x = x * _power_of_two(part, wide(x.dtype)).astype(x.dtype)
  return x


def _power_of_two(power: jax.Array, dtype: Any) -> jax.Array:
  kind, fraction = _LAYOUTS[dtype]
  most = _most(dtype)
  stored = jnp.clip(power, -most, most).astype(kind) + (most + 1)
  return jax.lax.bitcast_convert_type(stored << fraction, dtype)


def _most(dtype: Any) -> int:
  """Returns the largest n for which 2^-n is a normal number."""
  return -int(jnp.finfo(dtype).minexp)
