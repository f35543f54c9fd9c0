"""The errors that a caller may meet, each with a hint of what to do next.

Each is also one of Python's own: a `ValueError` for what was asked for wrongly,
an `OSError` for a file or a network, a `RuntimeError` for what went wrong.
Imports nothing of the project.
"""

from typing import Any, NamedTuple


class Hint(NamedTuple):
  """A command that most likely helps, for `launch.cli.messages` to spell out.

  Attributes:
    flags: to be given to the command that failed, or changed there.
    command: another one that takes the settings of that one, as "bench"; "":
      the same.
    text: the whole of it, where it is none of ours; the rest is "" then.
  """

  flags: tuple[str, ...] = ()
  command: str = ""
  text: str = ""


class Hinted(Exception):  # noqa: N818 - a base, and no error by itself
  """An exception with a hint.

  Attributes:
    hint: what to do next; None where nothing is known to help.
  """

  hint: Hint | None = None

  def __init__(self, *args: Any, hint: Hint | None = None):
    """Takes what an exception takes, and a hint."""
    super().__init__(*args)
    self.hint = hint or type(self).hint


# What was asked for wrongly.


class ArgumentError(Hinted, ValueError):
  """An argument has a value that cannot be right; names it."""


class SettingsError(ArgumentError):
  """A setting is wrong, or contradicts the run that the directory holds."""


class RefusedError(ArgumentError):
  """The record forbids going on with these settings."""


class MismatchError(ArgumentError):
  """A sound checkpoint does not fit the model or the optimizer."""


class DisagreementError(ArgumentError):
  """The processes of a job were started differently."""


class StartError(ArgumentError):
  """What says how the processes of the job meet makes no sense."""


# Records.

VERIFY = Hint(command="verify")


class LedgerError(Hinted):
  """The ledger is damaged, or this process may not write it."""

  hint = VERIFY


class ShutOutError(LedgerError):
  """Another process has written the record that this one was to write."""


class UnsoundError(Hinted):
  """The record of a run is damaged or contradicts what the run left."""

  hint = VERIFY


class SensitivityError(Hinted, RuntimeError):
  """A clipped sum moves further than it may; says by which parameter."""


# Files and data.


class MissingPackageError(Hinted, ModuleNotFoundError):
  """A Python package that a feature needs is not installed."""


def missing(what: str, package: str, extra: str) -> MissingPackageError:
  """The error of a feature whose package is not installed.

  Args:
    what: the feature, as a reader of the config knows it.
    package: its name on PyPI.
    extra: of ours, that installs it.
  """
  command = f"pip install 'dpdist[{extra}]'"
  return MissingPackageError(
    f"{what} needs {package}: {command}", hint=Hint(text=command)
  )


class FetchError(Hinted, OSError):
  """A data set could not be had, or is not what was pinned."""


class ReadError(Hinted, OSError):
  """A data set could not be read. Names no example and no file of it."""


class ChangedError(ReadError):
  """Files of a data set were changed while a run was reading them."""


class SaveError(Hinted, OSError):
  """A checkpoint could not be saved: no room, or no right to write there."""


# The processes of a job.


class PeerError(Hinted, RuntimeError):
  """Another process of the job stopped; says which, and why."""


class LostError(Hinted, RuntimeError):
  """The other processes could not be reached; `dpdist.distributed.watchdog`
  finds out why."""


class MeetError(Hinted, RuntimeError):
  """The other processes could not be met in time."""


class Preempted(Exception):  # noqa: N818 - it is not an error
  """The run stopped early, has saved, and can be resumed.

  Attributes:
    step: updates in the checkpoint that was saved.
  """

  def __init__(self, step: int, reason: str = ""):
    """Says what to do.

    Args:
      step: see above.
      reason: what asked to stop, if this process knows.
    """
    known = f" ({reason})" if reason else ""
    super().__init__(
      f"stopped after step {step}{known}; run the same command again"
    )
    self.step = step
