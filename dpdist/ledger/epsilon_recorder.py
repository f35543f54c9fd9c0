"""Records a running job's epsilon in its ledger, without delaying steps.

Accountants take tenths of a second, so they run in a thread beside the steps.
The process that writes the ledger records their results between two steps, if
nothing was charged meanwhile.
"""

from concurrent import futures
from typing import Any, Self

from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib


class EpsilonRecorder:
  """Keeps a ledger's `epsilons` up to date, in one thread; to be entered."""

  def __init__(self, ledger: ledger_lib.Ledger):
    self._ledger = ledger
    self._pool = futures.ThreadPoolExecutor(1)
    self._work: futures.Future[dict[str, Any]] | None = None
    self._charged = 0
    self._seen = ""  # The ledger's head when all was recorded.

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self._pool.shutdown(wait=False, cancel_futures=True)

  def on_step(self, done: int) -> None:
    """Records the results that are there by now."""
    del done
    self.poll()

  def on_row(self, row: object) -> None:
    """Does nothing: epsilon is no measurement."""

  def poll(self, *, wait: bool = False) -> None:
    """Records the results that are there by now, or, with wait, all of them."""
    if self._seen == self._ledger.head:
      return  # As after most steps: nothing was written.
    while self._ledger.epsilons is None:
      if self._work is None:
        self._charged = self._ledger.spent_steps
        self._work = self._pool.submit(
          _epsilons, spent=self._ledger.spent, planned=self._ledger.planned
        )
      if not wait and not self._work.done():
        return
      found, self._work = self._work.result(), None
      if self._charged == self._ledger.spent_steps:
        self._ledger.record_epsilons(**found)
    self._seen = self._ledger.head


def _epsilons(**parts: list[plan_lib.PlanUse]) -> dict[str, Any]:
  return {name: composition.epsilons(x) for name, x in parts.items()}
