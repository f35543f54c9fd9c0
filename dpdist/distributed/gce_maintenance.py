"""Watches for Google Cloud's notices that it will stop this machine.

A Compute Engine machine, a TPU host among them, asks a server that only it can
reach (https://cloud.google.com/compute/docs/metadata). Three of its features
are used:
  * `instance/maintenance-event` turns to TERMINATE_ON_HOST_MAINTENANCE before a
    machine with an accelerator is stopped, a minute to an hour ahead. A machine
    that is moved while it runs (MIGRATE_...) need not do anything.
  * `instance/preempted` turns to TRUE when a spot machine is about to be
    stopped, 30 seconds ahead.
  * With `wait_for_change` the server holds its answer back until the value
    differs from that of `last_etag`, or for `timeout_sec` at most.
"""

from collections.abc import Callable
import http.client
import os
import pathlib
import threading
from typing import Self
import urllib.parse

_PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
_HOST = "metadata.google.internal"
_WAIT_SECONDS = 60
# The pause between two requests, whatever the server does.
_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0


def server() -> str:
  """Returns the server's host and any port; "" on any other machine."""
  # The variable is the one that Google's own libraries read.
  named = os.environ.get("GCE_METADATA_HOST", "")
  if named:
    return named
  try:
    is_google = _PRODUCT.read_text().startswith("Google")
  except OSError:
    is_google = False
  return _HOST if is_google else ""


class Maintenance:
  """Reports that this machine will be stopped, if it is Google's."""

  def __init__(self, receive: Callable[[str], None]):
    """Stores a callback that another thread calls with what will happen."""
    self._receive = receive
    self._left = threading.Event()

  def __enter__(self) -> Self:
    host = server()
    if host:
      for ask in (self._ask_for_maintenance, self._ask_for_preemption):
        # Daemon threads: an answer may take a minute, and nobody waits for it.
        threading.Thread(target=ask, args=(host,), daemon=True).start()
    return self

  def __exit__(self, *unused: object) -> None:
    self._left.set()

  def _ask_for_maintenance(self, host: str) -> None:
    values = _Values(host, "maintenance-event", self._left)
    # Only a change is a notice: a job that was started again on a machine with
    # an hour left uses that hour.
    previous = values.next()
    while previous is not None:
      value = values.next()
      if value and value != previous and value.startswith("TERMINATE"):
        self._receive("the machine's maintenance")
      previous = value

  def _ask_for_preemption(self, host: str) -> None:
    values = _Values(host, "preempted", self._left)
    while (value := values.next()) is not None:
      if value == "TRUE":
        self._receive("the machine's preemption")
        return


class _Values:
  """Reads the values of a key of the server, one after another."""

  def __init__(self, host: str, key: str, left: threading.Event):
    self._host = host
    self._path = f"/computeMetadata/v1/instance/{key}"
    self._left = left
    self._etag = ""
    self._pause = 0.0

  def next(self) -> str | None:
    """Returns the first value, then each new one; None at the end."""
    while not self._left.wait(self._pause):
      try:
        value = self._get()
      except (OSError, http.client.HTTPException):
        longer = max(_PAUSE_SECONDS, 2 * self._pause)
        self._pause = min(longer, _LONGEST_PAUSE_SECONDS)
      else:
        self._pause = _PAUSE_SECONDS
        return value
    return None

  def _get(self) -> str:
    path = self._path
    if self._etag:
      path += "?" + urllib.parse.urlencode(
        {
          "wait_for_change": "true",
          "last_etag": self._etag,
          "timeout_sec": _WAIT_SECONDS,
        }
      )
    # Not urllib's opener: the server is never behind a proxy.
    connection = http.client.HTTPConnection(
      self._host, timeout=_WAIT_SECONDS + 10
    )
    try:
      connection.request("GET", path, headers={"Metadata-Flavor": "Google"})
      answer = connection.getresponse()
      text = answer.read().decode("ascii", "replace").strip()
      # Any other server that happens to have this name sends no such header.
      if (
        answer.status != http.HTTPStatus.OK
        or answer.getheader("Metadata-Flavor") != "Google"
      ):
        raise ConnectionError(f"{self._host} answered {answer.status}")
      self._etag = answer.getheader("ETag") or ""
      return text
    finally:
      connection.close()
