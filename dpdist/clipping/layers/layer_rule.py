"""The interface of a layer rule: what the engines ask of one primitive.

A layer is a primitive of JAX that meets one weight with one data operand, such
as a matrix product. Its rule knows the gradient with respect to the weight, and
ways to that gradient's norm. To add a layer, derive a class from `LayerRule`
and register it, in a module that is imported before `dpdist.clipped_grad` is
called:

    @registry.register("layer_rule", "scale")
    class Scale(layer_rule.LayerRule):
      primitive = "mul"
      weight_operands = (0, 1)
      ...

Where no rule matches, a gradient is formed for each example, which is always
right. A run compares the clipped sum with `jax.grad` before it charges
anything, so a wrong rule stops it. The run's fingerprint holds the rule's code.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dpdist.clipping.layers import costs
from dpdist.clipping.layers import factors
from dpdist.clipping.layers import norms
from dpdist.clipping.trace import program
from dpdist.clipping.trace import varying_axes
from dpdist.clipping.trace.program import WeightUse


@dataclasses.dataclass(frozen=True)
class Strategy:
  """A way to the norms of gradients."""

  text: str  # In words, for `ClippedGrad.explain`.
  forms: bool = False  # Whether it forms the gradients.
  # Whether it stores them for the sum; else a product computes the sum.
  stores: bool = False


STORE = Strategy("formed and kept", forms=True, stores=True)
RECOMPUTE = Strategy("formed for the norm", forms=True)
GRAM = Strategy("norm from inner products of positions")


class LayerRule:
  """The rule for one primitive.

  The primitive has two operands and one result. The result must be a linear
  function of the weight, plus a term that does not depend on the weight. The
  gradient then depends on the data operand and the cotangent alone.

  Arrays are of one example unless a method says otherwise. Both `operand` and
  `cotangent` (the gradient of the result) have a leading axis for each loop
  around the equation.

  Guarantees that a rule gives, and that the clip norm rests on:
    * `norm` is never less than the norm of the gradient.
    * `positions` and `terms` are never too small.

  Attributes:
    primitive: the name of the primitive.
    weight_operands: which operands may be the weight.
    multiplies: whether the gradient is bilinear in operand and cotangent. If
      not, it only moves and adds up entries of the cotangent.
    can_transpose: whether `to_factors` may be transposed.
  """

  primitive: ClassVar[str]
  weight_operands: ClassVar[tuple[int, ...]]
  multiplies: ClassVar[bool] = True
  can_transpose: ClassVar[bool] = True

  def matches(self, eqn: Any) -> bool:
    """Returns whether the rule holds for an equation of its primitive.

    All floats of the equation have one range, that of float32 or of float64.
    """
    del eqn
    return True

  def layout(self, use: WeightUse) -> factors.Layout | None:
    """Returns how the factors lie on parameters; None if it has no factors."""
    del use
    return None

  def to_factors(
    self, use: WeightUse, operand: jax.Array, cotangent: jax.Array
  ) -> factors.Dense | factors.Lookup:
    """Returns the gradient as two factors; called only if it has a layout."""
    raise NotImplementedError

  def factor_sizes(self, use: WeightUse) -> tuple[int, int, int, int]:
    """Returns (S, T, m, n) of `to_factors`, in the terms of `factors.Dense`."""
    raise NotImplementedError

  def forming_cost(self, use: WeightUse, model: costs.Model) -> costs.Cost:
    """Returns the cost of `gradient`, without writing its result."""
    raise NotImplementedError

  def strategies(
    self, use: WeightUse, model: costs.Model
  ) -> Mapping[Strategy, costs.Cost]:
    """Returns ways to the norm of a weight that is used once, with costs.

    `STORE` and `RECOMPUTE` need not be among them, and `GRAM` need not if the
    layer has a layout.
    """
    del use, model
    return {}

  def norm(
    self,
    strategy: Strategy,
    use: WeightUse,
    operand: jax.Array,
    cotangent: jax.Array,
    unit_roundoff: float,
  ) -> jax.Array:
    """Returns the norm of the gradient by one of `strategies`.

    `operand` is what the weight met, and `cotangent` the gradient of the
    result. unit_roundoff is the relative error with which the summing product
    rounds its operands; 0 if it does not round them. The norm is float32 or
    wider.
    """
    raise NotImplementedError

  def positions(self, use: WeightUse, operand: jax.Array | None) -> int:
    """Returns the most terms that an entry of the gradient adds up."""
    raise NotImplementedError

  def terms(
    self, use: WeightUse, operand: jax.Array | None, cotangent: jax.Array
  ) -> jax.Array:
    """Bounds the sum of the norms of the terms that the gradient adds up."""
    if self.multiplies:
      raise NotImplementedError
    return self.positions(use, operand) ** 0.5 * norms.of(cotangent)

  def gradient(
    self,
    use: WeightUse,
    operand: jax.Array | None,
    cotangent: jax.Array,
    platform: str,
  ) -> jax.Array:
    """Returns the gradient of the weight, of its shape, float32 or wider."""
    del platform
    assert operand is not None
    return product_gradient(use, operand, cotangent, use.weight.loops)

  def weighted_sum(
    self, use: WeightUse, operand: jax.Array, cotangent: jax.Array
  ) -> jax.Array:
    """Sums gradients over the examples of a batch.

    `operand`, what the weight met, and `cotangent` have a leading axis B, then
    the loops. The cotangent is scaled by the examples' factors if `multiplies`
    is False; otherwise either it or the operand is. The sum is of the weight's
    weight_shape, float32 or wider.
    """
    return product_gradient(use, operand, cotangent, (False, *use.weight.loops))


def product_gradient(
  use: WeightUse,
  operand: jax.Array,
  cotangent: jax.Array,
  each: Sequence[bool],
) -> jax.Array:
  """Returns the gradient of a layer's weight by JAX's own derivative.

  `operand`, what the weight met, and the output's gradient have the same
  leading axes. `each` says for each of these whether every entry has its own
  weight; the gradients, float32 or wider, are summed along the others.
  """
  cotangent = norms.widen(cotangent)
  changed = {}
  if "preferred_element_type" in use.eqn.params:
    changed = {"preferred_element_type": cotangent.dtype}
  if jnp.issubdtype(operand.dtype, jnp.floating):
    operand = operand.astype(cotangent.dtype)

  def product(weight: jax.Array, operand: jax.Array) -> jax.Array:
    values = [operand, weight] if use.operand else [weight, operand]
    return program.bind(use.eqn, values, **changed)[0]

  for own in reversed(each):
    product = jax.vmap(product, in_axes=(0 if own else None, 0))
  lead = (n for n, own in zip(operand.shape, each, strict=False) if own)
  weight = varying_axes.cast_to_varying(
    jnp.zeros((*lead, *use.var.aval.shape), cotangent.dtype),
    varying_axes.varying_axes((operand, cotangent)),
  )
  # The product is linear in the weight, so the weight's value does not matter.
  _, pull = jax.vjp(lambda w: product(w, operand), weight)
  return pull(cotangent)[0]
