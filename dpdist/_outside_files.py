"""Finds the files of code that a user writes, and of what that imports.

Files that are installed, as in site-packages, are not followed; nor is an
import of a name that is computed.
"""

from collections.abc import Iterable, Iterator
from importlib import machinery
from importlib import util
import os
import pathlib
import re
import sys
import types
from typing import Any

from dpdist import _own_code

_CODE = (".py", ".pyc", *machinery.EXTENSION_SUFFIXES)
_STDLIB = pathlib.Path(os.__file__).resolve().parent
# An import of another top-level module, wherever in a line it stands.
_IMPORT = re.compile(
  r"(?m)(?:^|[;:])[ \t]*(?:from[ \t]+(\w[\w.]*)[ \t]+import\b"
  r"|import[ \t]+(\w[\w., \t]*))"
)


def of(module: str) -> Iterator[tuple[str, pathlib.Path]]:
  """Yields the code of a module's top-level package, or of the module alone.

  And that of all that it imports, unless it is installed.
  """
  seen = {module.partition(".")[0]}
  file = getattr(sys.modules.get(module), "__file__", None)
  top = sys.modules.get(module.partition(".")[0])
  waiting = [*_files_at(getattr(top, "__path__", ()), file)]
  yield from waiting
  while waiting:
    _, path = waiting.pop()
    for name in sorted(_imports(path) - seen):
      seen.add(name)
      folders, file = _places(name)
      # Before a folder is walked: installed ones hold thousands of files.
      folders = [x for x in folders if is_outside(pathlib.Path(x))]
      if not folders and (not file or not is_outside(pathlib.Path(file))):
        continue
      found = [*_files_at(folders, file)]
      waiting += found
      yield from ((f"{name}: {inside}", path) for inside, path in found)


def _files_at(
  folders: Iterable[str], file: str | None
) -> Iterator[tuple[str, pathlib.Path]]:
  """Yields the code in folders, by the name there; without any, a file."""
  folders = sorted(map(str, folders))
  for folder in folders:
    for at, below, found in os.walk(folder, followlinks=True):
      below[:] = sorted(name for name in below if name != "__pycache__")
      for name in sorted(found):
        if name.endswith(_CODE):
          path = pathlib.Path(at, name)
          yield path.relative_to(folder).as_posix(), path
  if not folders and file:
    yield pathlib.Path(file).name, pathlib.Path(file)


def _places(name: str) -> tuple[list[str], str | None]:
  """Returns where a top-level module is: its folders, or its file."""
  try:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    spec = spec or util.find_spec(name)
  except (ImportError, ValueError):
    spec = None
  if spec is None or not (spec.has_location or spec.submodule_search_locations):
    return [], None
  return [*(spec.submodule_search_locations or ())], spec.origin


def _imports(path: pathlib.Path) -> set[str]:
  """Returns the top-level modules that a file's imports name."""
  if path.suffix != ".py" or not path.is_file():
    return set()
  text = path.read_text("utf-8", "replace").replace("\\\n", " ")
  names: set[str] = set()
  for one, several in _IMPORT.findall(text):
    names.update([one] if one else several.split(","))
  return {name.split()[0].partition(".")[0] for name in names if name.split()}


def is_outside(path: pathlib.Path) -> bool:
  """Returns whether a file is neither ours, nor Python's, nor installed."""
  path = path.resolve()
  is_installed = {"site-packages", "dist-packages"} & {*path.parts}
  is_pythons = path.is_relative_to(_STDLIB)
  return not (is_installed or is_pythons or _own_code.has(path))


def is_function(value: Any) -> bool:
  """Returns whether a value is a function of such code."""
  if not isinstance(value, types.FunctionType):
    return False
  path = pathlib.Path(value.__code__.co_filename)
  return path.is_file() and is_outside(path)
