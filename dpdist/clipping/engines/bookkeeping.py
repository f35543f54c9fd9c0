"""The book-keeping engine: clipped sums at the cost of an ordinary gradient.

It runs one forward pass and one backward pass through the activations alone.
Then it computes for each weight its norms by the cheapest exact rule and the
clipped sum as one product. An ordinary gradient takes the same passes and
products; only the norms are added (Bu et al. 2023, "Differentially Private
Optimization on Large Model at Small Cost", here for any JAX program).
"""

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist.clipping.engines import sharing
from dpdist.clipping.engines import vmap
from dpdist.clipping.engines.clip_norms import Scaling
from dpdist.clipping.layers import costs
from dpdist.clipping.layers import inner_products
from dpdist.clipping.layers import norms
from dpdist.clipping.layers.rules import Form
from dpdist.clipping.layers.rules import Rule
from dpdist.clipping.trace import evaluate
from dpdist.clipping.trace import shards
from dpdist.clipping.trace import varying_axes
from dpdist.clipping.trace.program import Block
from dpdist.clipping.trace.program import WeightUse

PyTree = Any
Key = tuple[int, ...]


class Problem(NamedTuple):
  """The input of the engines that does not depend on examples."""

  block: Block  # The loss of one example, split into equations and weight uses.
  rules: Sequence[Rule]  # They cover all uses of `block`.
  leaves: Sequence[Any]  # Trained; some may be `shards.Shard`s.
  frozen: Sequence[Any]  # Some may be `shards.Shard`s.
  # For each parameter the number of the group it is clipped with.
  groups: Sequence[int]
  scaling: Scaling
  platform: str  # "cpu", "gpu" or "tpu".

  def inputs(self, example: Sequence[Any]) -> list[Any]:
    """Returns the block's inputs for one example."""
    return [*self.leaves, *self.frozen, *example]

  def unit_roundoff(self, rule: Rule) -> float:
    """Returns the relative error of the operands of a sum's products."""
    return max(
      (
        costs.unit_roundoff(self.platform, use.eqn.params.get("precision"))
        for use in rule.uses
        if use.eqn is not None
      ),
      default=0.0,
    )


def clipped_sum(
  problem: Problem, examples: Sequence[jax.Array], keep: jax.Array
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
  """Sums clipped per-example gradients.

  `keep` is [B] bool; an example that is not kept contributes exactly 0. Returns
  the sum of each parameter's gradients, float32 or wider, and for a shard its
  part of the sum over its mesh axis; the outputs of the loss, [B, ...]; and the
  norms before clipping, [B] for each group.
  """
  operands, cotangents, outs = backward(problem, examples)
  total = [
    jnp.zeros(keep.shape, jnp.float32) for _ in problem.scaling.l2_clip_norms
  ]
  less = [jnp.zeros(keep.shape, jnp.float32) for _ in total]
  kept = []
  for rule in problem.rules:
    of_groups, formed = norms_of(problem, rule, operands, cotangents)
    for group, of_rule in of_groups.items():
      total[group] = norms.hypot(total[group], of_rule)
    kept.append(formed if rule.strategy.stores else None)
    if rule.strategy.stores:
      continue
    group = problem.groups[min(rule.leaves)]
    for use in rule.uses:
      x, g = operands[use.key], cotangents[use.key]
      other = x if _scales_cotangent(use, x, g) else g
      less[group] += jax.vmap(functools.partial(lost, use))(other)
  scales, total = problem.scaling.scales(total, keep, less)
  sums = weighted_sum(problem, operands, cotangents, kept, scales)
  return problem.scaling.enlarged(sums, problem.groups), outs, total


def lost(use: WeightUse, other: jax.Array) -> jax.Array:
  """Bounds the norm of what underflow takes from an example's product.

  One side of the product is multiplied with at most 1; `other` is the other
  side, for one example. Each entry of the product is a sum of products of a
  lost number, at most the smallest normal one, and an entry of the other side.
  The bound is that number times the sum of the other side's magnitudes, times
  the square root of the number of entries.
  """
  if not use.layer.multiplies:
    return jnp.zeros((), jnp.float32)
  each = math.sqrt(math.prod(use.weight_shape)) * float(
    jnp.finfo(other.dtype if other.dtype.itemsize > 4 else jnp.float32).tiny
  )
  other = norms.widen(other)
  return jnp.sum(jnp.abs(other * each)).astype(jnp.float32)


def backward(
  problem: Problem, examples: Sequence[jax.Array]
) -> tuple[dict[Key, jax.Array], dict[Key, jax.Array], list[jax.Array]]:
  """Runs a forward pass, and a backward pass through the activations.

  Returns the data operands of products and the gradients of the tapped values,
  both by use and with a leading axis B; and the outputs of the loss.
  """
  size = examples[0].shape[0]
  taps = varying_axes.cast_to_varying(
    {
      use.key: jnp.zeros((size, *use.tap_shape), use.out.dtype)
      for use in problem.block.all_uses()
    },
    varying_axes.varying_axes((list(problem.leaves), list(examples))),
  )

  def losses(taps: dict[Key, jax.Array]) -> tuple[jax.Array, Any]:
    def one(example: Any, taps: Any) -> Any:
      return evaluate.forward(problem.block, problem.inputs(example), taps)

    outs, operands = jax.vmap(one)(list(examples), taps)
    return outs[0], (outs, operands)

  loss, pull, (outs, operands) = jax.vjp(losses, taps, has_aux=True)
  (cotangents,) = pull(jnp.ones_like(loss))
  once = lambda by_key: {
    key: sharing.computed_once(x) for key, x in by_key.items()
  }
  return once(operands), once(cotangents), outs


def norms_of(
  problem: Problem,
  rule: Rule,
  operands: dict[Key, jax.Array],
  cotangents: dict[Key, jax.Array],
) -> tuple[dict[int, jax.Array], Any]:
  """Returns the norms of a rule's gradients, by group, and the gradients.

  Operands and cotangents have a leading axis B; those of other rules are
  ignored. The norms are [B]; the gradients are in the form of `rule.form`, with
  a leading axis B, or None where they are not formed.
  """
  operands = {s.key: operands[s.key] for s in rule.uses if s.eqn is not None}
  cotangents = {s.key: cotangents[s.key] for s in rule.uses}
  if rule.form is not Form.PARAMETERS:
    group = problem.groups[min(rule.leaves)]
    of_rule, formed = jax.vmap(functools.partial(norm, problem, rule))(
      operands, cotangents
    )
    return {group: of_rule}, formed

  # Gathered here, so that it is not done for each example.
  problem = problem._replace(
    leaves=[shards.whole(x) for x in problem.leaves],
    frozen=[shards.whole(x) for x in problem.frozen],
  )

  def one(args: tuple[dict[Key, jax.Array], dict[Key, jax.Array]]) -> Any:
    of_weights = _of_weights(problem, rule, *args)
    by_leaf = {
      i: sharing.computed_once(x)
      for i, x in to_leaves(problem, of_weights, rule.leaves).items()
    }
    total: dict[int, jax.Array] = {}
    for i, x in by_leaf.items():
      group = problem.groups[i]
      total[group] = norms.hypot(total.get(group, jnp.zeros(())), norms.of(x))
    return total, by_leaf

  # Taking gradients to the parameters passes over them many times. Where the
  # gradients of all examples do not fit in the cache, take one at a time.
  (size,) = {len(x) for x in cotangents.values()}
  size *= 4 * sum(math.prod(use.weight_shape) for use in rule.uses)
  if problem.platform == "cpu" and size > costs.CACHE_BYTES["cpu"]:
    return jax.lax.map(one, (operands, cotangents))
  return jax.vmap(one)((operands, cotangents))


def norm(
  problem: Problem,
  rule: Rule,
  operands: dict[Key, jax.Array],
  cotangents: dict[Key, jax.Array],
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the norm of one example's gradient, and the gradient itself.

  The rule's form is not PARAMETERS. The norm is a scalar; the gradient is in
  the form of `rule.form`, or None if it is not formed.
  """
  unit_roundoff = problem.unit_roundoff(rule)
  if not rule.strategy.forms:
    return rule.norm_unformed(operands, cotangents, unit_roundoff), None
  formed = rule.gradient(_of_weights(problem, rule, operands, cotangents))
  if rule.strategy.stores:
    formed = sharing.computed_once(formed)
  result = norms.of(formed)
  if not rule.strategy.stores:
    # The sum is computed by another product, in which terms that cancel here
    # may leave their rounding errors.
    size: Any = sum(
      s.layer.terms(s, operands.get(s.key), cotangents[s.key])
      for s in rule.uses
    )
    result = jnp.maximum(result, inner_products.SUMMED**0.5 * size)
    # Both products round.
    twice = 2 * sum(
      s.layer.positions(s, operands.get(s.key)) for s in rule.uses
    )
    result = inner_products.with_room(result, size, twice, 0.0)
    if unit_roundoff:
      # What is not multiplied is not rounded.
      terms: Any = sum(
        s.layer.terms(s, operands[s.key], cotangents[s.key])
        if s.layer.multiplies
        else jnp.zeros((), norms.wide(cotangents[s.key].dtype))
        for s in rule.uses
      )
      result = inner_products.with_room(result, terms, 0, unit_roundoff)
  return result, formed


def _of_weights(
  problem: Problem,
  rule: Rule,
  operands: dict[Key, jax.Array],
  cotangents: dict[Key, jax.Array],
) -> dict[Key, jax.Array]:
  """Returns the gradients of the uses' weights for one example."""
  return {
    use.key: use.layer.gradient(
      use, operands.get(use.key), cotangents[use.key], problem.platform
    )
    for use in rule.uses
  }


def to_leaves(
  problem: Problem,
  cotangents: dict[Key, jax.Array],
  wanted: frozenset[int],
) -> dict[int, jax.Array]:
  """Takes gradients of weights to parameters; see `to_parameters`."""
  known = problem.inputs(())
  values = [*known, *[None] * (len(problem.block.kinds) - len(known))]
  gradients = evaluate.to_parameters(problem.block, values, cotangents)
  return {
    i: norms.widen(x)
    for i, x in enumerate(gradients)
    if x is not None and i in wanted
  }


def weighted_sum(
  problem: Problem,
  operands: dict[Key, jax.Array],
  cotangents: dict[Key, jax.Array],
  kept: Sequence[Any],
  scales: Sequence[jax.Array],
) -> list[jax.Array]:
  """Sums scaled gradients over the examples, and takes them to the parameters.

  Operands and cotangents are by use, with a leading axis B; `kept` holds for
  each rule its gradients as `norms_of` returns them, or None; `scales` holds
  [B] for each group. Returns each parameter's sum, float32 or wider, and for a
  shard its part of the sum over its mesh axis.
  """
  groups = problem.groups
  of_weights: dict[Key, jax.Array] = {}
  of_leaves: dict[int, jax.Array] = {}
  products: list[tuple[WeightUse, jax.Array]] = []
  for rule, formed in zip(problem.rules, kept, strict=True):
    if rule.form is Form.PARAMETERS and formed is not None:
      for i, x in formed.items():
        of_leaves[i] = vmap.weighted_sum(x, scales[groups[i]])
      continue
    # A rule with several groups keeps its gradients, since its parameters'
    # shares in a product cannot be scaled separately.
    scale = scales[groups[min(rule.leaves)]]
    if formed is None:
      products.extend((use, scale) for use in rule.uses)
    else:
      of_weights[rule.uses[0].key] = vmap.weighted_sum(formed, scale)
  of_weights |= _products(
    problem, products, operands, cotangents, scales[0] != 0
  )
  sums = to_leaves(problem, of_weights, frozenset(range(len(groups))))
  return shards.sums(
    problem.leaves,
    [sums[i] + of_leaves.get(i, 0.0) for i in range(len(groups))],
  )


def _products(
  problem: Problem,
  uses: Sequence[tuple[WeightUse, jax.Array]],
  operands: dict[Key, jax.Array],
  cotangents: dict[Key, jax.Array],
  keep: jax.Array,
) -> dict[Key, jax.Array]:
  """Computes the sums that are products; NaN of one left out becomes 0."""
  scaled, others = {}, {}
  for use, scale in uses:
    x, g = operands[use.key], norms.widen(cotangents[use.key])
    if _scales_cotangent(use, x, g):
      scaled[use.key], others[use.key] = _scaled(scale, g), x
    else:
      scaled[use.key], others[use.key] = (
        _scaled(scale, norms.widen(x)),
        g,
      )
  only_kept = lambda others: {
    key: jnp.where(_rows(keep, x), x, jnp.zeros((), x.dtype))
    for key, x in others.items()
  }
  if problem.platform == "tpu":  # XLA fuses it into the product.
    others = only_kept(others)
  else:
    others = jax.lax.cond(jnp.all(keep), lambda x: x, only_kept, others)
  sums = {}
  for use, _ in uses:
    one, other = scaled[use.key], others[use.key]
    x, g = operands[use.key], cotangents[use.key]
    if _scales_cotangent(use, x, g):
      one, other = other, one
    sums[use.key] = use.layer.weighted_sum(use, one, other)
  return sums


def _scales_cotangent(use: WeightUse, x: jax.Array, g: jax.Array) -> bool:
  """Returns whether the cotangent is scaled, and not the operand."""
  return not use.layer.multiplies or g.size <= x.size


def _rows(scale: jax.Array, x: jax.Array) -> jax.Array:
  return scale.reshape(scale.shape + (1,) * (x.ndim - 1))


def _scaled(scale: jax.Array, x: jax.Array) -> jax.Array:
  rows = _rows(scale, x).astype(x.dtype)
  return jnp.where(rows != 0, x * rows, 0)
