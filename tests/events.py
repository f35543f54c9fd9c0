"""Reads files for TensorBoard, as it does."""

import pathlib
import struct

from tensorboardX.proto import event_pb2


def read(folder: pathlib.Path) -> list[event_pb2.Event]:
  """The records of all files of a folder: length, crc, bytes, crc."""
  events = []
  for path in sorted(folder.iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
      events.append(event)
      at += length + 16
  return events


def scalars(folder: pathlib.Path) -> dict[tuple[str, int], float]:
  """By name and step."""
  return {
    (value.tag, event.step): value.simple_value
    for event in read(folder)
    for value in event.summary.value
  }
