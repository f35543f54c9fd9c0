"""The errors that a caller may get, each with a hint of what to do next.

Most are also one of Python's own: a `ValueError` for a wrong request, an
`OSError` for a file or a network, a `RuntimeError` for a failure. Imports
nothing of the project.
"""

from typing import Any, NamedTuple


class Hint(NamedTuple):
  """A command that most likely helps; `launch.cli.messages` prints it in full.

  Attributes:
    flags: flags to add to the command that failed, or to change there.
    command: another command that takes the same settings, such as "bench"; "":
      the command that failed.
    text: the whole command, if it is not one of ours with these settings; the
      others are empty then. "dpdist NAME ..." is one of ours.
  """

  flags: tuple[str, ...] = ()
  command: str = ""
  text: str = ""


def in_a_line(error: BaseException) -> str:
  """Returns another's error as its kind and the first line of its text."""
  lines = str(error).strip().splitlines()
  text = f": {lines[0].strip().removesuffix('.')}" if lines else ""
  return f"{type(error).__name__}{text}"


class Hinted(Exception):  # noqa: N818 - a base class, not an error by itself
  """An exception with a hint of what to do next, if anything may help."""

  hint: Hint | None = None

  def __init__(self, *args: Any, hint: Hint | None = None):
    """Takes the arguments of an exception, and a hint."""
    super().__init__(*args)
    self.hint = hint or type(self).hint


# Wrong requests.


class ArgumentError(Hinted, ValueError):
  """An argument, which the message names, has a value that cannot be right."""


class SettingsError(ArgumentError):
  """A setting is wrong, or contradicts the run that the directory holds."""


class RefusedError(ArgumentError):
  """The record forbids going on with these settings."""


class MismatchError(ArgumentError):
  """A sound checkpoint does not fit the model or the optimizer."""


class DisagreementError(ArgumentError):
  """The processes of a job were started differently."""


class StartError(ArgumentError):
  """The settings by which a job's processes find each other are wrong."""


# Records.

VERIFY = Hint(command="verify")


class LedgerError(Hinted):
  """The ledger is damaged, or this process may not write it."""

  hint = VERIFY


class ShutOutError(LedgerError):
  """Another process has written the record that this one was about to write."""


class UnsoundError(Hinted):
  """The record of a run is damaged, or contradicts the run's files."""

  hint = VERIFY


class SensitivityError(Hinted, RuntimeError):
  """A clipped sum moves further than it may; says by which parameter."""


class ReplayError(Hinted, RuntimeError):
  """A step that runs again is made of other values; a new start goes on."""


# Files and data.


class MissingPackageError(Hinted, ModuleNotFoundError):
  """A Python package that a feature needs is not installed."""


def missing(what: str, package: str, extra: str) -> MissingPackageError:
  """Returns the error for a feature whose package is not installed.

  `what` is the feature in the words of the config; `extra` installs it.
  """
  command = f"pip install 'dpdist[{extra}]'"
  return MissingPackageError(
    f"{what} needs {package}: {command}", hint=Hint(text=command)
  )


class FetchError(Hinted, OSError):
  """A data set could not be fetched, or is not the pinned one."""


class ReadError(Hinted, OSError):
  """A data set could not be read. The message names no example and no file."""


class ChangedError(ReadError):
  """Files of a data set were changed while a run was reading them."""


class SaveError(Hinted, OSError):
  """A checkpoint could not be saved: no space, or no permission to write."""


# The processes of a job.


class PeerError(Hinted, RuntimeError):
  """Another process of the job stopped; the message says which, and why."""


class LostError(Hinted, RuntimeError):
  """The other processes could not be reached.

  `dpdist.distributed.watchdog` finds out why.
  """


class ConnectError(Hinted, RuntimeError):
  """The other processes could not be reached in time at the start."""


class Preempted(Exception):  # noqa: N818 - not an error
  """The run stopped early, has saved, and can be resumed.

  Attributes:
    step: updates in the checkpoint that was saved.
  """

  def __init__(self, step: int, reason: str = ""):
    """Makes the message; `reason` is what asked to stop, if it is known."""
    known = f" ({reason})" if reason else ""
    super().__init__(
      f"stopped after step {step}{known}; run the same command again"
    )
    self.step = step
