"""The commands by name: `dpdist train` is `python -m launch.train`.

The modules of launch/ are `launch` in a checkout and `dpdist.launch` where
dpdist is installed. So the processes that a command starts, and the commands
that it shows to people, are named here.
"""

import ast
import difflib
import importlib.util
import os
import runpy
import shlex
import sys

import dpdist

from . import exit_codes

COMMANDS = (
  *("init", "fetch", "check", "budget", "train", "local", "submit"),
  *("verify", "eval", "compare", "export", "bench", "audit", "reserve"),
)
_PACKAGE = __name__.removesuffix(".cli.words")
_IS_INSTALLED = _PACKAGE != "launch"


def module(name: str) -> str:
  """Returns what `python -m` runs a command by, as "launch.train"."""
  return f"{_PACKAGE}.{name}"


def shown(command: str) -> str:
  """Returns a command that people can run here, given as "dpdist train ..."."""
  if _IS_INSTALLED or not command.startswith("dpdist "):
    return command
  return f"python -m {_PACKAGE}.{command.removeprefix('dpdist ')}"


def line(name: str, *arguments: str) -> str:
  """Returns a command line of one of `COMMANDS` for people to run."""
  return shown(" ".join(map(_quoted, ["dpdist", name, *arguments])))


def _quoted(argument: str) -> str:
  """Returns an argument as a shell takes it, in one line."""
  if argument.isprintable():
    return shlex.quote(argument)
  escaped = argument.encode("unicode_escape").decode().replace("'", "\\'")
  return f"$'{escaped}'"


def main() -> int:
  """Runs the command that the first argument names; returns an exit code."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("--help", "-h", "help"):
    try:
      print(_overview(), flush=True)
    except BrokenPipeError:  # As of `dpdist --help | head -3`.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return exit_codes.NOBODY_READS
    return exit_codes.DONE
  if name == "--version":
    print(f"dpdist {dpdist.__version__}")
    return exit_codes.DONE
  if name not in COMMANDS:
    close = difflib.get_close_matches(name, COMMANDS, 1)
    print(f"error: there is no command {name!r}", file=sys.stderr)
    print(f"try: dpdist {close[0] if close else '--help'}", file=sys.stderr)
    return exit_codes.USAGE
  del sys.argv[1]
  runpy.run_module(module(name), run_name="__main__", alter_sys=True)
  return exit_codes.DONE


def _overview() -> str:
  """Returns a line for each command, from its docstring, which imports none."""
  lines = ["usage: dpdist COMMAND [--FLAG=VALUE ...]", ""]
  lines += [f"  {name:<7}  {_summary(name)}" for name in COMMANDS]
  lines += ["", "`dpdist COMMAND --help` says more about a command."]
  return "\n".join(lines)


def _summary(name: str) -> str:
  """Returns the first sentence about a command."""
  spec = importlib.util.find_spec(module(name))
  assert spec is not None
  if spec.submodule_search_locations:
    spec = importlib.util.find_spec(f"{spec.name}.__main__")
    assert spec is not None
  assert spec.origin is not None
  with open(spec.origin, encoding="utf-8") as file:
    text = ast.get_docstring(ast.parse(file.read())) or ""
  return text.splitlines()[0].partition(". ")[0].removesuffix(".")
