"""What a process is doing: which phase of which step, and for how long.

The training loop says so here, for less than a microsecond a time. Others
read it: `dpdist.distributed.watchdog` to find who holds a job up,
`dpdist.reporting.telemetry` to tell where the time goes.
"""

import collections
import time
from typing import NamedTuple

PHASES = (
  "starting",
  "reading",
  "charging",
  "compiling",
  "computing",
  "reducing",
  "agreeing",
  "evaluating",
  "saving",
  "finishing",
)
"""In the order in which they come in a step.

`compiling` comes before all steps; see `dpdist.training.dry_run`. Until the end
of computing a process needs no other one.
"""


class Now(NamedTuple):
  """A moment of a process.

  Attributes:
    step: that it is in, from 0; -1 before the first.
    phase: one of `PHASES`.
    since: when it came to the phase, on the clock of `time.monotonic`.
  """

  step: int
  phase: str
  since: float


class Progress:
  """What this process is doing.

  Attributes:
    now: may be read in any thread.
  """

  def __init__(self) -> None:
    self.now = Now(-1, "starting", time.monotonic())
    self._seconds: dict[str, float] = collections.defaultdict(float)

  def enter(self, step: int, phase: str) -> None:
    """Says that a phase begins, and the one before it ends."""
    before, now = self.now, time.monotonic()
    self._seconds[before.phase] += now - before.since
    self.now = Now(step, phase, now)

  def take(self) -> dict[str, float]:
    """Seconds by phase in those that ended since the last call."""
    seconds = dict(self._seconds)
    self._seconds.clear()
    return seconds
