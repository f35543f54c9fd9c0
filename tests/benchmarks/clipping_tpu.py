"""What clipped gradients cost on a TPU, told by its compiler: none is needed.

  pip install -e '.[tpu]'
  python -m tests.benchmarks.clipping_tpu [--json] [--topology=v5e:2x2]
    [--models="mlp;cnn"] [--methods="auto;vmap"]

Compiles the ordinary gradient and the clipped sums for one chip, and compares
the floating-point operations, the bytes read and written and the temporary
memory outside the chip that XLA counts in the finished programs. These do not
depend on the machine. The cycles are what XLA expects, and rough.
"""

import argparse
import json
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from tests.benchmarks import clipping
from tests.benchmarks import clipping_models


def _chip(topology: str) -> NamedSharding:
  """One chip of a topology that need not be there."""
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # Otherwise one process at a time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  jax.config.update("jax_platforms", "cpu")
  found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  return NamedSharding(Mesh(found.devices[:1], ("chip",)), PartitionSpec())


def measure(
  name: str, methods: tuple[str, ...], chip: NamedSharding
) -> list[dict[str, Any]]:
  """Returns a row for each candidate on one model."""
  problem = clipping_models.make(name)
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip),
    (problem.params, problem.batch),
  )
  rows: list[dict[str, Any]] = []
  for key, fn in clipping.candidates(problem, methods, "tpu").items():
    program = jax.jit(fn).lower(*args).compile()
    costs = program.cost_analysis()
    cycles = re.findall(r'"estimated_cycles":"(\d+)"', program.as_text())
    row = {
      "flops": costs["flops"],
      "bytes": costs["bytes accessed"],
      "temp": program.memory_analysis().temp_size_in_bytes,
      "cycles": sum(map(int, cycles)),
    }
    first = rows[0] if rows else row
    ratios = {f"{k}_ratio": _ratio(row[k], first[k]) for k in row}
    rows.append({"model": name, "method": key} | row | ratios)
  return rows


def _ratio(one: float, other: float) -> float:
  if one == other:  # Small models need no memory outside the chip.
    return 1.0
  return one / other if other else float("inf")


def main() -> None:
  """Prints a table, or JSON."""
  parser = argparse.ArgumentParser(description="Cost of clipping on a TPU.")
  parser.add_argument("--json", action="store_true", help="print JSON")
  parser.add_argument("--topology", default="v5e:2x2", help="which TPU")
  parser.add_argument("--models", help="names, separated by semicolons")
  parser.add_argument("--methods", default="auto", help="the same")
  arguments = parser.parse_args()
  names = clipping.chosen(
    "models", arguments.models, clipping_models.NAMES, clipping_models.ALL
  )
  methods = clipping.chosen(
    "methods", arguments.methods, clipping.METHODS, clipping.METHODS
  )
  chip = _chip(arguments.topology)
  rows = []
  if not arguments.json:
    print(
      f"{'model':<22} {'method':<28} {'flops':>6} {'bytes':>6} {'temp':>6}"
      f" {'MiB':>6} {'cycles':>6}"
    )
  for name in names:
    more = measure(name, methods, chip)
    rows += more
    if not arguments.json:
      for row in more:
        print(
          f"{row['model']:<22} {row['method']:<28} {row['flops_ratio']:6.3f}"
          f" {row['bytes_ratio']:6.2f} {row['temp_ratio']:6.2f}"
          f" {row['temp'] / 2**20:6.1f} {row['cycles_ratio']:6.2f}",
          flush=True,
        )
  if arguments.json:
    print(
      json.dumps(
        {
          "benchmark": "clipping_tpu",
          "topology": arguments.topology,
          "rows": rows,
        },
        indent=2,
      )
    )


if __name__ == "__main__":
  main()
