"""Defines the flags that several commands have, for the command that calls."""

from typing import Any

from absl import flags
from ml_collections import config_flags

# They count as those of the command, which --help lists.
flags.disclaim_key_flags()


def config(
  help: str = "A file in configs/; --config.a.b=value changes a setting.",
  *,
  required: bool = True,
) -> flags.FlagHolder[Any]:
  """Defines --config, whose settings are checked when flags are parsed."""
  # Flags of settings are read by `launch.cli.settings`, not from sys.argv.
  holder = config_flags.DEFINE_config_file("config", None, help, sys_argv=[])
  if required:
    flags.mark_flag_as_required(holder)
  return holder


def workdir(help: str = "The directory of the run.") -> flags.FlagHolder[str]:
  """Defines --workdir, which must be given."""
  return flags.DEFINE_string("workdir", None, help, required=True)


def ledger() -> flags.FlagHolder[str | None]:
  """Defines --ledger."""
  return flags.DEFINE_string(
    "ledger", None, "Where the run's ledger is, if not in its directory."
  )


def checkpoint() -> tuple[flags.FlagHolder[Any], flags.FlagHolder[int | None]]:
  """Defines --config and --step, which say how to load a checkpoint."""
  return (
    config("A file in configs/, if not as the run left it.", required=False),
    flags.DEFINE_integer(
      "step", None, "The checkpoint's step; without it the newest."
    ),
  )


def json() -> flags.FlagHolder[bool]:
  """Defines --json."""
  return flags.DEFINE_bool("json", False, "Print JSON.")


def plot(help: str) -> flags.FlagHolder[str | None]:
  """Defines --plot."""
  return flags.DEFINE_string("plot", None, help)
