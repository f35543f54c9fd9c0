"""The memory-saving engine: layer-wise norms, then a weighted backward pass.

It is for models that barely fit in memory, and for loops or rematerialised
parts whose activations must not be kept. Wherever a weight has a rule of its
own, its norm is computed inside the backward pass, where operand and gradient
exist anyway, and nothing else is stored. A second forward and backward pass
then sums the gradients, each multiplied with its example's scale (Lee & Kifer
2021, "Scaling up Differentially Private Deep Learning with Fast Per-Example
Gradient Clipping"). That takes about two thirds more time than book-keeping,
and the memory of an ordinary gradient.

In the paper the losses are scaled. Here the scale is applied where a gradient
meets a weight, and the pass through the activations is the same computation as
that of the norms. A scaled loss would round differently: where large terms
cancel, rounding errors that the norms do not contain would remain in the sum.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dpdist.clipping.engines import bookkeeping
from dpdist.clipping.engines import sharing
from dpdist.clipping.engines import vmap
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.layers import norms
from dpdist.clipping.layers.rules import Form
from dpdist.clipping.layers.rules import Rule
from dpdist.clipping.trace import evaluate
from dpdist.clipping.trace import shards
from dpdist.clipping.trace import varying_axes
from dpdist.clipping.trace.program import WeightUse

Key = tuple[int, ...]


def clipped_sum(
  problem: bookkeeping.Problem,
  examples: Sequence[jax.Array],
  keep: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
  """Sums clipped per-example gradients; see `bookkeeping.clipped_sum`."""
  if not _takes_two_passes(problem):
    return bookkeeping.clipped_sum(problem, examples, keep)
  of_groups, lost, kept, outs = _norms(problem, examples, keep.shape)
  scales, of_groups = problem.scaling.scales(of_groups, keep, lost)
  (scale,) = scales
  sums = {i: vmap.weighted_sum(x, scale) for i, x in kept.items()}
  some = scale != 0
  # An example that is left out may hold NaN, and NaN * 0 is NaN. The second
  # pass replaces it by another example, with scale 0.
  index = jnp.where(some, jnp.arange(some.size), jnp.argmax(some))
  examples = [x[index] for x in examples]
  # Without a barrier the compiler would merge the two passes into one.
  examples, scale = jax.lax.optimization_barrier((examples, scale))
  others = _weighted_gradient(
    problem, examples, scale, jnp.any(some), frozenset(kept)
  )
  for i, leaf in enumerate(problem.leaves):
    if i in kept:
      (others[i],) = shards.sums([leaf], [sums[i]])
  return problem.scaling.enlarged(others, problem.groups), outs, of_groups


def _takes_two_passes(problem: bookkeeping.Problem) -> bool:
  """Returns whether a second pass may sum the gradients.

  It may if each example has one scale, and if the second pass sums in float32
  the gradients whose norms the first one took, which a custom derivative need
  not do. Norms of kept gradients leave no room for the rounding of a product.
  """
  return (
    len(problem.scaling.bounds) == 1
    and problem.block.is_wide()
    and not problem.block.has_custom_vjp()
    and not any(
      rule.strategy.stores and problem.unit_roundoff(rule) > 0
      for rule in problem.rules
    )
  )


def _norms(
  problem: bookkeeping.Problem,
  examples: Sequence[jax.Array],
  shape: tuple[int, ...],
) -> tuple[
  list[jax.Array], list[jax.Array], dict[int, jax.Array], list[jax.Array]
]:
  """Runs the first pass.

  Returns norms, and what underflow may take from a sum, [B] for each group;
  then gradients [B, ...] by the number of their parameter, where weights are
  computed from parameters: taking gradients back there may cancel terms, and a
  sum over the examples would be rounded differently; then the outputs of the
  loss.
  """
  inside = {
    rule.uses[0].key: _summed_by_a_product(rule)
    for rule in problem.rules
    if _is_local(rule)
  }
  taps = {
    use.key: jnp.zeros((*shape, *use.lengths, 2), jnp.float32)
    if use.key in inside
    else jnp.zeros((*shape, *use.tap_shape), use.out.dtype)
    for use in problem.block.all_uses()
  }
  taps = varying_axes.cast_to_varying(
    taps, varying_axes.varying_axes((list(problem.leaves), list(examples)))
  )

  def product(
    use: WeightUse, weight: jax.Array, operand: jax.Array, tap: Any
  ) -> jax.Array:
    operand = _as_in_the_other_pass(operand)
    if use.key not in inside:
      out = evaluate.tapped(use, weight, operand, tap)
    else:
      out = _with_norm(problem, inside[use.key], weight, operand, tap)
    return _as_in_the_other_pass(out)

  def losses(taps: dict[Key, jax.Array]) -> tuple[jax.Array, Any]:
    def one(example: Any, taps: Any) -> Any:
      outs, operands = evaluate.forward(
        problem.block,
        problem.inputs(example),
        taps,
        evaluate.Hooks(product),
      )
      return outs, {k: x for k, x in operands.items() if k not in inside}

    outs, operands = jax.vmap(one)(list(examples), taps)
    return outs[0], (outs, operands)

  loss, pull, (outs, operands) = jax.vjp(losses, taps, has_aux=True)
  (cotangents,) = pull(jnp.ones_like(loss))
  operands = jax.tree.map(sharing.computed_once, operands)
  total = [jnp.zeros(shape, jnp.float32) for _ in problem.scaling.bounds]
  lost = [jnp.zeros(shape, jnp.float32) for _ in total]
  kept: dict[int, jax.Array] = {}
  for rule in map(_summed_by_a_product, problem.rules):
    group = problem.groups[min(rule.leaves)]
    first = rule.uses[0]
    if first.key in inside:
      # Each iteration of a loop has its own weight.
      both = cotangents[first.key].reshape(*shape, -1, 2)
      total[group] = norms.hypot(total[group], norms.of(both[..., 0], -1))
      lost[group] += jnp.sum(both[..., 1], -1)
      continue
    own = {s.key: sharing.computed_once(cotangents[s.key]) for s in rule.uses}
    of_rule, formed = bookkeeping.norms_of(problem, rule, operands, own)
    for i, norm in of_rule.items():
      total[i] = norms.hypot(total[i], norm)
    if rule.form is Form.PARAMETERS:
      kept |= formed
      continue
    for use in rule.uses:
      if use.eqn is not None:
        of_one = functools.partial(bookkeeping.lost, use)
        lost[group] += jax.vmap(of_one)(operands[use.key])
  return total, lost, kept, outs


def _as_in_the_other_pass(x: jax.Array) -> jax.Array:
  """Returns x, rounded alike in both passes.

  Between two products the passes are the same computation, and round alike if
  no product is fused with anything before or after it.
  """
  if jnp.issubdtype(x.dtype, jnp.floating):
    return sharing.computed_once(x)
  return x


def _summed_by_a_product(rule: Rule) -> Rule:
  """Returns the rule with gradients formed only for the norm."""
  if not rule.strategy.stores or rule.form is Form.PARAMETERS:
    return rule
  return dataclasses.replace(rule, strategy=layer_rule.RECOMPUTE)


def _is_local(rule: Rule) -> bool:
  """Returns whether a rule needs one operand and one gradient at a time."""
  (first, *others) = rule.uses
  return (
    not others
    and first.eqn is not None
    and rule.form is not Form.PARAMETERS
    and all(first.weight.loops)
  )


def _with_norm(
  problem: bookkeeping.Problem,
  rule: Rule,
  weight: jax.Array,
  operand: jax.Array,
  tap: jax.Array,
) -> jax.Array:
  """Computes a product whose tap's gradient is the norm, and what was lost."""
  (use,) = rule.uses
  lone = dataclasses.replace(
    use, lengths=(), weight=use.weight._replace(loops=())
  )
  run = lambda weight, operand: evaluate.tapped(lone, weight, operand, None)

  @jax.custom_vjp
  def product(
    weight: jax.Array, operand: jax.Array, tap: jax.Array
  ) -> jax.Array:
    del tap
    return run(weight, operand)

  def forward(
    weight: jax.Array, operand: jax.Array, tap: jax.Array
  ) -> tuple[jax.Array, Any]:
    del tap
    return run(weight, operand), (weight, operand)

  def backward(residuals: Any, cotangent: jax.Array) -> Any:
    weight, operand = residuals
    if jnp.issubdtype(operand.dtype, jnp.floating):
      _, pull = jax.vjp(lambda x: run(weight, x), operand)
      (of_operand,) = pull(cotangent)
    else:
      of_operand = None
    norm, _ = bookkeeping.norm(
      problem,
      dataclasses.replace(rule, uses=(lone,)),
      {use.key: operand},
      {use.key: cotangent},
    )
    lost = bookkeeping.lost(lone, operand)
    return None, of_operand, jnp.stack([norm.astype(jnp.float32), lost])

  product.defvjp(forward, backward)
  return product(weight, operand, tap)


def _weighted_gradient(
  problem: bookkeeping.Problem,
  examples: Sequence[jax.Array],
  scale: jax.Array,
  some: jax.Array,
  others: frozenset[int],
) -> list[Any]:
  """Runs the second pass: sums scaled gradients, except of some parameters.

  Examples must not hold NaN. If `some` says that no scale [B] is other than 0,
  all sums are 0, and so is what this device adds to the sum of a shard. Returns
  each parameter's sum, or None for the numbers in `others`.
  """
  wanted = [i for i in range(len(problem.leaves)) if i not in others]

  def gather(shard: shards.Shard) -> jax.Array:
    return _kept_if(shard.whole(), some)

  def loss(leaves: list[Any], example: Any, scale: jax.Array) -> jax.Array:
    def product(
      use: WeightUse, weight: jax.Array, operand: jax.Array, tap: Any
    ) -> jax.Array:
      still = jax.lax.stop_gradient
      operand = _as_in_the_other_pass(operand)
      # Never computed forward: its value is unused.
      of_weight = evaluate.tapped(use, weight, still(operand), tap)
      out = evaluate.tapped(use, still(weight), operand, tap)
      return _as_in_the_other_pass(_with_scaled(out, of_weight, scale))

    def on_fallback(weight: jax.Array) -> jax.Array:
      return _with_scaled(jax.lax.stop_gradient(weight), weight, scale)

    values = [*leaves, *problem.frozen, *example]
    return evaluate.forward(
      problem.block,
      values,
      {},
      evaluate.Hooks(product, gather, on_fallback),
    )[0][0]

  def losses(trained: list[Any]) -> jax.Array:
    leaves = list(problem.leaves)
    for i, x in zip(wanted, trained, strict=True):
      leaves[i] = x
    run = jax.vmap(lambda example, scale: loss(leaves, example, scale))
    return run(list(examples), scale)

  out, pull = jax.vjp(losses, [problem.leaves[i] for i in wanted])
  sums: list[Any] = [None] * len(problem.leaves)
  for i, x in zip(wanted, pull(jnp.ones_like(out))[0], strict=True):
    is_part = isinstance(x, shards.Shard)
    sums[i] = x.part if is_part else jnp.where(some, x, 0)
  return sums


@jax.custom_vjp
def _with_scaled(x: jax.Array, same: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns x; passes its gradient to x, and times scale (or 0) to `same`."""
  del same
  # A value that is the same for all examples would have one gradient for all of
  # them, in which single examples cannot be scaled any more.
  return jnp.where(scale < 0, 0, x)


def _scaled_forward(
  x: jax.Array, same: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return _with_scaled(x, same, scale), scale


def _scaled_backward(
  scale: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  g = sharing.computed_once(g)
  # An example that is left out was replaced: its gradient must not count.
  return g, jnp.where(scale != 0, scale.astype(g.dtype) * g, 0), None


_with_scaled.defvjp(_scaled_forward, _scaled_backward)


@jax.custom_vjp
def _kept_if(x: jax.Array, some: jax.Array) -> jax.Array:
  """Returns x, whose gradient, even NaN, becomes 0 unless some is True."""
  del some
  return x


_kept_if.defvjp(
  lambda x, some: (x, some), lambda some, g: (jnp.where(some, g, 0), None)
)
