"""The rule of embeddings: rows of a table that are looked up by ids."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dpdist import registry
from dpdist.clipping.layers import costs
from dpdist.clipping.layers import factors
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.trace.program import WeightUse


@registry.register("layer_rule", "gather")
class Gather(layer_rule.LayerRule):
  """A product whose rows are one-hot. Nothing is multiplied or rounded."""

  primitive = "gather"
  weight_operands = (0,)
  multiplies = False
  # One-hot rows cannot be columns.
  can_transpose = False

  def matches(self, eqn: Any) -> bool:
    """Returns whether it takes whole rows of a table, one for each index.

    JAX checks bounds in the indices' dtype, in which rows of a larger table may
    seem to be outside, and drops their gradients.
    """
    numbers = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return (
      len(shape) == 2
      and shape[0] - 1 <= jnp.iinfo(eqn.invars[1].aval.dtype).max
      and tuple(numbers.collapsed_slice_dims) == (0,)
      and tuple(numbers.start_index_map) == (0,)
      and not numbers.operand_batching_dims
      and tuple(eqn.params["slice_sizes"]) == (1, shape[1])
      and eqn.invars[1].aval.shape[-1:] == (1,)
      and tuple(numbers.offset_dims) == (len(eqn.outvars[0].aval.shape) - 1,)
    )

  def layout(self, use: WeightUse) -> factors.Layout | None:
    if any(use.weight.loops):
      return None
    return factors.layout(use, ((), (0,), (1,)))

  def to_factors(
    self, use: WeightUse, operand: jax.Array, cotangent: jax.Array
  ) -> factors.Lookup:
    return lookup(use, operand, cotangent)

  def factor_sizes(self, use: WeightUse) -> tuple[int, int, int, int]:
    """Returns the sizes; one-hot rows have no width."""
    width = use.eqn.invars[0].aval.shape[1]
    return 1, math.prod(use.tap_shape) // max(1, width), 0, width

  def forming_cost(self, use: WeightUse, model: costs.Model) -> costs.Cost:
    del model  # It adds a row to the table for each position.
    return costs.Cost(0, 4.0 * math.prod(use.tap_shape), 0)

  def positions(self, use: WeightUse, operand: jax.Array | None) -> int:
    del use
    assert operand is not None
    return operand.size


def lookup(
  use: WeightUse, indices: jax.Array, cotangent: jax.Array
) -> factors.Lookup:
  """Returns the factors of an example's embedding lookup, loops included."""
  table = use.eqn.invars[0].aval.shape
  # The number of rows may be too large for the dtype of the ids: uint8 holds
  # 256 ids, but not the number 256.
  if indices.dtype.itemsize < 4:
    indices = indices.astype(jnp.int32)
  indices = indices.reshape(-1)
  columns = cotangent.reshape(-1, table[1])
  inside = (indices >= 0) & (indices < table[0])
  # Plain indexing assumes ids in bounds, and reads the nearest row for others.
  # The gradient's scatter nevertheless drops what is out of bounds.
  if use.eqn.params["mode"] != jax.lax.GatherScatterMode.CLIP:
    columns = jnp.where(inside[:, None], columns, 0)
  return factors.Lookup(jnp.clip(indices, 0, table[0] - 1), columns)
