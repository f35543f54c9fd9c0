"""Parses absl flags, with the exit codes of this project's commands."""

from collections.abc import Callable, Sequence
import functools
import os
import re
import select
import sys
from typing import NoReturn

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from dpdist import config
from dpdist import errors

from . import exit_codes
from . import messages


def run(main: Callable[..., int], *, passes_on: bool = False) -> NoReturn:
  """Runs a command's main under absl; bad flags exit with `exit_codes.USAGE`.

  If passes_on, the command line must have `--`; main then takes what follows.
  """
  # Libraries log each file they write; --verbosity=0 shows it.
  logging.set_verbosity(logging.WARNING)
  app.run(
    functools.partial(_guarded, main, passes_on),
    flags_parser=functools.partial(_parse, passes_on),
  )
  raise AssertionError("app.run does not return")


def usage_error(message: object, hint: errors.Hint | None = None) -> int:
  """Prints an error and a hint, by default its own; returns the exit code."""
  hint = hint or getattr(message, "hint", None)
  return messages.show(messages.Message(str(message), exit_codes.USAGE, hint))


def _guarded(
  main: Callable[..., int], passes_on: bool, argv: Sequence[str]
) -> int:
  """Runs a command; errors that the user can mend end in a sentence."""
  try:
    code = main(argv[1:]) if passes_on else main()
    sys.stdout.flush()
    return code
  except (Exception, KeyboardInterrupt) as error:
    if isinstance(error, BrokenPipeError) and _nobody_reads():
      return exit_codes.NOBODY_READS
    message = messages.explain(error)
    if message is None:
      raise
    return messages.show(message)


def _nobody_reads() -> bool:
  """Returns whether standard output's reader has ended; drops the rest then."""
  poll = select.poll()
  poll.register(sys.stdout.fileno(), 0)  # Errors are reported in any case.
  if not poll.poll(0):
    return False
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return True


def _last_line(text: object) -> str:
  """Returns the last line of a traceback."""
  return (str(text).strip().splitlines() or [""])[-1].strip()


def _parse(passes_on: bool, argv: Sequence[str]) -> list[str]:
  passed: list[str] = []
  if passes_on and "--" in argv:
    end = argv.index("--")
    argv, passed = argv[:end], list(argv[end + 1 :])
  try:
    unset: list[str] = []
    if "config" in flags.FLAGS:
      argv, unset = _unset(argv)
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      # If a file could not be loaded, any attribute raises the error.
      hasattr(flags.FLAGS.config, "to_dict")
      config.check(flags.FLAGS.config)
      changes = config_flags.get_override_values(flags.FLAGS["config"])
      for name in unset:
        flags.FLAGS.config.update_from_flattened_dict({name: None})
        changes[name] = None
  except AttributeError as error:
    # An unknown setting, perhaps with a suggestion, wrapped in a KeyError.
    reason = error.args[0] if error.args else error
    if isinstance(reason, KeyError) and reason.args:
      reason = reason.args[0]
    help_ = errors.Hint(text=f"python -m launch.{messages.name()} --help")
    sys.exit(usage_error(f"there is no setting {_last_line(reason)}", help_))
  except (flags.Error, TypeError, ValueError) as error:
    if "Traceback" in str(error):
      sys.exit(_not_loaded(_last_line(error)))
    sys.exit(usage_error(f"{' '.join(str(error).split())}\nTry --help."))
  except Exception as error:
    # A file of settings is a program, and may fail in any way.
    reason = _last_line(error) or type(error).__name__
    sys.exit(_not_loaded(reason))
  if len(rest) > 1:
    sys.exit(usage_error(f"unexpected argument {rest[1]!r}\nTry --help."))
  if passes_on and not passed:
    sys.exit(usage_error("no arguments to pass on after --\nTry --help."))
  return rest + passed


def _not_loaded(reason: str) -> int:
  return usage_error(
    f"--config cannot be loaded: {reason}", errors.Hint(text="ls configs")
  )


def _unset(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Removes the flags that unset a setting, which its parser would refuse.

  Returns the other arguments, and the settings to set to None: those that may
  be None and whose last flag is "None", "none" or empty.
  """
  argv = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
  optional = config.optional()
  kept: list[str] = []
  unset: dict[str, bool] = {}
  words = iter(argv)
  for word in words:
    if word == "--":
      kept += [word, *words]
      break
    match = re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", word, re.DOTALL)
    if match is None or match[1] not in optional:
      kept.append(word)
      continue
    given = [word]
    value = match[2]
    if value is None:
      given += [after for after in [next(words, None)] if after is not None]
      value = given[-1]
    unset[match[1]] = value in ("", "None", "none")
    if not unset[match[1]]:
      kept += given
  return kept, [name for name, is_unset in unset.items() if is_unset]
