"""What a door says when it fails: one sentence, and the next command to try.

What a person can do something about is told so, without a traceback; what is
nobody's fault but this program's keeps it. --traceback shows it in any case.
Imports no jax, and tells its errors by their words.
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

from dpdist.ledger import ledger
from launch.cli import exit_codes

_TRACEBACK = flags.DEFINE_bool(
  "traceback", False, "After an error, show where in the program it came from."
)


class Told(NamedTuple):
  """What is said of an error.

  Attributes:
    sentence: what is wrong.
    code: to exit with.
    command: to try; "": what the sentence is known to ask for.
  """

  sentence: str
  code: int = exit_codes.UNSOUND
  command: str = ""


def explain(error: BaseException) -> Told | None:
  """What to say of an error that any door may meet; None of a fault of ours."""
  text = str(error)
  if isinstance(error, KeyboardInterrupt):
    return Told("stopped by Ctrl-C", exit_codes.INTERRUPTED)
  # By which tensorstore means a full disk as well.
  exhausted = "RESOURCE_EXHAUSTED" in text and _NO_SPACE not in text
  if isinstance(error, MemoryError) or exhausted:
    wanted = re.search(r"[Aa]llocat\w+ (\d+) bytes", text)
    size = (
      f": {int(wanted[1]) / 1e9:,.1f} GB more were wanted" if wanted else ""
    )
    return Told(f"out of memory{size}")
  if "Unable to initialize backend" in text or _is_without_backend(error):
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return Told(f"no device: there is none for JAX_PLATFORMS={platforms!r}")
  if isinstance(error, ModuleNotFoundError) and "pip install" in text:
    return Told(text)
  if isinstance(error, ledger.LedgerError) or (
    type(error).__name__ == "UnsoundError"
  ):
    return Told(text, command=_verify())
  if isinstance(error, OSError):
    return Told(text if error.filename else f"{_workdir() or '.'}: {text}")
  return None


def _is_without_backend(error: BaseException) -> bool:
  """JAX fails by assertion where there is no plugin for what is asked for."""
  frames = traceback.extract_tb(error.__traceback__)
  return (
    isinstance(error, AssertionError)
    and bool(frames)
    and frames[-1].filename.endswith("xla_bridge.py")
  )


def tell(told: Told) -> int:
  """Prints the sentence and, if one is known, a command; returns the code."""
  print(f"error: {told.sentence}", file=sys.stderr)
  command = told.command or next_command(told.sentence)
  if command:
    print(f"try: {command}", file=sys.stderr)
  asked = flags.FLAGS.is_parsed() and _TRACEBACK.value
  if asked and sys.exc_info()[0] is not None:
    traceback.print_exc()
  return told.code


def next_command(sentence: str) -> str:
  """The command that most likely helps; "" if none is known."""
  for pattern, make in _COMMANDS:
    if re.search(pattern, sentence):
      return make(sentence)
  return ""


def _door() -> str:
  return pathlib.Path(sys.argv[0]).stem if sys.argv else ""


def again(*more: str, door: str | None = None) -> str:
  """This command, as it is typed, with flags that are added or changed.

  Args:
    *more: as "--name=value".
    door: another one, which takes the flags of the config alone.
  """
  given = sys.argv[1:]
  if door is not None:
    given = [flag for flag in given if flag.startswith("--config")]
  changed = {flag.split("=")[0] for flag in more}
  kept = [flag for flag in given if flag.split("=")[0] not in changed]
  return shlex.join(["python", "-m", f"launch.{door or _door()}", *kept, *more])


def _workdir() -> str:
  """The last one that is given, as absl takes it; "" if none is."""
  found = ""
  for flag, after in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
    if re.fullmatch("--?workdir", flag):
      found = after
    elif match := re.match("--?workdir=(.*)", flag):
      found = match[1]
  return found


def _asked_for(sentence: str) -> str:
  found = re.search(r"`([^`]+)`|(pip install (?:'[^']*'|[\w.-]+))", sentence)
  return (found[1] or found[2]) if found else ""


_NO_SPACE = os.strerror(errno.ENOSPC)
_NO_RIGHT = re.escape(os.strerror(errno.EACCES))
_NO_FOLDER = re.escape(os.strerror(errno.ENOTDIR))
_A_FILE = re.escape(os.strerror(errno.EEXIST))

# By what the sentence says, first the more particular.
_COMMANDS = (
  (r"`python -m [^`]+`|pip install ", _asked_for),
  (r"^stopped by Ctrl-C", lambda _: again()),
  (
    r"^out of memory|RESOURCE_EXHAUSTED",
    lambda _: again("--autotune", door="bench"),
  ),
  (r"^no device", lambda _: f"JAX_PLATFORMS=cpu {again()}"),
  (
    r"\bmesh must|\bmesh\.\w+ must",
    lambda _: again(
      "--config.mesh.data=-1", "--config.mesh.fsdp=1", "--config.mesh.model=1"
    ),
  ),
  (r"--config cannot be loaded", lambda _: "ls configs"),
  (r"there is no setting", lambda _: f"python -m launch.{_door()} --help"),
  (r"apt-get install", _asked_for),
  (r"data\.path must", lambda _: again("--config.data.path=DIRECTORY")),
  (
    r"workdir must be the directory of a run|ledger in .* is empty",
    lambda _: (
      "python -m launch.train --config=configs/digits.py"
      f" --workdir={shlex.quote(_workdir() or '/tmp/digits')}"
    ),
  ),
  (r"step must be that of a checkpoint", lambda _: again("--step=STEP")),
  (r"output must be a new", lambda _: again("--output=ANOTHER")),
  (r"config must be given", lambda _: again("--config=FILE")),
  (
    f"{_NO_RIGHT}|{_NO_FOLDER}|{_A_FILE}|Read-only",
    lambda _: again("--workdir=ANOTHER") if _workdir() else "",
  ),
  (_NO_SPACE, lambda _: f"df -h {shlex.quote(_workdir() or '.')}"),
  (r"num_examples must be the number of", lambda s: again(_num_examples(s))),
  (
    r"chunk_size must",
    lambda _: again("--config.chunk_size=0"),
  ),
)


def _verify() -> str:
  """ "" where another --workdir is what helps, or there is none."""
  place = _workdir()
  if not place or (os.path.exists(place) and not os.path.isdir(place)):
    return ""
  return f"python -m launch.verify --workdir={shlex.quote(place)}"


def _num_examples(sentence: str) -> str:
  found = re.search(r", (\d+), got", sentence)
  number = found[1] if found else "NUMBER"
  return f"--config.privacy.num_examples={number}"
