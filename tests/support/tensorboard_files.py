"""Reads files of scalars as TensorBoard does."""

import pathlib
import struct

from tensorboardX.proto import event_pb2


def read(folder: pathlib.Path) -> list[event_pb2.Event]:
  """Returns the records of all files of a folder, in the order of the files.

  A record is its length (8 bytes), a checksum (4), its content, and a checksum
  (4).
  """
  found = []
  for path in sorted(folder.glob("events*")):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      record = data[at + 12 : at + 12 + length]
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
