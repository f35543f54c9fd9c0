"""strace: whether it may be used, and what it wrote."""

from collections.abc import Iterator
import re
import shutil
import subprocess

_UNFINISHED = " <unfinished ...>"
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_CALL = re.compile(r"(\w+)\((.*)\) += (\d+)(<.*)?")


def is_allowed() -> bool:
  """Whether there is strace, and this process may trace another."""
  if shutil.which("strace") is None:
    return False
  probe = ["strace", "-o", "/dev/null", "true"]
  return subprocess.run(probe, capture_output=True).returncode == 0


def calls(trace: str) -> Iterator[tuple[str, str, int]]:
  """Reads what `strace -f` wrote.

  Yields:
    (name, arguments, result) of each system call that succeeded, in the order
    in which they ended.
  """
  begun = {}
  for line in trace.splitlines():
    thread, _, text = line.partition(" ")
    text = text.strip()
    if text.endswith(_UNFINISHED):
      begun[thread] = text.removesuffix(_UNFINISHED)
      continue
    if resumed := _RESUMED.fullmatch(text):
      text = begun.pop(thread) + resumed[1]
    if call := _CALL.fullmatch(text):
      name, arguments, result, _ = call.groups()
      yield name, arguments, int(result)
