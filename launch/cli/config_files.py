"""Finds the configs that come with dpdist: `--config=digits`.

A name without a slash and without ".py" is the name of one of them. A folder
with a config.py stands for that, and anything else is a path.
"""

from collections.abc import Sequence
import difflib
import os
import pathlib
import shlex

from dpdist import errors

# configs/ beside launch/, in a checkout and inside of an installed dpdist.
FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs"


def names() -> list[str]:
  """Returns the names of the configs that come with dpdist, sorted."""
  return sorted(x.stem for x in FOLDER.glob("*.py") if x.stem != "__init__")


def found(argv: Sequence[str]) -> list[str]:
  """Returns a command line with paths for the names of --config.

  Raises:
    errors.ArgumentError: no config that comes with dpdist has such a name.
  """
  changed = list(argv)
  for place, word in enumerate(argv):
    if word == "--":
      break
    flag, equals, value = word.partition("=")
    if flag not in ("--config", "-config"):
      continue
    if equals:
      changed[place] = f"{flag}={_path(value)}"
    elif place + 1 < len(argv):
      changed[place + 1] = _path(argv[place + 1])
  return changed


def given(path: str) -> str:
  """Returns the name of a config by whose path it was found, or the path.

  A name is found on other machines too, wherever dpdist is there.
  """
  file, colon, argument = path.partition(":")
  inside = pathlib.Path(file)
  if inside.is_absolute() and inside.parent == FOLDER:
    return f"{inside.stem}{colon}{argument}"
  return path


def listing() -> str:
  """Returns a command that lists the configs that come with dpdist."""
  here = os.path.relpath(FOLDER)
  return f"ls {shlex.quote(str(FOLDER) if here.startswith('..') else here)}"


def _path(value: str) -> str:
  name, colon, argument = value.partition(":")
  inside = os.path.join(name, "config.py")
  if name and os.path.isfile(inside):
    # As `dpdist init` makes it.
    return f"{inside}{colon}{argument}"
  if os.path.isfile(name) and not name.endswith(".py"):
    raise errors.ArgumentError(
      f"config must be a Python file, whose name ends in .py, got {name!r}"
    )
  if not name or os.sep in name or name.endswith(".py"):
    return value
  if name in names():
    return f"{FOLDER / name}.py{colon}{argument}"
  close = difflib.get_close_matches(name, names(), 3)
  known = f"did you mean {' or '.join(close)}?" if close else ", ".join(names())
  raise errors.ArgumentError(
    "config must be the path of a file or the name of a config that comes with"
    f" dpdist, got {name!r}" + ("; " if close else ", none of ") + known
  )
