"""Retries a source that fails or does not answer.

Network disks and object stores may fail for seconds and come back. A read that
fails is tried again, and one that does not return is waited for, until a time
limit; then one error says what to do. A late read returns what it would have
returned at once.

Messages name the data set, never a file or a place in one: which examples a
step reads is private.
"""

from collections.abc import Callable, Iterator, Mapping
import copy
import threading
from typing import Any

import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.data import arrays as arrays_lib
from dpdist.data import sources
from dpdist.data import statistics as statistics_lib

# Waits between attempts double from the first to the longest.
_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 10.0
# How often a read that is under way is checked.
_TICK_SECONDS = 0.1


class RetryingSource:
  """A source whose reads are tried again, up to a time limit.

  An OSError of the source means that it may work later; no other error is tried
  again. Reads are retried for retry_seconds, 0: not at all, and an attempt that
  takes stall_seconds counts as a failure too, 0: no limit. Seconds are counted
  in waits, not by the clock: a process that was stopped and wakes up has used
  none of its limit. `tell` is called with a line of text when failures begin,
  from any thread; a second read that fails at the same time is not reported.

  Each attempt has a thread, which does not keep the interpreter from ending;
  threads that a source starts itself may. Where nothing can stall, or no limit
  is set, there is no thread, which is cheaper.

  Guarantees:
    A read returns what one attempt returned as a whole.
  """

  def __init__(
    self,
    source: sources.Source,
    *,
    name: str,
    retry_seconds: float,
    stall_seconds: float,
    tell: Callable[[str], None],
  ):
    for setting, value in (
      ("retry_seconds", retry_seconds),
      ("stall_seconds", stall_seconds),
    ):
      rule = _validation.real(at_least=0)
      _validation.check(f"data.{setting}", value, rule)
    self._source = source
    self._name = name
    self._retry_seconds = retry_seconds
    is_in_memory = isinstance(source, arrays_lib.ArraySource) and (
      source.is_in_memory
    )
    self._stall_seconds = 0 if is_in_memory else stall_seconds
    self._tell = tell
    self._closed = threading.Event()
    self._lock = threading.Lock()
    self._num_in_trouble = 0

  def __len__(self) -> int:
    return len(self._source)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Reads examples; see `dpdist.data.sources.Source.read`.

    Raises ReadError if the time limit is reached, or if the source raised a
    ValueError because its content is wrong.
    """
    return self._get(lambda: self._source.read(indices), self._stall_seconds)

  def content_digest(self) -> str:
    """Returns the source's digest; failures are retried, without a limit."""
    return self._get(self._source.content_digest, 0)

  def earlier_digests(self) -> list[str]:
    """See `sources.earlier_digests`; may take as long as the digest."""
    return list(self._get(lambda: sources.earlier_digests(self._source), 0))

  def changed_files(self) -> list[str]:
    """See `dpdist.data.sources.changed_files`; ReadError at the time limit."""
    limit = self._stall_seconds
    # As long as `content_digest` may take, if content has to be hashed again.
    if self._get(lambda: sources.is_touched(self._source), limit):
      limit = 0
    return list(self._get(lambda: sources.changed_files(self._source), limit))

  def private_statistics(self) -> statistics_lib.Statistics | None:
    """See `dpdist.data.sources.private_statistics`."""
    found: statistics_lib.Statistics | None
    found = self._get(
      lambda: sources.private_statistics(self._source), self._stall_seconds
    )
    return found

  def measured(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns of rows what private statistics are of."""
    source: Any = self._source
    return dict(
      self._get(lambda: source.measured(indices), self._stall_seconds)
    )

  def with_statistics(self, released: Mapping[str, Any]) -> "RetryingSource":
    """See `sources.with_statistics`; `close` is that of both."""
    made = copy.copy(self)
    made._source = sources.with_statistics(self._source, released)
    return made

  def close(self) -> None:
    """Makes all waiting threads raise an error soon."""
    self._closed.set()

  def _get(self, make: Callable[[], Any], stall_seconds: float) -> Any:
    delays = _delays()
    patience, is_in_trouble = self._retry_seconds, False

    def trouble(what: str) -> None:
      nonlocal is_in_trouble
      if patience <= 0:
        raise errors.ReadError(
          f"{self._name} {what}, and was waited for {self._retry_seconds:g} s:"
          " see that all of it can be read, and run the same command again,"
          " which goes on from the last checkpoint"
        )
      if not is_in_trouble:
        is_in_trouble = True
        self._begin_trouble(what)

    try:
      while True:
        attempt, silence = _Attempt(make), 0.0
        if stall_seconds:
          attempt.start()
          while not attempt.ends_within(_TICK_SECONDS):
            silence += _TICK_SECONDS
            if is_in_trouble:
              patience -= _TICK_SECONDS
            if silence >= stall_seconds:
              trouble(f"has not answered for {stall_seconds:g} s")
            self._check_open()
        else:
          attempt.run()
        error = attempt.error
        if error is None:
          return attempt.value
        if isinstance(error, ValueError):
          # That of a text would hold a byte of somebody's row.
          is_text = isinstance(error, UnicodeError)
          said = "a text is not UTF-8" if is_text else error
          raise errors.ReadError(f"{self._name} cannot be read: {said}")
        if not isinstance(error, OSError):
          raise error
        # Not the whole text, which may have the name of a file.
        trouble(f"cannot be read ({error.strerror or type(error).__name__})")
        delay = min(next(delays), patience)
        self._closed.wait(delay)
        self._check_open()
        patience -= delay
    finally:
      if is_in_trouble:
        with self._lock:
          self._num_in_trouble -= 1

  def _begin_trouble(self, what: str) -> None:
    with self._lock:
      self._num_in_trouble += 1
      is_first = self._num_in_trouble == 1
    if is_first:
      self._tell(
        f"{self._name} {what}; it is waited for, up to"
        f" {self._retry_seconds:g} s"
      )

  def _check_open(self) -> None:
    if self._closed.is_set():
      raise errors.ReadError(f"{self._name} was closed")


class _Attempt(threading.Thread):
  """One attempt; to be started as a thread, or run."""

  def __init__(self, make: Callable[[], Any]):
    super().__init__(name="dpdist-read", daemon=True)
    self._make = make
    self.value: Any = None
    self.error: BaseException | None = None

  def run(self) -> None:
    """Calls the function."""
    try:
      self.value = self._make()
    except BaseException as error:
      self.error = error

  def ends_within(self, seconds: float) -> bool:
    """Waits for the end, and returns whether it came within so many seconds."""
    self.join(seconds)
    return not self.is_alive()


def _delays() -> Iterator[float]:
  """Yields the seconds between attempts, the same in every run."""
  delay = _FIRST_DELAY_SECONDS
  while True:
    yield delay
    delay = min(2 * delay, _LONGEST_DELAY_SECONDS)
