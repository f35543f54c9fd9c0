"""Records which phase of which step a process is in, and for how long.

The training loop records it here, in less than a microsecond each time.
`dpdist.distributed.watchdog` reads it to find the process that stalls a job,
and `dpdist.reporting.telemetry` to show where the time goes.
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
  """What a process is doing at a moment.

  Attributes:
    step: the step that it is in, from 0; -1 before the first.
    phase: one of `PHASES`.
    since: when the phase began, on the clock of `time.monotonic`.
  """

  step: int
  phase: str
  since: float


class Progress:
  """Tracks what this process is doing.

  Attributes:
    now: may be read in any thread.
  """

  def __init__(self) -> None:
    self.now = Now(-1, "starting", time.monotonic())
    self._seconds: dict[str, float] = collections.defaultdict(float)

  def enter(self, step: int, phase: str) -> None:
    """Records that a phase begins, and that the one before it ends."""
    before, now = self.now, time.monotonic()
    self._seconds[before.phase] += now - before.since
    self.now = Now(step, phase, now)

  def drain(self) -> dict[str, float]:
    """Returns seconds by phase, of phases that ended since the last call."""
    seconds = dict(self._seconds)
    self._seconds.clear()
    return seconds
