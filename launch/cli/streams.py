"""Keeps a run going when nobody reads what it prints any more."""

from collections.abc import Iterator
import contextlib
import io
import os
import sys
from typing import Any, TextIO

_GONE = (
  "standard output is closed, as nothing reads it any more; the run goes on,"
  " and says the rest in its directory alone"
)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
  """Lets no write to standard output or standard error raise, while it lasts.

  A pipe whose reader has ended, or a terminal that was closed, would end a run
  in the middle, without a word. What is written then is lost, and standard
  error says so once, if it is still there.
  """
  before = sys.stdout, sys.stderr
  sys.stderr = _Lasting(sys.stderr)
  sys.stdout = _Lasting(
    sys.stdout, lambda: print(f"WARNING: {_GONE}", file=sys.stderr, flush=True)
  )
  try:
    yield
  finally:
    sys.stdout, sys.stderr = before


class _Lasting:
  """A stream that drops what it cannot write."""

  def __init__(self, stream: TextIO | None, tell: Any = lambda: None):
    # None where the descriptor was closed before the start.
    self._stream = stream or io.StringIO()
    self._tell = tell

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    with self._dropped():
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with self._dropped():
      self._stream.flush()

  @contextlib.contextmanager
  def _dropped(self) -> Iterator[None]:
    try:
      yield
    except OSError:  # No reader, no terminal, or no room where a file is.
      # What the stream holds would fail again where Python ends.
      with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
      tell, self._tell = self._tell, lambda: None
      tell()
