"""Makes the loss of one example of an Equinox module.

    loss_fn, params = equinox.per_example_loss(
      model, lambda model, example, key: cross_entropy(
        model(example[0], key=key), example[1]))
    fn = dpdist.clipped_grad(loss_fn, l2_clip_norm=1.0)
    fn(params, batch, rng=key)
    ...
    model = eqx.combine(params, model)     # when training is over

Importing this module imports equinox, which is no requirement of dpdist.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from dpdist.frameworks import equinox as equinox_lib
from dpdist.frameworks import model_check

PyTree = Any


def per_example_loss(
  model: Any, loss: Callable[..., jax.Array]
) -> tuple[Callable[..., jax.Array], Any]:
  """Splits a module into loss_fn(params, example[, rng]) and parameters.

  Args:
    model: a module without stateful layers. Its floating arrays are trained;
      to freeze some of them, see `frozen` of `dpdist.clipped_grad`.
    loss: (model, example[, key]) -> a number, for one example without a batch
      axis.

  Returns:
    loss_fn for `dpdist.clipped_grad` and `dpdist.private_gradients`, and the
    parameters: the module with None in place of everything else.

  Raises:
    ValueError: the module has stateful layers, such as batch norm.
  """
  model_check.refuse_unsafe(equinox_lib.findings(model))
  params, static = eqx.partition(model, eqx.is_inexact_array)

  def loss_fn(params: Any, example: PyTree, *rng: jax.Array) -> jax.Array:
    return loss(eqx.combine(params, static), example, *rng)

  return loss_fn, params
