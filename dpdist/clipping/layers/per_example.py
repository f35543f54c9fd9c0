"""The fallback: a weight that becomes data, with a gradient for each example.

It is right for every program that JAX can differentiate.
"""

import math

import jax
import jax.numpy as jnp

from dpdist.clipping.layers import costs
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.layers import norms
from dpdist.clipping.trace.program import WeightUse


class PerExample(layer_rule.LayerRule):
  """Takes the gradient from the backward pass, which holds it already."""

  primitive = "per-example fallback"
  weight_operands = ()
  multiplies = False

  def forming_cost(self, use: WeightUse, model: costs.Model) -> costs.Cost:
    del use, model
    return costs.Cost(0, 0, 0)

  def positions(self, use: WeightUse, operand: jax.Array | None) -> int:
    del operand
    return math.prod(use.lengths)

  def gradient(
    self,
    use: WeightUse,
    operand: jax.Array | None,
    cotangent: jax.Array,
    platform: str,
  ) -> jax.Array:
    """Adds up the gradients of the iterations that share the weight."""
    del operand, platform
    shared = tuple(i for i, each in enumerate(use.weight.loops) if not each)
    return jnp.sum(norms.widen(cotangent), axis=shared)
