"""The Gaussian mechanism: its law, its keys, its precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpdist.noise import noise


def _draw(transform, tree, state=None):
  state = transform.init(tree) if state is None else state
  return transform.update(tree, state)


def test_noise_is_normal_with_the_given_standard_deviation():
  # 4e5 draws: the deviation's own standard error is 0.11 %, so that 0.5 % is
  # 4.5 of them (error rate below 1e-5), and 2/3 or 3/2 is rejected for certain.
  stddev = 3.0
  got, _ = _draw(noise.gaussian_noise(stddev, 11), jnp.zeros(400_000))
  got = np.asarray(got, np.float64)
  assert abs(np.std(got) / stddev - 1) < 0.005
  assert abs(np.mean(got)) < 5 * stddev / np.sqrt(400_000)
  assert scipy.stats.kstest(got[:50_000] / stddev, "norm").pvalue > 1e-4


def test_noise_is_added_to_the_sum():
  tree = {"w": jnp.arange(6.0).reshape(2, 3)}
  got, _ = _draw(noise.gaussian_noise(0.0, 1), tree)
  np.testing.assert_array_equal(got["w"], tree["w"])


def test_all_noise_is_distinct_over_leaves_and_steps():
  transform = noise.gaussian_noise(1.0, 5)
  tree = {name: jnp.zeros(50) for name in "abc"}
  state, seen = transform.init(tree), []
  for _ in range(4):
    got, state = transform.update(tree, state)
    seen.extend(np.asarray(leaf) for leaf in jax.tree.leaves(got))
  assert int(state.draws) == 4
  # Equal shapes, so that a key used twice shows as equal blocks. Of 600 float32
  # normals a handful may coincide.
  assert np.unique(np.concatenate(seen)).size > 590
  blocks = np.stack(seen)
  correlation = np.corrcoef(blocks) - np.eye(len(blocks))
  assert np.max(np.abs(correlation)) < 0.75


def test_same_seed_and_count_give_the_same_bits():
  tree = jnp.zeros(8)
  a, state = _draw(noise.gaussian_noise(1.0, b"secret"), tree)
  b, _ = _draw(noise.gaussian_noise(1.0, b"secret"), tree)
  np.testing.assert_array_equal(a, b)
  c, _ = _draw(noise.gaussian_noise(1.0, b"secret"), tree, state)
  assert not np.any(np.asarray(a) == np.asarray(c))


def test_the_state_is_a_counter_and_no_key():
  # It goes into checkpoints, from which noise must not be drawn again.
  transform = noise.gaussian_noise(1.0, b"secret")
  state = transform.init(jnp.zeros(2))
  for draws in range(2):
    (counter,) = jax.tree.leaves(state)
    assert (counter.shape, counter.dtype) == ((), jnp.int32)
    assert int(counter) == draws
    _, state = transform.update(jnp.zeros(2), state)


@pytest.mark.parametrize(("a", "b"), [(5, 2**32 + 5), (0, 1), (b"x", b"y")])
def test_seeds_keep_all_their_bits(a, b):
  tree = jnp.zeros(8)
  one, _ = _draw(noise.gaussian_noise(1.0, a), tree)
  other, _ = _draw(noise.gaussian_noise(1.0, b), tree)
  assert not np.any(np.asarray(one) == np.asarray(other))


def test_noise_on_a_bfloat16_sum_is_float32():
  got, _ = _draw(noise.gaussian_noise(1.0, 1), jnp.zeros(10_000, jnp.bfloat16))
  assert got.dtype == jnp.float32
  # A bfloat16 normal has only 128 distinct magnitudes.
  assert np.unique(got).size > 9_000


def test_a_traced_key_is_not_written_into_the_program():
  words = np.array([0x12345678, 0x9ABCDEF1], np.uint32)

  def draw(words):
    transform = noise.gaussian_noise(1.0, noise.as_key(words))
    return transform.update(jnp.zeros(3), transform.init(None))[0]

  text = jax.jit(draw).lower(words).compile().as_text()
  assert str(words[0]) not in text
  assert str(words[1]) not in text


@pytest.mark.parametrize(
  ("stddev", "seed", "message"),
  [
    (-1.0, 1, "stddev .* -1"),
    (np.nan, 1, "stddev .* nan"),
    (np.inf, 1, "stddev .* inf"),
    (1.0, 1.5, "seed .* float"),
    (1.0, b"", "seed .* bytes"),
    (1.0, True, "seed .* bool"),
    (1.0, jnp.zeros(2), "seed .* float32"),
  ],
)
def test_bad_arguments_are_named(stddev, seed, message):
  with pytest.raises(ValueError, match=message):
    noise.gaussian_noise(stddev, seed)


def test_that_the_noise_of_an_int_is_public_is_said_once(caplog):
  noise._say_that_it_is_public.cache_clear()
  with caplog.at_level("WARNING", logger="dpdist"):
    noise.gaussian_noise(1.0, b"thirty-two bytes of a secret....")
    noise.gaussian_noise(1.0, jax.random.key(1))
    assert not caplog.records
    for seed in (1, 2):
      transform = noise.gaussian_noise(1.0, seed)
      state = transform.init(jnp.zeros(2))
      for _ in range(3):
        _, state = transform.update(jnp.zeros(2), state)
  assert [record.levelname for record in caplog.records] == ["WARNING"]
  assert "seed is an int" in caplog.text
  assert "os.urandom(32)" in caplog.text


@pytest.mark.parametrize(
  ("key", "is_of_an_int"),
  [
    (jax.random.key(0), True),
    (jax.random.key(2**32 - 1), True),
    (jax.random.key(5, impl="rbg"), True),
    (jax.random.split(jax.random.key(5))[0], False),
    (jax.random.split(jax.random.key(5)), False),
    (jax.random.wrap_key_data(jnp.array([7, 0], jnp.uint32)), False),
    (jnp.zeros((), jnp.uint32), False),
    (7, False),
  ],
)
def test_the_key_of_an_int_is_known(key, is_of_an_int):
  assert noise.is_of_an_int(key) is is_of_an_int
