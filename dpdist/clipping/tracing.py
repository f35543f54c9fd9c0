"""Traces the loss of one example, analyzes it and chooses a clipping method."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple
import warnings

import jax

from dpdist import errors
from dpdist.clipping import checks
from dpdist.clipping import freezing
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.layers import rules
from dpdist.clipping.trace import program
from dpdist.clipping.trace import shards
from dpdist.clipping.trace import split
from dpdist.clipping.trace import varying_axes

PyTree = Any


class Traced(NamedTuple):
  """The traced loss of one example."""

  # (trainable leaves, frozen leaves, *example) -> (loss, aux).
  loss_fn: Callable[..., tuple[jax.Array, Any]]
  block: program.Block  # The loss as a block of equations and weight uses.
  shapes: tuple[Any, Any]  # Of (loss, aux).
  # Names of the effects that prevent such an analysis.
  effects: tuple[str, ...]

  def of_trainable(
    self, parts: freezing.Split
  ) -> Callable[..., tuple[jax.Array, Any]]:
    """Returns the function with its frozen leaves filled in, whole."""
    frozen = [shards.whole(x) for x in parts.frozen]
    return lambda trainable, *example: self.loss_fn(trainable, frozen, *example)

  def method(self, wanted: str, axes: frozenset[str]) -> tuple[str, str]:
    """Returns the method to use, and why.

    `wanted` is a method, or "auto"; a ValueError says that it cannot be used.
    The examples vary over the mesh axes `axes`.
    """
    other = varying_axes.axes_in(self.block.jaxpr.jaxpr) - axes
    if other and wanted in ("auto", "vmap"):
      return "vmap", f"the loss also varies over the mesh axes {sorted(other)}"
    if other:
      raise errors.ArgumentError(
        "method must be 'auto' or 'vmap' for a loss that also varies over the"
        f" mesh axes {sorted(other)}, got {wanted!r}"
      )
    if self.effects:
      reason = f"the loss has the effects {list(self.effects)}"
      if wanted not in ("auto", "vmap"):
        warnings.warn(
          f"method {wanted!r} was asked for, and 'vmap' is taken: {reason}, as"
          " of jax.new_ref or jax.experimental.io_callback, and no other method"
          " knows them",
          stacklevel=3,
        )
      return "vmap", reason
    if wanted != "auto":
      return wanted, "as asked for"
    if self.block.rematerialises():
      return (
        "two_pass",
        "the loss rematerialises activations, which book-keeping would keep",
      )
    return "bookkeeping", "the fastest where activations are kept anyway"


def trace(
  loss_fn: Callable[..., Any],
  has_aux: bool,
  parts: freezing.Split,
  examples: tuple[PyTree, ...],
  layer_rules: Sequence[layer_rule.LayerRule],
) -> Traced:
  """Traces a loss of one example.

  `loss_fn` maps (params, *example) to the loss, or to (loss, aux) with has_aux.
  `examples` have a leading axis; shapes are enough. Raises ValueError if the
  loss uses other examples, or random numbers that do not come from its rng.
  """

  def joined(trainable: list[Any], frozen: list[Any], *example: Any) -> Any:
    value = loss_fn(parts.join(trainable, frozen), *example)
    return value if has_aux else (value, None)

  whole = lambda leaves: [shards.whole(x) for x in leaves]
  one = jax.tree.map(
    lambda x: (
      jax.eval_shape(lambda y: y[0], x)
      if isinstance(x, jax.ShapeDtypeStruct)
      else x[0]
    ),
    examples,
  )
  try:
    closed, shapes = program.trace(
      joined, whole(parts.trainable), whole(parts.frozen), *one
    )
  except NameError as error:
    if "axis name" not in str(error):
      raise
    raise errors.ArgumentError(
      "loss_fn must use one example alone, but it uses a named axis over"
      f" several ({error}): statistics of a batch, as of batch norm, make"
      " an example's gradient depend on the others; use group or layer norm"
    ) from error
  checks.randomness(closed.jaxpr)
  num_leaves, num_constants = len(parts.trainable), len(parts.frozen)
  effects = program.effects(closed.jaxpr)
  if effects:  # It is not analyzed: all of it counts as data.
    num_leaves = num_constants = 0
  block = split.split(
    closed,
    num_leaves,
    num_constants,
    functools.partial(rules.find, layer_rules),
  )
  return Traced(joined, block, shapes, effects)
