"""Being asked to stop: SIGTERM from a scheduler, or Ctrl-C."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Preempted(Exception):  # noqa: N818 - it is not an error
  """The run stopped early, has saved, and can be resumed.

  Attributes:
    step: updates in the checkpoint that was saved.
  """

  def __init__(self, step: int):
    super().__init__(f"stopped after step {step}; run the same command again")
    self.step = step


class Notice:
  """Turns the first SIGTERM or SIGINT into a flag; a context manager.

  A second signal acts as it would have without this, so that a run which hangs
  in saving can still be ended. Outside the main thread, where Python delivers
  no signals, nothing is installed.

  Attributes:
    received: whether a signal came.
  """

  def __init__(self) -> None:
    self.received = False
    self._previous: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *unused: object) -> None:
    self._restore()

  def _receive(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self.received = True
    self._restore()

  def _restore(self) -> None:
    while self._previous:
      signal.signal(*self._previous.popitem())
