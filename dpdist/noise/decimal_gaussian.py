"""Gaussian noise on exact integers, the same on every machine.

The noise is computed in decimal arithmetic of 100 digits, whose results are
defined to the last digit, from a key alone. Its uniform numbers have 128 bits,
so that a draw is that of a real-valued Gaussian up to a distance in total
variation of about stddev * 2**-124, which is 2**-88 where a multiplier of 20
meets a grid of 2**32.

The noise is rounded down to a whole number. Rounding down an integer plus noise
is the same integer plus the noise rounded down, so what is released is a
function of the integer plus real-valued noise: the proof of the Gaussian
mechanism holds for it as it is.

Imports no jax.
"""

from collections.abc import Iterator
import decimal
import hmac
import numbers

from dpdist import _validation

_BLOCK = b"dpdist.noise/decimal_gaussian/v1\0"
_DIGITS = 100
_BITS = 128
# Fixed, so that no setting of the process has a say.
_CONTEXT = decimal.Context(
  prec=_DIGITS,
  rounding=decimal.ROUND_HALF_EVEN,
  Emin=-999_999,
  Emax=999_999,
  capitals=1,
  clamp=0,
  flags=[],
  traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow],
)


def integers(key: bytes, count: int, stddev: int | float) -> list[int]:
  """Returns independent Gaussian draws, each rounded down.

  Args:
    key: secret, of 32 bytes; each key must be used for one sum only.
    count: how many draws.
    stddev: standard deviation, at least 1 and below 1e60.

  Raises:
    ValueError: an argument is out of its range.
  """
  _validation.require(
    isinstance(key, bytes) and len(key) == 32, "key", "32 bytes", "another"
  )
  rule = _validation.Rule(
    "at least 1 and below 1e60", numbers.Real, lambda x: x, _is_in_range
  )
  scale = decimal.Decimal(_validation.check("stddev", stddev, rule))
  normals = _normals(key)
  floor = decimal.ROUND_FLOOR
  return [
    int(
      _CONTEXT.multiply(next(normals), scale).to_integral_value(
        floor, context=_CONTEXT
      )
    )
    for _ in range(_validation.check("count", count, _validation.integer(0)))
  ]


def _is_in_range(stddev: int | float) -> bool:
  return 1 <= stddev < 10**60


def _normals(key: bytes) -> Iterator[decimal.Decimal]:
  """Yields standard normals by Marsaglia's polar method, two of each point."""
  c = _CONTEXT
  one = decimal.Decimal(2**_BITS)
  for a, b in _points(key):
    # Of the point (a, b) / 2**128 in the unit disk, the square of its length.
    square = a * a + b * b
    if square >= 2 ** (2 * _BITS):
      continue
    s = c.divide(decimal.Decimal(square), c.multiply(one, one))
    factor = c.sqrt(c.divide(c.multiply(decimal.Decimal(-2), c.ln(s)), s))
    for x in (a, b):
      yield c.multiply(c.divide(decimal.Decimal(x), one), factor)


def _points(key: bytes) -> Iterator[tuple[int, int]]:
  """Yields pairs of odd integers, uniform between -2**128 and 2**128."""
  number = 0
  while True:
    block = hmac.digest(key, _BLOCK + number.to_bytes(8, "big"), "sha256")
    number += 1
    first, second = (int.from_bytes(block[i : i + 16], "big") for i in (0, 16))
    # Odd, so that none is 0.
    yield 2 * first + 1 - 2**_BITS, 2 * second + 1 - 2**_BITS
