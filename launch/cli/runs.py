"""Opens the ledger that a command's flags name."""

import importlib
import os
from typing import TYPE_CHECKING

from absl import flags

from dpdist import errors

if TYPE_CHECKING:
  from dpdist.ledger import ledger as ledger_lib

from . import words

_CODE = flags.DEFINE_multi_string(
  "code",
  [],
  "A module of your own that the run's settings name, as package.module. It is"
  " imported: a record alone has nothing imported.",
)


def open_begun(workdir: str, location: str | None) -> "ledger_lib.Ledger":
  """Opens the ledger of a run that has begun, for reading.

  It is in the run's directory unless a location is given. Raises ValueError if
  there is no such run, or no such module as --code names, and LedgerError if
  its records name code that --code does not.
  """
  # Imported here: flags are parsed without what takes long to import.
  from dpdist.ledger import ledger as ledger_lib

  for module in _CODE.value:
    try:
      importlib.import_module(module)
    except ImportError as error:
      raise errors.ArgumentError(
        f"code must be a module that can be imported, got {module!r}: {error}"
      ) from error
  if location is None:
    location = os.path.join(workdir, "ledger")
    # Reading must not create a ledger.
    if not os.path.isdir(location):
      raise errors.ArgumentError(
        "workdir must be the directory of a run, with a ledger, got"
        f" {workdir!r}",
        hint=_first_run(workdir),
      )
  ledger = ledger_lib.Ledger(location)
  if ledger.is_new:
    raise errors.ArgumentError(
      f"the ledger in {location!r} is empty: nothing was spent",
      hint=_first_run(workdir),
    )
  return ledger


def _first_run(workdir: str) -> errors.Hint:
  place = f"--workdir={workdir or '/tmp/digits'}"
  return errors.Hint(text=words.line("train", "--config=digits", place))
