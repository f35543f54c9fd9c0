"""The lean engine: norms layer by layer, then a second, weighted backward pass.

For models that only just fit, and loops or rematerialised parts whose
activations must not be kept: wherever a weight has a rule of its own, its norm
is computed inside the backward pass, at the place where operand and gradient
exist anyway, and nothing else is stored. A second forward and backward pass
then sums the gradients, each multiplied with its example's scale (Lee & Kifer
2021, "Scaling up Differentially Private Deep Learning with Fast Per-Example
Gradient Clipping"). That is about two thirds dearer than book-keeping, in the
memory of an ordinary gradient.

There the losses are multiplied. Here the scale enters where a gradient meets a
weight, and the pass through the activations is the one that the norms came
from: of a scaled loss it would round otherwise, and where large terms cancel,
what the norms never saw would be left in the sum.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dpdist.clipping import bookkeeping
from dpdist.clipping import evaluate
from dpdist.clipping import manual_axes
from dpdist.clipping import norms
from dpdist.clipping import shards
from dpdist.clipping.program import Site
from dpdist.clipping.rules import Rule

Key = tuple[int, ...]


def clipped_sum(
  problem: bookkeeping.Problem,
  examples: Sequence[jax.Array],
  keep: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
  """Sums clipped per-example gradients; see `bookkeeping.clipped_sum`."""
  found, outs = _norms(problem, examples, keep.shape)
  scales, found = problem.scaling.scales(found, keep)
  kept = scales[0] != 0
  # An example that is left out may hold NaN, and NaN * 0 is NaN. In the second
  # pass another one stands in for it, with scale 0.
  index = jnp.where(kept, jnp.arange(kept.size), jnp.argmax(kept))
  examples = [x[index] for x in examples]
  # Without a barrier the compiler would merge the two passes into one.
  examples, scales = jax.lax.optimization_barrier((examples, scales))
  if (
    len(scales) == 1
    and problem.block.is_wide()
    and not problem.block.has_custom_vjp()
    and not _rounds_what_is_kept(problem)
  ):
    sums = _weighted_gradient(problem, examples, scales[0], jnp.any(kept))
  else:
    # Several scales an example, products that would be summed in less than
    # float32, a derivative of the user's, that need not scale with the loss, or
    # rounding that the norms have no room for: as in book-keeping, with the
    # scales known beforehand.
    operands, cotangents, _ = bookkeeping.backward(problem, examples)
    formed = [
      bookkeeping.norms_of(problem, rule, operands, cotangents)[1]
      if rule.way == "keep"
      else None
      for rule in problem.rules
    ]
    sums = bookkeeping.weighted_sum(
      problem, operands, cotangents, formed, scales
    )
  return sums, outs, found


def _norms(
  problem: bookkeeping.Problem,
  examples: Sequence[jax.Array],
  shape: tuple[int, ...],
) -> tuple[list[jax.Array], list[jax.Array]]:
  inside = {
    rule.sites[0].key: _summed_by_a_product(rule)
    for rule in problem.rules
    if _is_local(rule)
  }
  taps = {
    site.key: jnp.zeros((*shape, *site.lengths), jnp.float32)
    if site.key in inside
    else jnp.zeros((*shape, *site.tap_shape), site.out.dtype)
    for site in problem.block.all_sites()
  }
  taps = manual_axes.cast_to_varying(
    taps, manual_axes.varying_axes((list(problem.leaves), list(examples)))
  )

  def product(
    site: Site, weight: jax.Array, operand: jax.Array, tap: Any
  ) -> jax.Array:
    if site.key not in inside:
      return evaluate.tapped(site, weight, operand, tap)
    return _with_norm(problem, inside[site.key], weight, operand, tap)

  def losses(taps: dict[Key, jax.Array]) -> tuple[jax.Array, Any]:
    def one(example: Any, taps: Any) -> Any:
      outs, operands = evaluate.forward(
        problem.block,
        problem.inputs(example),
        taps,
        product=product,
      )
      return outs, {k: x for k, x in operands.items() if k not in inside}

    outs, operands = jax.vmap(one)(list(examples), taps)
    return outs[0], (outs, operands)

  loss, pull, (outs, operands) = jax.vjp(losses, taps, has_aux=True)
  (cotangents,) = pull(jnp.ones_like(loss))
  total = [jnp.zeros(shape, jnp.float32) for _ in problem.scaling.bounds]
  for rule in map(_summed_by_a_product, problem.rules):
    first = rule.sites[0]
    if first.key in inside:
      group = problem.groups[min(rule.leaves)]
      # Each iteration of a loop has a weight of its own.
      mine = norms.of(cotangents[first.key].reshape(*shape, -1), -1)
      total[group] = norms.hypot(total[group], mine)
      continue
    found, _ = bookkeeping.norms_of(problem, rule, operands, cotangents)
    for group, mine in found.items():
      total[group] = norms.hypot(total[group], mine)
  return total, outs


def _summed_by_a_product(rule: Rule) -> Rule:
  """A rule whose gradients are formed for the norm alone."""
  return dataclasses.replace(rule, way="drop") if rule.way == "keep" else rule


def _rounds_what_is_kept(problem: bookkeeping.Problem) -> bool:
  """Whether a product would be summed that has no room for its rounding: norms
  of gradients that are kept are those of what book-keeping sums."""
  return any(
    rule.way == "keep" and problem.unit_roundoff(rule) > 0
    for rule in problem.rules
  )


def _is_local(rule: Rule) -> bool:
  """Whether a rule needs one operand and one gradient at a time."""
  (first, *more) = rule.sites
  return (
    not more
    and first.eqn is not None
    and rule.view != "parameters"
    and all(first.weight.loops)
  )


def _with_norm(
  problem: bookkeeping.Problem,
  rule: Rule,
  weight: jax.Array,
  operand: jax.Array,
  tap: jax.Array,
) -> jax.Array:
  """A product whose backward pass leaves the norm as the tap's gradient."""
  (site,) = rule.sites
  lone = dataclasses.replace(
    site, lengths=(), weight=site.weight._replace(loops=())
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
      dataclasses.replace(rule, sites=(lone,)),
      {site.key: operand},
      {site.key: cotangent},
    )
    return None, of_operand, norm.astype(jnp.float32)

  product.defvjp(forward, backward)
  return product(weight, operand, tap)


def _weighted_gradient(
  problem: bookkeeping.Problem,
  examples: Sequence[jax.Array],
  scale: jax.Array,
  some: jax.Array,
) -> list[jax.Array]:
  """The sum of the scaled gradients; 0 unless some are kept, in what a device
  adds to the sum of a shard too."""

  def gather(shard: shards.Shard) -> jax.Array:
    return _kept_if(shard.whole(), some)

  def loss(leaves: list[Any], example: Any, scale: jax.Array) -> jax.Array:
    def product(
      site: Site, weight: jax.Array, operand: jax.Array, tap: Any
    ) -> jax.Array:
      still = jax.lax.stop_gradient
      # Never computed forward: nobody uses its value.
      of_weight = evaluate.tapped(site, weight, still(operand), tap)
      out = evaluate.tapped(site, still(weight), operand, tap)
      return _with_scaled(out, of_weight, scale)

    def promote(weight: jax.Array) -> jax.Array:
      return _with_scaled(jax.lax.stop_gradient(weight), weight, scale)

    values = [*leaves, *problem.frozen, *example]
    return evaluate.forward(
      problem.block,
      values,
      {},
      product=product,
      gather=gather,
      promote=promote,
    )[0][0]

  def losses(leaves: list[Any]) -> jax.Array:
    run = jax.vmap(lambda example, scale: loss(leaves, example, scale))
    return run(list(examples), scale)

  out, pull = jax.vjp(losses, list(problem.leaves))
  return [
    x.part if isinstance(x, shards.Shard) else jnp.where(some, x, 0)
    for x in pull(jnp.ones_like(out))[0]
  ]


@jax.custom_vjp
def _with_scaled(x: jax.Array, same: jax.Array, scale: jax.Array) -> jax.Array:
  """x; its gradient is x's as it is, and that of `same` times scale, or 0."""
  del same
  # What is the same for all examples would have one gradient for all of them,
  # in which nothing can be scaled any more.
  return x + (0 * scale).astype(x.dtype)


def _scaled_forward(
  x: jax.Array, same: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return _with_scaled(x, same, scale), scale


def _scaled_backward(
  scale: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  # An example that is left out has a stand-in, of which nothing may remain.
  return g, jnp.where(scale != 0, scale.astype(g.dtype) * g, 0), None


_with_scaled.defvjp(_scaled_forward, _scaled_backward)


@jax.custom_vjp
def _kept_if(x: jax.Array, some: jax.Array) -> jax.Array:
  """x, whose gradient is 0 unless some is True: NaN included."""
  del some
  return x


_kept_if.defvjp(
  lambda x, some: (x, some), lambda some, g: (jnp.where(some, g, 0), None)
)
