"""The ledger that a door's flags name."""

import os

from dpdist import ledger as ledger_lib

# What a run leaves in its directory before it charges its first step.
_SIGNS = ("ledger", "config.json", "checkpoints", "result.json")


def open_begun(workdir: str, location: str | None) -> ledger_lib.Ledger:
  """Opens the ledger of a run that has begun, to be read.

  Args:
    workdir: the run's directory.
    location: of its ledger; None: in the directory.

  Raises:
    ValueError: there is none.
    dpdist.ledger.LedgerError: it is damaged.
  """
  if location is None:
    location = os.path.join(workdir, "ledger")
    # Looking must not leave a ledger behind.
    if not os.path.isdir(location):
      raise ValueError(
        "workdir must be the directory of a run, with a ledger, got"
        f" {workdir!r}"
      )
  ledger = ledger_lib.Ledger(location)
  if ledger.is_new:
    raise ValueError(f"the ledger in {location!r} is empty: nothing was spent")
  return ledger


def none_began(workdir: str, location: str | None) -> bool:
  """Whether a directory is there, and no run has ever begun in it.

  So it is where a run was refused for its settings or its data. One whose
  ledger is elsewhere has left its settings.

  Args:
    workdir: the directory.
    location: of the ledger, if it is given.
  """
  return (
    location is None
    and os.path.isdir(workdir)
    and not any(os.path.exists(os.path.join(workdir, x)) for x in _SIGNS)
  )
