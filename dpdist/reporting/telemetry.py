"""Records times and memory of a job's machines, process by process.

PRIVATE, like the data: a step takes longer when more examples were drawn, and
no noise covers how many were. None of this is among the released metrics
(`dpdist.reporting.metrics`); it goes to TensorBoard in a directory of its own,
`operations`, that only its owner can enter.
"""

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
import pathlib
import statistics
from typing import Self

import jax

from dpdist.distributed import progress as progress_lib
from dpdist.reporting import tensorboard

FOLDER = "operations"
"""In the run's directory."""

# The phases that a step waits for; evaluating and saving are extra.
_STEP = ("reading", "charging", "computing", "reducing", "agreeing")
_STATM = pathlib.Path("/proc/self/statm")


class Writer:
  """Writes the rows of all processes; a context manager."""

  def __init__(self, workdir: str | os.PathLike[str], *, start_step: int):
    """Makes the directory if it is missing.

    Args:
      workdir: of the run.
      start_step: the step resumed from.
    """
    folder = pathlib.Path(workdir) / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    self._events = tensorboard.Events(
      folder, purge_step=start_step + 1, tells_time=True
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: object, *rest: object) -> None:
    self._events.__exit__(kind, *rest)

  def write(
    self, step: int, rows: Sequence[str], job: Mapping[str, float] | None = None
  ) -> None:
    """Writes what `measure` returned in each process, in their order.

    Args:
      step: updates made.
      rows: of the processes.
      job: of all of them together, by name.
    """
    scalars = _scalars([json.loads(row) for row in rows])
    self._events.write(step, scalars | dict(job or {}))


def measure(progress: progress_lib.Progress, num_steps: int) -> str:
  """Returns this process's times and memory since the last call.

  Args:
    progress: of this process.
    num_steps: steps in that time, without one that compiled.

  Returns:
    JSON: means over the steps, in seconds, and memory now, in bytes.
  """
  seconds = progress.drain()
  mean = lambda *phases: (
    sum(seconds.get(x, 0.0) for x in phases) / max(1, num_steps)
  )
  row = {
    "step_seconds": mean(*_STEP),
    "input_wait_seconds": mean("reading"),
    # Before it needs the other processes.
    "own_seconds": mean("reading", "computing"),
    "host_bytes": _resident(),
  }
  return json.dumps(row | _device_memory())


def _scalars(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
  scalars = {
    f"process_{number}/{name}": value
    for number, row in enumerate(rows)
    for name, value in row.items()
  }
  own = [row["own_seconds"] for row in rows]
  scalars["straggler_ratio"] = max(own) / (statistics.median(own) or 1.0)
  return scalars


def _resident() -> int:
  """Returns the bytes of memory that this process holds; 0 if unknown."""
  with contextlib.suppress(OSError):
    pages = int(_STATM.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
  return 0


def _device_memory() -> dict[str, float]:
  """Returns the memory of this process's fullest device; {} if unknown."""
  told = [device.memory_stats() or {} for device in jax.local_devices()]
  memory = {}
  for name, key in (
    ("device_bytes", "bytes_in_use"),
    ("device_peak_bytes", "peak_bytes_in_use"),
  ):
    values = [stats[key] for stats in told if key in stats]
    if values:
      memory[name] = max(values)
  return memory
