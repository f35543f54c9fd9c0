"""Makes the loss of a user, or of an example's copies, to be clipped as one."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dpdist import clipping

PyTree = Any


def mean_over_unit(
  loss_fn: Callable[..., tuple[jax.Array, None]], *, empty_slot: str
) -> Callable[..., tuple[jax.Array, None]]:
  """Returns the mean of a loss over the examples of one unit, such as a user.

  Its gradient is clipped as one, so the clip norm bounds how far a user moves a
  sum, however many examples they have.

  Guarantees:
    * A unit without examples has the loss 0, whose gradient is exactly 0.
    * The values in empty slots have no effect, even if they are NaN.

  Args:
    loss_fn: (params, example, rng) -> (loss, None), for one example.
    empty_slot: the name of the unit's array, bool [slots], that is True for
      slots without an example; see `dpdist.data.users`.

  Returns:
    loss_fn(params, unit, rng) -> (loss, None). The other arrays of a unit are
    those of an example, with a leading axis [slots]. Each slot has its own rng.
  """

  mean = clipping.mean_of_group(loss_fn, has_aux=True)

  def unit_loss(
    params: PyTree, unit: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[jax.Array, None]:
    examples = {name: x for name, x in unit.items() if name != empty_slot}
    return mean(params, (examples, unit[empty_slot]), rng)

  return unit_loss


def mean_over_copies(
  loss_fn: Callable[..., tuple[jax.Array, None]],
  change: Callable[[jax.Array, jax.Array], jax.Array],
  multiplicity: int,
  *,
  inputs: str = "inputs",
) -> Callable[..., tuple[jax.Array, None]]:
  """Returns the mean of a loss over randomly changed copies of one example.

  This is augmentation multiplicity (De et al. 2022, "Unlocking High-Accuracy
  Differentially Private Image Classification through Scale", section 3.2; Fort
  et al. 2021). The gradients of the copies are averaged, and the average is
  clipped once. So the example moves a sum by at most the clip norm, however
  many copies there are. Copies cost time, but no privacy.

  Args:
    loss_fn: (params, example, rng) -> (loss, None).
    change: (key, inputs) -> inputs of the same shape.
    multiplicity: K, the number of copies; at least 1.
    inputs: the name of the array that is changed.

  Returns:
    loss_fn(params, example, rng) -> (loss, None). The copies depend on the
    example and on rng, which is a key of this example at this step.
  """
  mean = clipping.mean_of_group(loss_fn, has_aux=True)

  def copies_loss(
    params: PyTree, example: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[jax.Array, None]:
    change_key, loss_key = jax.random.split(rng)
    keys = jax.random.split(change_key, multiplicity)
    copies = {
      name: jnp.broadcast_to(x, (multiplicity, *x.shape))
      for name, x in example.items()
    }
    copies[inputs] = jax.vmap(change)(keys, copies[inputs])
    is_padding = jnp.zeros(multiplicity, bool)
    return mean(params, (copies, is_padding), loss_key)

  return copies_loss
