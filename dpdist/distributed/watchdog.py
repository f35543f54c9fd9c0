"""Ends all processes of a job when one of them is lost or stalls.

Each process other than the primary process holds a connection to it. When a
process is killed, the kernel closes its connection; a process that fails sends
a message; and all report every few seconds where they are
(`dpdist.distributed.progress`). From that the primary process finds out why a
job does not go on, and sends the cause to all. A process that receives it
prints one line that names the cause and ends, even where it hangs in a
collective.

JAX's own service aborts processes too, but it names none, and acts at once only
where the primary process died. Its abort is delayed until the line is printed;
see `_abort_slowly`.
"""

from collections.abc import Callable
import contextlib
import ctypes
import os
import platform
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn, Self

import jax
from jax._src import (
  distributed,  # The only place that names the primary process.
)

from dpdist import errors
from dpdist.distributed import collectives
from dpdist.distributed import peers
from dpdist.distributed import progress as progress_lib
from dpdist.distributed import startup

_FAILED = 1
_BEAT_SECONDS = 2.0
_TICK_SECONDS = 0.5
_CALL_SECONDS = 30.0
_LONGEST_TEXT = 1000
# A process that dies makes the collectives of others fail, and their errors may
# arrive before its own end is seen.
_SETTLE_SECONDS = 0.5
# How long a process that knows the cause has to end by itself, with its files
# closed; then its watchdog ends it. Together less than an abort waits.
_GRACE_SECONDS = 2.0
# How long an error of this process waits for its cause.
_PATIENCE_SECONDS = 5.0


class _Cause(NamedTuple):
  """Why a job ends: a text that names the process."""

  text: str
  # The process that failed and reported it; -1 if one was lost.
  number: int = -1


class Watchdog:
  """Ends this process in good time when others are lost; a context manager.

  Does nothing in a job of one process. In a job of several, all processes must
  enter it together.

  When another process fails, dies, is silent or stalls, the block raises
  `dpdist.errors.PeerError`, whatever error that caused here. If this process
  hangs in the block, it prints the same line and exits with code 1.
  """

  def __init__(
    self,
    progress: progress_lib.Progress,
    stuck_after: float,
    *,
    own: tuple[type[Exception], ...] = (),
  ):
    """Stores the arguments; watches nothing yet.

    A phase of a step may take stuck_after seconds, and a process may be silent
    for as long; 0 allows any time. All processes reach the `own` errors by
    themselves, so these come through, unless a process was lost.
    """
    self._progress = progress
    self._stuck_after = stuck_after
    self._own = own
    self._stack = contextlib.ExitStack()
    self._selector = selectors.DefaultSelector()
    self._peers: list[peers.Peer] = []
    self._server: socket.socket | None = None
    self._death = ""
    self._failure: _Cause | None = None
    self._due: float | None = None
    self._cause: _Cause | None = None
    self._known = threading.Event()
    self._left = threading.Event()
    self._is_over = False
    self._thread: threading.Thread | None = None

  def __enter__(self) -> Self:
    if jax.process_count() == 1:
      return self
    with self._stack:
      self._stack.callback(self._selector.close)
      server = collectives.run_on_primary(self._listen)
      collectives.run_on_all(lambda: self._call_primary(**server))
      self._wake, waked = socket.socketpair()
      for end in (self._wake, waked):
        self._stack.enter_context(end)
      self._selector.register(waked, selectors.EVENT_READ, lambda: None)
      self._stack.callback(_abort_slowly())
      # Before the thread starts, which adds the connections that it accepts.
      self._stack = self._stack.pop_all()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: object,
  ) -> None:
    if self._thread is None:
      return
    self._left.set()
    if error is None or isinstance(error, (errors.Preempted, errors.PeerError)):
      # All processes reach it at once, and need no watchdog from here on.
      self._is_over = True
      self._wake_up()
      self._thread.join()
      self._send_all({"bye": True})
      self._stack.close()
      return
    self._fail(error)
    self._known.wait(_PATIENCE_SECONDS)
    # The abort must wait until this process has ended, so its delay is not
    # undone.
    cause = self._cause
    if (
      cause is not None
      and cause.number != jax.process_index()
      and (cause.number < 0 or not isinstance(error, self._own))
    ):
      raise errors.PeerError(cause.text) from error

  def _fail(self, error: BaseException) -> None:
    """Reports the error that this process fails with."""
    lines = str(error).splitlines() or [""]
    text = lines[0][:_LONGEST_TEXT] or repr(error)[:_LONGEST_TEXT]
    if collectives.is_primary():
      self._note_failure(0, peers.name(0, platform.node()), text)
      self._wake_up()
    else:
      self._send_all({"failed": text})

  def _listen(self) -> dict[str, Any]:
    """Opens the primary process's server; returns how to reach it."""
    where = distributed.global_state.coordinator_address
    server = self._stack.enter_context(peers.listen(startup.loopback(where)))
    self._server, token = server, secrets.token_hex(16)
    self._selector.register(
      server, selectors.EVENT_READ, lambda: self._accept(server, token)
    )
    port = server.getsockname()[1]
    return {"port": port, "token": token, "host_name": platform.node()}

  def _call_primary(self, *, port: int, token: str, host_name: str) -> None:
    if collectives.is_primary():
      return
    # This process reaches the primary process at the host of JAX's service.
    host = startup.host_of(distributed.global_state.coordinator_address or "")
    primary = self._add(socket.create_connection((host, port), _CALL_SECONDS))
    primary.number, primary.name = 0, peers.name(0, host_name)
    primary.send(peers.greeting(token, jax.process_index(), platform.node()))

  def _add(self, connection: socket.socket, token: str = "") -> peers.Peer:
    peer = peers.Peer(self._stack.enter_context(connection), token)
    self._peers.append(peer)
    self._selector.register(
      connection, selectors.EVENT_READ, lambda: self._on_message(peer)
    )
    return peer

  # The methods below run in the watchdog's own thread.

  def _run(self) -> None:
    next_beat = 0.0
    while True:
      for key, _ in self._selector.select(_TICK_SECONDS):
        key.data()
      if self._is_over:
        return
      now = time.monotonic()
      if now >= next_beat:
        next_beat = now + _BEAT_SECONDS
        step, phase, seconds, _ = self._progress.status()
        self._send_all({"beat": [step, phase, seconds]})
      cause = self._diagnose(now)
      if cause is not None:
        self._shut_down(cause)
        return

  def _diagnose(self, now: float) -> _Cause | None:
    """Returns why the job ends; None if it goes on."""
    if self._cause is not None:  # The primary process reported it.
      return self._cause
    if self._due is not None:
      if now < self._due:
        return None
      return _Cause(self._death) if self._death else self._failure
    statuses = {
      peer.name: peer.status(now)
      for peer in self._peers
      if peer.name and not peer.is_excused
    }
    text = progress_lib.find_silent(statuses, self._stuck_after)
    if not text and collectives.is_primary():
      own = peers.name(0, platform.node())
      statuses[own] = self._progress.status()
      text = progress_lib.find_stuck(statuses, self._stuck_after)
    return _Cause(text) if text else None

  def _shut_down(self, cause: _Cause) -> None:
    """Makes all processes end."""
    self._cause = cause
    if collectives.is_primary():
      self._send_all({"cause": cause})
    else:
      # A primary process that was only slow learns why this process ended.
      self._send_all({"failed": cause.text})
    self._known.set()
    if not self._left.wait(_GRACE_SECONDS):
      os.write(2, f"error: {cause.text}\n".encode())
      os._exit(_FAILED)

  def _send_all(self, message: dict[str, Any]) -> None:
    for peer in self._peers:
      if peer.name and not peer.is_closed:
        peer.send(message)

  def _accept(self, server: socket.socket, token: str) -> None:
    with contextlib.suppress(OSError):  # It disconnected before its greeting.
      self._add(server.accept()[0], token)

  def _close(self, peer: peers.Peer) -> None:
    self._selector.unregister(peer.connection)
    peer.connection.close()
    peer.is_closed = True

  def _stop_accepting(self) -> None:
    """Stops accepting connections once all processes are connected."""
    named = {peer.number for peer in self._peers if peer.name}
    if self._server is None or len(named) < jax.process_count() - 1:
      return
    self._selector.unregister(self._server)
    self._server.close()
    self._server = None
    unknown = [peer for peer in self._peers if not peer.name]
    for peer in unknown:
      if not peer.is_closed:
        self._close(peer)
      self._peers.remove(peer)

  def _on_message(self, peer: peers.Peer) -> None:
    if peer.is_closed:
      return
    messages = peer.receive()
    if messages is None:
      self._close(peer)
      if peer.name and not peer.is_excused:
        self._death = self._death or f"{peer.name} ended without a word"
        self._settle()
      peer.is_excused = True
      return
    self._stop_accepting()
    for message in messages:
      if "cause" in message:
        self._cause = _Cause(*message["cause"])
      elif "failed" in message:
        peer.is_excused = True
        self._note_failure(peer.number, peer.name, message["failed"])
      elif "bye" in message:
        peer.is_excused = True
        if peer.number == 0:
          # A primary process that has ended sends no cause.
          self._known.set()

  def _note_failure(self, number: int, name: str, text: str) -> None:
    if self._failure is None:
      self._failure = _Cause(f"{name} failed: {text}", number)
    self._settle()

  def _settle(self) -> None:
    if self._due is None:
      self._due = time.monotonic() + _SETTLE_SECONDS

  def _wake_up(self) -> None:
    with contextlib.suppress(OSError):
      self._wake.send(b"x")


def leave(code: int) -> NoReturn:
  """Ends this process at once: JAX would wait for others that may be lost."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)


def _abort_slowly() -> Callable[[], None]:
  """Delays an abort of this process by six seconds; returns a way to undo it.

  JAX's client aborts a process, in a thread, as soon as the primary process is
  gone, and cannot be configured otherwise (jax 0.10.2). Meanwhile the watchdog
  reports what happened and ends the process properly. The handler is the C
  library's `sleep`, which a signal may call; its argument is the signal's
  number, 6.
  """
  library = ctypes.CDLL(None)
  set_handler = library.signal
  set_handler.argtypes = [ctypes.c_int, ctypes.c_void_p]
  set_handler.restype = ctypes.c_void_p
  sleep = ctypes.cast(library.sleep, ctypes.c_void_p)
  previous = set_handler(signal.SIGABRT, sleep)
  return lambda: set_handler(signal.SIGABRT, previous) and None
