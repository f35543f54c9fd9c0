"""Who holds a job up, judged by what its processes last told.

In a job that hangs nearly all processes wait for others. Those that are behind
all others, in step and phase, are the ones that are waited for.
"""

from collections.abc import Mapping
from typing import NamedTuple

from dpdist.distributed import progress

# A process that lives tells so every few seconds. JAX aborts a job of which it
# has not heard for 100 seconds, and does not say it as clearly.
SILENT_SECONDS = 60.0
# These take as long as models, file systems and held-out data make them.
_UNLIMITED = ("starting", "compiling", "evaluating", "saving", "finishing")
_MOST_NAMED = 4


class Sign(NamedTuple):
  """What a process last told.

  Attributes:
    step: that it was in.
    phase: one of `dpdist.distributed.progress.PHASES`.
    seconds: how long it had been there.
    silence: seconds since it told that.
  """

  step: int
  phase: str
  seconds: float
  silence: float


def silent(signs: Mapping[str, Sign], stuck_after: float) -> str:
  """Names the processes that have told nothing for long.

  Args:
    signs: of processes, by their names.
    stuck_after: see `stuck`.

  Returns:
    What is wrong; "" if nothing is.
  """
  if not stuck_after:
    return ""
  patience = min(SILENT_SECONDS, stuck_after)
  names = [name for name, sign in signs.items() if sign.silence > patience]
  if not names:
    return ""
  sign = signs[names[0]]
  return (
    f"{_names(names)} not heard of for {sign.silence:.0f} s, and last told of"
    f" {_place(sign)}"
  )


def stuck(signs: Mapping[str, Sign], stuck_after: float) -> str:
  """Names the processes that a job waits for, if it waits too long.

  Args:
    signs: of all processes, by their names.
    stuck_after: seconds that a phase of a step may take; 0 for any time.

  Returns:
    What is wrong; "" if nothing is.
  """
  if not stuck_after:
    return ""
  first = min(map(_position, signs.values()))
  behind = {
    name: sign for name, sign in signs.items() if _position(sign) == first
  }
  seconds = min(sign.seconds for sign in behind.values())
  (sign, *_) = behind.values()
  if sign.phase in _UNLIMITED or seconds <= stuck_after:
    return ""
  where = f"stuck in {_place(sign)} for {seconds:.0f} s"
  if len(behind) == len(signs) > 1:
    return f"all {len(signs)} processes are {where}"
  return f"{_names(list(behind))} {where}, and the others wait"


def _position(sign: Sign) -> tuple[int, int]:
  phase = "computing" if sign.phase == "compiling" else sign.phase
  return sign.step, progress.PHASES.index(phase)


def _place(sign: Sign) -> str:
  if sign.step < 0:
    return sign.phase
  # People count steps from 1, as the screen does.
  return f"step {sign.step + 1} ({sign.phase})"


def _names(names: list[str]) -> str:
  more = len(names) - _MOST_NAMED
  text = ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" * (more > 0))
  return f"{text} {'is' if len(names) == 1 else 'are'}"
