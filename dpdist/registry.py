"""Finds plug-ins by name, this project's own and others.

A setting names a plug-in of some kind: a data set, an engine. `resolve` finds
it

  * by a registered name, as all plug-ins of this project have;
  * as "package.module:attribute", which is imported;
  * by an entry point of the group "dpdist.KIND" of an installed package.

Code outside this project decides what a run computes as much as our own does.
So a run's fingerprint contains `outside_sha256`, and the run goes on under new
keys if that code changes. The hash is computed from files: after editing a
module that a running interpreter has loaded, such as a notebook's, restart the
interpreter before a run.
"""

from collections.abc import Callable
import hashlib
import importlib
from importlib import metadata
import pathlib
import sys
from typing import Any, TypeVar

from dpdist import errors

_T = TypeVar("_T")

_OURS = ("dpdist", "launch")
_things: dict[str, dict[str, Any]] = {}
_outside: set[str] = set()


def register(kind: str, *names: str) -> Callable[[_T], _T]:
  """Returns a decorator that registers a plug-in by its names.

  Raises:
    ValueError: another plug-in of the kind already has one of the names.
  """

  def put(thing: _T) -> _T:
    known = _things.setdefault(kind, {})
    for name in names:
      if known.get(name, thing) is not thing:
        raise ValueError(
          f"names of a {kind} must be new, got {name!r}, which is"
          f" {known[name]!r}"
        )
      known[name] = thing
    return thing

  return put


def names(kind: str) -> list[str]:
  """Returns registered names and those of entry points, sorted."""
  points = {point.name for point in metadata.entry_points(group=_group(kind))}
  return sorted({*_things.get(kind, {}), *points})


def resolve(kind: str, name: str, *, setting: str) -> Any:
  """Finds a plug-in.

  Args:
    kind: its kind, such as "dataset".
    name: its name; see the module's docstring.
    setting: the setting that names it, for messages.

  Raises:
    ValueError: there is no plug-in of that name, or it does not say where its
      code is.
  """
  thing = _find(kind, name, setting)
  if thing is None:
    raise errors.ArgumentError(
      f"{setting} must be one of {names(kind)}, or package.module:attribute,"
      f" got {name!r}"
    )
  # Functions and classes name their module; a module has its own name.
  where = getattr(thing, "__module__", None) or getattr(thing, "__name__", None)
  if not isinstance(where, str) or where in sys.stdlib_module_names:
    raise errors.ArgumentError(
      f"{setting} must name a function, a class or a module, whose code a run"
      f" can be told apart by, got {thing!r}"
    )
  named = name.partition(":")[0] if ":" in name else where
  _outside.update(
    module for module in (where, named) if module.split(".")[0] not in _OURS
  )
  return thing


def _find(kind: str, name: str, setting: str) -> Any:
  if name in _things.get(kind, {}):
    return _things[kind][name]
  module, has_attribute, attribute = name.partition(":")
  if has_attribute:
    try:
      return getattr(importlib.import_module(module), attribute)
    except (AttributeError, ImportError, ValueError) as error:
      raise errors.ArgumentError(
        f"{setting} must be package.module:attribute of what can be imported,"
        f" got {name!r}: {error}"
      ) from error
  for point in metadata.entry_points(group=_group(kind), name=name):
    return point.load()
  return None


def outside_sha256() -> str:
  """Returns SHA-256 of resolved code outside this project; "" if there is none.

  For each module it covers all source of its package. What that package imports
  from elsewhere is covered by the versions in a fingerprint, if listed there.
  """
  if not _outside:
    return ""
  digest = hashlib.sha256()
  for name in sorted(_outside):
    digest.update(name.encode() + b"\0")
    for file in _files(name):
      digest.update(file.name.encode() + b"\0")
      digest.update(hashlib.sha256(file.read_bytes()).digest())
  return digest.hexdigest()


def _files(module: str) -> list[pathlib.Path]:
  """Returns source files of a module's top-level package, or of the module."""
  top = sys.modules.get(module.partition(".")[0])
  folders = [pathlib.Path(x) for x in getattr(top, "__path__", ())]
  if folders:
    return sorted(file for x in folders for file in x.rglob("*.py"))
  file = getattr(sys.modules.get(module), "__file__", None)
  return [pathlib.Path(file)] if file else []


def _group(kind: str) -> str:
  return f"dpdist.{kind}"
