"""The functions that a Keras fit compiles, for a chunk and for an update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist import clipping
from dpdist.clipping import watched
from dpdist.frontends import keras_loss
from dpdist.mechanism import mechanism as mechanism_lib
from dpdist.privacy import plan as plan_lib
from dpdist.sums import compensated

PyTree = Any


class Functions(NamedTuple):
  """The functions of an update; the last two are compiled."""

  # Maps the non-trainable values to the clipped gradient.
  clipped_grad: Callable[[list[jax.Array]], clipping.ClippedGrad]
  # Adds a chunk's clipped sum, and returns its loss and what a watched step
  # saw.
  accumulate: Callable[..., Any]
  update: Callable[..., Any]  # Draws the noise and lets the optimizer step.


def of(
  model: Any, plan: plan_lib.PrivacyPlan, options: dict[str, Any]
) -> Functions:
  """Makes a model's functions; the options are those of `clipped_grad`."""

  def clipped_grad(non_trainable: list[jax.Array]) -> clipping.ClippedGrad:
    loss = keras_loss.per_example_loss(model, non_trainable)
    return clipping.clipped_grad(loss, **options)

  def accumulate(
    trainable: list[jax.Array],
    non_trainable: list[jax.Array],
    total: compensated.Sum,
    batch: tuple[PyTree, PyTree],
    is_padding_example: jax.Array,
    key: jax.Array,
    first_row: jax.Array,
    direction: list[jax.Array] | None = None,
  ) -> tuple[compensated.Sum, jax.Array, watched.Seen | None]:
    rows = first_row + jnp.arange(is_padding_example.shape[0])
    got = clipped_grad(non_trainable)(
      trainable,
      batch,
      is_padding_example=is_padding_example,
      rng=jax.vmap(jax.random.fold_in, (None, 0))(key, rows),
      direction=direction,
    )
    got, seen = watched.seen(got)
    loss = jnp.sum(jnp.where(is_padding_example, 0, got.loss))
    return compensated.add(total, got.sum, got.low), loss, seen

  def update(
    trainable: list[jax.Array],
    optimizer: list[jax.Array],
    total: compensated.Sum,
    key: jax.Array,
    step: jax.Array,
  ) -> tuple[list[jax.Array], list[jax.Array]]:
    bound = mechanism_lib.of(plan, clipped_grad([]))
    state = bound.state_at(trainable, step)
    noisy, state = bound.add_noise(total, state, key)
    gradient, _ = bound.finish(noisy, state)
    return model.optimizer.stateless_apply(optimizer, gradient, trainable)

  return Functions(clipped_grad, jax.jit(accumulate), jax.jit(update))
