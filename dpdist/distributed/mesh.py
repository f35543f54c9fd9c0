"""The device mesh, and how arrays are laid out on it.

The mesh has three axes. `data` and `fsdp` divide the examples of a chunk;
`fsdp` also divides each parameter and everything that is kept beside it.
`model` divides the parameters that a model has rules for, and single operations
with them; along it XLA's partitioner decides what is sent when.
"""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from dpdist import errors

AXES = ("data", "fsdp", "model")
EXAMPLE_AXES = ("data", "fsdp")
EXAMPLES = PartitionSpec(EXAMPLE_AXES)
REPLICATED = PartitionSpec()

_ALL_DEVICES = errors.Hint(
  flags=(
    "--config.mesh.data=-1",
    "--config.mesh.fsdp=1",
    "--config.mesh.model=1",
  )
)

# How a model's parameters are divided over `model`: a pattern that is searched
# for in the parameter's path, as "blocks/up/kernel", and which of its last
# dimensions is divided, as (None, "model").
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]


def make(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Makes the mesh of devices; a size of -1 takes those that remain."""
  devices = jax.devices() if devices is None else devices
  shape = [sizes[axis] for axis in AXES]
  known = math.prod(size for size in shape if size != -1)
  if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
    raise errors.ArgumentError(
      "mesh must give each axis a size above 0, and at most one -1, got"
      f" {dict(sizes)}",
      hint=_ALL_DEVICES,
    )
  shape = [len(devices) // known if size == -1 else size for size in shape]
  if math.prod(shape) != len(devices):
    raise errors.ArgumentError(
      f"mesh must use all {len(devices)} devices, got {dict(sizes)}",
      hint=_ALL_DEVICES,
    )
  return Mesh(
    _arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def _arranged(
  shape: Sequence[int], devices: Sequence[jax.Device]
) -> np.ndarray:
  """Arranges devices so that neighbors in the machine are mesh neighbors.

  TPU slices, which only the data center's network joins, stay whole along
  `data`.
  """
  slices: dict[int, list[jax.Device]] = {}
  for device in devices:
    slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
  data, *rest = shape
  if data % len(slices):
    raise errors.ArgumentError(
      f"mesh.data must be a multiple of the {len(slices)} slices, got {data}",
      hint=_ALL_DEVICES,
    )
  parts = [
    mesh_utils.create_device_mesh(
      (data // len(slices), *rest), part, allow_split_physical_axes=True
    )
    for _, part in sorted(slices.items())
  ]
  return np.concatenate(parts)


def num_example_shards(mesh: Mesh) -> int:
  """Returns the number of parts that a chunk's examples are divided into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def examples(mesh: Mesh) -> NamedSharding:
  """Returns the sharding with the leading axis over the example shards."""
  return NamedSharding(mesh, EXAMPLES)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding with the whole array on every device."""
  return NamedSharding(mesh, REPLICATED)


def manual_axes(mesh: Mesh) -> frozenset[str]:
  """Returns the axes that shard_map handles by hand; XLA has the others."""
  return frozenset(EXAMPLE_AXES if mesh.shape["model"] > 1 else AXES)


def partition(params: Any, mesh: Mesh, rules: Rules = ()) -> Any:
  """Returns a PartitionSpec for each parameter.

  Over `model` the first rule that fits decides. Over `fsdp` the longest
  dimension is divided that is left and divides evenly, the last of equals. What
  cannot be divided is whole on every device.
  """

  def spec(path: Any, leaf: Any) -> PartitionSpec:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = _model_axes(name, leaf.shape, mesh.shape["model"], rules)
    size = mesh.shape["fsdp"]
    free = [
      (length, i)
      for i, length in enumerate(leaf.shape)
      if axes[i] is None and length % size == 0
    ]
    if size > 1 and free:
      axes[max(free)[1]] = "fsdp"
    return PartitionSpec(*axes) if any(axes) else REPLICATED

  return jax.tree_util.tree_map_with_path(spec, params)


def _model_axes(
  name: str, shape: tuple[int, ...], size: int, rules: Rules
) -> list[str | None]:
  axes: list[str | None] = [None] * len(shape)
  if size == 1:
    return axes
  for pattern, last in rules:
    if not re.search(pattern, name):
      continue
    if len(last) > len(shape):
      raise errors.ArgumentError(
        f"the model's rule {pattern!r} must be for at most the {len(shape)}"
        f" dimensions of {name}, got {last}"
      )
    axes[len(shape) - len(last) :] = last
    for length, axis in zip(shape, axes, strict=True):
      if axis is not None and length % size:
        raise errors.ArgumentError(
          f"mesh.model must divide the dimensions of {name} {shape} that the"
          f" model divides, {last}, got {size}",
          hint=_ALL_DEVICES,
        )
    break
  return axes


def without_model(spec: PartitionSpec) -> PartitionSpec:
  """Returns a spec without its `model` axis."""
  return PartitionSpec(*(None if axis == "model" else axis for axis in spec))


def summed_axes(spec: PartitionSpec) -> tuple[str, ...]:
  """Returns the axes that divide the examples but not an array of this spec."""
  return tuple(axis for axis in EXAMPLE_AXES if axis not in spec)


def stacked(spec: PartitionSpec) -> PartitionSpec:
  """Returns the spec of partial sums, stacked along `summed_axes`."""
  return PartitionSpec(summed_axes(spec), *spec)


def specs_of_parts(tree: Any, params: Any, specs: Any) -> Any:
  """Returns the layout of a tree whose parts like params lie like them."""
  structure: Any = jax.tree.structure(params)
  shapes = [x.shape for x in jax.tree.leaves(params)]

  def is_like(part: Any) -> bool:
    return bool(jax.tree.structure(part) == structure) and shapes == [
      x.shape for x in jax.tree.leaves(part)
    ]

  return jax.tree.map(
    lambda part: specs if is_like(part) else REPLICATED,
    tree,
    is_leaf=is_like,
  )


def constrain(tree: Any, specs: Any, mesh: Mesh) -> Any:
  """Constrains the layout of a traced pytree."""
  return jax.tree.map(
    lambda x, spec: jax.lax.with_sharding_constraint(
      x, NamedSharding(mesh, spec)
    ),
    tree,
    specs,
  )


def place(tree: Any, specs: Any, mesh: Mesh) -> Any:
  """Divides whole arrays, equal in all processes, over the mesh."""

  def divide(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    if spec == REPLICATED:
      return replicate(x, mesh)
    host = np.asarray(x)
    return jax.make_array_from_callback(
      host.shape, NamedSharding(mesh, spec), lambda index: host[index]
    )

  return jax.tree.map(divide, tree, specs)


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Copies arrays, equal in all processes, to every device of the mesh."""
  sharding = replicated(mesh)
  devices = sharding.addressable_devices_indices_map(())

  # Device by device: jax.device_put to a mesh of processes with one device each
  # makes arrays whose shards cannot be read (jax 0.10.2).
  def copy(x: jax.Array) -> jax.Array:
    parts = [jax.device_put(x, device) for device in devices]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

  return jax.tree.map(copy, tree)


def whole(x: jax.Array | np.ndarray) -> np.ndarray:
  """Copies an array to this process's memory; to be called in all processes."""
  if isinstance(x, jax.Array) and not (
    x.is_fully_addressable or x.is_fully_replicated
  ):
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)


def chunk_multiple(clipping: Any, mesh: Mesh) -> tuple[int, str]:
  """Returns the divisor of a chunk's size, and the setting it comes from."""
  size, name = clipping.microbatch_size, "microbatch_size"
  if clipping.exact_sum:
    # A group is computed at once, or in microbatches that divide it.
    size, name = clipping.exact_group_size, "exact_group_size"
  return num_example_shards(mesh) * max(1, size), name


def put_rows(rows: np.ndarray, chunk_size: int, mesh: Mesh) -> jax.Array:
  """Puts this process's rows of a chunk (see `local_rows`) on the mesh."""
  shape = (chunk_size, *rows.shape[1:])
  return jax.make_array_from_process_local_data(examples(mesh), rows, shape)


def bytes_per_device(tree: Any, specs: Any, mesh: Mesh) -> int:
  """Returns the bytes that arrays or shapes take on one device."""
  sizes = jax.tree.map(
    lambda x, spec: (
      math.prod(NamedSharding(mesh, spec).shard_shape(x.shape))
      * x.dtype.itemsize
    ),
    tree,
    specs,
  )
  return sum(jax.tree.leaves(sizes))


def local_rows(
  mesh: Mesh, chunk_size: int, devices: Sequence[jax.Device] | None = None
) -> np.ndarray:
  """Returns the rows of a chunk that this process, or devices, hold, int64."""
  devices = mesh.local_devices if devices is None else devices
  indices = examples(mesh).devices_indices_map((chunk_size,))
  return np.unique(
    [np.arange(chunk_size)[indices[device]] for device in devices]
  )
