"""Parameters of which each device holds a part.

A loss is traced, split and checked as if every parameter were whole. Parts are
gathered only where the whole is used: before a product, or inside the loop or
the rematerialised block that uses it. So no more than one block of a deep model
is ever whole. Norms are those of the whole parameter's gradient. At the same
place in the backward pass the devices' clipped sums are added, and each device
keeps its part (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward
Training Trillion Parameter Models", section 5).
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dpdist import errors

PyTree = Any


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["part"],
  meta_fields=["axis", "dimension"],
)
@dataclasses.dataclass(frozen=True)
class Shard:
  """This device's part of an array."""

  part: jax.Array  # The array's entries on this device.
  axis: str  # The mesh axis along which the parts lie.
  # The array's dimension that is divided, counted from the end, so that it does
  # not change when leading dimensions come and go.
  dimension: int

  def whole(self) -> jax.Array:
    """Gathers the whole array."""
    return jax.lax.all_gather(
      self.part, self.axis, axis=self.dimension % self.part.ndim, tiled=True
    )

  def divides_rows(self) -> bool:
    """Returns whether the array's first dimension is divided."""
    return self.dimension == -self.part.ndim

  def sum(self, total: jax.Array) -> jax.Array:
    """Returns this device's part of the sum of all devices' arrays."""
    return jax.lax.psum_scatter(
      total,
      self.axis,
      scatter_dimension=self.dimension % total.ndim,
      tiled=True,
    )


def wrap(
  params: PyTree, specs: PyTree | None, axes: frozenset[str]
) -> list[Any]:
  """Returns the leaves of params, as inside shard_map, with parts as `Shard`s.

  `specs` is None, or a pytree like params of PartitionSpecs with at most one
  mesh axis. It must be one of `axes`, along which the batch is divided.
  """
  leaves, structure = jax.tree.flatten(params)
  if specs is None:
    return leaves
  # mypy does not accept JAX's class of tree structures as a type.
  any_structure: Any = structure
  return [
    _wrap(leaf, spec, axes)
    for leaf, spec in zip(
      leaves, any_structure.flatten_up_to(specs), strict=True
    )
  ]


def _wrap(leaf: jax.Array, spec: PartitionSpec, axes: frozenset[str]) -> Any:
  named = [(i, name) for i, name in enumerate(spec) if name is not None]
  if not named:
    return leaf
  if len(named) > 1 or named[0][1] not in axes:
    # A sum over devices with the same examples would count them twice.
    raise errors.ArgumentError(
      "param_specs must name at most one mesh axis a parameter, of those along"
      f" which the batch is divided, {sorted(axes)}, got {spec}"
    )
  ((dimension, axis),) = named
  return Shard(leaf, axis, dimension - leaf.ndim)


def whole(x: Any) -> Any:
  """Returns x as a whole array, gathered if it is a shard."""
  return x.whole() if isinstance(x, Shard) else x


def sums(leaves: Sequence[Any], totals: Sequence[jax.Array]) -> list[jax.Array]:
  """Returns what this device keeps of its sums for the whole parameters."""
  return [
    leaf.sum(total) if isinstance(leaf, Shard) else total
    for leaf, total in zip(leaves, totals, strict=True)
  ]
