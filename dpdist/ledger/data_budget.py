"""One privacy budget for a data set, shared by all runs on it.

The people that the data is about are affected by what all runs on it release
together, not by one run alone. A data set's budget is a log that these runs
share, under a common root and the SHA-256 of the training set's content.

Guarantees:
  * All or nothing. Before its first step a run reserves all that its plan can
    spend, or is refused. So does a search over settings: `reserve` keeps budget
    for its runs, for all of them or none.
  * Reserved costs add up. Each run may be chosen after a look at the runs
    before it, so costs are Renyi divergences at one order, fixed when the
    budget is made (see `dpdist.privacy.composition`), and their sum may not
    exceed the budget's.
  * Copies are charged. A run records its ledger's head in the budget at every
    start and every charge. If a copy of its directory goes on by itself, the
    copy lacks the head that was recorded last, and must reserve for itself;
    once a copy has gone on in its place, so must the original, before its next
    step.
  * Only what can never be released is given back: what a run that was ended for
    good did not spend, and budget kept for runs that never came.

Other data has another budget. If two data sets share examples, their owner must
count the two budgets together.

Imports no jax.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import os
import secrets
from typing import Any

from dpdist import _validation
from dpdist import errors
from dpdist.accounting import rdp
from dpdist.files import json_fields
from dpdist.ledger import budget_records
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from dpdist.ledger import stores
from dpdist.privacy import plan as plan_lib

# How far rounding may raise a sum of costs that fits.
_ROUNDING = 1e-9
# How much more a run may cost than its reservation: some units in the last
# digit of a noise multiplier that another machine calibrated.
_CALIBRATION = 1e-4


class DataBudget:
  """The budget of one data set. Any process may read and write it."""

  def __init__(self, root: str | os.PathLike[str], data: str):
    """Reads and checks every record, below a local path or a URL.

    It need not exist. `data` is the content digest of the training set, hex.
    """
    self.root = os.fspath(root)
    if "://" not in self.root and not self.root.startswith("{"):
      # Absolute, so that a run finds it from any working directory.
      self.root = os.path.abspath(self.root)
    self.data = data
    # None before the budget is made.
    self.terms: budget_records.BudgetTerms | None = None
    self.same_as = ""  # The digest that it was made under, if it is another.
    # By a random name, and by label.
    self.allocations: dict[str, budget_records.Allocation] = {}
    self.reservations: dict[str, budget_records.Reservation] = {}
    # The allocation of this process's run, and the head that it last recorded.
    self._own, self._own_head = "", ""
    self._log = records.Log(stores.below(self.root, data), self._apply)

  @property
  def reserved(self) -> float:
    """Returns the sum of all costs, a divergence."""
    return math.fsum(
      [
        *(allocation.cost for allocation in self.allocations.values()),
        *(r.cost * r.free for r in self.reservations.values()),
      ]
    )

  @property
  def epsilon(self) -> float:
    """Returns the epsilon of all that is reserved."""
    terms, cost = self._terms, self.reserved
    return rdp.epsilon_at(terms.order, cost, terms.delta) if cost else 0.0

  def share(self, cost: float) -> float:
    """Returns a cost as a part of the whole budget.

    Shares add up. Epsilons do not: most of a small run's epsilon comes from
    turning a divergence into an epsilon, which is paid once for all runs.
    """
    return cost / self._terms.divergence

  def cost(self, parts: Sequence[plan_lib.PlanUse]) -> float:
    """Returns the divergence of parts of a run, at the budget's order."""
    return budget_records.cost(self._terms, parts)

  def make(
    self,
    *,
    epsilon: float,
    delta: float,
    neighboring_relation: str,
    is_supposed: bool = False,
  ) -> None:
    """Makes the budget, or compares these `BudgetTerms` with those it has.

    One that is supposed is not written, and can only be looked at.
    """
    _validation.check("data_budget.delta", delta, _validation.DELTA)
    _validation.check("data_budget.epsilon", epsilon, _validation.POSITIVE)
    order, divergence = budget_records.best_order(epsilon, delta)
    terms = budget_records.BudgetTerms(
      epsilon, delta, neighboring_relation, order, divergence
    )

    def decide() -> tuple[str, Mapping[str, Any]] | None:
      if self.terms is None:
        facts = {"format": budget_records.FORMAT, "data": self.data}
        return "make", facts | dataclasses.asdict(terms)
      # Compares what was given, not what was computed from it: another machine
      # may round otherwise.
      if (epsilon, delta, neighboring_relation) != (
        self.terms.epsilon,
        self.terms.delta,
        self.terms.neighboring_relation,
      ):
        raise errors.RefusedError(
          f"the budget of data set {self.data[:12]} in {self.root} was made for"
          f" epsilon {self.terms.epsilon:g} at delta {self.terms.delta:g},"
          f" {self.terms.neighboring_relation}; got epsilon {epsilon:g}, delta"
          f" {delta:g}, {neighboring_relation}"
        )
      return None

    if not is_supposed:
      self._log.propose(decide)
    elif decide() is not None:
      self.terms = terms

  def refer_to(self, data: str) -> None:
    """Records that this budget is that of another digest; it must have none."""

    def decide() -> tuple[str, Mapping[str, Any]] | None:
      if self.terms is not None or self.same_as not in ("", data):
        raise errors.RefusedError(
          f"data set {self.data[:12]} has a budget in {self.root} already"
        )
      return None if self.same_as else ("same", {"data": data})

    self._log.propose(decide)

  def check(self, cost: float, reservation: str = "") -> None:
    """Raises RefusedError if a new run of this cost would not fit now."""
    if not reservation:
      self._check_fits(cost, "this run")
      return
    found = self._reservation(reservation)
    if found.free < 1:
      raise errors.RefusedError(f"reservation {reservation!r} has no run left")
    if cost > found.cost * (1 + _ROUNDING):
      raise errors.RefusedError(
        f"reservation {reservation!r} is for runs that take"
        f" {self.share(found.cost):.3%} of the budget at most, this one takes"
        f" {self.share(cost):.3%}"
      )

  def would_take(
    self,
    ledger: ledger_lib.Ledger | None,
    parts: Sequence[plan_lib.PlanUse],
    *,
    label: str,
    reservation: str = "",
  ) -> float:
    """Returns what `allocate` would reserve beyond the run's allocation.

    Without a ledger, the run is new. Raises RefusedError as that does; writes
    nothing.
    """
    cost = self.cost(parts)
    name = None if ledger is None else self._find(ledger)
    if name is None:
      self.check(cost, reservation)
      return cost
    more = cost - self.allocations[name].cost
    if more > 0:
      self._check_fits(more, f"what changed in {label!r}")
    return more

  def reserve(self, label: str, cost: float, count: int) -> None:
    """Keeps budget for runs to come, for all of them or for none.

    Each of `count` runs costs a divergence of `cost`, and a little more is
    kept, since calibrations differ.
    """
    _validation.check("count", count, _validation.COUNT)
    _validation.check("cost", cost, _validation.real(at_least=0))

    def decide() -> tuple[str, Mapping[str, Any]]:
      is_new = bool(label) and label not in self.reservations
      rule = "a name that no reservation has yet"
      _validation.require(is_new, "label", rule, label)
      each = cost * (1 + _CALIBRATION)
      self._check_fits(each * count, f"{count} runs")
      return "reserve", {"label": label, "cost": each, "count": count}

    self._log.propose(decide)

  def cancel(self, label: str) -> None:
    """Gives back a reservation whose runs never came."""

    def decide() -> tuple[str, Mapping[str, Any]]:
      self._reservation(label)
      return "cancel", {"label": label}

    self._log.propose(decide)

  def allocate(
    self,
    ledger: ledger_lib.Ledger,
    parts: Sequence[plan_lib.PlanUse],
    *,
    label: str,
    reservation: str = "",
  ) -> str:
    """Reserves all that a run may spend; must be called at its every start.

    From then on, it is the run that this process, its ledger's writer, writes.
    `parts` is what it will have spent at the end of its plan. The cost comes
    out of the reservation, if it has one and no allocation yet. Returns the
    name of the allocation, or raises RefusedError, and reserves nothing.
    """
    fresh = secrets.token_hex(16)

    def decide() -> tuple[str, Mapping[str, Any]]:
      self.would_take(ledger, parts, label=label, reservation=reservation)
      cost = self.cost(parts)
      name = self._find(ledger)
      if name is None:
        return "admit", {
          "stake": fresh,
          "label": label,
          "reservation": reservation,
          "cost": cost,
          "head": ledger.head,
        }
      # The plan may be smaller now, and the reserved cost with it: it still
      # covers all that was charged, and charging more needs another `allocate`.
      return "grow", {"stake": name, "cost": cost, "head": ledger.head}

    self._log.propose(decide)
    name = self._find(ledger)
    assert name is not None  # Its head was just recorded.
    self._own, self._own_head = name, ledger.head
    return name

  def advance(self, ledger: ledger_lib.Ledger) -> None:
    """Records a ledger's new head, before anything it charged is released.

    Raises LedgerError if a copy of the run went on in its place.
    """

    def decide() -> tuple[str, Mapping[str, Any]]:
      if self.allocations[self._own].head != self._own_head:
        raise errors.LedgerError(
          "a copy of this run went on in its place, by the budget of its data"
          " set; this process must stop"
        )
      return "follow", {"stake": self._own, "head": ledger.head}

    self._log.propose(decide)
    self._own_head = ledger.head

  def refund(self, ledger: ledger_lib.Ledger) -> float:
    """Returns the divergence that an ended run gives back, as it was not spent.

    A run whose clipping did not bound what an example can do, or whose record
    is not sound, gives nothing back: what it spent is unknown.
    """
    if not ledger.is_ended:
      raise errors.ArgumentError("ledger must be of a run that was ended")
    refunded = 0.0

    def decide() -> tuple[str, Mapping[str, Any]] | None:
      nonlocal refunded
      refunded = 0.0
      name = self._find(ledger)
      if name is None:
        raise errors.ArgumentError(
          "ledger must be of a run that holds an allocation in this budget"
        )
      if self.allocations[name].is_ended:
        return None
      cost = self.cost(ledger.spent)
      if ledger.unsound or history.TOO_LONG in ledger.notices:
        cost = self.allocations[name].cost
      refunded = self.allocations[name].cost - cost
      return "end", {"stake": name, "cost": cost, "head": ledger.head}

    self._log.propose(decide)
    return refunded

  def holds(self, ledger: ledger_lib.Ledger) -> bool:
    """Returns whether a run, and not a copy of it, has an allocation here."""
    return self._find(ledger) is not None

  @property
  def _terms(self) -> budget_records.BudgetTerms:
    if self.terms is None:
      raise errors.ArgumentError(
        f"there is no budget for data set {self.data[:12]} in {self.root}"
      )
    return self.terms

  def _find(self, ledger: ledger_lib.Ledger) -> str | None:
    """Returns the name of the allocation; None for a copy or a new run."""
    for name, allocation in self.allocations.items():
      if ledger.has_been_at(allocation.head):
        return name
    return None

  def _reservation(self, label: str) -> budget_records.Reservation:
    names = sorted(self.reservations)
    _validation.require(label in names, "reservation", f"one of {names}", label)
    return self.reservations[label]

  def _check_fits(self, cost: float, what: str) -> None:
    terms = self._terms
    if self.reserved + cost > terms.divergence * (1 + _ROUNDING):
      share, more = self.share(self.reserved), self.share(cost)
      raise errors.RefusedError(
        f"the data set's budget of epsilon {terms.epsilon:g} at delta"
        f" {terms.delta:g} would be exceeded: {share:.3%} of it is reserved,"
        f" and {what} would take {more:.3%} (by Renyi divergences of order"
        f" {terms.order}, since runs are chosen one after the other)"
      )

  def _apply(self, record: dict[str, Any]) -> None:
    """Updates the state by one record; the only way state changes."""
    kind = record["kind"]
    if kind == "lost":
      # The record reserved nothing that a run could have relied on: the process
      # that wrote it saw it fail.
      return
    if kind not in budget_records.FIELDS:
      raise ValueError(f"kind {kind!r}")
    json_fields.check(record, budget_records.FIELDS[kind])
    if record.get("cost", 0) < 0:
      raise ValueError("a cost below 0")
    first = self.terms is None and not self.same_as
    if (kind in ("make", "same")) != first:
      raise ValueError(f"a record of kind {kind!r} in this place")
    match record:
      case {"kind": "make"}:
        self.terms = budget_records.read_terms(record, self.data)
      case {"kind": "same", "data": data}:
        self.same_as = data
      case {"kind": "reserve", "label": label, "cost": cost, "count": count}:
        self.reservations[label] = budget_records.Reservation(
          label, cost, count
        )
      case {"kind": "cancel", "label": label}:
        self._set_free(label, 0)
      case {"kind": "admit", "stake": name, "reservation": reservation}:
        if reservation:
          self._set_free(reservation, self.reservations[reservation].free - 1)
        self.allocations[name] = budget_records.Allocation(
          record["label"], record["cost"], record["head"]
        )
      case {"kind": "grow" | "follow" | "end", "stake": name, "head": head}:
        before = self.allocations[name]
        self.allocations[name] = dataclasses.replace(
          before,
          head=head,
          cost=record.get("cost", before.cost),
          is_ended=before.is_ended or kind == "end",
        )

  def _set_free(self, label: str, free: int) -> None:
    if free < 0:
      raise ValueError(f"reservation {label!r} has no run left")
    self.reservations[label] = dataclasses.replace(
      self.reservations[label], free=free
    )
