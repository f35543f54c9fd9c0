"""What rounding may change of a program is seen, wherever it happens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist.sensitivity import rounding_errors


def _change(fn, *args):
  """Returns by how much larger rounding errors change a result, relative."""
  plain, other = fn(*args), rounding_errors.enlarged(fn, 0.0)(*args)
  return float(jnp.max(jnp.abs(other - plain)) / jnp.max(jnp.abs(plain)))


_X = np.full(3, 0.7, np.float32)


def _looped(x):
  def body(carry, y):
    return jnp.sin(carry * y), carry

  return jax.lax.scan(body, x, jnp.ones((4, 3)))[0]


def _until(x):
  return jax.lax.while_loop(lambda x: jnp.all(x < 5), lambda x: x * 1.5, x)


def _branched(x):
  return jax.lax.cond(x[0] > 0, jnp.exp, jnp.cos, x)


@jax.custom_jvp
def _own(x):
  return jnp.log(x)


_own.defjvp(lambda xs, ts: (_own(*xs), ts[0] / xs[0]))


@pytest.mark.parametrize(
  "fn",
  [
    jnp.tanh,
    _looped,
    _until,
    _branched,
    _own,
    jax.jit(jnp.sqrt),
    jax.checkpoint(jnp.cosh),
    lambda x: jnp.convolve(x, x),
    lambda x: x @ jnp.ones((3, 2)),
    jax.grad(lambda x: jnp.sum(_own(x) ** 2)),
  ],
)
def test_results_change_by_a_little_inside_of_every_construct(fn):
  assert 1e-8 < _change(fn, _X) < 2e-5


@pytest.mark.parametrize("fn", [jnp.sort, lambda x: x[::-1], jnp.floor])
def test_numbers_that_are_moved_stay(fn):
  assert rounding_errors.enlarged(fn, 0.0)(_X).tolist() == fn(_X).tolist()


@pytest.mark.parametrize("x", [7.0, 7.9, 8.3])
def test_what_rounding_left_of_a_difference_is_not_steady(x):
  """One less the square of a tanh; float32 holds a few bits of it."""
  slope = jax.grad(jnp.tanh)
  exact = 1 - np.tanh(x) ** 2
  error = abs(float(slope(jnp.float32(x))) / exact - 1)
  assert _change(slope, jnp.float32(x)) > 0.5 * error


def test_what_may_be_flushed_is_not_steady():
  tiny = np.float32(3e-38)
  enlarge = lambda x: ((x * np.float32(0.5)) * np.float32(1e37)) * 1e0
  assert _change(enlarge, tiny) > 0.5


def test_zero_stays_and_coarse_products_are_coarse():
  dot = lambda x, y: x @ y
  zero = rounding_errors.enlarged(dot, 2.0**-8)(jnp.zeros(3), jnp.ones(3))
  assert float(zero) == 0
  coarse = rounding_errors.enlarged(dot, 2.0**-8)(_X, _X)
  assert abs(float(coarse) / float(_X @ _X) - 1) == pytest.approx(2.0**-8, 1e-3)
