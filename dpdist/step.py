"""One training step: accumulate chunks, then apply.

`accumulate` adds a chunk's clipped sum to each device's own accumulator and
touches no network. `apply` reduces the accumulators over the mesh, draws noise
once, divides by the expected batch size and updates the parameters. A step may
have any number of chunks, none included, so that a draw of any size fits any
memory and nothing recompiles.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from dpdist import clipping
from dpdist import mechanism as mechanism_lib
from dpdist import mesh as mesh_lib
from dpdist import noise

PyTree = Any


class TrainState(NamedTuple):
  """What a checkpoint keeps; all of it is released.

  Attributes:
    step: int32 scalar, updates made so far.
    params: the model's parameters.
    opt_state: the optimizer's.
    ema_params: exponential moving average of params; None without one.
    noise_state: the noise mechanism's counter.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  ema_params: PyTree | None
  noise_state: noise.GaussianNoiseState


class Stats(NamedTuple):
  """What the drawn examples did; sensitive, and never released by itself.

  Attributes:
    num_examples: examples drawn.
    num_clipped: those whose gradient was longer than the clip norm.
    num_nonfinite: those left out because their gradient norm was not finite.
    loss: sum of the finite examples' losses.
  """

  num_examples: jax.Array
  num_clipped: jax.Array
  num_nonfinite: jax.Array
  loss: jax.Array


def no_stats(shards: int) -> Stats:
  """Of no example, for each device that divides the examples."""
  count = lambda: jnp.zeros((shards,), jnp.int32)
  return Stats(count(), count(), count(), jnp.zeros((shards,)))


class Accumulator(NamedTuple):
  """A step's sums so far, apart for each device that divides the examples.

  Attributes:
    clipped_sum: pytree like params, float32 or wider, with a leading axis over
      those devices.
    stats: Stats of [devices] arrays.
  """

  clipped_sum: PyTree
  stats: Stats


@dataclasses.dataclass(frozen=True)
class Step:
  """The two halves of a step, compiled once for a mesh.

  Attributes:
    mechanism: what the guarantee rests on.
    optimizer: applied to the noisy mean.
    mesh: with the axes of `dpdist.mesh`.
    ema_decay: of the moving average of the parameters; 0 keeps none.
  """

  mechanism: mechanism_lib.Mechanism
  optimizer: optax.GradientTransformation
  mesh: Mesh
  ema_decay: float = 0.0

  def init(self, params: PyTree) -> TrainState:
    """The state before the first step, replicated over the mesh."""
    return mesh_lib.replicate(self.initial(params), self.mesh)

  def initial(self, params: PyTree) -> TrainState:
    """The same, where params are; may be traced."""
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=self.optimizer.init(params),
      # A copy: state and average may be donated in the same call.
      ema_params=jax.tree.map(jnp.copy, params) if self.ema_decay else None,
      noise_state=noise.GaussianNoiseState(jnp.zeros((), jnp.int32)),
    )

  @functools.cached_property
  def zeros(self) -> Callable[..., Any]:
    """Compiled (params) -> an empty Accumulator."""
    shards = mesh_lib.num_example_shards(self.mesh)

    def zeros(params: PyTree) -> Accumulator:
      sums = jax.tree.map(
        lambda x: jnp.zeros(
          (shards, *x.shape), jnp.promote_types(x.dtype, jnp.float32)
        ),
        params,
      )
      return Accumulator(sums, no_stats(shards))

    return jax.jit(zeros, out_shardings=mesh_lib.examples(self.mesh))

  @functools.cached_property
  def accumulate(self) -> Callable[..., Any]:
    """Compiled function that adds one chunk; no collective.

    Args of the function:
      params: replicated.
      accumulator: of the same step; its memory is reused.
      batch: pytree; leading axis the chunk, sharded over the examples' devices.
      is_padding_example: [chunk] bool, sharded alike.
      key: the step's key for dropout and the like.
      first_row: where the chunk begins in the step's list of examples, so that
        randomness belongs to an example and not to a device.

    Returns of the function:
      The accumulator with the chunk's clipped sum.
    """

    @functools.partial(
      jax.shard_map,
      mesh=self.mesh,
      in_specs=(mesh_lib.REPLICATED,) + (mesh_lib.EXAMPLES,) * 4,
      out_specs=mesh_lib.EXAMPLES,
    )
    def local(
      params: PyTree,
      accumulator: Accumulator,
      batch: PyTree,
      is_padding_example: jax.Array,
      rngs: jax.Array,
    ) -> Accumulator:
      grads = self.mechanism.clipped_grad(
        params, batch, is_padding_example=is_padding_example, rng=rngs
      )
      stats = count(self.mechanism, grads, is_padding_example)
      more = Accumulator(grads.sum, stats)
      # The leading axis has one entry a device, here this device's own.
      return jax.tree.map(lambda x, y: x + y[None], accumulator, more)

    def accumulate(
      params: PyTree,
      accumulator: Accumulator,
      batch: PyTree,
      is_padding_example: jax.Array,
      key: jax.Array,
      first_row: jax.Array | int,
    ) -> Accumulator:
      rows = first_row + jnp.arange(is_padding_example.shape[0])
      rngs = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
      return local(params, accumulator, batch, is_padding_example, rngs)

    return jax.jit(accumulate, donate_argnums=(1,))

  @functools.cached_property
  def apply(self) -> Callable[..., Any]:
    """Compiled function that ends a step: one reduction, one draw, one update.

    Args of the function:
      state: before the step; its memory is reused.
      accumulator: with all chunks of the step.
      noise_key: a typed PRNG key, secret; the step counter is folded into it.

    Returns of the function:
      The state after the step, and released metrics: "noisy_gradient_norm".
    """
    axes = tuple(mesh_lib.EXAMPLES[0])

    @functools.partial(
      jax.shard_map,
      mesh=self.mesh,
      in_specs=mesh_lib.EXAMPLES,
      out_specs=mesh_lib.REPLICATED,
    )
    def reduce(clipped_sum: PyTree) -> PyTree:
      return jax.lax.psum(jax.tree.map(lambda x: x[0], clipped_sum), axes)

    def apply(
      state: TrainState, accumulator: Accumulator, noise_key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
      # Outside shard_map: inside, each device would draw, and the sum of their
      # draws, or copies of one block, is not the noise that was planned.
      noisy_sum, noise_state = self.mechanism.noise(noise_key).update(
        reduce(accumulator.clipped_sum), state.noise_state
      )
      return update(
        self.mechanism,
        self.optimizer,
        self.ema_decay,
        state,
        noisy_sum,
        noise_state,
      )

    return jax.jit(
      apply,
      donate_argnums=(0,),
      out_shardings=mesh_lib.replicated(self.mesh),
    )

  @functools.cached_property
  def stats(self) -> Callable[..., Any]:
    """Compiled (accumulator) -> Stats over all devices. Sensitive."""
    return jax.jit(
      lambda accumulator: jax.tree.map(jnp.sum, accumulator.stats),
      out_shardings=mesh_lib.replicated(self.mesh),
    )


def count(
  mechanism: mechanism_lib.Mechanism,
  grads: clipping.ClippedGrads,
  is_padding_example: jax.Array,
) -> Stats:
  """Stats, scalars, of the examples whose gradients are given."""
  real = ~is_padding_example
  finite = jnp.isfinite(grads.grad_norms)
  clipped = grads.grad_norms > mechanism.clipped_grad.l2_clip_norm
  loss = jnp.where(real & jnp.isfinite(grads.loss), grads.loss, 0)
  return Stats(
    num_examples=jnp.sum(real, dtype=jnp.int32),
    num_clipped=jnp.sum(real & finite & clipped, dtype=jnp.int32),
    num_nonfinite=jnp.sum(real & ~finite, dtype=jnp.int32),
    loss=jnp.sum(loss, dtype=jnp.float32),
  )


def update(
  mechanism: mechanism_lib.Mechanism,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
  state: TrainState,
  noisy_sum: PyTree,
  noise_state: noise.GaussianNoiseState,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """What follows the noise: the state after the step, and released metrics."""
  gradient = mechanism.mean(noisy_sum)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  new_state = TrainState(
    state.step + 1,
    params,
    opt_state,
    _ema(ema_decay, params, state.ema_params, state.step),
    noise_state,
  )
  return new_state, {"noisy_gradient_norm": optax.tree.norm(gradient)}


def _ema(
  ema_decay: float, params: PyTree, ema_params: PyTree | None, step: jax.Array
) -> PyTree | None:
  if ema_params is None:
    return None
  # Early on the average follows closely, so that it forgets the init.
  decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
  return optax.incremental_update(params, ema_params, 1.0 - decay)
