"""Exchanges lines of JSON between two processes of a job."""

import contextlib
import json
import secrets
import socket
import threading
import time
from typing import Any

from dpdist.distributed import progress

_LONGEST_LINE = 65536
_SEND_SECONDS = 5.0
_MOST_CALLERS = 4096  # At a time.


class Peer:
  """Another process, at the other end of a connection, which this closes."""

  def __init__(self, connection: socket.socket, token: str = ""):
    """Wraps a connection; the other end has to know the token, if any."""
    connection.settimeout(_SEND_SECONDS)
    self.connection = connection
    self.number = -1  # The process's number; -1 until it has sent it.
    self.name = ""  # For messages to people; "" until it has sent its number.
    self.is_excused = False  # Whether it said that it will end.
    self.is_closed = False
    self._token = token
    self._buffer = b""
    self._lock = threading.Lock()
    self._heard = time.monotonic()
    self._last = progress.ProcessStatus(-1, "starting", 0.0)

  def send(self, message: dict[str, Any]) -> None:
    """Sends a message; a failure to send shows up at the next receive."""
    with self._lock, contextlib.suppress(OSError):
      self.connection.sendall(json.dumps(message).encode() + b"\n")

  def receive(self) -> list[dict[str, Any]] | None:
    """Returns the messages since the last call; None at the end."""
    try:
      data = self.connection.recv(_LONGEST_LINE)
    except OSError:
      data = b""
    *lines, self._buffer = (self._buffer + data).split(b"\n")
    if not data or len(self._buffer) > _LONGEST_LINE:
      return None
    self._heard = time.monotonic()
    messages = []
    for line in lines:
      try:
        message = json.loads(line)
        if not self.name:
          self._greet(message)
        elif "beat" in message:
          step, phase, seconds = message["beat"]
          self._last = progress.ProcessStatus(step, phase, seconds)
        else:
          messages.append(message)
      except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return messages

  def status(self, now: float) -> progress.ProcessStatus:
    """Returns what the process last reported."""
    return self._last._replace(silence=now - self._heard)

  def _greet(self, message: dict[str, Any]) -> None:
    if not secrets.compare_digest(message["hello"], self._token):
      raise ValueError("another token")
    self.number = int(message["number"])
    self.name = name(self.number, str(message["host"]))


def greeting(token: str, number: int, host: str) -> dict[str, Any]:
  """Returns the first message on a new connection."""
  return {"hello": token, "number": number, "host": host}


def name(number: int, host: str) -> str:
  """Returns the name of a process for messages to people."""
  return f"process {number} ({host})"


def listen(address: str = "") -> socket.socket:
  """Opens a server on a free port; "" is all addresses, by IPv4 and IPv6."""
  if address:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server(
      (address, 0), family=family, backlog=_MOST_CALLERS
    )
  with contextlib.suppress(OSError, ValueError):
    return socket.create_server(
      ("", 0),
      family=socket.AF_INET6,
      dualstack_ipv6=True,
      backlog=_MOST_CALLERS,
    )
  return socket.create_server(("", 0), backlog=_MOST_CALLERS)
