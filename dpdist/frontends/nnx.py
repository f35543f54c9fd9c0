"""Makes the loss of one example of a Flax NNX module.

loss_fn, params = nnx.per_example_loss(
  model, lambda model, example: cross_entropy(model(example[0]), example[1])
)
fn = dpdist.clipped_grad(loss_fn, l2_clip_norm=1.0)
fn(params, batch, rng=key)
...
nnx.update(model, params)     # Flax's own, when training is over
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax

from dpdist import errors
from dpdist.frameworks import nnx as nnx_lib

PyTree = Any


def per_example_loss(
  model: nnx.Module, loss: Callable[[Any, PyTree], jax.Array]
) -> tuple[Callable[..., jax.Array], nnx.State]:
  """Splits a module into loss_fn(params, example, rng=None) and parameters.

  Args:
    model: a module whose only state is nnx.Params and random streams. It is not
      changed.
    loss: (model, example) -> a number, for one example without a batch axis.

  Returns:
    loss_fn for `dpdist.clipped_grad` and `dpdist.private_gradients`, and the
    parameters. Random streams begin anew for each example, from its rng.

  Raises:
    ValueError: the module has other state, as batch norm does; or, on a call,
      it has random streams and no rng was given.
  """
  graph, *states = nnx.split(model, nnx.Param, nnx.RngState, ...)
  params, streams, others = states
  state = nnx.to_flat_state(others)
  if state:
    named = ", ".join(
      f"{'/'.join(map(str, path))} ({type(variable).__name__})"
      for path, variable in state
    )
    raise errors.ArgumentError(
      "model must have no state but nnx.Param, since what it keeps of the"
      f" examples is not noised, got {named}: use nnx.GroupNorm or"
      " nnx.LayerNorm in place of nnx.BatchNorm"
    )
  has_streams = bool(jax.tree.leaves(streams))

  def loss_fn(
    params: nnx.State, example: PyTree, rng: jax.Array | None = None
  ) -> jax.Array:
    if has_streams and rng is None:
      raise errors.ArgumentError(
        "rng must be given, since the model draws random numbers: pass rng to"
        " the clipped gradient, or call model.eval() first and split it anew"
      )
    fresh = streams if rng is None else nnx_lib.reseeded(streams, rng)
    return loss(nnx.merge(graph, params, fresh), example)

  return loss_fn, params
