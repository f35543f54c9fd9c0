"""Finds the largest chunk that fits this machine, by trying.

Sizes are doubled until one does not fit or holds nearly every draw, and then
bisected. To try a size, its program is compiled, and its memory compared with
what is free; if that is enough, it is run. (On a CPU, whose memory the system
overcommits until it kills a process, the free memory is the bound.) The sizes
that fit then take turns, so that their speeds can be compared on a machine
whose own speed drifts.
"""

from collections.abc import Callable
import statistics
from typing import Any

import jax

from dpdist.distributed import mesh as mesh_lib
from dpdist.profiling import measure

_ROUNDS = 3
# The answer is within this fraction of the largest that fits.
_PRECISION = 1 / 8
# The first try is this fraction of a chunk that holds nearly every draw.
_FIRST = 32


def search(
  bench: measure.Bench, *, free_bytes: int | None = None
) -> dict[str, Any]:
  """Finds the largest chunk that fits into a device's free bytes.

  They are measured if `free_bytes` is None. Returns, JSON-able, "tries", each
  with "chunk_size", "bytes", "fits" and, if it fits, "chunk_seconds" and
  "examples_per_second", in the order in which they were made; "largest" that
  fits, or None; and "fastest" of those that were tried.
  """
  free = free_bytes
  if free is None:
    free = measure.free_bytes(bench.step.mesh)
  multiple = mesh_lib.num_example_shards(bench.step.mesh) * max(
    1, bench.config.clipping.microbatch_size
  )
  most = measure.most_useful(bench)
  tries: list[dict[str, Any]] = []
  runs: dict[int, Callable[[], float]] = {}

  def fits(size: int) -> bool:
    needed, run = _try(bench, size, free)
    tries.append({"chunk_size": size, "bytes": needed, "fits": run is not None})
    if run is not None:
      runs[size] = run
    return run is not None

  good, bad = 0, most + multiple
  size = max(multiple, most // _FIRST // multiple * multiple)
  while good < most < bad:
    if fits(size):
      good, size = size, min(2 * size, most)
    else:
      bad = size
  while bad - good > max(multiple, _PRECISION * bad) and good < most:
    size = (good + bad) // 2 // multiple * multiple
    if size <= good:
      break
    if fits(size):
      good = size
    else:
      bad = size
  turns = [{size: run() for size, run in runs.items()} for _ in range(_ROUNDS)]
  for row in tries:
    if row["fits"]:
      size = row["chunk_size"]
      seconds = statistics.median(turn[size] for turn in turns)
      row["chunk_seconds"] = seconds
      row["examples_per_second"] = size / seconds
  fastest = max(
    (row for row in tries if row["fits"]),
    key=lambda row: row["examples_per_second"],
    default={"chunk_size": None},
  )
  return {
    "free_bytes": free,
    "tries": tries,
    "largest": good or None,
    "fastest": fastest["chunk_size"],
  }


def _try(
  bench: measure.Bench, size: int, free: int
) -> tuple[int | None, Callable[[], float] | None]:
  """Returns the bytes needed (None: unknown), and a runner if it fits."""
  needed = None
  try:
    needed, run = measure.trial(bench, size)
    if needed > free:
      return needed, None
    run()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return needed, None
  return needed, run
