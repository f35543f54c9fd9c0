"""What a compiled step does, and how long a TPU takes for it at the least.

The numbers are of three kinds: a chip's published peaks, matrix products from
the traced program, and collectives from XLA's text.
"""

import dataclasses
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.extend import core

from dpdist import _validation
from dpdist import errors

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "reduce-scatter",
)
_BITS = {
  **dict.fromkeys(("pred", "s8", "u8"), 8),
  **dict.fromkeys(("bf16", "f16", "s16", "u16"), 16),
  **dict.fromkeys(("f32", "s32", "u32"), 32),
  **dict.fromkeys(("f64", "s64", "u64", "c64"), 64),
}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<shape>\(.*?\)|\S+) "
  r"(?P<kind>[a-z\-]+?)(?P<half>-start|-done)?\(",
)
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations)=\{?([^,}]*)")
_SLICES = re.compile(r" send\(.*_xla_megascale_target=.\{([\d,]+)\}")
_WHILE = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")


class Chip(NamedTuple):
  """A chip's peak numbers, as Google publishes them."""

  # Of bfloat16 products; float32 products become these by default.
  flops_per_second: float
  memory_bytes: float  # Of high-bandwidth memory.
  memory_bandwidth: float  # Bytes a second.
  # Bytes a second to other chips of a slice, in one direction: half of the
  # bidirectional figure.
  link_bandwidth: float
  # Bytes a second to other slices, a chip's share of its host's network cards.
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
  """Describes the devices of a topology, slice by slice, to compile for.

  The topology is a kind of chip and the shape of a slice, as "v6e:16x16"; the
  data center's network joins the slices. Needs libtpu; the process must not use
  a TPU of its own.
  """
  kind, _, shape = topology.partition(":")
  _validation.require(
    kind in CHIPS and shape.replace("x", "").isdecimal(),
    "topology",
    f"one of {sorted(CHIPS)} and a shape, as v6e:16x16",
    topology,
  )
  _validation.check("num_slices", num_slices, _validation.COUNT)
  # Otherwise the plugin asks the cloud which machine this is.
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # Otherwise only one process at a time may load it.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
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


@dataclasses.dataclass(frozen=True)
class Collective:
  """One place in a program that sends."""

  kind: str  # One of `KINDS`.
  # Of its result on one device; for a reduce-scatter, whose result is a part,
  # of its operand.
  num_bytes: int
  group_size: int  # Devices that take part together.
  num_runs: int  # In one run of the program.
  # Whether it uses the data center's network, since XLA sends between slices of
  # TPUs through their hosts.
  is_between_slices: bool = False

  @property
  def bytes_sent(self) -> float:
    """Returns the bytes that a device sends in all runs, in a ring."""
    share = (self.group_size - 1) / self.group_size
    turns = 2 if self.kind == "all-reduce" else 1
    return self.num_runs * self.num_bytes * share * turns


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a compiled program, in the order of its text.

  The text is that of `jax.stages.Compiled.as_text()`. The body of a loop counts
  as often as it runs, if the loop's condition compares a counter with a
  constant, as those of `jax.lax.scan` do.
  """
  bodies = _computations(text)
  runs = _runs(bodies)
  partitions = re.search(r"num_partitions=(\d+)", text)
  num_devices = int(partitions[1]) if partitions else 1
  found: list[Collective] = []
  seen: set[str] = set()
  for name, lines in bodies.items():
    for line in lines:
      if slices := _SLICES.search(line):
        shape = _ARRAY.findall(line)[0]
        found.append(
          Collective(
            "all-reduce",
            _bytes("[".join(shape) + "]", is_pair=False),
            len(slices[1].split(",")),
            runs[name],
            is_between_slices=True,
          )
        )
      match = _INSTRUCTION.match(line)
      if not match or match["kind"] not in KINDS or match["half"] == "-done":
        continue
      channel = re.search(r"channel_id=(\d+)", line)
      if channel and channel[1] != "1" and match["kind"] == "all-gather":
        # Started and ended in fusions of a TPU, each of which has a copy.
        if channel[1] in seen:
          continue
        seen.add(channel[1])
      size = _group_size(line, num_devices)
      if size == 1:
        continue
      kind = match["kind"]
      num_bytes = _bytes(match["shape"], is_pair=match["half"] == "-start")
      if name.startswith("all-reduce-scatter"):
        # A fusion of a TPU, of which each device gets a part.
        kind = "reduce-scatter"
      elif kind == "reduce-scatter":
        num_bytes *= size
      found.append(Collective(kind, num_bytes, size, runs[name]))
  return found


def _computations(text: str) -> dict[str, list[str]]:
  bodies: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      name = "ENTRY" if line.startswith("ENTRY") else match[1]
      lines = bodies.setdefault(name, [])
    else:
      lines.append(line)
  return bodies


def _runs(bodies: dict[str, list[str]]) -> dict[str, int]:
  """Returns how often each computation runs."""
  runs = dict.fromkeys(bodies, 0)

  def visit(name: str, times: int) -> None:
    runs[name] += times
    for line in bodies[name]:
      if loop := _WHILE.search(line):
        visit(loop[2], times * _trips(bodies[loop[1]]))
        continue
      for called in _CALLED.findall(line):
        callee = called.strip().lstrip("%")
        if callee in bodies:
          visit(callee, times)

  visit("ENTRY", 1)
  return runs


def _trips(condition: list[str]) -> int:
  """Returns how often a loop runs; 1 if its condition does not show it."""
  text = "\n".join(condition)
  limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
  return int(limits[0]) if len(limits) == 1 else 1


def _group_size(line: str, num_devices: int) -> int:
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(match[1].split(","))
  # [groups,size]<=[...]
  if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
    return int(match[2])
  # A permutation lists pairs; if no group is listed, all devices are one.
  return 2 if "source_target_pairs" in line else num_devices


def _bytes(shape: str, *, is_pair: bool) -> int:
  """Returns the bytes of all arrays of a shape, without a start's operands."""
  sizes = [
    math.prod(int(n) for n in dims.split(",") if n) * _BITS.get(dtype, 32) // 8
    for dtype, dims in _ARRAY.findall(shape)
  ]
  if is_pair:
    sizes = sizes[len(sizes) // 2 :]
  return sum(sizes)


class Work(NamedTuple):
  """The cost of products."""

  flops: float  # Floating-point operations, two for each multiplication.
  num_bytes: float  # Of operands and results, each read or written once.

  def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
    return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)

  def times(self, n: float) -> "Work":
    """Returns the work of n repetitions."""
    return Work(self.flops * n, self.num_bytes * n)


def count_products(jaxpr: Any) -> Work:
  """Returns the work of a jaxpr and all it calls; of the dearest branch.

  Compilers count a loop's body once. Here it counts as often as it runs, and
  what `jax.shard_map` runs counts for one device.
  """
  total = Work(0, 0)
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      (summed, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      total += _product(eqn, math.prod(shape[i] for i in summed))
    elif name == "conv_general_dilated":
      # Each entry of the result sums over all of the kernel but its output
      # channels.
      kernel = eqn.invars[1].aval.shape
      out = eqn.params["dimension_numbers"].rhs_spec[0]
      total += _product(eqn, math.prod(kernel) // kernel[out])
    elif name == "cond":
      branches = [
        count_products(branch.jaxpr) for branch in eqn.params["branches"]
      ]
      total += max(branches, key=lambda work: work.flops)
    else:
      times = eqn.params["length"] if name == "scan" else 1
      for inner in core.jaxprs_in_params(eqn.params):
        total += count_products(inner).times(times)
  return total


def _product(eqn: Any, summed: int) -> Work:
  (out,) = eqn.outvars
  values = [*eqn.invars, out]
  return Work(
    2 * math.prod(out.aval.shape) * summed,
    sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in values),
  )


def temp_bytes(program: Any) -> int:
  """Returns what a compiled program needs beside its arguments, on a device."""
  analysis = program.memory_analysis()
  grown = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  return int(analysis.temp_size_in_bytes + max(0, grown))


def work(
  name: str, traced: Any, program: Any, chip: Chip, num_model: int
) -> dict[str, Any]:
  """Returns what a compiled program does, and how long a chip takes for it.

  The name is "accumulate" or "apply"; `num_model` chips share one example's
  products.
  """
  done = count_products(traced.jaxpr.jaxpr).times(1 / num_model)
  # Nothing loops in `apply`, which touches all of the state.
  num_bytes = done.num_bytes
  if name == "apply":
    num_bytes = float(program.cost_analysis()["bytes accessed"])
  found = collectives(program.as_text())
  return {
    "flops": done.flops,
    "bytes": num_bytes,
    "collectives": [
      dataclasses.asdict(x) | {"bytes_sent": x.bytes_sent} for x in found
    ],
    "seconds": _seconds(chip, done.flops, num_bytes, found),
  }


def _seconds(
  chip: Chip,
  flops: float,
  num_bytes: float,
  found: list[Collective],
) -> dict[str, float]:
  sent = lambda between: sum(
    x.bytes_sent for x in found if x.is_between_slices == between
  )
  return {
    "arithmetic": flops / chip.flops_per_second,
    "memory": num_bytes / chip.memory_bandwidth,
    "links": sent(False) / chip.link_bandwidth,
    "network": sent(True) / chip.network_bandwidth,
  }
