"""The rule of dense layers: matrix products, and those of any other axes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist import registry
from dpdist.clipping.layers import costs
from dpdist.clipping.layers import factors
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.trace import program
from dpdist.clipping.trace.program import WeightUse


class _DotAxes(NamedTuple):
  """The (batch, contracted, free) axes of a weight and of what it met."""

  weight: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
  operand: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@registry.register("layer_rule", "dot_general")
class DotGeneral(layer_rule.LayerRule):
  """Its factors are contracted entries, and the weight's free entries."""

  primitive = "dot_general"
  weight_operands = (0, 1)

  def matches(self, eqn: Any) -> bool:
    return program.is_floating(eqn)

  def layout(self, use: WeightUse) -> factors.Layout | None:
    return factors.layout(use, _axes(use).weight)

  def to_factors(
    self, use: WeightUse, operand: jax.Array, cotangent: jax.Array
  ) -> factors.Dense:
    """Returns the factors; iterations that share the weight are positions."""
    _, _, m, n = self.factor_sizes(use)
    batch, contracted, free = _axes(use).operand
    num_batch, num_free = len(batch), len(free)
    num_loops = len(use.lengths)
    each = [i for i in range(num_loops) if use.weight.loops[i]]
    shared = [i for i in range(num_loops) if not use.weight.loops[i]]
    shift = lambda axes: [a + num_loops for a in axes]
    rows = jnp.transpose(
      operand,
      [*each, *shift(batch), *shared, *shift(free), *shift(contracted)],
    )
    # The output has the batch axes, then each operand's free axes in turn.
    b = shift(range(num_batch))
    rest = shift(range(num_batch, cotangent.ndim - num_loops))
    if use.operand:
      of_operand, of_weight = rest[:num_free], rest[num_free:]
    else:
      first = len(rest) - num_free
      of_operand, of_weight = rest[first:], rest[:first]
    columns = jnp.transpose(
      cotangent, [*each, *b, *shared, *of_operand, *of_weight]
    )
    lead = math.prod(rows.shape[: len(each) + num_batch])
    return factors.Dense(
      rows.reshape(lead, -1, m) if m else rows.reshape(lead, 0, 0),
      columns.reshape(lead, -1, n) if n else columns.reshape(lead, 0, 0),
    )

  def factor_sizes(self, use: WeightUse) -> tuple[int, int, int, int]:
    weight = use.eqn.invars[use.operand].aval.shape
    operand = use.eqn.invars[1 - use.operand].aval.shape
    axes = _axes(use)
    size = lambda shape, which: math.prod(shape[a] for a in which)
    loops = list(zip(use.lengths, use.weight.loops, strict=True))
    return (
      size(weight, axes.weight[0]) * math.prod(n for n, each in loops if each),
      size(operand, axes.operand[2])
      * math.prod(n for n, each in loops if not each),
      size(weight, axes.weight[1]),
      size(weight, axes.weight[2]),
    )

  def forming_cost(self, use: WeightUse, model: costs.Model) -> costs.Cost:
    count, positions, rows, columns = self.factor_sizes(use)
    return costs.Cost(
      count * model.product(rows, positions, columns),
      4.0 * count * (positions * (rows + columns)),
      0,
    )

  def positions(self, use: WeightUse, operand: jax.Array | None) -> int:
    del operand
    return self.factor_sizes(use)[1]

  def terms(
    self, use: WeightUse, operand: jax.Array | None, cotangent: jax.Array
  ) -> jax.Array:
    assert operand is not None
    return factors.sum_of_norms(self.to_factors(use, operand, cotangent))


def _axes(use: WeightUse) -> _DotAxes:
  contracted, batch = use.eqn.params["dimension_numbers"]
  roles = []
  for i, x in enumerate(use.eqn.invars):
    used = {*contracted[i], *batch[i]}
    free = tuple(a for a in range(len(x.aval.shape)) if a not in used)
    roles.append((tuple(batch[i]), tuple(contracted[i]), free))
  return _DotAxes(roles[use.operand], roles[1 - use.operand])
