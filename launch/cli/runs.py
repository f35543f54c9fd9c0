"""Opens the ledger that a command's flags name."""

import os
import shlex

from dpdist import errors
from dpdist.ledger import ledger as ledger_lib

# The same as `dpdist.workdir.resume.NOT_BEGUN`, which takes long to import.
_NOT_BEGUN = "not_begun"


def open_begun(workdir: str, location: str | None) -> ledger_lib.Ledger:
  """Opens the ledger of a run that has begun, for reading.

  It is in the run's directory unless a location is given. Raises ValueError if
  there is no such run.
  """
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
  place = shlex.quote(workdir or "/tmp/digits")
  return errors.Hint(
    text=f"python -m launch.train --config=configs/digits.py --workdir={place}"
  )


def none_began(workdir: str, location: str | None) -> bool:
  """Returns whether a run was started in a directory but none has begun there.

  It was refused then, for its data or by the dry run.
  """
  return (
    location is None
    and os.path.isfile(os.path.join(workdir, _NOT_BEGUN))
    and not os.path.exists(os.path.join(workdir, "ledger"))
  )
