"""Lines of JSON between two processes of a job."""

import contextlib
import json
import secrets
import socket
import threading
import time
from typing import Any

from dpdist.distributed import stalls

_LONGEST_LINE = 65536
_SEND_SECONDS = 5.0
_MOST_CALLERS = 4096  # At a time.


class Peer:
  """Another process, at the other end of a connection.

  Attributes:
    connection: the socket; the peer's to close.
    number: the process's; -1 until it said so.
    name: for people; "" until then.
    is_excused: it said that it will end.
    is_closed: it has ended.
  """

  def __init__(self, connection: socket.socket, token: str = ""):
    """A peer of which nothing is known.

    Args:
      connection: to it.
      token: that it has to know; "" if this process called it.
    """
    connection.settimeout(_SEND_SECONDS)
    self.connection = connection
    self.number = -1
    self.name = ""
    self.is_excused = False
    self.is_closed = False
    self._token = token
    self._buffer = b""
    self._lock = threading.Lock()
    self._heard = time.monotonic()
    self._last: tuple[int, str, float] = (-1, "starting", 0.0)

  def send(self, message: dict[str, Any]) -> None:
    """Sends a message; one that cannot be sent shows where it is received."""
    with self._lock, contextlib.suppress(OSError):
      self.connection.sendall(json.dumps(message).encode() + b"\n")

  def receive(self) -> list[dict[str, Any]] | None:
    """What came since the last call; None if it is the end, or no peer's."""
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
          self._last = (step, phase, seconds)
        else:
          messages.append(message)
      except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return messages

  def sign(self, now: float) -> stalls.Sign:
    """What it last told."""
    return stalls.Sign(*self._last, silence=now - self._heard)

  def _greet(self, message: dict[str, Any]) -> None:
    if not secrets.compare_digest(message["hello"], self._token):
      raise ValueError("a stranger")
    self.number = int(message["number"])
    self.name = name(self.number, str(message["host"]))


def greeting(token: str, number: int, host: str) -> dict[str, Any]:
  """The first message to whoever was called."""
  return {"hello": token, "number": number, "host": host}


def name(number: int, host: str) -> str:
  """What people call a process."""
  return f"process {number} ({host})"


def host_of(address: str) -> str:
  """The host of HOST:PORT."""
  return address.rpartition(":")[0].strip("[]")


def listen(address: str = "") -> socket.socket:
  """A server on a port that was free.

  Args:
    address: that it is called at; "": any of this machine, by IPv4 and, where
      it is had, IPv6.
  """
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
