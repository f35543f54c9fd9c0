"""Groups of examples whose gradients are averaged, and clipped as one.

    loss = clipping.mean_of_group(loss_fn)
    fn = dpdist.clipped_grad(loss, l2_clip_norm=1.0)
    groups, is_padding_group = clipping.into_groups(batch, 8)
    fn(params, groups, is_padding_example=is_padding_group)

There are fewer gradients, so less is computed, and averages are shorter, so
less is clipped. But it costs privacy: if one example of a group of several is
replaced or missing, the group's clipped gradient may reverse, from C in one
direction to C in the other. The sum moves by 2 C, where it moves by C if each
example is clipped alone. That is like having half the noise multiplier.

This bound holds only if no other group changes. Groups are made of rows in
order, so a row must stay in its place whatever the other rows are: a missing
example leaves a padding row behind. If the examples of a Poisson draw are
packed without gaps, as by `dpdist.PoissonSampler`, one more of them shifts all
that follow, and every group may reverse: noise that is made for one group does
not cover that. So groups are fixed beforehand (rows 0 to m-1 of the data set, m
to 2m-1, ...) and drawn as a whole. A plan with `group_size` accounts for what
one of their rows can do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpdist import _validation
from dpdist import errors
from dpdist.clipping import checks

PyTree = Any


def into_groups(
  batch: PyTree,
  group_size: int,
  *,
  is_padding_example: jax.Array | None = None,
) -> tuple[tuple[PyTree, jax.Array], jax.Array]:
  """Turns a batch of examples into a batch of groups of neighbouring rows.

  Args:
    batch: pytree; every leaf has the same leading axis B.
    group_size: m, at least 1; must divide B.
    is_padding_example: [B] bool; padding has no share in its group's mean.
      None: there is no padding.

  Returns:
    A batch for `mean_of_group`: (pytree of [B / m, m, ...], [B / m, m] bool);
    and [B / m] bool, True for groups that are all padding.

  Raises:
    ValueError: group_size does not divide the batch, or is_padding_example does
      not fit it.
  """
  _validation.check("group_size", group_size, _validation.COUNT)
  size = checks.batch_size(batch)
  if size % group_size:
    raise errors.ArgumentError(
      f"group_size must divide the batch of {size}, got {group_size}"
    )
  is_padding = checks.padding(is_padding_example, size)
  split = lambda x: jnp.reshape(x, (-1, group_size, *jnp.shape(x)[1:]))
  by_group = split(is_padding)
  return (jax.tree.map(split, batch), by_group), jnp.all(by_group, axis=1)


def mean_of_group(
  loss_fn: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., Any]:
  """Returns the loss of a group: the mean of the losses of its examples.

  Args:
    loss_fn: (params, example[, rng]) -> loss, or (loss, aux) with has_aux; for
      one example.
    has_aux: whether loss_fn returns (loss, aux).

  Returns:
    A function (params, group[, rng]) -> loss, or (loss, aux), where group is
    one of `into_groups`. Padding has no share in the mean, whatever it holds;
    the loss of padding alone is 0, with gradient 0. rng is split over the
    group's examples. aux has a leading axis over them; for padding it is that
    of another example.
  """

  def loss(params: PyTree, group: Any, *rng: jax.Array) -> Any:
    examples, is_padding = group
    # Replace padding by another example, or by zeros if there is none. Padding
    # may hold NaN, which would reach the gradient even if its loss is
    # multiplied by 0.
    num_real = jnp.sum(~is_padding)
    stand_in = jnp.argmin(is_padding)

    def fill(x: jax.Array) -> jax.Array:
      one = jnp.where(num_real > 0, x[stand_in], jnp.zeros_like(x[0]))
      mask = is_padding.reshape(is_padding.shape + (1,) * (x.ndim - 1))
      return jnp.where(mask, one, x)

    examples = jax.tree.map(fill, examples)
    keys = [jax.random.split(key, is_padding.shape[0]) for key in rng]
    out = jax.vmap(loss_fn, in_axes=(None, 0, *[0] * len(keys)))(
      params, examples, *keys
    )
    losses, aux = out if has_aux else (out, None)
    if jnp.ndim(losses) != 1:
      raise errors.ArgumentError(
        "loss_fn must return one floating number for one example, got shape"
        f" {jnp.shape(losses)[1:]}"
      )
    total = jnp.sum(jnp.where(is_padding, 0, losses))
    mean = total / jnp.maximum(1, num_real)
    return (mean, aux) if has_aux else mean

  return loss
