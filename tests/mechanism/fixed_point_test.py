"""Integer sums against Python's integers, and the bounds of their format."""

from fractions import Fraction
import math

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist.sums import fixed_point

_FORMATS = [fixed_point.Format(12, 2), fixed_point.Format(-3, 3)]


def _value(limbs, index=()):
  """The integer, in units of the last limb, that limbs stand for."""
  total = 0
  for limb in limbs:
    total = total * 2**20 + int(np.asarray(limb)[index])
  return total


def _truncated(x, form):
  scaled = Fraction(float(x)) / Fraction(form.unit)
  return math.trunc(scaled)


@pytest.mark.parametrize("form", _FORMATS)
@hypothesis.given(
  st.lists(
    st.floats(-(2.0**16), 2.0**16, width=32, allow_subnormal=False), min_size=1
  )
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_a_sum_is_that_of_the_truncated_terms_in_any_order(form, terms):
  def total(values):
    limbs = fixed_point.zeros(form, ())
    for value in values:
      more = fixed_point.split(form, jnp.float32(value), 2.0**16)
      limbs = fixed_point.add(limbs, more)
    return limbs

  limbs = total(terms)
  assert _value(limbs) == sum(_truncated(x, form) for x in terms)
  assert all(0 <= int(limb) < 2**20 for limb in limbs[1:])
  assert total(terms[::-1]) == limbs
  exact = float(Fraction(_value(limbs)) * Fraction(form.unit))
  value = float(fixed_point.to_float(form, limbs, jnp.float32))
  room = math.ldexp(1.0, -form.exponent - 23)
  np.testing.assert_allclose(value, exact, rtol=2**-22, atol=room)


@hypothesis.given(
  st.integers(-(2**30), 2**30),
  st.lists(st.integers(-(2**20), 2**31 - 2**12), min_size=1, max_size=3),
)
@hypothesis.settings(deadline=None, max_examples=100)
def test_carry_keeps_the_value_and_leaves_one_form(first, others):
  limbs = tuple(jnp.int32(x) for x in (first, *others))
  carried = fixed_point.carry(limbs)
  assert _value(carried) == _value(limbs)
  assert all(0 <= int(limb) < 2**20 for limb in carried[1:])
  assert fixed_point.carry(carried) == carried


def test_truncation_makes_no_entry_larger_and_moves_it_by_less_than_a_unit():
  form = fixed_point.Format(4, 2)
  x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
  limbs = fixed_point.split(form, jnp.asarray(x), 8.0)
  back = (
    np.asarray(limbs[0], np.float64) + np.asarray(limbs[1]) / 2**20
  ) / 2**4
  assert np.all(np.abs(back) <= np.abs(x))
  assert np.all(np.abs(back - x) < form.unit)
  assert np.any(back != x)


def test_what_is_not_finite_cannot_overflow():
  form = fixed_point.choose(
    largest=8.0, num_terms=4, num_entries=3, tolerance=1e-3
  )
  x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e38])
  limbs = fixed_point.split(form, x, 2.0)
  value = fixed_point.to_float(form, fixed_point.carry(limbs), jnp.float32)
  np.testing.assert_array_equal(value, [0, 2, -2, 2])


@pytest.mark.parametrize("largest", [1e-9, 0.75, 1.0, 6e7, 1e12])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_on_2048_devices_does_not_overflow(largest, sign):
  devices = 2048
  form = fixed_point.choose(
    largest=largest, num_terms=devices, num_entries=1, tolerance=largest / 1e6
  )
  term = np.float32(largest / devices) * np.float32(1 - 2**-20)
  one = fixed_point.add(
    fixed_point.zeros(form, ()),
    fixed_point.split(form, jnp.float32(sign * term), largest),
  )
  # As devices add: modulo 2**32, without carries.
  reduced = tuple(jnp.int32(np.int32(int(x) * devices)) for x in one)
  assert all(int(x) * devices < 2**31 for x in one)
  total = fixed_point.carry(reduced)
  assert _value(total) == devices * _truncated(sign * term, form)


@hypothesis.given(
  st.floats(1e-12, 1e20),
  st.integers(1, 10**9),
  st.integers(1, 10**11),
  st.floats(1e-6, 1e-2),
)
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_format_holds_its_bounds(largest, num_terms, num_entries, share):
  tolerance = share * largest / num_terms
  form = fixed_point.choose(
    largest=largest,
    num_terms=num_terms,
    num_entries=num_entries,
    tolerance=tolerance,
  )
  assert largest * 2.0**form.exponent <= 2**30
  assert largest * 2.0**form.exponent > 2**28
  rounding = 2 * num_terms * math.sqrt(num_entries) * form.unit
  assert rounding <= tolerance
  assert form.num_limbs == 2 or rounding * 2**20 > tolerance
