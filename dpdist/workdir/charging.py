"""Charges a run's steps ahead, and gives back those that it never began.

Steps are charged several at a time, before the first of them is computed. A run
that ends in an orderly way in between, by a request to stop or by an error, has
charged steps of which it computed nothing on data. `Charges` takes their charge
back as it is left.

What it takes for begun is never too little: a step counts as begun from just
before its first computation on data. A step whose computation failed is begun,
since what of it was computed cannot be known. Nothing is given back

  * that was charged before this process wrote the ledger, which another process
    may have begun (see `dpdist.ledger.ledger.Ledger.give_back`);
  * by a job of several processes, of which one may be further on than another;
  * by a process that dies: it has no time to.

A copy of a whole process, memory and all, such as a snapshot of a virtual
machine, takes the charges for its own, and may compute what the other copy gave
back; it is stopped as soon as it saves or charges. Nothing here sees it before.

The ledger comes first and the data set's budget after it. A process that dies
between the two leaves a budget that holds too much.
"""

import functools
from types import TracebackType
from typing import Self

import jax

from dpdist.distributed import collectives
from dpdist.ledger import data_budget
from dpdist.ledger import ledger as ledger_lib
from dpdist.reporting import console


class Charges:
  """Charges the steps of a run; a context manager.

  To be entered and asked in all processes alike.
  """

  def __init__(
    self,
    ledger: ledger_lib.Ledger | None,
    budget: data_budget.DataBudget | None,
    start_step: int,
  ):
    """Charges nothing yet.

    Args:
      ledger: of the run; None in the processes that do not write it.
      budget: of the data set, in which the run was admitted; or None.
      start_step: the first step that will be computed.
    """
    self._ledger = ledger
    self._budget = budget
    self._begun = start_step

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._ledger is None or jax.process_count() > 1:
      return
    try:
      if self._ledger.give_back(self._begun):
        self._tell_budget()
    except ledger_lib.LedgerError as problem:
      # As when another process went on with the run. Too much stays charged.
      console.warn(f"what was charged ahead stays charged: {problem}")

  def through(self, stop_step: int) -> None:
    """Charges the steps before stop_step, durably, unless they are charged."""
    collectives.from_leader(functools.partial(self._charge, stop_step))

  def begin(self, step: int) -> None:
    """To be called before a step's first computation on data."""
    self._begun = step + 1

  def _charge(self, stop_step: int) -> None:
    assert self._ledger is not None
    if self._ledger.reserve_through(stop_step):
      self._tell_budget()

  def _tell_budget(self) -> None:
    if self._budget is not None:
      assert self._ledger is not None
      self._budget.follow(self._ledger)
