"""Finds the processes that stall a job, from what each last reported.

In a job that hangs, nearly all processes wait for others. The ones that the
others wait for are those behind all others, in step and phase.
"""

from collections.abc import Mapping
from typing import NamedTuple

from dpdist.distributed import progress

# A live process reports every few seconds. JAX aborts a job when it has not
# heard from a process for 100 seconds, with a less clear message.
SILENT_SECONDS = 60.0
# These take as long as models, file systems and held-out data make them.
_UNLIMITED = ("starting", "compiling", "evaluating", "saving", "finishing")
_MOST_NAMED = 4


class ProcessStatus(NamedTuple):
  """What a process last reported.

  Attributes:
    step: the step that it was in.
    phase: one of `dpdist.distributed.progress.PHASES`.
    seconds: how long it had been in the phase.
    silence: seconds since that report.
  """

  step: int
  phase: str
  seconds: float
  silence: float


def silent(statuses: Mapping[str, ProcessStatus], stuck_after: float) -> str:
  """Names the processes that have not reported for too long.

  Args:
    statuses: last reports of processes, by name.
    stuck_after: see `stuck`.

  Returns:
    What is wrong; "" if nothing is.
  """
  if not stuck_after:
    return ""
  patience = min(SILENT_SECONDS, stuck_after)
  names = [
    name for name, status in statuses.items() if status.silence > patience
  ]
  if not names:
    return ""
  status = statuses[names[0]]
  return (
    f"{_names(names)} not heard of for {status.silence:.0f} s, and last"
    f" reported {_place(status)}"
  )


def stuck(statuses: Mapping[str, ProcessStatus], stuck_after: float) -> str:
  """Names the processes that a job waits for, if it has waited too long.

  Args:
    statuses: last reports of all processes, by name.
    stuck_after: seconds that a phase of a step may take; 0 for any time.

  Returns:
    What is wrong; "" if nothing is.
  """
  if not stuck_after:
    return ""
  first = min(map(_position, statuses.values()))
  behind = {
    name: status
    for name, status in statuses.items()
    if _position(status) == first
  }
  seconds = min(status.seconds for status in behind.values())
  (status, *_) = behind.values()
  if status.phase in _UNLIMITED or seconds <= stuck_after:
    return ""
  where = f"stuck in {_place(status)} for {seconds:.0f} s"
  if len(behind) == len(statuses) > 1:
    return f"all {len(statuses)} processes are {where}"
  return f"{_names(list(behind))} {where}, and the others wait"


def _position(status: ProcessStatus) -> tuple[int, int]:
  phase = "computing" if status.phase == "compiling" else status.phase
  return status.step, progress.PHASES.index(phase)


def _place(status: ProcessStatus) -> str:
  if status.step < 0:
    return status.phase
  # People count steps from 1, and so does the console.
  return f"step {status.step + 1} ({status.phase})"


def _names(names: list[str]) -> str:
  more = len(names) - _MOST_NAMED
  text = ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" * (more > 0))
  return f"{text} {'is' if len(names) == 1 else 'are'}"
