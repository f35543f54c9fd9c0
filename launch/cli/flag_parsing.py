"""Parses absl flags, with the exit codes of this project's commands.

Imports no jax, so that help and wrong usage are answered at once.
"""

from collections.abc import Callable, Sequence
import difflib
import functools
import os
import select
import sys
import textwrap
from typing import NoReturn

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from dpdist import _settings
from dpdist import config as config_lib
from dpdist import errors

from . import config_files
from . import exit_codes
from . import messages
from . import settings
from . import words

_HELP = ("help", "helpshort", "helpfull", "settings", "h", "?")
_WIDTH = 80
_NO_SETTINGS = (
  "get_config() of the file in --config must return its settings, as"
  " dpdist.config.default() does, got None"
)
# What a command that helps says for flags that were not given.
_EXAMPLES = {"config": "digits", "workdir": "DIRECTORY"}


def run(main: Callable[..., int], *, passes_on: bool = False) -> NoReturn:
  """Runs a command's main under absl; bad flags exit with `exit_codes.USAGE`.

  If passes_on, the command line must have `--`; main then takes what follows.
  """
  # Libraries log each file they write; --verbosity=0 shows it.
  logging.set_verbosity(logging.WARNING)
  app.run(
    functools.partial(_guarded, main, passes_on),
    flags_parser=functools.partial(_parse, passes_on, module=main.__module__),
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
    if sys.stdout is not None:  # It was closed before the start.
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


def _parse(
  passes_on: bool, argv: Sequence[str], *, module: str = ""
) -> list[str]:
  passed: list[str] = []
  if "--" in argv:
    end = argv.index("--")
    argv, passed = argv[:end], list(argv[end + 1 :])
  asked = {word.lstrip("-") for word in argv[1:] if word[:1] == "-"}
  for name in _HELP:
    if name in asked:
      print(_help(name, module), end="")
      sys.exit(exit_codes.DONE)
  if not passes_on and passed:
    sys.exit(usage_error(f"unexpected argument {passed[0]!r}\nTry --help."))
  changes: list[settings.Change] = []
  try:
    if "config" in flags.FLAGS:
      argv = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
      argv = config_files.found(argv)
      argv, changes = settings.take(argv)
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      _set_up(changes)
  except flags.UnrecognizedFlagError as error:
    sys.exit(_no_flag(error, passes_on))
  except errors.ArgumentError as error:
    sys.exit(usage_error(error, error.hint or _try_help()))
  except (flags.Error, TypeError, ValueError) as error:
    if "--config=None" in str(error) and flags.FLAGS["config"].present:
      sys.exit(usage_error(_NO_SETTINGS, _try_help()))
    if "other than None" in str(error) and (missing := _missing()):
      sys.exit(_not_given(missing))
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


def _set_up(changes: Sequence[settings.Change]) -> None:
  """Checks the config that --config names, and changes it by its flags."""
  config = flags.FLAGS.config
  if config is None and flags.FLAGS["config"].present:
    raise errors.ArgumentError(_NO_SETTINGS)
  if config is None:
    if changes:
      raise errors.ArgumentError(
        f"--config.{changes[0].path} changes a setting of the file in --config,"
        " which is not given",
        hint=errors.Hint(flags=("--config=FILE",)),
      )
    return
  # If a file could not be loaded, any attribute raises the error.
  hasattr(config, "to_dict")
  config_lib.check(config)
  made = settings.change(config, changes)
  config_flags.get_override_values(flags.FLAGS["config"]).update(made)
  config_lib.check(config)


def _missing() -> list[str]:
  """Returns the names of flags that must be given and are not."""
  names = [
    name
    for name in flags.FLAGS
    if flags.FLAGS[name].value is None and not flags.FLAGS[name].present
  ]
  needed = [x for x in names if _is_required(flags.FLAGS[x])]
  return sorted(needed, key=lambda x: (x not in _EXAMPLES, x))


def _is_required(flag: flags.Flag) -> bool:
  return any("other than None" in x.message for x in flag.validators)


def _not_given(names: Sequence[str]) -> int:
  listed = " and ".join(f"--{name}" for name in names)
  values = (f"--{x}={_EXAMPLES.get(x, x.upper())}" for x in names)
  said = f"{listed} must be given, got none"
  return usage_error(said, errors.Hint(flags=tuple(values)))


def _no_flag(error: flags.UnrecognizedFlagError, passes_on: bool) -> int:
  name = error.flagname
  said = f"there is no flag --{name}"
  close = difflib.get_close_matches(name, [*flags.FLAGS], 1, 0.7)
  meant = _settings.suggest(name) if "config" in flags.FLAGS else ""
  if close:
    said += f": did you mean --{close[0]}?"
  elif meant:
    said += f": did you mean --config.{meant}?"
  elif passes_on:
    said += ": flags of what it starts come after --"
  return usage_error(said, _try_help())


def _try_help() -> errors.Hint:
  return errors.Hint(text=words.line(messages.name(), "--help"))


def _help(name: str, module: str) -> str:
  """Returns what --help, --helpfull or --settings print."""
  if name == "settings":
    return settings.reference()
  text = f"{(sys.modules[module].__doc__ or '').strip()}\n\nFlags:\n"
  own: dict[str, flags.Flag] = {}
  common = [x for x in flags.FLAGS.flags_by_module_dict() if ".cli." in x]
  # A program that is run names its flags by its path, a module by its name.
  for place in (sys.argv[0], module, *common):
    for flag in flags.FLAGS.get_key_flags_for_module(place):
      own[flag.name] = flag
  text += "".join(map(_flag, own.values()))
  has_settings = "config" in flags.FLAGS
  if name == "helpfull":
    text += f"\n{settings.reference()}" if has_settings else ""
    return f"{text}\nFlags of all modules:\n{flags.FLAGS.get_help()}\n"
  if has_settings:
    text += "\n--settings lists all settings that --config.NAME=VALUE changes."
  return f"{text}\n--helpfull shows all there is.\n"


def _flag(flag: flags.Flag) -> str:
  value = "" if flag.boolean else "=VALUE"
  name = f"  --{'[no]' if flag.boolean else ''}{flag.name}{value}"
  meaning = " ".join((flag.help or "").split())
  if isinstance(flag, flags.EnumFlag):
    meaning += f" One of {', '.join(flag.parser.enum_values)}."
  if not flag.boolean and flag.default not in (None, "", []):
    meaning += f" (default {flag.default_as_str})"
  if _is_required(flag):
    meaning += " (required)"
  indent = " " * 6
  return "\n".join(
    [
      name,
      textwrap.fill(
        meaning, _WIDTH, initial_indent=indent, subsequent_indent=indent
      ),
      "",
    ]
  )


def _not_loaded(reason: str) -> int:
  return usage_error(
    f"--config cannot be loaded: {reason}",
    errors.Hint(text=config_files.listing()),
  )
