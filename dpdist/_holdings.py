"""What functions hold besides the files of their code.

Two functions of one file, or one function that holds other numbers, compute
other things: a run must tell them apart.
"""

import functools
import hashlib
import types
from typing import Any

import numpy as np

from dpdist import _outside_files
from dpdist import errors

_PLAIN = (
  *(bool, int, float, complex, str, bytes),
  *(type(None), type(...), np.generic, np.dtype),
)


class Holdings:
  """Collects the modules of functions' code, and the values that they hold."""

  def __init__(self, setting: str):
    """Stores what the functions were given as; holds nothing yet."""
    self.modules: set[str] = set()  # Their names.
    self.values: list[str] = []  # A text of each value, in a fixed order.
    self._setting = setting
    # Kept, so that no other thing gets the identity of one that was seen.
    self._seen: dict[int, Any] = {}

  def add(self, thing: Any) -> None:
    """Adds a function, class or value, and all that it holds."""
    if isinstance(thing, _PLAIN):
      self.values.append(f"{type(thing).__name__} {thing!r}")
    elif isinstance(thing, np.ndarray) and not thing.dtype.hasobject:
      content = hashlib.sha256(np.ascontiguousarray(thing).tobytes())
      self.values.append(f"{thing.dtype} {thing.shape} {content.hexdigest()}")
    elif id(thing) in self._seen:
      self.values.append(f"the same as {[*self._seen].index(id(thing))}")
    else:
      self._seen[id(thing)] = thing
      self._add_composed(thing)

  def _add_composed(self, thing: Any) -> None:
    if isinstance(thing, list | tuple):
      parts = [len(thing), *thing]
    elif isinstance(thing, dict):
      parts = [len(thing), *(x for item in thing.items() for x in item)]
    elif isinstance(thing, set | frozenset):
      parts = [len(thing), *sorted(thing, key=repr)]
    elif isinstance(thing, types.ModuleType):
      self.modules.add(thing.__name__)
      return
    elif isinstance(thing, type):
      self.modules.update(base.__module__ for base in thing.__mro__)
      self.values.append(f"class {thing.__qualname__}")
      return
    elif isinstance(thing, types.FunctionType):
      self.modules.add(thing.__module__ or "")
      parts = [thing.__qualname__, *_code(thing.__code__), *_held_by(thing)]
    elif isinstance(thing, types.MethodType):
      parts = [thing.__func__, thing.__self__]
    elif isinstance(thing, functools.partial):
      parts = [thing.func, thing.args, thing.keywords]
    elif isinstance(thing, types.BuiltinFunctionType | np.ufunc):
      parts = [repr(getattr(thing, "__module__", "")), thing.__name__]
    elif hasattr(type(thing), "__array__"):  # Of JAX, or of PyTorch.
      parts = [_as_array(thing, self._setting)]
    elif hasattr(thing, "__dict__"):
      slots = [getattr(thing, name, None) for name in _slots(type(thing))]
      parts = [type(thing), vars(thing), slots]
    else:
      raise errors.ArgumentError(
        f"{self._setting} must have functions that hold numbers, texts, arrays"
        " and functions, by which a run can be told apart, got one with a"
        f" {type(thing).__module__}.{type(thing).__qualname__}"
      )
    for part in parts:
      self.add(part)


def _code(code: types.CodeType) -> list[Any]:
  """Returns what a function's code does, without where it stands."""
  parts: list[Any] = [code.co_code, code.co_names, code.co_varnames]
  for constant in code.co_consts:
    is_code = isinstance(constant, types.CodeType)
    parts += _code(constant) if is_code else [constant]
  return parts


def _slots(kind: type) -> list[str]:
  """Returns the names of a class's slots, in which instances hold values."""
  named = [getattr(base, "__slots__", ()) for base in kind.__mro__]
  lists = [[slots] if isinstance(slots, str) else [*slots] for slots in named]
  found = {name for names in lists for name in names}
  return sorted(found - {"__dict__", "__weakref__"})


def _as_array(thing: Any, setting: str) -> np.ndarray:
  try:
    array = np.asarray(thing)
  except (TypeError, ValueError, RuntimeError):  # Such as a key of JAX.
    array = np.array(None)
  if array.dtype.hasobject:
    raise errors.ArgumentError(
      f"{setting} must have functions that hold arrays of numbers, got one with"
      f" a {type(thing).__qualname__}"
    )
  return array


def _held_by(function: types.FunctionType) -> list[Any]:
  """Returns what a function holds besides its code, in a fixed order."""
  held: list[Any] = [function.__defaults__ or (), function.__kwdefaults__ or {}]
  for cell in function.__closure__ or ():
    try:
      held.append(cell.cell_contents)
    except ValueError:  # It is not set yet.
      held.append("unset")
  held.append(getattr(function, "__wrapped__", ()))
  codes = [function.__code__]
  names: set[str] = set()
  while codes:
    code = codes.pop()
    names.update(code.co_names)
    codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
  for name in sorted(names & function.__globals__.keys()):
    value = function.__globals__[name]
    # What a module holds besides may be anything, such as a logger.
    is_covered = _is_plain(value) or hasattr(type(value), "__array__")
    is_covered |= isinstance(value, functools.partial | types.SimpleNamespace)
    if is_covered or _outside_files.is_function(value):
      held += [name, value]
  return held


def _is_plain(value: Any) -> bool:
  """Returns whether a value is plain, or a collection of such."""
  if isinstance(value, dict):
    return all(_is_plain(x) for item in value.items() for x in item)
  if isinstance(value, list | tuple | set | frozenset):
    return all(map(_is_plain, value))
  if isinstance(value, np.ndarray):
    return not value.dtype.hasobject
  return isinstance(value, _PLAIN)
