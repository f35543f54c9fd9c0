"""absl flags with the exit codes of this project's doors."""

from collections.abc import Callable, Sequence
import functools
import sys
from typing import NoReturn

from absl import app
from absl import flags
from absl import logging

from dpdist import config
from launch import errors
from launch import exit_codes


def run(
  main: Callable[[Sequence[str]], int], *, passes_on: bool = False
) -> NoReturn:
  """Runs a door's main under absl; bad flags end with `exit_codes.USAGE`.

  Args:
    main: gets the program's name, and returns an exit code.
    passes_on: whether it must be given `--`, and gets what follows too.
  """
  # Libraries log each file they write; --verbosity=0 shows it.
  logging.set_verbosity(logging.WARNING)
  app.run(
    functools.partial(_told, main),
    flags_parser=functools.partial(_parse, passes_on),
  )
  raise AssertionError("app.run does not return")


def usage_error(message: object) -> int:
  """Prints one line, and what to try, to standard error.

  Returns:
    The exit code.
  """
  return errors.tell(errors.Told(str(message), exit_codes.USAGE))


def _told(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
  """Runs a door; what a person can do something about ends in a sentence."""
  try:
    return main(argv)
  except (Exception, KeyboardInterrupt) as error:
    told = errors.explain(error)
    if told is None:
      raise
    return errors.tell(told)


def _last_line(text: object) -> str:
  """What is said at the end of a traceback, without it."""
  return (str(text).strip().splitlines() or [""])[-1].strip()


def _parse(passes_on: bool, argv: Sequence[str]) -> list[str]:
  passed: list[str] = []
  if passes_on and "--" in argv:
    end = argv.index("--")
    argv, passed = argv[:end], list(argv[end + 1 :])
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      # A file that could not be loaded says so when it is first looked into.
      getattr(flags.FLAGS.config, "keys", None)
      config.check(flags.FLAGS.config)
  except AttributeError as error:
    # An unknown setting, perhaps with a suggestion, wrapped in a KeyError.
    reason = error.args[0] if error.args else error
    if isinstance(reason, KeyError) and reason.args:
      reason = reason.args[0]
    sys.exit(usage_error(f"there is no setting {_last_line(reason)}"))
  except (flags.Error, TypeError, ValueError) as error:
    if "Traceback" in str(error):
      sys.exit(usage_error(f"--config cannot be loaded: {_last_line(error)}"))
    sys.exit(usage_error(f"{' '.join(str(error).split())}\nTry --help."))
  except Exception as error:
    # A file of settings is a program, and may fail in any way.
    reason = _last_line(error) or type(error).__name__
    sys.exit(usage_error(f"--config cannot be loaded: {reason}"))
  if len(rest) > 1:
    sys.exit(usage_error(f"unexpected argument {rest[1]!r}\nTry --help."))
  if passes_on and not passed:
    sys.exit(usage_error("no arguments to pass on after --\nTry --help."))
  return rest + passed
