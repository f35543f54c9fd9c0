"""Records times and memory of a job's machines, process by process.

PRIVATE, like the data: a step takes longer when more examples were drawn, and
no noise covers how many were. None of this is among the released metrics
(`dpdist.reporting.metrics`); it goes to a directory of its own, `operations`,
that only its owner can enter.
"""

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
import pathlib
import statistics

import jax

from dpdist.distributed import progress as progress_lib
from dpdist.reporting import rows

FOLDER = "operations"
"""In the run's directory."""
FILE = "telemetry.jsonl"
"""In that folder."""

# The phases that a step waits for; evaluating and saving are extra.
_STEP = ("reading", "charging", "computing", "reducing", "agreeing")
_STATM = pathlib.Path("/proc/self/statm")


class Writer(rows.Log):
  """Writes the rows of all processes; a context manager."""

  def __init__(self, workdir: str | os.PathLike[str], *, start_step: int):
    """Makes the directory if it is missing; see `rows.Log`."""
    folder = pathlib.Path(workdir) / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    super().__init__(
      folder / FILE, folder, start_step=start_step, has_times=True
    )

  def write(
    self,
    step: int,
    machines: Sequence[str],
    job: Mapping[str, float] | None = None,
  ) -> None:
    """Writes what `measure` returned in each process, and values of the job."""
    scalars = _scalars([json.loads(row) for row in machines])
    self._write(step, scalars | dict(job or {}))


def measure(progress: progress_lib.Progress, num_steps: int) -> str:
  """Returns this process's mean times and its memory now, as JSON."""
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


def _scalars(machines: Sequence[Mapping[str, float]]) -> dict[str, float]:
  scalars = {
    f"process_{number}/{name}": value
    for number, row in enumerate(machines)
    for name, value in row.items()
  }
  own = [row["own_seconds"] for row in machines]
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
  devices = [device.memory_stats() or {} for device in jax.local_devices()]
  memory = {}
  for name, key in (
    ("device_bytes", "bytes_in_use"),
    ("device_peak_bytes", "peak_bytes_in_use"),
  ):
    values = [stats[key] for stats in devices if key in stats]
    if values:
      memory[name] = max(values)
  return memory
