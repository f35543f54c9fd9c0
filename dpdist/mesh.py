"""The device mesh, and how arrays lie on it.

Three axes: `data` and `fsdp` divide the examples of a chunk; `model` is there
for models that split single operations, and today computes the same on every
one of its devices. Parameters are replicated on all three.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

AXES = ("data", "fsdp", "model")
EXAMPLES = PartitionSpec(("data", "fsdp"))
REPLICATED = PartitionSpec()


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
    raise ValueError(
      "mesh must give each axis a size above 0, and at most one -1, got"
      f" {dict(sizes)}"
    )
  shape = [len(devices) // known if size == -1 else size for size in shape]
  if math.prod(shape) != len(devices):
    raise ValueError(
      f"mesh must use all {len(devices)} devices, got {dict(sizes)}"
    )
  return jax.make_mesh(
    tuple(shape),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def num_example_shards(mesh: Mesh) -> int:
  """Into how many parts the examples of a chunk are divided."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def examples(mesh: Mesh) -> NamedSharding:
  """Leading axis over the devices that divide the examples."""
  return NamedSharding(mesh, EXAMPLES)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, REPLICATED)


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
