"""Opens the ledger that a command's flags name."""

import importlib
import json
import os
import pathlib
from typing import TYPE_CHECKING

from absl import flags

from dpdist import errors
from dpdist.files import places

if TYPE_CHECKING:
  from dpdist.ledger import ledger as ledger_lib

# The same as `dpdist.workdir.resume.NOT_BEGUN`, which takes long to import.
_NOT_BEGUN = "not_begun"

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
  elsewhere = errors.Hint(flags=("--ledger=WHERE_THE_LEDGER_IS",))
  location = location or _recorded(places.directory(workdir))
  if not location:
    location = os.path.join(workdir, "ledger")
    # Reading must not create a ledger.
    if not os.path.isdir(location):
      raise errors.ArgumentError(
        "workdir must be the directory of a run, with a ledger, got"
        f" {workdir!r}",
        hint=elsewhere,
      )
  ledger = ledger_lib.Ledger(location)
  if ledger.is_new:
    raise errors.ArgumentError(
      f"the ledger in {location!r} is empty: nothing was spent", hint=elsewhere
    )
  return ledger


def _recorded(workdir: pathlib.Path) -> str:
  """Returns where the run's own settings say that its ledger is; "" if not."""
  try:
    found = json.loads((workdir / "config.json").read_text()).get("ledger")
  except (OSError, ValueError, AttributeError):
    return ""
  return found if isinstance(found, str) else ""


def none_began(workdir: str, location: str | None) -> bool:
  """Returns whether a run was started in a directory but none has begun there.

  It was refused then, for its data or by the dry run.
  """
  return (
    location is None
    and os.path.isfile(os.path.join(workdir, _NOT_BEGUN))
    and not os.path.exists(os.path.join(workdir, "ledger"))
  )
