"""The rule of convolutions: of any stride, dilation, padding and groups."""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpdist import registry
from dpdist.clipping.layers import costs
from dpdist.clipping.layers import factors
from dpdist.clipping.layers import kernel_gradients
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.layers import norms
from dpdist.clipping.layers import pixels
from dpdist.clipping.trace import program
from dpdist.clipping.trace.program import WeightUse

DIAGONAL_GRAM = layer_rule.Strategy("norm from inner products of pixels")


@registry.register("layer_rule", "conv_general_dilated")
class Convolution(layer_rule.LayerRule):
  """A product of patches of the input with the gradient of the output."""

  primitive = "conv_general_dilated"
  weight_operands = (1,)

  def matches(self, eqn: Any) -> bool:
    return eqn.params["batch_group_count"] == 1 and program.is_floating(eqn)

  def forming_cost(self, use: WeightUse, model: costs.Model) -> costs.Cost:
    s = kernel_gradients.sizes(use)
    count = s.groups * math.prod(use.lengths)
    rows = s.offsets * s.inputs
    read = s.positions * s.outputs
    read += s.positions * rows if model.reads_patches else s.padded * s.inputs
    return costs.Cost(
      count * model.product(rows, s.positions, s.outputs),
      4.0 * count * read,
      0,
    )

  def strategies(
    self, use: WeightUse, model: costs.Model
  ) -> Mapping[layer_rule.Strategy, costs.Cost]:
    if use.lengths:
      return {}
    s = kernel_gradients.sizes(use)
    return {
      layer_rule.GRAM: _gram_cost(s, model),
      DIAGONAL_GRAM: _diagonal_gram_cost(s, model),
    }

  def norm(
    self,
    strategy: layer_rule.Strategy,
    use: WeightUse,
    operand: jax.Array,
    cotangent: jax.Array,
    unit_roundoff: float,
  ) -> jax.Array:
    if strategy == DIAGONAL_GRAM:
      return pixels.norm(use, operand, cotangent, unit_roundoff)
    return factors.norm(
      [kernel_gradients.patches(use, operand, cotangent)],
      unit_roundoff,
      use.eqn.params["precision"],
    )

  def positions(self, use: WeightUse, operand: jax.Array | None) -> int:
    del operand
    return kernel_gradients.sizes(use).positions * math.prod(use.lengths)

  def terms(
    self, use: WeightUse, operand: jax.Array | None, cotangent: jax.Array
  ) -> jax.Array:
    assert operand is not None
    # A pixel is in at most a patch for each offset.
    offsets = kernel_gradients.sizes(use).offsets
    product, power = norms.products(
      offsets**0.5 * norms.of(operand), norms.of(cotangent)
    )
    return norms.times_power_of_two(product, power)

  def gradient(
    self,
    use: WeightUse,
    operand: jax.Array | None,
    cotangent: jax.Array,
    platform: str,
  ) -> jax.Array:
    one = lambda x, g: kernel_gradients.instantiate(use, x, g, platform)
    for _ in use.lengths:
      one = jax.vmap(one)
    shared = tuple(i for i, each in enumerate(use.weight.loops) if not each)
    return jnp.sum(one(operand, cotangent), axis=shared)


def _gram_cost(s: kernel_gradients.Sizes, model: costs.Model) -> costs.Cost:
  """Returns the cost of all pairs of patches."""
  rows = s.offsets * s.inputs
  pairs = lambda width: model.product(s.positions, width, s.positions)
  passed = model.patch_passes * s.positions * (rows + s.outputs)
  return costs.Cost(
    s.groups * (pairs(rows) + pairs(s.outputs)),
    4.0 * s.groups * (4 * s.positions**2 + passed),
    0,
  )


def _diagonal_gram_cost(
  s: kernel_gradients.Sizes, model: costs.Model
) -> costs.Cost:
  """Returns the cost of pixels' inner products, summed along diagonals."""
  pairs = lambda width: model.product(s.cells, width, s.cells)
  moved = s.phases * s.cells * s.inputs + s.cells * s.outputs
  return costs.Cost(
    s.groups * (s.phases * pairs(s.inputs) + pairs(s.outputs)),
    # Padding, sorting and shifting are passes of their own.
    4.0 * s.groups * (4 * (s.phases + 1) * s.cells**2 + 6 * moved),
    0,
  )
