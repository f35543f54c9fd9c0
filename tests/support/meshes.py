"""Meshes of eight devices or fewer, by a name for a test's parameters."""

import math

import jax
from jax.sharding import Mesh

from dpdist.distributed import mesh

# Devices along each of `mesh.AXES`.
SHAPES = {
  "1": (1, 1, 1),
  "2": (2, 1, 1),
  "4": (2, 2, 1),
  "8": (8, 1, 1),
  "8, fsdp": (2, 4, 1),
  "8, model": (2, 2, 2),
}


def of(name: str) -> Mesh:
  """Makes one of `SHAPES` from the first devices."""
  return shaped(SHAPES[name])


def shaped(shape: tuple[int, ...]) -> Mesh:
  """Makes a mesh of so many devices along each axis, from the first ones."""
  return mesh.make(
    dict(zip(mesh.AXES, shape, strict=True)), jax.devices()[: math.prod(shape)]
  )
