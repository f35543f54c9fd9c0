"""Finds or makes a data set's budget, among the budgets under one root.

Imports no jax.
"""

from collections.abc import Callable, Sequence
import os

from dpdist import errors
from dpdist.ledger import data_budget
from dpdist.ledger import records


def find(
  root: str | os.PathLike[str],
  data: str,
  earlier: Callable[[], Sequence[str]] = tuple,
  *,
  is_looked_at: bool = False,
) -> data_budget.DataBudget:
  """Finds the budget of a data set, also if an earlier release made it.

  An earlier release may have identified the data by another digest, one that
  depends on the names of files. So that files may be renamed from now on, a
  record says that the two are the same. Earlier releases may have made several
  budgets for one content, as for an .npz and an ArrayRecord of it. Then nothing
  bounds the sum of what they allow, and nothing is spent from any of them.

  `data` is the content digest of the training set, hex, and `earlier` returns
  others of the same content, like `dpdist.data.sources.earlier_digests`; it is
  called only if it matters. The terms of the returned budget are None if there
  is none yet. If it is only looked at, nothing is recorded. Raises RefusedError
  if the budget that was recorded as the same is gone, or the data set has
  several budgets.
  """
  budget = data_budget.DataBudget(root, data)
  if budget.same_as:
    kept = data_budget.DataBudget(root, budget.same_as)
    if kept.terms is None:
      raise errors.RefusedError(
        f"the budget of data set {data[:12]} is kept in {kept.root} as that of"
        f" {budget.same_as[:12]}, and is not there: bring it back"
      )
  else:
    kept = budget
  found = {} if kept.terms is None else {kept.data: kept}
  # If there is no other budget, the data need not all be read.
  if {*records.folders(root)} - {data, kept.data}:
    for other in {*earlier()} - {data, *found}:
      if (made := data_budget.DataBudget(root, other)).terms is not None:
        found[other] = made
  if len(found) > 1:
    names = sorted(name[:12] for name in found)
    raise errors.RefusedError(
      f"data set {data[:12]} has {len(found)} budgets in {budget.root},"
      f" {' and '.join(names)}, made by releases that called it otherwise,"
      " which together allow more than each: keep one, take the other's folder"
      " away, and reserve in the one that stays (dpdist reserve) what it had"
      " reserved"
    )
  if not found:
    return budget
  (only,) = found.values()
  if only is not kept and not is_looked_at:
    budget.refer_to(only.data)
  return only


def open_or_make(
  root: str | os.PathLike[str],
  data: str,
  *,
  epsilon: float | None,
  delta: float | None,
  neighboring_relation: str,
  earlier: Callable[[], Sequence[str]] = tuple,
  tell: Callable[[str], None] = lambda line: None,
  is_looked_at: bool = False,
) -> data_budget.DataBudget:
  """Opens a data set's budget; makes it if epsilon and delta are given.

  These are of all runs together; None stands for those of the budget, which
  must exist, or ArgumentError is raised. See `find` for `data` and `earlier`.
  `tell` is called with a line of text if a budget is made beside others: the
  data set may have one of them, and have been changed since. If it is only
  looked at, nothing is written, and a missing budget is supposed. Raises
  RefusedError if the budget has other terms, and LedgerError if it is damaged.
  """
  budget = find(root, data, earlier, is_looked_at=is_looked_at)
  is_new = budget.terms is None
  if budget.terms is not None:
    epsilon = budget.terms.epsilon if epsilon is None else epsilon
    delta = budget.terms.delta if delta is None else delta
  if epsilon is None or delta is None:
    raise errors.ArgumentError(
      "data_budget.epsilon and data_budget.delta must be given where the data"
      f" set has no budget yet, as in {os.fspath(root)!r}, got {epsilon} and"
      f" {delta}"
    )
  budget.make(
    epsilon=epsilon,
    delta=delta,
    neighboring_relation=neighboring_relation,
    is_supposed=is_looked_at,
  )
  others = [name for name in records.folders(root) if name != budget.data]
  if is_new and others and not is_looked_at:
    tell(
      f"data set {budget.data[:12]} had no budget in {budget.root} and has a"
      f" new one now, beside those of {len(others)} other data sets: if it is"
      " one of these and was changed, count the two together"
    )
  return budget


def all_below(root: str | os.PathLike[str]) -> list[data_budget.DataBudget]:
  """Returns the budgets of all data sets under a root."""
  return [data_budget.DataBudget(root, data) for data in records.folders(root)]
