"""Records where in a step each process is, and finds those that stall a job.

The training loop records its phases in a `Progress`, in less than a microsecond
each time. `dpdist.distributed.watchdog` sends them to the primary process, and
`dpdist.reporting.telemetry` shows where the time goes.

In a job that hangs, nearly all processes wait for others. The ones that the
others wait for are those behind all others, in step and phase.
"""

import collections
from collections.abc import Callable, Mapping
import time
from typing import NamedTuple

PHASES = (
  "starting",
  "loading",
  "planning",
  "reading",
  "charging",
  "compiling",
  "checking",
  "measuring",
  "computing",
  "reducing",
  "agreeing",
  "evaluating",
  "saving",
  "finishing",
)
"""In the order in which they come in a step.

`loading` and `planning` come before all steps, and so do `compiling` and
`checking`; see `dpdist.training.dry_run`. Until the end of computing a process
needs no other one.
"""

# A live process reports every few seconds. JAX aborts a job when it has not
# heard from a process for 100 seconds, with a less clear message.
SILENT_SECONDS = 60.0
# These take as long as models, file systems and held-out data make them.
_UNLIMITED = (
  *("starting", "loading", "planning", "compiling", "checking"),
  "measuring",
  *("evaluating", "saving", "finishing"),
)
_MOST_NAMED = 4


class ProcessStatus(NamedTuple):
  """What a process last reported."""

  step: int  # The step that it was in, from 0; -1 before the first.
  phase: str  # One of `PHASES`.
  seconds: float  # How long it had been in the phase.
  silence: float = 0.0  # Seconds since that report.


class Progress:
  """Tracks what this process is doing. `status` may be called in any thread."""

  def __init__(self, on_enter: Callable[[str], None] | None = None) -> None:
    """Makes one that has just started; on_enter is called with each phase."""
    self._on_enter = on_enter
    self._now = (-1, "starting", time.monotonic())
    self._seconds: dict[str, float] = collections.defaultdict(float)

  def enter(self, step: int, phase: str) -> None:
    """Records that a phase begins, and that the one before it ends."""
    (_, ended, since), now = self._now, time.monotonic()
    self._seconds[ended] += now - since
    self._now = (step, phase, now)
    if self._on_enter is not None:
      self._on_enter(phase)

  def status(self) -> ProcessStatus:
    """Returns what this process is doing now."""
    step, phase, since = self._now
    return ProcessStatus(step, phase, time.monotonic() - since)

  def drain(self) -> dict[str, float]:
    """Returns seconds by phase, of phases that ended since the last call."""
    seconds = dict(self._seconds)
    self._seconds.clear()
    return seconds


def find_silent(
  statuses: Mapping[str, ProcessStatus], stuck_after: float
) -> str:
  """Names the processes that have not reported for too long; "": none."""
  if not stuck_after:
    return ""
  patience = min(SILENT_SECONDS, stuck_after)
  silent = {k: s for k, s in statuses.items() if s.silence > patience}
  if not silent:
    return ""
  (status, *_) = silent.values()
  return (
    f"{_names(silent)} not heard of for {status.silence:.0f} s, and last"
    f" reported {_place(status)}"
  )


def find_stuck(
  statuses: Mapping[str, ProcessStatus], stuck_after: float
) -> str:
  """Names the processes that a job waits for, if it has waited too long.

  Returns "" if they waited no more than stuck_after seconds, or if that is 0.
  """
  if not stuck_after:
    return ""
  first = min(map(_position, statuses.values()))
  behind = {k: s for k, s in statuses.items() if _position(s) == first}
  seconds = min(status.seconds for status in behind.values())
  (status, *_) = behind.values()
  if status.phase in _UNLIMITED or seconds <= stuck_after:
    return ""
  where = f"stuck in {_place(status)} for {seconds:.0f} s"
  if len(behind) == len(statuses) > 1:
    return f"all {len(statuses)} processes are {where}"
  return f"{_names(behind)} {where}, and the others wait"


def _position(status: ProcessStatus) -> tuple[int, int]:
  phase = status.phase
  if phase in ("compiling", "checking", "measuring"):
    phase = "computing"
  return status.step, PHASES.index(phase)


def _place(status: ProcessStatus) -> str:
  if status.step < 0:
    return status.phase
  # People count steps from 1, and so does the console.
  return f"step {status.step + 1} ({status.phase})"


def _names(statuses: Mapping[str, ProcessStatus]) -> str:
  names = list(statuses)
  text = ", ".join(names[:_MOST_NAMED])
  if len(names) > _MOST_NAMED:
    text += f" and {len(names) - _MOST_NAMED} more"
  return f"{text} {'is' if len(names) == 1 else 'are'}"
