"""Lists what a compiled program sends: its collectives, from XLA's text.

The body of a loop counts as often as it runs, if the loop's condition compares
a counter with a constant, as those of `jax.lax.scan` do.
"""

import dataclasses
import math
import re

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


@dataclasses.dataclass(frozen=True)
class Collective:
  """One place in a program that sends.

  Attributes:
    kind: one of `KINDS`.
    num_bytes: of its result on one device; for a reduce-scatter, whose result
      is a part, of its operand.
    group_size: devices that take part together.
    num_runs: in one run of the program.
    is_between_slices: whether it uses the data center's network, since XLA
      sends between slices of TPUs through their hosts.
  """

  kind: str
  num_bytes: int
  group_size: int
  num_runs: int
  is_between_slices: bool = False

  @property
  def bytes_sent(self) -> float:
    """Returns the bytes that one device sends in all runs, in a ring.

    No algorithm needs fewer.
    """
    share = (self.group_size - 1) / self.group_size
    turns = 2 if self.kind == "all-reduce" else 1
    return self.num_runs * self.num_bytes * share * turns


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a compiled program.

  Args:
    text: from `jax.stages.Compiled.as_text()`.

  Returns:
    Each place that sends to other devices, in the order of the text.
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
