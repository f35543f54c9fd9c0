"""Gaussian noise, as a noise mechanism and as an optax gradient transformation.

The transformation has two pure functions, `init(params)` and
`update(clipped_sum, state)`. Its state is a counter of draws. All randomness is
a function of (seed, counter, leaf), so a checkpoint keeps only the counter.
"""

import dataclasses
import functools
import hashlib
import logging
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpdist import registry
from dpdist.keys import keys


class GaussianNoiseState(NamedTuple):
  """The whole state of a mechanism."""

  draws: jax.Array  # An int32 scalar, the number of draws so far.


def gaussian_noise(
  stddev: float | jax.Array, seed: int | bytes | jax.Array
) -> optax.GradientTransformation:
  """Adds independent Gaussian noise to every entry of a clipped sum.

  Call it once a step, on the sum over all devices, outside `jax.shard_map`.
  With partitionable threefry, the bits then depend on (seed, draws, leaf,
  position) alone, not on the mesh, and no collective is needed.

  Guarantees:
    * Noise is drawn and returned in float32 or wider, whatever the dtype of the
      sum. A bfloat16 normal would have only 128 values, and none above 2.9
      standard deviations.
    * No two (draws, leaf) pairs share a key.
    * Limits: threefry keys have 64 bits; a float32 normal is at most 5.42
      standard deviations; floating-point noise is not the real-valued noise of
      the proof (Mironov 2012, "On significance of the least significant bits").

  Args:
    stddev: standard deviation of one entry, in units of the sum: noise
      multiplier times l2 sensitivity. Finite and at least 0. A float32 scalar
      array, possibly traced, is not checked.
    seed: bytes, which are hashed to a key, or a scalar typed PRNG key, possibly
      traced. It must be secret, with 128 bits of entropy or more, such as
      os.urandom(32). Prefer a key that is an argument of the compiled function,
      since constants are written into compiled programs. An int is for tests:
      whoever guesses it can subtract the noise, and one log line warns of that.

  Returns:
    An optax.GradientTransformation whose state is only the step counter.

  Raises:
    ValueError: with the argument's name, its value and what would be right.
  """
  if not isinstance(stddev, jax.Array) and (
    isinstance(stddev, bool)
    or not isinstance(stddev, int | float)
    or not math.isfinite(stddev)
    or stddev < 0
  ):
    raise ValueError(f"stddev must be finite and at least 0, got {stddev!r}")
  key = key_of(seed)

  def init(params: Any) -> GaussianNoiseState:
    return Gaussian().init(params)

  def update(
    updates: Any, state: GaussianNoiseState, params: Any = None
  ) -> tuple[Any, GaussianNoiseState]:
    del params
    return _add(updates, state, key, stddev)

  return optax.GradientTransformation(init, update)


@registry.register("noise", "gaussian")
@dataclasses.dataclass(frozen=True)
class Gaussian:
  """Draws new noise at each step; see `noise_mechanism.NoiseMechanism`."""

  restarts: ClassVar[Literal["from_index", "from_state"]] = "from_index"

  def sensitivity_factor(self, num_steps: int) -> float:
    return 1.0

  def init(self, params: Any) -> GaussianNoiseState:
    return GaussianNoiseState(jnp.zeros((), jnp.int32))

  def draw(
    self,
    like: Any,
    state: GaussianNoiseState,
    *,
    key: jax.Array,
    release_index: jax.Array | None,
    stddev: Any,
  ) -> tuple[Any, GaussianNoiseState]:
    return _add(like, state, key, stddev)


def _add(
  total: Any, state: GaussianNoiseState, key: jax.Array, stddev: Any
) -> tuple[Any, GaussianNoiseState]:
  """Adds noise to a sum; stddev is a prefix pytree of it."""
  step_key = jax.random.fold_in(key, state.draws)
  leaves, structure = jax.tree.flatten(total)
  stddevs = jax.tree.broadcast(stddev, total)
  noisy = []
  for index, (leaf, scale) in enumerate(
    zip(leaves, jax.tree.leaves(stddevs), strict=True)
  ):
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    leaf_key = jax.random.fold_in(step_key, index)
    noise = jax.random.normal(leaf_key, leaf.shape, dtype)
    noisy.append(leaf.astype(dtype) + scale * noise)
  state = GaussianNoiseState(state.draws + 1)
  return jax.tree.unflatten(structure, noisy), state


def as_key(key_data: np.ndarray | jax.Array) -> jax.Array:
  """Makes a typed threefry key of two words: an int would keep only 32 bits."""
  return jax.random.wrap_key_data(jnp.asarray(key_data), impl="threefry2x32")


def key_of(seed: int | bytes | jax.Array) -> jax.Array:
  """Returns the key that `gaussian_noise` makes of its seed."""
  if isinstance(seed, jax.Array):
    if seed.shape or not jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
      raise ValueError(
        "seed must be an int, bytes or one typed PRNG key, got an array of"
        f" shape {seed.shape} and dtype {seed.dtype}"
      )
    return seed
  if isinstance(seed, int) and not isinstance(seed, bool):
    _say_that_it_is_public()
    seed = keys.insecure_secret(seed)
  if not isinstance(seed, bytes) or not seed:
    raise ValueError(
      "seed must be an int, non-empty bytes or one typed PRNG key, got a"
      f" {type(seed).__name__}"
    )
  digest = hashlib.sha256(b"dpdist.noise/seed/v1" + seed).digest()
  return as_key(keys.key_data(digest))


def is_of_an_int(key: jax.Array) -> bool:
  """Returns whether a key is what `jax.random.key` makes of a 32-bit int.

  One in 2^32 random keys is mistaken for such a key. Returns False for a traced
  key, whose value is unknown, and for several keys.
  """
  if isinstance(key, jax.core.Tracer) or getattr(key, "shape", None) != ():
    return False
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    return False
  return not np.asarray(jax.random.key_data(key))[0]


@functools.cache
def _say_that_it_is_public() -> None:
  """Warns once a process, not at every step."""
  logging.getLogger(__name__).warning(
    "seed is an int, which can be guessed: the noise is public and nothing is"
    " private. Pass a secret, such as os.urandom(32)."
  )
