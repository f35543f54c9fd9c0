"""From norms to what each example's gradient is multiplied with."""

from collections.abc import Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp

from dpdist.clipping.engines import sharing

# The part of the greatest norm of a scaled gradient by which what underflows
# may move it.
_LOST = 2.0**-20


@dataclasses.dataclass(frozen=True)
class Scaling:
  """How gradients are shortened; one entry of l2_clip_norms a group.

  Guarantees:
    * A scaled gradient is no longer than `bounds` says, for any norm.
    * An example of which a norm is not finite, or that is not kept, is
      multiplied with exactly 0.
    * No example is multiplied with more than 1 before the sum, so that nothing
      overflows on the way there; what is above 1 comes after it.

  Attributes:
    l2_clip_norms: above 0.
    rescale_to_unit_norm: divide by the clip norm.
    normalize_gamma: None to clip, g * min(1, C / |g|); else to normalise,
      g * C / (|g| + gamma) (Bu et al. 2023, "Automatic Clipping: Differentially
      Private Deep Learning Made Easier and Stronger").
  """

  l2_clip_norms: tuple[float, ...]
  rescale_to_unit_norm: bool
  normalize_gamma: float | None

  @property
  def bounds(self) -> tuple[float, ...]:
    """The greatest norm of a scaled gradient, for each group."""
    if self.rescale_to_unit_norm:
      return (1.0,) * len(self.l2_clip_norms)
    return self.l2_clip_norms

  @property
  def enlargements(self) -> tuple[float, ...]:
    """What the sums are multiplied with, for each group: a power of two, which
    rounds nothing, no smaller than the factor of any example."""
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
    """Computes the factors, but for `enlargements`.

    Args:
      norms: [B] of each group, float32 or wider.
      keep: [B] bool.
      lost: for each group, [B]: by how much a scaled gradient can differ from
        what it should be because numbers on the way there are too small for
        their dtype; empty if nothing is lost.

    Returns:
      Factors, at most 1, and norms, [B] a group. An example is left out of all
      groups if the norm of one is not finite, and of a group if it is scaled
      and loses too much: what it should cancel with would be left.
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
    # Else a compiler would compute them anew for each parameter's sum, and all
    # norms with them.
    return [sharing.computed_once(x) for x in factors], list(norms)

  def enlarged(
    self, sums: Sequence[jax.Array], groups: Sequence[int]
  ) -> list[jax.Array]:
    """The sums of gradients that were multiplied with what `scales` returns.

    Args:
      sums: for each parameter.
      groups: for each parameter the number of its group.
    """
    more = self.enlargements
    return [x * more[i] for x, i in zip(sums, groups, strict=True)]

  def of_norms(
    self, norms: Sequence[jax.Array], keep: jax.Array
  ) -> list[jax.Array]:
    """The whole factors, from the norms."""
    return self._factors(self.bounds, norms, keep)

  def _factors(
    self,
    bounds: Sequence[float],
    norms: Sequence[jax.Array],
    keep: jax.Array,
  ) -> list[jax.Array]:
    # inf * 0 is NaN, and NaN passes a comparison.
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
      # A subnormal number would be rounded by a large part of itself.
      fits = factor >= jnp.finfo(factor.dtype).tiny
      scales.append(jnp.where(keep & fits, factor, 0))
    return scales
