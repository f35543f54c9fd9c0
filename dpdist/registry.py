"""Finds things by the names in settings, whether ours or somebody else's.

A setting names a thing of some kind: a data set, a task, an engine, a sampling.
No setting names a layer rule: all that are registered are used. `resolve` finds
a thing

  * by a registered name, which all of ours have;
  * as "package.module:attribute", which is imported;
  * by an entry point of the group "dpdist.KIND" of an installed package.

Code outside of this project decides what a run computes as much as our own code
does. So a run's fingerprint holds `code_sha256` of what it resolved, and a run
goes on under new keys where that code has changed.

Guarantees:
  * The digest covers all source files and compiled modules of the top-level
    packages that name, define or register the thing, and of those that they
    import, and so on, but for installed ones (in site-packages). Other files,
    and what is imported by a name that is computed, are not in it.
  * The digest is of the code that this process runs. It is taken when the code
    is registered or first resolved. A run is refused if a file was edited after
    that, or after the process had imported it.
  * If a thing decides a step, its code must be in a file: code of a notebook is
    refused.
  * Of functions that are given as objects and must be in files, the digest also
    covers the values that they hold: those of closures, partials, defaults,
    instances, and of module variables that are plain values or collections of
    such; and what functions of their modules hold that they call.
"""

from collections.abc import Callable, Iterable
import functools
import hashlib
import importlib
from importlib import metadata
import inspect
import pathlib
import sys
import time
from typing import Any, NamedTuple, TypeVar

from dpdist import _holdings
from dpdist import _outside_files
from dpdist import _own_code
from dpdist import _validation
from dpdist import errors

_T = TypeVar("_T")

_STARTED = time.time()
# Kinds whose code decides what a run computes; an engine only starts a run.
_DECIDE_STEPS = (
  *("dataset", "task", "model", "optimizer", "layer_rule"),
  *("sampling", "noise", "clipper", "proof"),
)


class _Thing(NamedTuple):
  """A thing, and the module that it was registered by or is named by."""

  thing: Any
  named_by: str


_things: dict[str, dict[str, _Thing]] = {}
# By the name of a module: the digest of its package's files when first read.
_digests: dict[str, str] = {}


def register(kind: str, *names: str, module: str = "") -> Callable[[_T], _T]:
  """Returns a decorator that registers a thing by its names.

  `kind` is as "dataset", and `module` registers it; "": the one that calls
  this.
  """
  caller = module or sys._getframe(1).f_globals["__name__"]

  def put(thing: _T) -> _T:
    known = _things.setdefault(kind, {})
    for name in names:
      if name in known and known[name].thing is not thing:
        raise ValueError(
          f"names of a {kind} must be new, got {name!r}, which is"
          f" {known[name].thing!r}"
        )
      known[name] = _Thing(thing, caller)
    code = _spelt_out(caller)
    if (
      kind in _DECIDE_STEPS
      and not _is_ours(code)
      and [*_outside_files.of(code)]
    ):
      # Now, while the module is being imported: it is what this process runs.
      _digests.setdefault(code, _sha256(code, f"a {kind}"))
    return thing

  return put


def names(kind: str) -> list[str]:
  """Returns the names that are registered or are entry points, sorted."""
  return sorted({*_things.get(kind, {}), *_entry_points(kind)})


def is_known(kind: str, name: str) -> bool:
  """Returns whether a name is registered or is an entry point."""
  return name in _things.get(kind, {}) or name in _entry_points(kind)


def registered(kind: str) -> list[tuple[str, Any]]:
  """Returns what was registered, by name, sorted; no entry points."""
  return sorted(
    (name, found.thing) for name, found in _things.get(kind, {}).items()
  )


def outside_sha256(kind: str) -> str:
  """Returns the SHA-256 of registered code outside of this project, or ""."""
  parts = []
  for name, thing in sorted(_things.get(kind, {}).items()):
    setting = f"{kind} {name!r}"
    if _modules(thing, setting):
      resolve(kind, name, setting=setting)
      parts.append(f"{name}\0{code_sha256(kind, name, setting=setting)}\0")
  return hashlib.sha256("".join(parts).encode()).hexdigest() if parts else ""


def resolve(kind: str, name: str, *, setting: str) -> Any:
  """Finds a thing by a name in one of the forms above.

  The kind is as "dataset", and `setting` has the name, for messages. Raises
  ArgumentError also where a run could not tell whether its code has changed.
  """
  found = _find(kind, name, setting)
  if kind not in _DECIDE_STEPS:
    return found.thing
  for module in _modules(found, setting):
    if module not in _digests:
      _digests[module] = _sha256(module, setting)
  return found.thing


def load(kind: str, name: str, *, setting: str) -> None:
  """Imports a thing that is not ours, so that it registers what it needs."""
  if ":" in name or name in _entry_points(kind):
    resolve(kind, name, setting=setting)


def code_sha256(kind: str, name: str, *, setting: str) -> str:
  """Returns the SHA-256 of a thing's code outside of this project, or "".

  `resolve` must have been called before, with the same arguments.
  """
  digest = hashlib.sha256()
  modules = _modules(_find(kind, name, setting), setting)
  for module in modules:
    if _sha256(module, setting) != _digests[module]:
      raise errors.ArgumentError(
        f"{setting} must name code that stays as it is while a run starts, got"
        f" {name!r}, whose files have changed since this process read them:"
        " start it again"
      )
    digest.update(f"{module}\0{_digests[module]}\0".encode())
  return digest.hexdigest() if modules else ""


def code_sha256_of(
  things: Iterable[Any], *, setting: str, needs_files: bool
) -> str:
  """Returns the SHA-256 of files with code outside of this project, or "".

  Modules of the things were imported before; `setting` was given them, for
  messages. With needs_files, code without a file, and code that was edited
  after it was read, is refused, and what such code holds is covered. If not,
  the caller must tell such code apart by other means.
  """
  digest, is_ours = hashlib.sha256(), True
  if needs_files:
    holdings = _holdings.Holdings(setting)
    for thing in things:
      holdings.add(thing)
    modules = {_spelt_out(module) for module in holdings.modules}
    if holdings.values:
      digest.update("\0".join(holdings.values).encode())
      is_ours = False
  else:
    modules = {_spelt_out(_home(_unwrapped(thing))) for thing in things} - {""}
  for module in sorted(modules):
    if _is_ours(module) or _is_of_python(module):
      continue
    if needs_files:
      _refuse_edited(module, setting)
    elif not [*_outside_files.of(module)]:
      continue
    digest.update(f"{module}\0{_sha256(module, setting)}\0".encode())
    is_ours = False
  return "" if is_ours else digest.hexdigest()


def _unwrapped(thing: Any) -> Any:
  """Returns the function in a partial or decorated one."""
  while isinstance(thing, functools.partial):
    thing = thing.func
  return inspect.unwrap(thing)


def _home(thing: Any) -> str:
  """Returns the name of the module that a thing's code is in; "" if unknown."""
  # A module has a name; functions, classes and methods, and an instance by its
  # class, say where they are defined.
  where = getattr(thing, "__module__", None) or getattr(thing, "__name__", None)
  return where if isinstance(where, str) else ""


def _find(kind: str, name: str, setting: str) -> _Thing:
  if name in _things.get(kind, {}):
    return _things[kind][name]
  if name in _entry_points(kind):
    point = _entry_points(kind)[name]
    if kind in _DECIDE_STEPS:
      _refuse_edited(point.module, setting)
    return _Thing(point.load(), point.module)
  module, has_attribute, attribute = name.partition(":")
  if has_attribute:
    if kind in _DECIDE_STEPS:
      _refuse_edited(module, setting)
    try:
      thing = getattr(importlib.import_module(module), attribute)
    except (AttributeError, ImportError, ValueError) as error:
      raise errors.ArgumentError(
        f"{setting} must be package.module:attribute of what can be imported,"
        f" got {name!r}: {error}"
      ) from error
    return _Thing(thing, module)
  raise errors.ArgumentError(
    f"{setting} must be one of {names(kind)}, or package.module:attribute, got"
    f" {name!r}{_validation.suggestion(name, names(kind))}"
  )


def _modules(found: _Thing, setting: str) -> list[str]:
  """Returns the modules outside of this project that a thing's code is in."""
  where = _home(found.thing)
  if not where or where.split(".")[0] in sys.stdlib_module_names:
    raise errors.ArgumentError(
      f"{setting} must name a function, a class or a module, whose code a run"
      f" can be told apart by, got {found.thing!r}"
    )
  modules = {_spelt_out(where), _spelt_out(found.named_by)}
  return sorted(module for module in modules if not _is_ours(module))


def _spelt_out(module: str) -> str:
  """Returns the full name of "__main__" where `python -m` was given one."""
  spec = getattr(sys.modules.get(module), "__spec__", None)
  return spec.name if module == "__main__" and spec is not None else module


def _is_of_python(module: str) -> bool:
  if module.partition(".")[0] not in sys.stdlib_module_names:
    return False
  # By the place: a user's own module may have such a name.
  file = getattr(sys.modules.get(module), "__file__", None)
  return not file or not _outside_files.is_outside(pathlib.Path(file))


def _is_ours(module: str) -> bool:
  # By the place: a package of that name may be somebody else's.
  file = getattr(sys.modules.get(module), "__file__", None)
  if file:
    return _own_code.has(pathlib.Path(file).resolve())
  paths = [path.resolve() for _, path in _outside_files.of(module)]
  return bool(paths) and all(map(_own_code.has, paths))


def _refuse_edited(module: str, setting: str) -> None:
  """Raises ValueError for a module that was edited after it was imported."""
  if module not in sys.modules or module in _digests or _is_ours(module):
    return
  newest = max(
    (path.stat().st_mtime for _, path in _outside_files.of(module)), default=0
  )
  if newest > _STARTED:
    raise errors.ArgumentError(
      f"{setting} must name code that this process has read as it is, got"
      f" {module!r}, which was imported before and has files that are newer"
      " than this process: start it again"
    )


def _sha256(module: str, setting: str) -> str:
  digest = hashlib.sha256()
  files = list(_outside_files.of(module))
  if not files or not all(path.is_file() for _, path in files):
    raise errors.ArgumentError(
      f"{setting} must name code that is in files, by which a run can tell"
      f" whether it has changed, got code of {module!r}, which has none: put"
      " it into a module"
    )
  for name, path in files:
    digest.update(f"{name}\0".encode())
    digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()


def _entry_points(kind: str) -> dict[str, metadata.EntryPoint]:
  """Returns the entry points of a kind, by name."""
  return _entry_points_on(kind, tuple(sys.path))


@functools.cache
def _entry_points_on(
  kind: str, path: tuple[str, ...]
) -> dict[str, metadata.EntryPoint]:
  """Reads them once for each search path of modules."""
  del path  # It is where they are looked for.
  points = metadata.entry_points(group=f"dpdist.{kind}")
  return {point.name: point for point in points}
