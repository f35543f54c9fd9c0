"""The doors of launch/, opened in this process, one after the other.

Each of them defines its flags in absl's one table, and many have flags of the
same name; so each has its own put there when it is opened.
"""

import contextlib
import importlib
import io
import sys
from typing import Any, NamedTuple
import warnings

from absl import flags

from launch.cli import flag_parsing

# Of the doors that were imported: a module defines its flags once.
_FLAGS: dict[str, dict[str, Any]] = {}


class Outcome(NamedTuple):
  """How a door was left."""

  code: int
  out: str
  err: str


class Door:
  """One door; call it with its arguments."""

  def __init__(self, name: str):
    before = {*flags.FLAGS}
    self.name = name
    self._module = importlib.import_module(f"launch.{name}")
    if name not in _FLAGS:
      _FLAGS[name] = {x: flags.FLAGS[x] for x in {*flags.FLAGS} - before}
    self.flags = _FLAGS[name]
    for flag in {*flags.FLAGS} - before:
      delattr(flags.FLAGS, flag)

  def __call__(self, *arguments: str) -> Outcome:
    """Opens it; whatever it raises but SystemExit comes through."""
    before = {*flags.FLAGS}
    for name, flag in self.flags.items():
      flag.unparse()
      flags.FLAGS[name] = flag
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    # Flags of a config are read from there.
    sys.argv = [f"launch.{self.name}", *arguments]
    passes_on = self.name in ("local", "engines.ray_driver")
    code: object = None
    try:
      with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
      ):
        # As in a process of its own: libraries' warnings are no errors.
        warnings.simplefilter("ignore")
        flag_parsing.run(self._module.main, passes_on=passes_on)
    except SystemExit as end:
      code = end.code
    finally:
      sys.argv = argv
      flags.FLAGS.unparse_flags()
      for name in {*flags.FLAGS} - before:
        delattr(flags.FLAGS, name)
    number = code if isinstance(code, int) else 0 if code is None else -1
    return Outcome(number, out.getvalue(), err.getvalue())
