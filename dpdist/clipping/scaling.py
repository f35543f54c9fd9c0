"""From norms to what each example's gradient is multiplied with."""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Scaling:
  """How gradients are shortened; one entry of l2_clip_norms a group.

  Guarantees:
    * A scaled gradient is no longer than `bounds` says, for any norm.
    * An example of which a norm is not finite, or that is not kept, is
      multiplied with exactly 0.

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

  def scales(
    self, norms: Sequence[jax.Array], keep: jax.Array
  ) -> tuple[list[jax.Array], list[jax.Array]]:
    """Computes the factors.

    Args:
      norms: [B] of each group, float32 or wider.
      keep: [B] bool.

    Returns:
      Factors and norms, [B] a group. An example is left out of all groups if
      the norm of one is not finite.
    """
    return self.of_norms(norms, keep), list(norms)

  def of_norms(
    self, norms: Sequence[jax.Array], keep: jax.Array
  ) -> list[jax.Array]:
    """The factors alone, from the norms."""
    # inf * 0 is NaN, and NaN passes a comparison.
    for norm in norms:
      keep = keep & jnp.isfinite(norm)
    scales = []
    for norm, clip_norm, bound in zip(
      norms, self.l2_clip_norms, self.bounds, strict=True
    ):
      if self.normalize_gamma is None:
        divisor = jnp.maximum(norm, clip_norm)
      else:
        divisor = norm + self.normalize_gamma
      scales.append(jnp.where(keep, bound / divisor, 0))
    return scales
