"""Checks along one direction that gradients are as long as their norms say.

The derivative of an example's loss along v ~ N(0, I) is <g, v>. Forward mode
computes it without any of our rules or norms. It is normal with standard
deviation |g|, so that a scaled gradient of at most C has

  P(scale |<g, v>| > 6.5 C) <= P(|N(0, 1)| > 6.5) = 8.03e-11.

For an example beyond that limit, the norm is taken to be too small, and the
example adds 0 to the sum; with several groups the limit is longer, see
`limit_of`. With the check below, a scaled gradient of length k C is found with
probability 0.32 for k = 6.5, 0.52 for 10, 0.74 for 20 and 0.82 from 50 on; none
is found for k = 1.02. An example whose derivative is not finite also adds 0,
but raises no alarm.

That the numbers are floats adds little:
  * Float32 normals are at most 5.42. They are normals under the condition that
    all lie in a symmetric box, which makes {|<g, v>| <= t} no less likely
    (Royen 2014, the Gaussian correlation inequality). Their grid moves <g, v>
    by 1e-4 of |g|, rounding to bfloat16 by 2^-9: P stays below 1e-10.
  * The derivative itself is rounded, and by much where large terms cancel; in
    bfloat16 that is common. So a suspect is confirmed: the derivative is taken
    again along eight other directions, v with each entry made longer or shorter
    by 2^-6. A true derivative moves by about 2^-6 of |g|; one that is rounding
    error is drawn anew. Only where all eight are within an eighth of the first
    is the example left out.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist import errors
from dpdist.clipping import freezing
from dpdist.clipping import tracing
from dpdist.clipping.engines.clip_norms import Scaling
from dpdist.clipping.trace import evaluate
from dpdist.clipping.trace import shards
from dpdist.clipping.trace import varying_axes

PyTree = Any

# The limit for an example with one group, in clip norms.
_LIMIT = 6.5
_CONFIRMATIONS = 8
_CHANGE = 2.0**-6
_AGREES = 2.0**-3

# Maps a direction, an array a parameter, to the derivatives [B] along it.
Derive = Callable[[Sequence[Any]], jax.Array]


class Seen(NamedTuple):
  """What a watched chunk showed; sensitive.

  The loop reads only whether any entry of `found` is not 0.
  """

  # int32 [devices, trained parameters], the number of examples that were left
  # out because they were longer than their norms said, each counted at the
  # parameter with its longest part; plus 1 for a sum that is not finite, which
  # is left out as a whole.
  found: jax.Array
  norms: PyTree  # [chunk], of the examples' gradients before clipping.


def limit_of(num_groups: int) -> float:
  """Returns the length, in clip norms, beyond which an example is a suspect.

  With several groups, each is checked on its own against a longer limit: the
  probability that any passes it is at most that of one group passing 6.5.
  """
  normal = statistics.NormalDist()
  return -normal.inv_cdf(normal.cdf(-_LIMIT) / num_groups)


@dataclasses.dataclass(frozen=True, eq=False)
class Watched(Scaling):
  """Scaling that leaves out examples that are longer than their norms say."""

  derive: Derive  # Returns the derivatives of the losses along a direction.
  # An array, or `shards.Shard`, of normal numbers a parameter.
  direction: Sequence[Any]
  # For each parameter the number of the group it is clipped with.
  groups: Sequence[int]
  # What `scales` found, [B, parameters] bool: for each example that is left
  # out, True at the parameter with its longest part. It belongs to the one
  # trace that this object is made in.
  found: list[jax.Array] = dataclasses.field(default_factory=list)

  def scales(
    self,
    norms: Sequence[jax.Array],
    keep: jax.Array,
    lost: Sequence[jax.Array] = (),
  ) -> tuple[list[jax.Array], list[jax.Array]]:
    """Computes `Scaling`'s factors, but 0 for examples that it finds."""
    scales, norms = super().scales(norms, keep, lost)
    bounds = [
      bound / more
      for bound, more in zip(self.bounds, self.enlargements, strict=True)
    ]
    seen = [self.derive(self._of_group(i)) for i in range(len(bounds))]
    limit = limit_of(len(bounds))
    suspects = [
      jnp.abs(scale * d) > limit * bound
      for scale, d, bound in zip(scales, seen, bounds, strict=True)
    ]
    some = jnp.any(jnp.stack(suspects))
    # Confirming gathers parameters, so all devices with parts of one must agree
    # whether to confirm.
    axes = {x.axis for x in self.direction if isinstance(x, shards.Shard)}
    for axis in sorted(axes):
      some = jax.lax.pmax(some.astype(jnp.int32), axis) > 0

    def confirm() -> jax.Array:
      return self._confirmed(scales, bounds, seen, suspects)

    nobody = jnp.zeros((*keep.shape, len(self.groups)), bool)
    nobody = nobody & suspects[0][:, None]
    found = jax.lax.cond(some, confirm, lambda: nobody)
    self.found.append(found)
    # If an example's derivative overflows, nothing is known: raise no alarm,
    # for its norm may be right.
    is_known = jnp.all(jnp.isfinite(jnp.stack(seen)), axis=0)
    out = jnp.any(found, axis=1) | ~is_known
    return [jnp.where(out, 0, scale) for scale in scales], norms

  def _of_group(self, group: int) -> list[Any]:
    return [
      x if its_group == group else jax.tree.map(jnp.zeros_like, x)
      for x, its_group in zip(self.direction, self.groups, strict=True)
    ]

  def _confirmed(
    self,
    scales: Sequence[jax.Array],
    bounds: Sequence[float],
    seen: Sequence[jax.Array],
    suspects: Sequence[jax.Array],
  ) -> jax.Array:
    """Returns which suspects are no rounding error, [B, parameters] bool."""
    changed = _CONFIRMATIONS * len(seen)

    def one(number: jax.Array) -> jax.Array:
      of_group = number // _CONFIRMATIONS
      direction = []
      for i, (whole, group) in enumerate(
        zip(self.direction, self.groups, strict=True)
      ):
        own = number * len(self.groups) + i

        def change(x: jax.Array, own: Any = own, group: int = group) -> Any:
          longer = 1 + _CHANGE * signs(x.shape, own).astype(x.dtype)
          return jnp.where(of_group == group, x * longer, 0)

        def alone(x: jax.Array, i: int = i) -> jax.Array:
          return jnp.where(number == changed + i, x, 0)

        direction.append(
          jax.tree.map(
            lambda x, change=change, alone=alone: jnp.where(
              number < changed, change(x), alone(x)
            ).astype(x.dtype),
            whole,
          )
        )
      return self.derive(direction)

    along = jax.lax.map(one, jnp.arange(changed + len(self.groups)))
    sure = []
    for group, (d, suspect) in enumerate(zip(seen, suspects, strict=True)):
      again = along[group * _CONFIRMATIONS : (group + 1) * _CONFIRMATIONS]
      agrees = jnp.abs(again - d) <= _AGREES * jnp.abs(d)
      sure.append(suspect & jnp.all(agrees, axis=0))
    lengths = jnp.stack(
      [
        jnp.where(sure[group], jnp.abs(scales[group] * along[changed + i]), -1)
        / bounds[group]
        for i, group in enumerate(self.groups)
      ],
      axis=1,
    )
    longest = jax.nn.one_hot(
      jnp.argmax(lengths, axis=1), len(self.groups), dtype=bool
    )
    return longest & jnp.any(jnp.stack(sure), axis=0)[:, None]


def seen(grads: Any) -> tuple[Any, Seen | None]:
  """Returns grads, a sum that is not finite set to 0, and a `Seen` or None."""
  if grads.found is None:
    return grads, None
  is_finite = jnp.stack(
    [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(grads.sum)]
  )
  counts = jnp.sum(grads.found, axis=0, dtype=jnp.int32) + ~is_finite
  # A sum of clipped gradients cannot be like that, and no example can be named.
  kept = jax.tree.map(
    lambda x: jnp.where(jnp.all(is_finite), x, 0), (grads.sum, grads.low)
  )
  grads = grads._replace(sum=kept[0], low=kept[1])
  return grads, Seen(counts[None], grads.grad_norms)


def laid_out(
  direction: PyTree | None, leaves: Sequence[Any], axes: frozenset[str]
) -> list[Any] | None:
  """Returns the direction's leaves laid out like the parameters; None of None.

  `leaves` are the trained parameters, some of which may be `shards.Shard`s. The
  examples vary over the mesh axes `axes`.
  """
  if direction is None:
    return None
  found = varying_axes.cast_to_varying(jax.tree.leaves(direction), axes)
  wanted = [x.part if isinstance(x, shards.Shard) else x for x in leaves]
  kinds = [[(x.shape, x.dtype) for x in xs] for xs in (found, wanted)]
  if kinds[0] != kinds[1]:
    raise errors.ArgumentError(
      "direction must be like the parameters that are trained,"
      f" {kinds[1]}, got {kinds[0]}"
    )
  return [
    dataclasses.replace(x, part=v) if isinstance(x, shards.Shard) else v
    for x, v in zip(leaves, found, strict=True)
  ]


def signs(shape: Sequence[int], seed: jax.Array | int) -> jax.Array:
  """Returns public pseudorandom signs, 1 and -1, int32.

  Does not use `jax.random`, which takes a second to compile for eight devices.
  """
  x = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
  x = x + jnp.asarray(seed, jnp.uint32) * jnp.uint32(0x9E3779B9)
  # The last steps of MurmurHash3, which make each bit depend on all bits.
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return 1 - 2 * ((x ^ (x >> 16)) & 1).astype(jnp.int32)


def found(scaling: Scaling) -> jax.Array | None:
  """Returns what was found, [B, parameters] bool; None if unwatched."""
  if not isinstance(scaling, Watched):
    return None
  (one,) = scaling.found
  return one


def watch(
  scaling: Scaling,
  traced: tracing.Traced,
  parts: freezing.Split,
  examples: tuple[PyTree, ...],
  direction: Sequence[Any] | None,
  groups: Sequence[int],
) -> Scaling:
  """Returns the same scaling, which checks examples if there is a direction.

  A loss with effects is not looked at: what it writes would be written again.
  `direction` comes from `laid_out`; `groups` has for each trained parameter the
  number of the group it is clipped with.
  """
  if direction is None:
    return scaling
  derive = _deriver(traced, parts.trainable, parts.frozen, examples)
  fields = {
    field.name: getattr(scaling, field.name)
    for field in dataclasses.fields(scaling)
  }
  return Watched(
    **fields, derive=derive, direction=direction, groups=tuple(groups)
  )


def _deriver(
  traced: tracing.Traced,
  leaves: Sequence[Any],
  frozen: Sequence[Any],
  examples: tuple[PyTree, ...],
) -> Derive:
  leaves, frozen = list(leaves), list(frozen)
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
  axes = varying_axes.varying_axes((leaves, examples))

  if traced.effects:
    some = jax.tree.leaves(examples)[0]
    nothing = varying_axes.cast_to_varying(jnp.zeros(some.shape[0]), axes)
    return lambda direction: nothing

  if traced.block.has_custom_vjp():
    # A custom_vjp has no forward mode: take one gradient after the other.
    whole = [shards.whole(x) for x in leaves]
    constants = [shards.whole(x) for x in frozen]

    def dotted(example: tuple[PyTree, ...], direction: list[Any]) -> jax.Array:
      loss = lambda leaves: traced.loss_fn(leaves, constants, *example)[0]
      parts = zip(jax.grad(loss)(whole), direction, strict=True)
      # Not a dot product, whose operands accelerators round.
      sums = [jnp.sum(wide(g) * wide(v)) for g, v in parts]
      return jnp.sum(jnp.stack(sums))

    def derive(direction: Sequence[Any]) -> jax.Array:
      along = [shards.whole(x) for x in direction]
      return jax.lax.map(lambda example: dotted(example, along), examples)

    return derive

  in_parts = any(isinstance(x, shards.Shard) for x in (*leaves, *frozen))

  def one(example: tuple[PyTree, ...], direction: list[Any]) -> jax.Array:
    def loss(leaves: list[Any]) -> jax.Array:
      if not in_parts:
        return traced.loss_fn(leaves, frozen, *example)[0]
      # Gathers no more than one block of a deep model at a time.
      values = [*leaves, *frozen, *jax.tree.leaves(example)]
      return evaluate.forward(traced.block, values, {})[0][0]

    return wide(jax.jvp(loss, (leaves,), (direction,))[1])

  def forward(direction: Sequence[Any]) -> jax.Array:
    along = varying_axes.cast_to_varying(list(direction), axes)
    return jax.vmap(one, in_axes=(0, None))(examples, along)

  return forward
