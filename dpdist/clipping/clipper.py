"""The interface of a clipper: it clips gradients, and may add up more.

A clipper clips and sums the gradients of a chunk. It may also have extra
leaves: numbers of each example, such as whether its gradient was clipped. They
are added up, reduced and noised together with the gradient, in one tree and as
one Gaussian mechanism. The clipper learns from their noisy sums.

A clipper is registered by name, or settings name it as
"package.module:attribute". It is called with a `ClippedGrad` and its options.
It needs a proof of its own; see `dpdist.accounting.step_events`.
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

# Binary digits of a bound, and of the sum of all examples' counts. The product
# of both fits into the 24 digits of a float32.
_BOUND_DIGITS, _SUM_DIGITS = 4, 20


class Extra(NamedTuple):
  """An extra leaf."""

  shape: tuple[int, ...]  # Of what each example adds.
  # The leaf's part, in (0, 1), of what a step spends, which is measured by 1 /
  # noise multiplier^2. The gradient has the rest.
  share: float


class Clipped(NamedTuple):
  """A sum with extra leaves, or a tree of that structure."""

  gradient: PyTree  # The sum of clipped gradients, a pytree like params.
  extra: dict[str, Any]  # The extra leaves, by name.


class Clipper(Protocol):
  """Clips the gradients of examples and adds them up. It must be hashable."""

  @property
  def extra(self) -> Mapping[str, Extra]:
    """Returns the extra leaves by name; empty: there are none."""

  def init(self) -> PyTree:
    """Returns its state before the first step: arrays, or () if there are none.

    Every device and every checkpoint holds it, and checkpoints are released.
    """

  def clip(
    self, params: PyTree, batch: PyTree, state: PyTree, **arguments: Any
  ) -> transform.ClippedGrads:
    """Returns a batch's clipped sum, with the sensitivity of `ClippedGrad`.

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

    What an example adds to a leaf is cut to an l2 norm of 1, and NaN counts as
    0. Entries are rounded towards 0, to multiples of a power of two that is at
    most 2 B / 2^20.
    """

  def finish(
    self, gradient: PyTree, extra: Mapping[str, jax.Array], state: PyTree
  ) -> tuple[PyTree, PyTree]:
    """Returns the gradient for the optimizer, and what it has learned.

    Args:
      gradient: the noisy sum, divided by the expected number of examples.
      extra: the noisy sums of the extra leaves, divided by that number.
      state: what it had learned before the step.
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
  """Returns the clip norm cut to few binary digits: products are exact."""
  unit = math.ldexp(1.0, math.frexp(l2_clip_norm)[1] - _BOUND_DIGITS)
  return math.floor(l2_clip_norm / unit) * unit


def add_up(
  values: jax.Array, is_padding_example: jax.Array, bound: float
) -> jax.Array:
  """Adds up an extra leaf [B, ...] over the examples of a chunk, times `bound`.

  Guarantees:
    One example moves the sum by at most `bound` in l2 norm, whatever its value,
    and padding moves it by exactly 0. The sum of up to 2^20 examples is exact,
    in whatever order it is computed.
  """
  size, *shape = values.shape
  digits = max(0, _SUM_DIGITS - size.bit_length())
  values = values.astype(jnp.float32).reshape(size, -1)
  values = jnp.clip(values, -1e15, 1e15)  # So that no square overflows.
  norms = jnp.sqrt(jnp.sum(values * values, axis=1, keepdims=True))
  is_counted = ~is_padding_example[:, None] & jnp.isfinite(norms)
  room = room_of(values.shape[1])
  cut = jnp.where(is_counted, values / jnp.maximum(norms / room, 1), 0)
  counts = jnp.trunc(cut * 2**digits).astype(jnp.int32)
  total = jnp.sum(counts, axis=0).astype(jnp.float32)
  return (total * (bound / 2**digits)).reshape(shape)


def room_of(num_entries: int) -> float:
  """Returns the norm to which a leaf is cut, so that 1 is never exceeded.

  A float32 sum of n squares, in whatever order, is short of the true one by at
  most n 2^-24 of it. The rest is for the square root and the quotient. A single
  number loses nothing that truncation does not take away.
  """
  if num_entries == 1:
    return 1.0
  return 1 / (1 + 2.0**-20 + num_entries * 2.0**-23)
