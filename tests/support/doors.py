"""The doors, opened in this process as `python -m launch.NAME` opens them."""

from collections.abc import Iterator
import contextlib
import io
import runpy
import signal
import sys
from typing import NamedTuple
import unittest.mock
import warnings

from absl import flags
import grain  # noqa: F401

# Both define flags that stay, being modules and no programs.
from launch.cli import flag_parsing  # noqa: F401

_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


class Outcome(NamedTuple):
  """How a door ended."""

  code: int
  out: str
  err: str


def run(door: str, *args: str) -> Outcome:
  """Opens a door.

  What it changes of this process is put back, its flags above all: each door
  defines its own, some of the same name.

  Args:
    door: its name, as "train".
    *args: its command line.
  """
  out, err = io.StringIO(), io.StringIO()
  argv = [f"launch/{door}.py", *args]
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
      runpy.run_module(f"launch.{door}", run_name="__main__", alter_sys=True)
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
