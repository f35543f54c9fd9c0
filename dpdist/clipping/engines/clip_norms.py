"""Clip norms of groups of parameters, and the factors that they give."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpdist import errors
from dpdist.clipping.engines import sharing

PyTree = Any

# How far underflow may move a scaled gradient, as a part of its greatest norm.
_LOST = 2.0**-20


@dataclasses.dataclass(frozen=True)
class Scaling:
  """How gradients are scaled; l2_clip_norms has one entry for each group.

  Guarantees:
    * A scaled gradient is no longer than `bounds` says, for any norm.
    * An example with a norm that is not finite, or that is not kept, is
      multiplied with exactly 0.
    * No example is multiplied with more than 1 before the sum, so that nothing
      overflows before it; factors above 1 are applied after it.
  """

  l2_clip_norms: tuple[float, ...]  # Above 0.
  rescale_to_unit_norm: bool  # Divide by the clip norm.
  # None to clip, g * min(1, C / |g|); else to normalise, g * C / (|g| + gamma)
  # (Bu et al. 2023, "Automatic Clipping: Differentially Private Deep Learning
  # Made Easier and Stronger").
  normalize_gamma: float | None

  @property
  def bounds(self) -> tuple[float, ...]:
    """Returns the greatest norm of a scaled gradient, for each group."""
    if self.rescale_to_unit_norm:
      return (1.0,) * len(self.l2_clip_norms)
    return self.l2_clip_norms

  @property
  def enlargements(self) -> tuple[float, ...]:
    """Returns each group's power of two, at least every example's factor."""
    greatest = [
      bound / (self.normalize_gamma or clip_norm)
      for bound, clip_norm in zip(self.bounds, self.l2_clip_norms, strict=True)
    ]
    return tuple(2.0 ** max(0, math.ceil(math.log2(x))) for x in greatest)

  def scales(
    self,
    norms: Sequence[jax.Array],
    keep: jax.Array,
    lost: Sequence[jax.Array] = (),
  ) -> tuple[list[jax.Array], list[jax.Array]]:
    """Computes the factors, without `enlargements`.

    `norms` and `lost` hold [B] for each group, `norms` in float32 or wider.
    `lost` says by how much a scaled gradient can be wrong because intermediate
    numbers are too small for their dtype; it is empty if nothing is lost.

    Returns factors, at most 1, and norms, [B] for each group. An example is
    left out of all groups if the norm of one is not finite, and of a group if
    it is scaled and loses too much: lost terms may have cancelled others, which
    would remain.
    """
    bounds = [
      bound / more
      for bound, more in zip(self.bounds, self.enlargements, strict=True)
    ]
    factors = self._factors(bounds, norms, keep)
    if lost:
      factors = [
        jnp.where((factor < 1) & ~(less <= _LOST * bound), 0, factor)
        for factor, less, bound in zip(factors, lost, bounds, strict=True)
      ]
    # Otherwise a compiler would compute them, and all norms, anew for each
    # parameter's sum.
    return [sharing.computed_once(x) for x in factors], list(norms)

  def enlarged(
    self, sums: Sequence[jax.Array], groups: Sequence[int]
  ) -> list[jax.Array]:
    """Applies `enlargements` to the parameters' sums, scaled by `scales`."""
    more = self.enlargements
    return [x * more[i] for x, i in zip(sums, groups, strict=True)]

  def of_norms(
    self, norms: Sequence[jax.Array], keep: jax.Array
  ) -> list[jax.Array]:
    """Returns the whole factors, `enlargements` included."""
    return self._factors(self.bounds, norms, keep)

  def _factors(
    self,
    bounds: Sequence[float],
    norms: Sequence[jax.Array],
    keep: jax.Array,
  ) -> list[jax.Array]:
    # inf * 0 is NaN, and comparisons with NaN do not catch it.
    for norm in norms:
      keep = keep & jnp.isfinite(norm)
    scales = []
    for norm, clip_norm, bound in zip(
      norms, self.l2_clip_norms, bounds, strict=True
    ):
      if self.normalize_gamma is None:
        divisor = jnp.maximum(norm, clip_norm)
      else:
        divisor = norm + self.normalize_gamma
      factor = bound / divisor
      # The rounding error of a subnormal factor is a large part of it.
      fits = factor >= jnp.finfo(factor.dtype).tiny
      scales.append(jnp.where(keep & fits, factor, 0))
    return scales


def groups(
  params: PyTree, l2_clip_norm: PyTree, is_frozen: Sequence[bool]
) -> list[int]:
  """Returns for each trained parameter the number of its clip norm.

  `l2_clip_norm` is a number, or a prefix pytree of params with a number for
  each group. A group with a trained parameter must have a norm; one that is
  wholly frozen must have None, since a norm would count in the sensitivity.
  """
  norms, of_norms = jax.tree.flatten(l2_clip_norm, is_leaf=lambda x: x is None)
  # mypy does not accept JAX's class of tree structures as a type.
  prefix: Any = of_norms
  try:
    subtrees = prefix.flatten_up_to(params)
  except ValueError as error:
    raise errors.ArgumentError(
      "l2_clip_norm must be a number or a prefix pytree of params, got"
      f" {l2_clip_norm!r} for params {jax.tree.structure(params)}"
    ) from error
  numbers = []
  frozen = iter(is_frozen)
  number = 0
  for norm, subtree in zip(norms, subtrees, strict=True):
    flags = [next(frozen) for _ in jax.tree.leaves(subtree)]
    if norm is None and not all(flags):
      raise errors.ArgumentError(
        "l2_clip_norm must hold a norm for each group that is trained, got"
        f" None for one in {l2_clip_norm!r}"
      )
    if norm is not None and flags and all(flags):
      raise errors.ArgumentError(
        "l2_clip_norm must hold None for a group that is wholly frozen, or it"
        f" would count in the sensitivity, got {norm!r} for one in"
        f" {l2_clip_norm!r}"
      )
    numbers += [number for flag in flags if not flag]
    number += norm is not None
  return numbers
