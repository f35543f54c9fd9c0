"""The ledger that a door's flags name."""

import os

from dpdist import ledger as ledger_lib


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
