"""Turns any request to stop this process into a flag."""

from collections.abc import Callable
import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

from dpdist.distributed import gce_maintenance

# Within this time after the first signal, another one is the same request: a
# launcher, a shell and a scheduler may each pass on what they were sent.
ECHO_SECONDS = 1.0


def that_ask_to_stop() -> tuple[signal.Signals, ...]:
  """Returns the signals that ask to stop: SIGTERM, SIGINT, Slurm's early ones.

  Slurm sends SIGTERM when the grace time of a preemption begins. To learn of
  its time limit in advance, a job asks for a signal of its own choice, as in
  `sbatch --signal=USR1@60`. Elsewhere SIGUSR1 and SIGUSR2 keep their meaning.
  """
  always = (signal.SIGTERM, signal.SIGINT)
  if "SLURM_JOB_ID" in os.environ:
    return (*always, signal.SIGUSR1, signal.SIGUSR2)
  return always


class Signals:
  """Reports the first signal that asks to stop; a context manager.

  A later signal acts as it would have without this class, so that a run which
  hangs while saving can still be ended. Outside the main thread, where Python
  delivers no signals, nothing is installed.
  """

  def __init__(self, receive: Callable[[str], None]):
    """Stores a callback that the main thread calls with the signal's name."""
    self._receive = receive
    self._first: float | None = None
    self._previous: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():
      for number in that_ask_to_stop():
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused: object) -> None:
    while self._previous:
      signal.signal(*self._previous.popitem())

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    now = time.monotonic()
    if self._first is None:
      self._first = now
      self._receive(signal.Signals(number).name)
    elif now > self._first + ECHO_SECONDS:
      self.__exit__()
      signal.raise_signal(number)


_ACTIVE: list["Notice"] = []


def is_asked() -> bool:
  """Returns whether a run that goes on in this process was asked to stop."""
  return any(notice.received for notice in _ACTIVE)


class Notice:
  """Turns the first request to stop into a flag; a context manager.

  Requests are signals, and notices of Google's machines.
  """

  def __init__(self) -> None:
    self.received = False  # Whether a request came.
    self.reason = ""  # What the request was.
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> Self:
    _ACTIVE.append(self)
    self._stack.callback(_ACTIVE.remove, self)
    self._stack.enter_context(Signals(self._receive))
    self._stack.enter_context(gce_maintenance.Maintenance(self._receive))
    return self

  def __exit__(self, *unused: object) -> None:
    self._stack.close()

  def _receive(self, reason: str) -> None:
    self.reason = self.reason or reason
    self.received = True
