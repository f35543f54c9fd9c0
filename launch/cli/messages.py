"""Explains a command's failure in one sentence, and suggests the next command.

An error that the user can mend gets a sentence without a traceback; a fault of
this program keeps its traceback. --traceback shows it in any case. An error
itself says which command helps: see `dpdist.errors.Hint`. Imports no jax, and
so recognizes jax's errors by their text.
"""

import errno
import os
import pathlib
import re
import shlex
import sys
import traceback
from typing import NamedTuple

from absl import flags

from dpdist import errors

from . import exit_codes

_TRACEBACK = flags.DEFINE_bool(
  "traceback", False, "After an error, show where in the program it came from."
)


class Message(NamedTuple):
  """The explanation of an error."""

  sentence: str
  code: int = exit_codes.UNSOUND
  # What most likely helps; None if nothing is known to help.
  hint: errors.Hint | None = None


def explain(error: BaseException) -> Message | None:
  """Explains an error of any command; None if it is this program's fault."""
  text, hint = str(error), getattr(error, "hint", None)
  if isinstance(error, KeyboardInterrupt):
    return Message("stopped by Ctrl-C", exit_codes.INTERRUPTED, errors.Hint())
  # tensorstore uses this code for a full disk as well.
  exhausted = "RESOURCE_EXHAUSTED" in text and _NO_SPACE not in text
  if isinstance(error, MemoryError) or exhausted:
    wanted = re.search(r"[Aa]llocat\w+ (\d+) bytes", text)
    size = (
      f": {int(wanted[1]) / 1e9:,.1f} GB more were wanted" if wanted else ""
    )
    smaller = errors.Hint(flags=("--autotune",), command="bench")
    return Message(f"out of memory{size}", hint=smaller)
  if "Unable to initialize backend" in text or _is_without_backend(error):
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return Message(
      f"no device: there is none for JAX_PLATFORMS={platforms!r}",
      hint=errors.Hint(text=f"JAX_PLATFORMS=cpu {again()}"),
    )
  if isinstance(
    error,
    errors.MissingPackageError | errors.LedgerError | errors.UnsoundError,
  ):
    return Message(text, hint=hint)
  if isinstance(error, OSError):
    sentence = text if error.filename else f"{_workdir() or '.'}: {text}"
    return Message(sentence, hint=hint or _hint_of_files(error, text))
  return None


def _hint_of_files(error: OSError, text: str) -> errors.Hint | None:
  """Returns a hint if a file or folder is in the way, or a disk is full."""
  if _NO_SPACE in text:
    return errors.Hint(text=f"df -h {shlex.quote(_workdir() or '.')}")
  if _workdir() and (
    error.errno in _ELSEWHERE
    or any(os.strerror(number) in text for number in _ELSEWHERE)
  ):
    return errors.Hint(flags=("--workdir=ANOTHER",))
  return None


def _is_without_backend(error: BaseException) -> bool:
  """Detects JAX's assertion error for a missing plugin."""
  frames = traceback.extract_tb(error.__traceback__)
  return (
    isinstance(error, AssertionError)
    and bool(frames)
    and frames[-1].filename.endswith("xla_bridge.py")
  )


def show(message: Message) -> int:
  """Prints the sentence and, if one is known, a command; returns the code."""
  print(f"error: {message.sentence}", file=sys.stderr)
  command = _command(message.hint) if message.hint is not None else ""
  if command:
    print(f"try: {command}", file=sys.stderr)
  asked = flags.FLAGS.is_parsed() and _TRACEBACK.value
  if asked and sys.exc_info()[0] is not None:
    traceback.print_exc()
  return message.code


def _command(hint: errors.Hint) -> str:
  """Returns the command of a hint; "" if it would not help here."""
  if hint.text:
    return hint.text
  if hint == errors.VERIFY:
    return _verify()
  return again(*hint.flags, command=hint.command)


def name() -> str:
  """Returns the name of the running command, as "train"."""
  return pathlib.Path(sys.argv[0]).stem if sys.argv else ""


def again(*more: str, command: str = "") -> str:
  """Returns this command line, with flags "--name=value" added or changed.

  Another command gets only the flags of the config.
  """
  arguments = sys.argv[1:]
  if command:
    arguments = [flag for flag in arguments if flag.startswith("--config")]
  changed = {flag.split("=")[0] for flag in more}
  kept = [flag for flag in arguments if flag.split("=")[0] not in changed]
  program = f"launch.{command or name()}"
  return shlex.join(["python", "-m", program, *kept, *more])


def _workdir() -> str:
  """Returns the last --workdir, which absl uses; "" if none is given."""
  found = ""
  for flag, after in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
    if re.fullmatch("--?workdir", flag):
      found = after
    elif match := re.match("--?workdir=(.*)", flag):
      found = match[1]
  return found


_NO_SPACE = os.strerror(errno.ENOSPC)
_ELSEWHERE = (errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.EROFS)


def _verify() -> str:
  """Returns the command that verifies --workdir's run; "" if none is given."""
  place = _workdir()
  if place and os.path.exists(place) and not os.path.isdir(place):
    return again("--workdir=ANOTHER")
  if not place:
    return ""
  return f"python -m launch.verify --workdir={shlex.quote(place)}"
