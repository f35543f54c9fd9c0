"""Runs several processes of this machine, which start and end together."""

from collections.abc import Mapping, Sequence
import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any, NamedTuple

import rich.console
import rich.text

from dpdist.distributed import preemption

# The time from SIGTERM to SIGKILL.
_TERM_SECONDS = 10.0
_LOOK_SECONDS = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_PR_SET_PDEATHSIG = 1
_C = ctypes.CDLL(None) if sys.platform == "linux" else None


class Exit(NamedTuple):
  """The end of one process."""

  rank: int
  code: int  # Its exit code; negative for a signal that ended it.
  forced: bool  # Whether it was made to end here, since it did not by itself.


class Pod:
  """Processes that end together.

  Each leads a process group of its own, so that Ctrl-C in a terminal reaches
  them only through this object. SIGTERM, SIGINT or SIGHUP is passed on as one
  SIGTERM to each; one more, a second or more later, kills them. Once one has
  ended with another code than 0, the others have a grace time to end by
  themselves; then they get SIGTERM, and ten seconds later SIGKILL.

  If this process is killed, Linux kills them at once. Elsewhere they end at the
  next line that they print, since nobody reads it.
  """

  def __init__(
    self,
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    grace_seconds: float,
  ):
    """Stores what each process runs and its variables, by rank."""
    self.exits: list[Exit] = []  # In the order in which the processes ended.
    self.signals: list[int] = []  # Those that came from outside.
    self._command = list(command)
    self._environments = environments
    self._grace_seconds = grace_seconds
    self._alive: dict[int, subprocess.Popen[bytes]] = {}
    self._selector = selectors.DefaultSelector()
    self._passed_on = 0
    self._first = 0.0
    self._forced = False
    self._deadline: float | None = None

  def run(self) -> None:
    """Starts the processes, shows their output, and waits for their end."""
    previous = {
      number: signal.signal(number, self._receive)
      for number in _SIGNALS
      # nohup has made this process ignore SIGHUP.
      if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
      for rank, environment in enumerate(self._environments):
        self._start(rank, environment)
      while self._alive or self._selector.get_map():
        self._print_ready()
        self._reap()
        self._pass_on()
        self._end_late_ones()
    finally:
      self._send(signal.SIGKILL)
      for process in self._alive.values():
        process.wait()
      for number, handler in previous.items():
        signal.signal(number, handler)

  def _start(self, rank: int, environment: Mapping[str, str]) -> None:
    parent = os.getpid()
    process = subprocess.Popen(
      self._command,
      env=dict(environment),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      process_group=0,
      # Safe: this process has one thread.
      preexec_fn=lambda: _die_with(parent),
    )
    self._alive[rank] = process
    width = len(str(len(self._environments) - 1))
    for pipe, stream in (
      (process.stdout, sys.stdout),
      (process.stderr, sys.stderr),
    ):
      assert pipe is not None
      os.set_blocking(pipe.fileno(), False)
      self._selector.register(
        pipe, selectors.EVENT_READ, _Lines(rank, width, stream)
      )

  def _print_ready(self) -> None:
    if not self._selector.get_map():
      time.sleep(_LOOK_SECONDS)
      return
    for key, _ in self._selector.select(_LOOK_SECONDS):
      pipe: Any = key.fileobj
      data = pipe.read()
      if data is None:
        continue
      key.data.print(data)
      if not data:
        self._selector.unregister(pipe)
        pipe.close()

  def _reap(self) -> None:
    for rank, process in list(self._alive.items()):
      code = process.poll()
      if code is None:
        continue
      del self._alive[rank]
      # A process that it started may still hold its pipes open.
      _send_group(process, signal.SIGKILL)
      self.exits.append(Exit(rank, code, self._forced))
      if code and self._deadline is None:
        self._deadline = time.monotonic() + self._grace_seconds

  def _pass_on(self) -> None:
    if len(self.signals) > self._passed_on:
      first = not self._passed_on
      self._passed_on = len(self.signals)
      self._forced |= self._passed_on > 1
      if first and self._passed_on == 1:
        for process in self._alive.values():
          process.terminate()
      else:
        self._send(signal.SIGKILL)

  def _end_late_ones(self) -> None:
    if self._deadline is None or time.monotonic() < self._deadline:
      return
    self._send(signal.SIGKILL if self._forced else signal.SIGTERM)
    self._forced = True
    self._deadline = time.monotonic() + _TERM_SECONDS

  def _send(self, number: signal.Signals) -> None:
    for process in self._alive.values():
      _send_group(process, number)

  def _receive(self, number: int, frame: FrameType | None) -> None:
    del frame
    now = time.monotonic()
    if not self.signals:
      self._first = now
    elif now <= self._first + preemption.ECHO_SECONDS:
      # A closed terminal sends SIGHUP twice, by itself and by its shell.
      return
    self.signals.append(number)


class _Lines:
  """Prints a stream line by line, each with its process's rank."""

  def __init__(self, rank: int, width: int, stream: Any):
    self._prefix = (f"[{rank:>{width}}] ", _COLOURS[rank % len(_COLOURS)])
    # Ask the stream itself, as dpdist.reporting.console does.
    self._console = rich.console.Console(
      file=stream, force_terminal=stream.isatty()
    )
    self._rest = b""

  def print(self, data: bytes) -> None:
    """Prints whole lines; prints the rest at the end, when data is empty."""
    *lines, self._rest = (self._rest + data).split(b"\n")
    if not data and self._rest:
      lines.append(self._rest)
    for line in lines:
      text = line.decode(errors="replace")
      self._console.print(
        rich.text.Text.assemble(self._prefix, text), soft_wrap=True
      )


def _send_group(process: Any, number: signal.Signals) -> None:
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, number)


def _die_with(parent: int) -> None:
  """Makes a new process end when its parent does."""
  if _C is not None:
    _C.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
      os._exit(1)
