"""Writes files of scalars for TensorBoard, and reads them as it does."""

from collections.abc import Mapping
import contextlib
import pathlib
import struct
import time
from typing import Self

from tensorboardX import event_file_writer
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2
from tensorboardX.proto import summary_pb2

_FLUSH_SECONDS = 10.0


class Events:
  """A file for TensorBoard; a context manager.

  Not `tensorboardX.SummaryWriter`: it writes in a thread, and if that dies, of
  a full disk or of a clock set back, the run waits for it forever.
  """

  def __init__(
    self, folder: pathlib.Path, *, purge_step: int, tells_time: bool
  ):
    """Creates a new file in a folder, which is made if it is missing.

    Args:
      folder: a log directory for TensorBoard.
      purge_step: hides what other files hold of this step and later.
      tells_time: whether a row has the time at which it was written, or that of
        the file's creation. The time that a step takes reveals how many
        examples were drawn, which released files must not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Files are named by the second: a quick restart would overwrite one.
    self._writer = event_file_writer.EventsWriter(
      str(folder / "events"), f".{time.time_ns()}"
    )
    self._flushed = time.monotonic()
    self._time = None if tells_time else time.time()
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


def read(folder: pathlib.Path) -> list[event_pb2.Event]:
  """Returns the records of all files of a folder, in the order of the files.

  A record is its length (8 bytes), a checksum (4), its content, and a checksum
  (4). A record that a kill or a power cut damaged is left out, with what
  follows it in its file.
  """
  found = []
  for path in sorted(folder.glob("events*")):
    data, at = path.read_bytes(), 0
    while at + 12 <= len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      if at + length + 16 > len(data):
        break
      record = data[at + 12 : at + 12 + length]
      (checksum,) = struct.unpack_from("<I", data, at + 12 + length)
      if checksum != record_writer.masked_crc32c(record):
        break
      found.append(event_pb2.Event.FromString(record))
      at += length + 16
  return found


def scalars(folder: pathlib.Path) -> dict[tuple[str, int], float]:
  """Returns what TensorBoard shows of a folder: values by name and step.

  A file hides what those before it hold of its first step and later.
  """
  values: dict[tuple[str, int], float] = {}
  for event in read(folder):
    if event.HasField("session_log"):
      values = {
        (name, step): value
        for (name, step), value in values.items()
        if step < event.step
      }
    for value in event.summary.value:
      values[value.tag, event.step] = value.simple_value
  return values
