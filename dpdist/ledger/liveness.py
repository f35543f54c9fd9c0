"""Whether a process of this machine still lives, told without a clock."""

from collections.abc import Mapping
import os
import pathlib
import platform
from typing import Any


def card() -> dict[str, Any]:
  """What names this process, for others to look out for it, JSON-able."""
  return {
    "pid": os.getpid(),
    "started": _started(os.getpid()),
    "host": _host(),
    "host_name": platform.node(),
  }


def is_gone(card: Mapping[str, Any]) -> bool:
  """Whether the process that a card names is known to have ended."""
  return (
    bool(card["host"])
    and card["host"] == _host()
    and card["started"] != _started(card["pid"])
  )


def _host() -> str:
  """Names this boot of this machine, and the space of its process numbers."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _started(pid: int) -> str:
  """When a process of this machine began; "" if it has ended."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return ""
  # After the name, which may hold anything but ends with the last parenthesis.
  state, *rest = stat.rpartition(")")[2].split()
  return "" if state in "ZX" else rest[18]
