"""absl flags with the exit codes of this project's doors."""

from collections.abc import Callable, Sequence
import sys
from typing import NoReturn

from absl import app
from absl import flags
from absl import logging

from launch import exit_codes


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
  """Runs a door's main under absl; bad flags end with `exit_codes.USAGE`."""
  # Libraries log each file they write; --verbosity=0 shows it.
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=_parse)
  raise AssertionError("app.run does not return")


def usage_error(message: object) -> int:
  """Prints one line to standard error; returns the exit code."""
  print(f"error: {message}", file=sys.stderr)
  return exit_codes.USAGE


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, OSError, TypeError, ValueError) as error:
    # config_flags lets a config's own errors through: a missing file, an
    # unknown field with a suggestion, a value of the wrong type.
    sys.exit(usage_error(f"{error}\nTry --help."))
  if len(rest) > 1:
    sys.exit(usage_error(f"unexpected argument {rest[1]!r}\nTry --help."))
  return rest
