"""Makes the loss of one example of a Keras 3 model.

Importing this module imports keras, on its JAX backend.
"""

from collections.abc import Callable
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def _import_keras() -> Any:
  if "keras" not in sys.modules:
    os.environ.setdefault("KERAS_BACKEND", "jax")
  remedy = (
    "dpdist needs Keras on its JAX backend: set the environment variable"
    " KERAS_BACKEND=jax before keras is first imported, or import"
    " dpdist.frontends.keras before keras"
  )
  wanted = os.environ.get("KERAS_BACKEND")
  if "keras" not in sys.modules and wanted != "jax":
    raise ImportError(f"{remedy}; got KERAS_BACKEND={wanted}")
  import keras

  if keras.backend.backend() != "jax":
    raise ImportError(f"{remedy}; got the backend {keras.backend.backend()!r}")
  return keras


keras = _import_keras()


def per_example_loss(
  model: Any, non_trainable: list[jax.Array]
) -> Callable[..., jax.Array]:
  """Returns the loss of one example, without its batch axis.

  The model, compiled and built, is applied to each example alone, as a batch of
  one, so that no layer can mix examples. Its randomness (dropout and the like)
  is a function of its own key. `non_trainable` holds the values of
  model.non_trainable_variables; seeds among them are replaced.

  The loss takes (trainable, (x, y), rng), where trainable is the list of values
  of model.trainable_variables; after y there may be the example's weight, which
  multiplies its loss, and so its gradient before that is clipped.
  """
  seeds = [is_seed(v) for v in model.non_trainable_variables]

  def loss(
    trainable: list[jax.Array], example: tuple[PyTree, ...], rng: jax.Array
  ) -> jax.Array:
    value, _ = _loss_and_state(
      model, trainable, _seeded(non_trainable, seeds, rng), example
    )
    return value

  return loss


def changed_state(
  model: Any, example: tuple[PyTree, ...]
) -> list[tuple[str, str]]:
  """Lists the state that a training call changes, without seeds.

  The model is compiled and built; `example` is (x, y), with its weight if it
  has one, or their shapes, without the batch axis. Returns (path, shape) of
  each variable.
  """
  variables = model.non_trainable_variables
  trainable = [jax.typeof(v.value) for v in model.trainable_variables]
  state = [jax.typeof(v.value) for v in variables]
  closed = jax.make_jaxpr(
    lambda t, n, e: _loss_and_state(model, t, n, e)[1], return_shape=False
  )(trainable, state, example)
  given = closed.jaxpr.invars[len(trainable) :][: len(state)]
  return [
    (v.path, str(tuple(v.shape)))
    for v, before, after in zip(
      variables, given, closed.jaxpr.outvars, strict=True
    )
    if after is not before and not is_seed(v)
  ]


def is_seed(variable: Any) -> bool:
  """Returns whether a variable is the state of a keras.random.SeedGenerator."""
  return (
    variable.name == "seed_generator_state"
    and tuple(variable.shape) == (2,)
    and variable.dtype == "uint32"
  )


def _seeded(
  non_trainable: list[jax.Array], seeds: list[bool], rng: jax.Array
) -> list[jax.Array]:
  """Returns the state with seeds that belong to one example."""
  return [
    jax.random.key_data(jax.random.fold_in(rng, i)) if is_one else value
    for i, (value, is_one) in enumerate(zip(non_trainable, seeds, strict=True))
  ]


def _loss_and_state(
  model: Any,
  trainable: list[jax.Array],
  non_trainable: list[jax.Array],
  example: tuple[PyTree, ...],
) -> tuple[jax.Array, list[jax.Array]]:
  x, y, *weight = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], example)
  # No loss depends on them. Their present values would be constants of the
  # program, and those of metrics come and go while it is traced.
  zeros = lambda variables: [jnp.zeros(v.shape, v.dtype) for v in variables]
  loss, (_, _, state, _) = model.compute_loss_and_updates(
    trainable,
    non_trainable,
    zeros(model.metrics_variables),
    x,
    y,
    weight[0] if weight else None,
    training=True,
    optimizer_variables=zeros(model.optimizer.variables),
  )
  return loss, state
