"""The device mesh, and how arrays lie on it.

Three axes. `data` and `fsdp` divide the examples of a chunk; `fsdp` divides
each parameter as well, and all that is kept beside it. `model` divides the
parameters that a model has rules for, and with them single operations; there
XLA's partitioner decides what is sent when.
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

# How a model's parameters are divided over `model`: a pattern, searched for in
# the parameter's path, as "blocks/up/kernel", and which of its last dimensions
# is divided, as (None, "model").
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]


def make(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Makes the mesh.

  Args:
    sizes: an int for each of "data", "fsdp" and "model"; one of them may be -1,
      whatever remains.
    devices: to use all of; None: those of the job.

  Returns:
    A mesh with the axes `AXES`.

  Raises:
    ValueError: the sizes do not fit the devices.
  """
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
  """Neighbours on the mesh are neighbours in the machine; slices, which only
  the data center's network joins, are whole along `data`."""
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
  """Into how many parts the examples of a chunk are divided."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def examples(mesh: Mesh) -> NamedSharding:
  """Leading axis over the devices that divide the examples."""
  return NamedSharding(mesh, EXAMPLES)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, REPLICATED)


def manual_axes(mesh: Mesh) -> frozenset[str]:
  """The axes along which shard_map works by hand; the others are XLA's."""
  return frozenset(EXAMPLE_AXES if mesh.shape["model"] > 1 else AXES)


def partition(params: Any, mesh: Mesh, rules: Rules = ()) -> Any:
  """How parameters are divided.

  Over `model` by the first rule that fits; over `fsdp` along the longest
  dimension that is left and can be divided evenly, the last of equals. What
  cannot be divided is whole on every device.

  Args:
    params: pytree of arrays or shapes.
    mesh: with the axes `AXES`.
    rules: of the model.

  Returns:
    A PartitionSpec for each parameter.

  Raises:
    ValueError: a rule does not fit a parameter's shape.
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
      raise ValueError(
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
  """What a spec says of the axes that are not `model`."""
  return PartitionSpec(*(None if axis == "model" else axis for axis in spec))


def summed_axes(spec: PartitionSpec) -> tuple[str, ...]:
  """The axes that divide the examples and not an array of that spec."""
  return tuple(axis for axis in EXAMPLE_AXES if axis not in spec)


def stacked(spec: PartitionSpec) -> PartitionSpec:
  """Of partial sums, one for each device along `summed_axes`, stacked along a
  new first axis of the array."""
  return PartitionSpec(summed_axes(spec), *spec)


def constrain(tree: Any, specs: Any, mesh: Mesh) -> Any:
  """Says how a traced pytree lies."""
  return jax.tree.map(
    lambda x, spec: jax.lax.with_sharding_constraint(
      x, NamedSharding(mesh, spec)
    ),
    tree,
    specs,
  )


def place(tree: Any, specs: Any, mesh: Mesh) -> Any:
  """Divides a pytree of whole arrays of this process.

  All processes must have the same values.
  """

  def divide(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    if spec == REPLICATED:
      return replicate(x, mesh)
    host = np.asarray(x)
    return jax.make_array_from_callback(
      host.shape, NamedSharding(mesh, spec), lambda index: host[index]
    )

  return jax.tree.map(divide, tree, specs)


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Copies a pytree of arrays of this process to every device of the mesh.

  All processes must have the same values.
  """
  sharding = replicated(mesh)
  devices = sharding.addressable_devices_indices_map(())

  # Device by device: jax.device_put to a mesh of processes with one device each
  # makes arrays whose shards cannot be had (jax 0.10.2).
  def copy(x: jax.Array) -> jax.Array:
    parts = [jax.device_put(x, device) for device in devices]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

  return jax.tree.map(copy, tree)


def whole(x: jax.Array | np.ndarray) -> np.ndarray:
  """An array in this process's memory, wherever its parts are.

  To be called in all processes.
  """
  if isinstance(x, jax.Array) and not (
    x.is_fully_addressable or x.is_fully_replicated
  ):
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)


def chunk_multiple(clipping: Any, mesh: Mesh) -> tuple[int, str]:
  """What a chunk is a multiple of, and by which setting of `clipping`."""
  size, name = clipping.microbatch_size, "microbatch_size"
  if clipping.exact_sum:
    # A group is worked on at once, or in microbatches that divide it.
    size, name = clipping.exact_group_size, "exact_group_size"
  return num_example_shards(mesh) * max(1, size), name


def put_rows(rows: np.ndarray, chunk_size: int, mesh: Mesh) -> jax.Array:
  """Puts this process's rows of a chunk, see `local_rows`, on the mesh."""
  shape = (chunk_size, *rows.shape[1:])
  return jax.make_array_from_process_local_data(examples(mesh), rows, shape)


def bytes_per_device(tree: Any, specs: Any, mesh: Mesh) -> int:
  """What arrays or shapes take on one device."""
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
  """The rows of a chunk that a process holds, ascending, int64.

  Args:
    mesh: of the job.
    chunk_size: examples over the mesh at once.
    devices: of the process; None: those of this one.
  """
  devices = mesh.local_devices if devices is None else devices
  indices = examples(mesh).devices_indices_map((chunk_size,))
  return np.unique(
    [np.arange(chunk_size)[indices[device]] for device in devices]
  )
