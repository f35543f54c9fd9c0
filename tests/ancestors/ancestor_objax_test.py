"""What users of objax's PrivateGradValues could do, with its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist.noise import noise

pytestmark = pytest.mark.usefixtures("quick_compiles")

_DATA = jnp.array([2.0, 3, 5, -14, 8, -4])
_SEED = b"any"


def _loss(w, x):
  return 0.5 * (x - w) ** 2


def _make(m, norm, sigma=1.0, **kwargs):
  # Where there are groups the plan accounts by half of sigma, as there.
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=60,
      expected_batch_size=6,
      num_steps=10,
      l2_clip_norm=norm,
      target_delta=1e-5,
      noise_multiplier=sigma,
      group_size=m,
      # A row stays where it is, whoever else is there.
      neighboring_relation="zero_out",
    )
  )
  return dpdist.private_gradients(
    _loss, plan, seed=_SEED, rows_are_fixed=m > 1, **kwargs
  )


def _noise(stddev):
  transform = noise.gaussian_noise(stddev, _SEED)
  return transform.update(jnp.zeros(()), transform.init(0))[0]


@pytest.mark.parametrize("method", ["auto", "two_pass", "vmap"])
@pytest.mark.parametrize(
  ("m", "norm", "expected"), [(1, 1.0, -1 / 3), (6, 1.0, 0.0), (2, 3.0, -0.5)]
)
def test_gradient_value_and_deviation_of_the_noise(m, norm, expected, method):
  sigma = 1.7
  fn = _make(m, norm, sigma, method=method)
  w = jnp.zeros(())
  got, _ = jax.jit(fn)(w, _DATA, fn.init(w))
  num_groups = 6 // m
  # The noise of the mean has a deviation of C sigma / (number of groups).
  drawn = _noise(norm * sigma) / num_groups
  np.testing.assert_allclose(got.gradient - drawn, expected, atol=1e-6)
  np.testing.assert_allclose(got.loss, 0.5 * np.mean(np.square(_DATA)))


def test_values_may_be_a_tree_and_are_averaged():
  plan = _make(1, 1.0).plan
  loss = lambda w, x: (_loss(w, x), {"x": x, "both": [x * x, w]})
  fn = dpdist.private_gradients(loss, plan, seed=1, has_aux=True)
  got, _ = jax.jit(fn)(jnp.zeros(()), _DATA, fn.init(0))
  np.testing.assert_allclose(got.aux["x"], 0.0, atol=1e-6)
  np.testing.assert_allclose(got.aux["both"][0], np.mean(np.square(_DATA)))


def test_norm_accumulation_is_the_same_gradient():
  w, seen = jnp.float32(1.0), []
  for method in ("vmap", "two_pass"):
    fn = _make(2, 3.0, method=method)
    seen.append(jax.jit(fn)(w, _DATA, fn.init(w))[0].gradient)
  np.testing.assert_allclose(seen[0], seen[1], rtol=1e-5)


def test_generators_are_ones_own():
  plan, w = _make(1, 1.0).plan, jnp.zeros(())

  def draw(seed):
    fn = dpdist.private_gradients(_loss, plan, seed=seed)
    return float(jax.jit(fn)(w, _DATA, fn.init(w))[0].gradient)

  assert draw(b"a") == draw(b"a") != draw(b"b")
  assert draw(jax.random.key(3)) != draw(b"a")


def test_errors_and_repr():
  with pytest.raises(ValueError, match=r"batch_axis must be 0, got \(0, 1\)"):
    _make(1, 1.0, batch_axis=(0, 1))
  fn = _make(4, 1.0)
  with pytest.raises(
    ValueError, match=r"group_size must divide .* of 6, got 4"
  ):
    fn(jnp.zeros(()), _DATA, fn.init(0))
  for setting in ("l2_clip_norm=1.0", "noise_multiplier=1.0", "group_size=4"):
    assert setting in repr(fn)
  assert "any" not in repr(fn)
