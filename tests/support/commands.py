"""The commands, run in this process.

`run` does what `python -m launch.NAME` does. A `Command` is imported once and
run often: each command defines its flags in absl's one table, and many have
flags of the same name, so each has its own put there when it is run.
"""

from collections.abc import Iterator
import contextlib
import importlib
import io
import runpy
import signal
import sys
from typing import Any, NamedTuple
import unittest.mock
import warnings

from absl import flags
import grain  # noqa: F401

# These define flags that stay, being modules and no programs.
from launch.cli import flag_parsing
from launch.cli import runs  # noqa: F401

_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")

# Of the commands that were imported: a module defines its flags once.
_FLAGS: dict[str, dict[str, Any]] = {}


class Outcome(NamedTuple):
  """How a command ended."""

  code: int
  out: str
  err: str


def run(command: str, *args: str) -> Outcome:
  """Runs a command.

  What it changes of this process is put back, its flags above all: each command
  defines its own, some of the same name.

  Args:
    command: its name, as "train".
    *args: its command line.
  """
  out, err = io.StringIO(), io.StringIO()
  argv = [f"launch/{command}.py", *args]
  code = 0
  with (
    _kept(),
    unittest.mock.patch.object(sys, "argv", argv),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    warnings.catch_warnings(),
  ):
    # As outside of tests, which turn them into errors.
    warnings.simplefilter("ignore")
    try:
      runpy.run_module(f"launch.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
      code = ended.code if isinstance(ended.code, int) else bool(ended.code)
  return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _kept() -> Iterator[None]:
  handlers = {name: signal.getsignal(signal.Signals[name]) for name in _SIGNALS}
  known = set(flags.FLAGS)
  for name in known:
    flags.FLAGS[name].unparse()
  try:
    yield
  finally:
    for name in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, name)
    for name, handler in handlers.items():
      signal.signal(signal.Signals[name], handler)


class Command:
  """A command that is run often; call it with its arguments."""

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
    """Runs it; whatever it raises but SystemExit comes through."""
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
