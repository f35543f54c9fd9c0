"""TPU chips and topologies, for machines that are not at hand."""

import os
from typing import Any, NamedTuple

from dpdist import errors


class Chip(NamedTuple):
  """A chip's peak numbers, as Google publishes them.

  Attributes:
    flops_per_second: of bfloat16 products; float32 products become these by
      default.
    memory_bytes: of high-bandwidth memory.
    memory_bandwidth: bytes a second.
    link_bandwidth: bytes a second to other chips of a slice, in one direction:
      half of the bidirectional figure.
    network_bandwidth: bytes a second to other slices, a chip's share of its
      host's network cards.
  """

  flops_per_second: float
  memory_bytes: float
  memory_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float


# cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, read in November 2026. A pod's
# network bandwidth is divided by its chips; for v4, a host's 100 Gbit/s by 4.
CHIPS = {
  "v4": Chip(275e12, 32e9, 1228e9, 150e9, 3.1e9),
  "v5e": Chip(197e12, 16e9, 819e9, 200e9, 3.1e9),
  "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 6.2e9),
  "v6e": Chip(918e12, 32e9, 1640e9, 400e9, 12.5e9),
}


def devices(topology: str, num_slices: int = 1) -> list[Any]:
  """Describes the devices of a topology, to compile for.

  Needs libtpu. The process must not use a TPU of its own.

  Args:
    topology: a kind of chip and the shape of a slice, as "v6e:16x16".
    num_slices: the number of slices, joined by the data center's network.

  Returns:
    jax.Device-like descriptions, slice by slice.

  Raises:
    ValueError: there is no such topology, or no libtpu.
  """
  kind, colon, shape = topology.partition(":")
  if kind not in CHIPS or not colon or not shape.replace("x", "").isdecimal():
    raise ValueError(
      f"topology must be one of {sorted(CHIPS)} and a shape, as v6e:16x16, got"
      f" {topology!r}"
    )
  if num_slices < 1:
    raise ValueError(f"num_slices must be at least 1, got {num_slices}")
  # Otherwise the plugin asks the cloud which machine this is.
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # Otherwise only one process at a time may load it.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  import jax
  from jax.experimental import topologies

  jax.config.update("jax_platforms", "cpu")
  several = {"num_slices": num_slices} if num_slices > 1 else {}
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, **several
    )
  except Exception as error:
    reason = str(error).splitlines()[0]
    raise errors.ArgumentError(
      f"topology must be one that libtpu knows (pip install 'dpdist[tpu]'), got"
      f" {topology!r}: {reason}",
      hint=errors.Hint(text="pip install 'dpdist[tpu]'"),
    ) from error
  return list(found.devices)
