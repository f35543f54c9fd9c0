"""Checks and lays out the arguments of a call of a `ClippedGrad`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist.clipping import checks
from dpdist.clipping import freezing
from dpdist.clipping import tracing
from dpdist.clipping import watched
from dpdist.clipping.trace import shards
from dpdist.clipping.trace import varying_axes

PyTree = Any


class Call(NamedTuple):
  """A call's arguments, in the form that the engines take."""

  params: PyTree  # Arrays, which vary along the mesh axes of the batch.
  # Trained and frozen parameters, as shards where divided.
  parts: freezing.Split
  # The batch, and a key for each example if there are keys.
  examples: tuple[PyTree, ...]
  keep: jax.Array  # [B] bool, False for padding.
  along: list[Any] | None  # The direction, for each trained parameter.
  axes: frozenset[str]  # The mesh axes along which the examples vary.
  given: dict[str, Any]  # By name, the arguments with an axis over examples.

  @property
  def batch_size(self) -> int:
    """Returns the number of examples, padding included."""
    return self.keep.shape[0]


def lay_out(
  params: PyTree,
  batch: PyTree,
  *,
  is_padding_example: jax.Array | None,
  rng: jax.Array | None,
  param_specs: PyTree | None,
  direction: PyTree | None,
  frozen: freezing.Frozen,
) -> Call:
  """Checks the arguments of a `ClippedGrad`, and lays them out."""
  batch_size = checks.batch_size(batch)
  axes = varying_axes.varying_axes((batch, is_padding_example, rng))
  keep = ~checks.padding(is_padding_example, batch_size)
  rng = checks.per_example_keys(rng, batch_size, axes)
  given = {
    "batch": batch,
    "is_padding_example": is_padding_example,
    "rng": rng,
  }
  checks.sharding(**given)
  checks.params(freezing.partition(params, frozen)[0])
  # Python's and NumPy's numbers are accepted as arrays, also as constants of a
  # program.
  params, batch = jax.tree.map(jnp.asarray, (params, batch))
  params = varying_axes.cast_to_varying(params, axes)
  keep = varying_axes.cast_to_varying(keep, axes)
  parts = freezing.split(
    params,
    frozen,
    shards.wrap(params, param_specs, varying_axes.varying_axes(batch)),
  )
  # After the check of the specs, whose message says more.
  checks.whole(params, axes)
  along = watched.laid_out(direction, parts.trainable, axes)
  examples = (batch,) if rng is None else (batch, rng)
  return Call(params, parts, examples, keep, along, axes, given)


def check_traced(call: Call, traced: tracing.Traced) -> None:
  """Raises ValueError if the loss is no scalar, or mixes devices' examples."""
  checks.sharding_inside_jit(traced.block, **call.given)
  checks.loss(traced.block, traced.shapes[0], call.axes)
  divided = call.axes | varying_axes.untold_axes(call.axes)
  if divided:
    one = jax.tree.map(lambda x: x[0], jax.tree.leaves(call.examples))
    trained, fixed = call.parts.trainable, call.parts.frozen
    values = [shards.whole(x) for x in [*trained, *fixed]]
    checks.derivatives(traced.block, [*values, *one], len(trained), divided)
