"""Writes files of scalars for TensorBoard."""

from collections.abc import Mapping
import contextlib
import pathlib
import time
from typing import Self

from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2
from tensorboardX.proto import summary_pb2

_FLUSH_SECONDS = 10.0


class Events:
  """A file for TensorBoard; a context manager.

  Not `tensorboardX.SummaryWriter`: it writes in a thread, and if that dies, of
  a full disk or of a clock set back, the run waits for it forever.
  """

  def __init__(self, folder: pathlib.Path, *, purge_step: int, has_times: bool):
    """Creates a new file in a log directory, which is made if it is missing.

    Hides what other files hold of purge_step and later steps. With has_times a
    row has the time at which it was written, else that of the file's creation:
    the time that a step takes reveals how many examples were drawn, which
    released files must not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Files are named by the second: a quick restart would overwrite one.
    self._writer = event_file_writer.EventsWriter(
      str(folder / "events"), f".{time.time_ns()}"
    )
    self._flushed = time.monotonic()
    self._time = None if has_times else time.time()
    log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(step=purge_step, session_log=log))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes scalars."""
    scalars = [
      summary_pb2.Summary.Value(tag=name, simple_value=value)
      for name, value in values.items()
    ]
    self._write(
      event_pb2.Event(step=step, summary=summary_pb2.Summary(value=scalars))
    )

  def _write(self, event: event_pb2.Event) -> None:
    event.wall_time = time.time() if self._time is None else self._time
    self._writer.write_event(event)
    if time.monotonic() > self._flushed + _FLUSH_SECONDS:
      self._writer.flush()
      self._flushed = time.monotonic()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: object, *unused: object) -> None:
    # A full disk fails here too; the first error is the one to report.
    with contextlib.suppress(*[OSError] if kind else []):
      self._writer.close()
