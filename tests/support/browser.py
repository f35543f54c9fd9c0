"""A real headless Chromium, told what to do through a pipe.

It speaks the DevTools protocol (https://chromedevtools.github.io), as much of
it as is needed to open a page on a phone or a desk, ask it things and take its
picture. Nothing is fetched.
"""

import base64
from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
  "--headless=new",
  "--remote-debugging-pipe",
  "--disable-gpu",
  "--disable-dev-shm-usage",
  "--disable-background-networking",
  "--disable-extensions",
  "--no-first-run",
  # Its sandbox does not work for root, and it opens what the test wrote alone.
  "--no-sandbox",
)


class Page:
  """A page that is open.

  Attributes:
    errors: what the page or the browser complained of so far.
  """

  def __init__(self, send: int, receive: int):
    self.errors: list[str] = []
    self._send, self._receive = send, receive
    self._buffer = b""
    self._number = 0
    self._seen: list[str] = []
    target = self._call("Target.createTarget", url="about:blank")["targetId"]
    self._session: str | None = None
    self._session = self._call(
      "Target.attachToTarget", targetId=target, flatten=True
    )["sessionId"]
    for domain in ("Page", "Runtime", "Log"):
      self._call(f"{domain}.enable")

  def open(
    self, path: pathlib.Path, *, width: int, height: int, scheme: str = "light"
  ) -> None:
    """Opens a file, and returns when all of it is there.

    Args:
      path: of the page.
      width: of the window, in the page's pixels; a phone below 600.
      height: likewise.
      scheme: "light" or "dark", which the reader prefers.
    """
    self._call(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=2,
      mobile=width < 600,
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    self._call("Emulation.setEmulatedMedia", features=features)
    self._seen.clear()
    self._call("Page.navigate", url=path.absolute().as_uri())
    while "Page.loadEventFired" not in self._seen:
      self._take(self._read())

  def ask(self, expression: str) -> Any:
    """The value of an expression of JavaScript, JSON-able."""
    found = self._call(
      "Runtime.evaluate", expression=expression, returnByValue=True
    )
    assert "exceptionDetails" not in found, found["exceptionDetails"]
    return found["result"].get("value")

  def picture(self, path: pathlib.Path) -> None:
    """Saves the whole page, scrolled or not, as a PNG."""
    width, height = self.ask(
      "[innerWidth, document.documentElement.scrollHeight]"
    )
    shot = self._call(
      "Page.captureScreenshot",
      captureBeyondViewport=True,
      clip={"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
    )
    path.write_bytes(base64.b64decode(shot["data"]))

  def _call(self, method: str, **params: Any) -> dict[str, Any]:
    self._number += 1
    message = {"id": self._number, "method": method, "params": params}
    if getattr(self, "_session", None):
      message["sessionId"] = self._session
    os.write(self._send, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._read()
      if answer.get("id") == self._number:
        assert "error" not in answer, answer
        return dict(answer["result"])
      self._take(answer)

  def _read(self) -> dict[str, Any]:
    while b"\0" not in self._buffer:
      more = os.read(self._receive, 1 << 16)
      if not more:
        raise RuntimeError("the browser has ended")
      self._buffer += more
    message, self._buffer = self._buffer.split(b"\0", 1)
    return dict(json.loads(message))

  def _take(self, event: dict[str, Any]) -> None:
    method, params = event.get("method", ""), event.get("params", {})
    self._seen.append(method)
    if method == "Runtime.exceptionThrown":
      self.errors.append(json.dumps(params["exceptionDetails"]))
    elif method == "Log.entryAdded":
      if params["entry"]["level"] in ("error", "warning"):
        self.errors.append(params["entry"]["text"])
    elif method == "Runtime.consoleAPICalled" and params["type"] in (
      "error",
      "warning",
      "assert",
    ):
      self.errors.append(json.dumps(params["args"]))


@contextlib.contextmanager
def chromium(folder: pathlib.Path) -> Iterator[Page]:
  """Starts the browser, and ends it.

  Args:
    folder: for what it keeps.

  Raises:
    RuntimeError: it is not installed.
  """
  program = next(filter(None, map(shutil.which, _NAMES)), None)
  if program is None:
    raise RuntimeError("no browser: apt-get install chromium")
  their_read, send = os.pipe()
  receive, their_write = os.pipe()
  # It reads at descriptor 3 and writes at 4.
  script = f'exec "$0" "$@" 3<&{their_read} 4>&{their_write}'
  command = ["bash", "-c", script, program, *_OPTIONS]
  process = subprocess.Popen(
    [*command, f"--user-data-dir={folder}"],
    pass_fds=(their_read, their_write),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.close(their_read)
  os.close(their_write)
  try:
    yield Page(send, receive)
  finally:
    os.close(send)
    os.close(receive)
    process.terminate()
    process.wait()
