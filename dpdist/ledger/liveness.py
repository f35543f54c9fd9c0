"""Finds out, without a clock, whether a process of this machine is alive."""

from collections.abc import Mapping
import os
import pathlib
import platform
from typing import Any


def card() -> dict[str, Any]:
  """Returns a JSON-able card by which others can recognize this process."""
  return {
    "pid": os.getpid(),
    "started": _started(os.getpid()),
    "host": _host(),
    "host_name": platform.node(),
  }


def is_gone(card: Mapping[str, Any]) -> bool:
  """Returns whether the process that a card names is known to have ended."""
  return (
    bool(card["host"])
    and card["host"] == _host()
    and card["started"] != _started(card["pid"])
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
