"""The terms of a data set's budget, and the records that it is read from.

Imports no jax.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from dpdist import errors
from dpdist.accounting import rdp
from dpdist.privacy import plan as plan_lib

FORMAT = 1
# The fields that a record of each kind must have, and their types.
# fmt: off
FIELDS: dict[str, dict[str, type]] = {
  "make": {
    "format": int, "data": str, "epsilon": float, "delta": float,
    "neighboring_relation": str, "order": int, "divergence": float,
  },
  # The budget of this data set is the one that was made under another digest
  # of the same content.
  "same": {"data": str},
  "reserve": {"label": str, "cost": float, "count": int},
  "cancel": {"label": str},
  "admit": {
    "stake": str, "cost": float, "head": str, "label": str, "reservation": str,
  },
  "grow": {"stake": str, "cost": float, "head": str},
  "follow": {"stake": str, "head": str},
  "end": {"stake": str, "cost": float, "head": str},
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class BudgetTerms:
  """What a data set may spend."""

  epsilon: float  # Of all runs together, above 0.
  delta: float  # In (0, 1).
  neighboring_relation: str  # Of every run.
  order: int  # The Renyi order at which costs are added up.
  divergence: float  # The largest sum of costs.


@dataclasses.dataclass(frozen=True)
class Allocation:
  """What one run has reserved."""

  label: str  # For people.
  # The largest divergence of its plan; for a run that was ended, what it spent.
  cost: float
  head: str  # Of its ledger, as last recorded here.
  is_ended: bool = False  # Whether the rest was given back.


@dataclasses.dataclass(frozen=True)
class Reservation:
  """Budget that is kept for runs to come."""

  label: str  # For people, and for runs to refer to it; unique.
  cost: float  # The divergence of each run.
  free: int  # How many runs may still come.


def read_terms(record: Mapping[str, Any], data: str) -> BudgetTerms:
  """Returns the terms of the record that makes a budget of that data set."""
  if record["format"] != FORMAT or record["data"] != data:
    raise ValueError("another format, or another data set")
  if not (
    0 < record["delta"] < 1
    and record["epsilon"] > 0
    and record["divergence"] > 0
    and record["order"] in rdp.WHOLE_ORDERS
  ):
    raise ValueError("terms that no budget can have")
  names = [field.name for field in dataclasses.fields(BudgetTerms)]
  return BudgetTerms(**{name: record[name] for name in names})


def best_order(epsilon: float, delta: float) -> tuple[int, float]:
  """Returns the order at which most steps fit, and the divergence that fits.

  A step's divergence grows about in proportion to the order, so most steps fit
  where the budget's divergence over the order is largest.
  """
  room = {
    order: rdp.largest_divergence(order, epsilon, delta)
    for order in rdp.WHOLE_ORDERS
  }
  order = max(room, key=lambda order: room[order] / order)
  if room[order] <= 0:
    raise errors.ArgumentError(
      f"data_budget.epsilon must be large enough for data_budget.delta={delta},"
      f" got {epsilon}"
    )
  return order, room[order]


def cost(terms: BudgetTerms, parts: Sequence[plan_lib.PlanUse]) -> float:
  """Returns the divergence of parts of a run, at a budget's order.

  Raises RefusedError if they have another relation, or no such divergences.
  """
  for plan, _ in parts:
    if plan.neighboring_relation != terms.neighboring_relation:
      raise errors.RefusedError(
        f"neighboring_relation must be the data set's,"
        f" {terms.neighboring_relation!r}, got {plan.neighboring_relation!r}"
      )
  steps = [x for plan, num_steps in parts for x in plan.steps(num_steps)]
  for event, _ in steps:
    if event.loose_rdp:
      raise errors.RefusedError(
        "a data set's budget adds up Renyi divergences, which there are not"
        f" for {event.loose_rdp}"
      )
  return math.fsum(
    rdp.divergence(event, count, terms.order) for event, count in steps
  )
