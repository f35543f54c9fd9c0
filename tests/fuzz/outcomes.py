"""What may come of an input that is not as it was meant.

A right answer, or one error that the package itself raises, clear and of one
line; and what was on disk is there as it was, byte for byte.
"""

from collections.abc import Callable
import pathlib
import random
import re
import signal
import traceback
from typing import Any

from dpdist import errors
from tests.support import commands

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of one input: processor time, whatever else the machine does.
_SECONDS = 30.0
# Kinds of errors that the package raises, or lets through from opening files.
_OWN = (ValueError, OSError, errors.LedgerError)
# What comes from the depths, though the last frame may be the package's.
_DEPTHS = re.compile(
  r"invalid literal for|could not convert|cannot reshape|buffer size must|"
  r"not enough values|too many values|unsupported operand|"
  r"string argument should|Exceeds the limit|codec can't|"
  r"math domain|cannot convert float|negative dimensions|"
  r"embedded null byte|bad (local|central)|is not a valid literal"
)

Kind = Callable[[random.Random], str]


class FaultError(Exception):
  """An outcome that must not be."""


class LateError(BaseException):
  """An input took too long."""


def refused(error: BaseException) -> str:
  """Holds an error against what an error of the package is.

  Raises:
    FaultError: it is none.
  """
  frames = traceback.extract_tb(error.__traceback__)
  last = pathlib.Path(frames[-1].filename) if frames else pathlib.Path()
  told = f"{type(error).__name__}: {str(error)[:500]}"
  is_ours = any(
    last.is_relative_to(_ROOT / folder) for folder in ("dpdist", "launch")
  )
  if (
    not isinstance(error, _OWN)
    or isinstance(error, UnicodeError)
    or type(error).__module__ in ("json.decoder", "zipfile", "gzip")
    or not is_ours
    or _DEPTHS.search(str(error))
    or not str(error)
  ):
    shown = "".join(traceback.format_exception(error)[-9:])
    raise FaultError(f"{told}\n{shown}") from error
  if "\n" in str(error).strip():
    raise FaultError(f"an error of several lines: {told}")
  return "refused"


def tried(call: Callable[[], Any], check: Callable[[Any], None]) -> str:
  """Calls; holds what it returns, or raises, against what is right."""
  try:
    value = call()
  except Exception as error:
    return refused(error)
  check(value)
  return "answered"


def opened(
  command: commands.Command,
  *arguments: str,
  codes: tuple[int, ...] = (0, 1, 2),
) -> tuple[str, commands.Outcome]:
  """Runs a command; what it says must be an answer or an error of one line."""
  try:
    outcome = command(*arguments)
  except Exception as error:
    shown = "".join(traceback.format_exception(error)[-9:])
    raise FaultError(f"{command.name} {arguments}\n{shown}") from error
  told = f"{command.name} {arguments}: {outcome}"[:3000]
  if outcome.code not in codes or "Traceback" in outcome.out + outcome.err:
    raise FaultError(told)
  if not outcome.code:
    return "answered", outcome
  lines = outcome.err.strip().removesuffix("Try --help.").strip().splitlines()
  # absl warns of a config that is None; launch.submit tells of its plan.
  told_before = r"W\d{4} |WARNING: |will spend epsilon "
  lines = [x for x in lines if not re.match(told_before, x)]
  if len(lines) == 2 and lines[1].startswith("try: "):
    lines.pop()
  if outcome.code == 1 and command.name == "verify" and not lines:
    # Its findings are its answer.
    if "NOT sound" not in outcome.out and '"sound": false' not in outcome.out:
      raise FaultError(told)
    return "refused", outcome
  if len(lines) != 1 or not lines[0].startswith("error: ") or _is_deep(lines):
    raise FaultError(told)
  return "refused", outcome


def _is_deep(lines: list[str]) -> bool:
  # absl's own words on what is no number are clear enough.
  is_told = re.match("error: (flag --|--config cannot be loaded: )", lines[0])
  return bool(_DEPTHS.search(lines[0])) and not is_told


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
  """All files below a folder, by their paths there."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def put(folder: pathlib.Path, files: dict[str, bytes]) -> None:
  """Makes a folder hold these files and nothing else."""
  now = snapshot(folder) if folder.exists() else {}
  for name in now.keys() - files.keys():
    (folder / name).unlink()
  for name, data in files.items():
    if now.get(name) != data:
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(data)


def run(
  kind: Kind,
  name: str,
  *,
  inputs: range,
  seed: int,
  tell: Callable[[int], None] = lambda number: None,
) -> tuple[dict[str, int], list[str]]:
  """Tries inputs of one kind.

  Returns:
    How many came to what, and the faults.
  """
  counts: dict[str, int] = {}
  faults: list[str] = []
  before = [
    signal.signal(number, _late) for number in (signal.SIGPROF, signal.SIGALRM)
  ]
  for number in inputs:
    tell(number)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    # What waits takes no processor time.
    signal.setitimer(signal.ITIMER_REAL, 20 * _SECONDS)
    try:
      outcome = kind(random.Random(f"{name}:{seed}:{number}"))
    except (FaultError, LateError) as fault:
      outcome = "fault"
      faults.append(f"{name}, seed {seed}, input {number}: {fault}")
    finally:
      signal.setitimer(signal.ITIMER_PROF, 0)
      signal.setitimer(signal.ITIMER_REAL, 0)
    counts[outcome] = counts.get(outcome, 0) + 1
  for number, handler in zip(
    (signal.SIGPROF, signal.SIGALRM), before, strict=True
  ):
    signal.signal(number, handler)
  return counts, faults


def _late(number: int, frame: Any) -> None:
  where = "".join(traceback.format_stack(frame)[-6:])
  raise LateError(f"took longer than {_SECONDS:g} s\n{where}")
