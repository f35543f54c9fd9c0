"""Finds out, without a clock, whether a process of this machine is alive."""

from collections.abc import Mapping
import os
import pathlib
import platform
from typing import Any


def process_id() -> dict[str, Any]:
  """Identifies this process to others, in a form that JSON can hold."""
  return {
    "pid": os.getpid(),
    "started": _started(os.getpid()),
    "host": _host(),
    "host_name": platform.node(),
  }


def is_gone(process: Mapping[str, Any]) -> bool:
  """Returns whether a process (see `process_id`) is known to have ended."""
  return (
    bool(process["host"])
    and process["host"] == _host()
    and process["started"] != _started(process["pid"])
  )


def _host() -> str:
  """Names this boot of this machine, and its namespace of process numbers."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _started(pid: int) -> str:
  """Returns when a process of this machine began; "" if it has ended."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return ""
  # After the process's name, which may hold anything but ends with the last
  # parenthesis.
  state, *rest = stat.rpartition(")")[2].split()
  return "" if state in "ZX" else rest[18]
