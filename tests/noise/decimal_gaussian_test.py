"""Noise in whole numbers: Gaussian, and the same on every machine."""

import decimal

import numpy as np
import pytest
from scipy import stats

from dpdist.noise import decimal_gaussian

_KEY = bytes(range(32))


def test_it_is_gaussian_of_that_deviation():
  stddev = 3.7 * 2**32
  drawn = np.array(decimal_gaussian.integers(_KEY, 4000, stddev), float)
  assert stats.kstest(drawn / stddev, "norm").pvalue > 1e-3
  # A chi-square of 4000: within four of its deviations.
  assert abs(np.mean((drawn / stddev) ** 2) - 1) < 4 * np.sqrt(2 / 4000)
  assert abs(np.corrcoef(drawn[::2], drawn[1::2])[0, 1]) < 4 / np.sqrt(2000)


def test_it_is_rounded_down_with_all_its_digits():
  """The mean of what rounding takes away is a half, and no grid is seen."""
  small = np.array(decimal_gaussian.integers(_KEY, 4000, 1))
  large = decimal_gaussian.integers(_KEY, 4000, 2**120)
  assert np.array_equal([x // 2**120 for x in large], small)
  assert len({x % 2**64 for x in large}) == 4000


def test_bits_are_for_ever():
  """A run that goes on elsewhere releases the same numbers."""
  golden = [3613383126, -2133137323, 7635304932]
  assert decimal_gaussian.integers(_KEY, 3, 1.5 * 2**33) == golden
  with decimal.localcontext() as context:
    context.prec, context.rounding = 5, decimal.ROUND_UP
    context.Emax, context.traps[decimal.Inexact] = 9, True
    assert decimal_gaussian.integers(_KEY, 3, 1.5 * 2**33) == golden


def test_keys_have_noise_of_their_own():
  one = decimal_gaussian.integers(_KEY, 50, 2**40)
  other = decimal_gaussian.integers(_KEY[::-1], 50, 2**40)
  assert one == decimal_gaussian.integers(_KEY, 60, 2**40)[:50]
  assert not {*one} & {*other}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((b"short", 1, 2), "key must be 32 bytes"),
    ((_KEY, -1, 2), "count must be an integer >= 0, got -1"),
    ((_KEY, 1, 0.5), "stddev must be at least 1 and below 1e60, got 0.5"),
    ((_KEY, 1, float("nan")), "stddev must be"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    decimal_gaussian.integers(*arguments)
