"""The seam between a clipped gradient and what else a step adds up.

A clipper clips and sums the gradients of a chunk. It may also have extra
leaves: numbers of each example, such as whether its gradient was clipped, whose
noisy sums it learns from. They are added up, reduced and noised together with
the gradient, in one tree and as one Gaussian mechanism. It is registered by
name, or named in settings as "package.module:attribute", is called with a
`ClippedGrad` and its options, and needs a proof of its own; see
`dpdist.accounting.step_events`.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dpdist import registry
from dpdist.clipping import transform

PyTree = Any

# A bound has so many binary digits, and a sum so many of them as well as those
# of the number of examples, so that both fit into the 24 of a float32.
_BOUND_DIGITS, _SUM_DIGITS = 4, 20


class Extra(NamedTuple):
  """An extra leaf.

  Attributes:
    shape: of what each example adds.
    share: of the privacy that a step spends, in (0, 1): of 1 / noise
      multiplier^2. The gradient has what the shares of all leaves leave of 1.
  """

  shape: tuple[int, ...]
  share: float


class Clipped(NamedTuple):
  """A sum with extra leaves, or a tree of that structure.

  Attributes:
    gradient: of clipped gradients, a pytree like params.
    extra: the extra leaves, by name.
  """

  gradient: PyTree
  extra: dict[str, Any]


class Clipper(Protocol):
  """Clips the gradients of examples and adds them up. It must be hashable."""

  @property
  def extra(self) -> Mapping[str, Extra]:
    """Returns the extra leaves by name; empty: there are none."""

  def init(self) -> PyTree:
    """Returns what it learns before the first step: arrays, or () for nothing.

    It is saved in checkpoints, which are released, and on every device.
    """

  def clip(
    self, params: PyTree, batch: PyTree, state: PyTree, **arguments: Any
  ) -> transform.ClippedGrads:
    """Returns the clipped sum of a batch, of the `ClippedGrad`'s sensitivity.

    Args:
      params: as for `ClippedGrad`.
      batch: as for `ClippedGrad`.
      state: what it has learned.
      **arguments: as for `ClippedGrad`.
    """

  def observe(
    self, grads: transform.ClippedGrads, state: PyTree
  ) -> Mapping[str, jax.Array]:
    """Returns the extra leaves of each example, [B, *shape], by name.

    An example counts by at most an l2 norm of 1, to which longer ones are cut;
    NaN counts as 0. Entries are rounded towards 0 to multiples
    of a power of two, at most 2 B / 2^20.
    """

  def finish(
    self, gradient: PyTree, extra: Mapping[str, jax.Array], state: PyTree
  ) -> tuple[PyTree, PyTree]:
    """Returns the gradient for the optimizer, and what it has learned.

    Args:
      gradient: noisy sum over the expected number of examples.
      extra: noisy sums of what examples counted, over that number.
      state: what it had learned.
    """


@registry.register("clipper", "fixed")
@dataclasses.dataclass(frozen=True)
class Fixed:
  """Clips to a norm that never changes, and adds up nothing else."""

  clipped_grad: transform.ClippedGrad

  @property
  def extra(self) -> Mapping[str, Extra]:
    return {}

  def init(self) -> PyTree:
    return ()

  def clip(
    self, params: PyTree, batch: PyTree, state: PyTree, **arguments: Any
  ) -> transform.ClippedGrads:
    return self.clipped_grad(params, batch, **arguments)

  def observe(
    self, grads: transform.ClippedGrads, state: PyTree
  ) -> Mapping[str, jax.Array]:
    return {}

  def finish(
    self, gradient: PyTree, extra: Mapping[str, jax.Array], state: PyTree
  ) -> tuple[PyTree, PyTree]:
    return gradient, state


def bound(l2_clip_norm: float) -> float:
  """Returns by how much an example counts at most in the sum of a leaf.

  It is the clip norm, cut to few binary digits so that products are exact.
  """
  unit = math.ldexp(1.0, math.frexp(l2_clip_norm)[1] - _BOUND_DIGITS)
  return math.floor(l2_clip_norm / unit) * unit


def add_up(
  values: jax.Array, is_padding_example: jax.Array, bound: float
) -> jax.Array:
  """Adds up an extra leaf over the examples of a chunk, times `bound`.

  Guarantees:
    One example moves the sum by at most `bound` in l2 norm, whatever its value,
    and padding moves it by exactly 0. The sum of up to 2^20 examples is exact,
    in whatever order it is computed.

  Args:
    values: [B, *shape], what each example counts.
    is_padding_example: [B] bool.
    bound: from the function `bound`.
  """
  size, *shape = values.shape
  digits = max(0, _SUM_DIGITS - size.bit_length())
  values = values.astype(jnp.float32).reshape(size, -1)
  values = jnp.clip(values, -1e15, 1e15)  # So that no square overflows.
  norms = jnp.sqrt(jnp.sum(values * values, axis=1, keepdims=True))
  is_counted = ~is_padding_example[:, None] & jnp.isfinite(norms)
  # Rounding of the norm and of the quotient, unless the leaf is a number.
  room = 1.0 if values.shape[1] == 1 else 1 - 2.0**-20
  cut = jnp.where(is_counted, values / jnp.maximum(norms / room, 1), 0)
  counts = jnp.trunc(cut * 2**digits).astype(jnp.int32)
  total = jnp.sum(counts, axis=0).astype(jnp.float32)
  return (total * (bound / 2**digits)).reshape(shape)
