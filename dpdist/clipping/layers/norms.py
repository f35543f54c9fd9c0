"""Euclidean norms that neither underflow nor overflow on the way.

The square of a float32 below 1e-19 is 0, and that of one above 2e19 is
infinite. From plain squares the norm of a gradient of 1e-20 is 0, and so is
every guard that is made of squares. Here a vector is first multiplied with a
power of two that makes it neither small nor large, which rounds nothing; and
what functions pass on is a norm, and not its square.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# For each dtype: integers of its size, and the bits of its fraction.
_LAYOUTS: dict[Any, tuple[Any, int]] = {
  jnp.dtype("float64"): (jnp.int64, 52),
  jnp.dtype("float32"): (jnp.int32, 23),
}
# The exponent of 0: below all others, also where two of them are added.
OF_ZERO = -(2**14)


def wide(dtype: Any) -> Any:
  """float32, or wider if it is."""
  return jnp.promote_types(dtype, jnp.float32)


def of(x: jax.Array, axes: int | Sequence[int] | None = None) -> jax.Array:
  """The norm of x along some axes, or of all of it; float32 or wider.

  Not finite where an entry is not, or where it exceeds the dtype.
  """
  unit, power = scaled(x.astype(wide(x.dtype)), axes)
  root = jnp.sqrt(jnp.sum(jnp.square(unit), axis=axes))
  return times_power_of_two(root, power.reshape(root.shape))


def products(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """a * b but for a power of two, which is the second result.

  Of products that are far apart the smaller ones may vanish.
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
  """The root of the sum of two squares, of numbers that are not negative."""
  high, low = jnp.maximum(a, b), jnp.minimum(a, b)
  some = high > 0  # Not where it is NaN, which is returned.
  ratio = low / jnp.where(some, high, 1)
  return jnp.where(some, high * jnp.sqrt(1 + jnp.square(ratio)), high)


def scaled(
  x: jax.Array, axes: int | Sequence[int] | None = None
) -> tuple[jax.Array, jax.Array]:
  """Vectors that can be squared, and the powers of two that were taken out.

  Args:
    x: of any floating dtype, or of whole numbers.
    axes: along which a vector lies; all if None.

  Returns:
    Entries of at most 4, the sum of whose sizes is at least 1/2 unless all are
    0 or subnormal, and not finite where they were not, of a dtype with the
    range of float32; and exponents, int32, of x's shape but 1 along the axes,
    far below all others where a vector is 0.
  """
  if x.dtype != jnp.bfloat16:
    x = x.astype(wide(x.dtype))
  # Of factors that it knows the compiler would make one, and square each apart.
  # Nor is what x is computed from computed twice.
  x = jax.lax.optimization_barrier(x)
  # Sums are several times cheaper than maxima on a CPU, and as good here.
  size = jnp.sum(jnp.abs(x), axis=axes, keepdims=True, dtype=wide(x.dtype))
  power = exponent(size)
  factor = jax.lax.optimization_barrier(_power_of_two(-power, size.dtype))
  return x * factor.astype(x.dtype), jnp.where(size == 0, OF_ZERO, power)


def exponent(x: jax.Array) -> jax.Array:
  """The n with 2^n <= x < 2^(n + 1), as far as 2^n and 2^-n are numbers; int32.

  Of float32 or float64; for what is not finite the largest.
  """
  kind, fraction = _LAYOUTS[x.dtype]
  most = _most(x.dtype)
  stored = jax.lax.bitcast_convert_type(x, kind) >> fraction
  return jnp.clip(stored.astype(jnp.int32) - (most + 1), -most, most)


def times_power_of_two(x: jax.Array, power: jax.Array) -> jax.Array:
  """x 2^power, for a power that is the sum of at most two exponents."""
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
  """The largest n for which 2^-n is a number with a full fraction."""
  return -int(jnp.finfo(dtype).minexp)
