"""Verifies that a run's record is whole and agrees with what the run left.

Everything is recomputed from the records; nothing that a run wrote about itself
is believed. Imports no jax, so that a record can be verified anywhere.
"""

from collections.abc import Callable
import math
import os
import pathlib
from typing import Any, NamedTuple

from dpdist import errors
from dpdist.files import json_fields
from dpdist.ledger import data_budget
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.reporting import metrics
from dpdist.workdir import manifest
from dpdist.workdir import statistics

# Two machines may differ in the last digits of an epsilon.
_TOLERANCE = 1e-6
# An older version discretized losses into other cells; its epsilons are upper
# bounds as well.
_CELLS = 1e-4


class Finding(NamedTuple):
  """The result of one check: what was checked, and what was found."""

  what: str
  found: str
  problem: str  # What is wrong with it; "" if nothing is.


def verify(
  workdir: str | os.PathLike[str], ledger: ledger_lib.Ledger
) -> list[Finding]:
  """Checks the record of a run and returns what each check found, in order.

  The ledger's chain was checked when it was read. The record is sound if no
  finding has a problem. A check that fails to run is a finding too.
  """
  findings = []
  for what, check in _CHECKS.items():
    try:
      found, problem = check(pathlib.Path(workdir), ledger)
    except (ValueError, OSError, errors.LedgerError) as error:
      found, problem = "cannot be checked", str(error)
    findings.append(Finding(what, found, problem))
  return findings


def _records(_: pathlib.Path, ledger: ledger_lib.Ledger) -> tuple[str, str]:
  count, writers = len(ledger.records), _count(ledger.writer, "process")
  return f"{count} records, unaltered; written to by {writers}", ""


def _guarantee(_: pathlib.Path, ledger: ledger_lib.Ledger) -> tuple[str, str]:
  return ledger.guarantee, "; ".join(ledger.unsound)


def _plan(_: pathlib.Path, ledger: ledger_lib.Ledger) -> tuple[str, str]:
  plan, planned = ledger.plan, ledger.planned
  epsilon = composition.epsilon(planned)
  found = (
    f"{plan.num_steps} steps of noise multiplier {plan.noise_multiplier:g}, by"
    f" {composition.accountant_of(planned)} epsilon {epsilon:.6g} at delta"
    f" {plan.delta:g}"
  )
  if len(ledger.segments) > 1:
    found += f" with the {len(ledger.segments) - 1} before it"
  target = plan.target_epsilon
  if target is not None and not _is_bound(target, _least(planned)):
    return found, f"it spends more than its target epsilon {target:g}"
  return found, ""


def _steps(_: pathlib.Path, ledger: ledger_lib.Ledger) -> tuple[str, str]:
  planned = sum(part.num_steps for part in ledger.planned)
  branches = _count(len(ledger.branches), "branch")
  found = f"{ledger.spent_steps} of {planned} charged, on {branches}"
  if ledger.refunded_steps:
    found += f"; {ledger.refunded_steps} charged ahead were given back"
  # When the records were read, it was checked that each plan holds, that each
  # checkpoint is of steps that were charged, and that nothing was given back
  # that another writer charged or that a checkpoint has.
  return found, ""


def _epsilon(_: pathlib.Path, ledger: ledger_lib.Ledger) -> tuple[str, str]:
  epsilons = composition.epsilons(ledger.spent)
  found = [f"{v:.6g} ({k})" for k, v in epsilons.items() if v is not None]
  return ", ".join(found), ""


def _recorded_epsilons(
  _: pathlib.Path, ledger: ledger_lib.Ledger
) -> tuple[str, str]:
  """Recomputes every epsilon that was recorded, perhaps with a looser bound."""
  count, problems = 0, []
  for by_one_order in (False, True):
    problem, count = "", 0
    past = history.History()
    for record in ledger.records:
      past.apply(record)
      if record["kind"] != "epsilons":
        continue
      count += 1
      for name, parts in (("spent", past.spent), ("planned", past.planned)):
        right = composition.epsilons(parts, by_one_order=by_one_order)
        recorded = record[name]
        if not problem and (
          right.keys() != recorded.keys()
          or not all(_is_bound(recorded[k], right[k]) for k in right)
        ):
          problem = (
            f"record {record['seq']} says {name} {recorded}, it is {right}"
          )
    problems.append(problem)
    if len(ledger.segments) < 2:
      break  # There is no filter.
  return (
    f"{count} recorded on the way",
    "" if "" in problems else problems[0],
  )


def _data_budget(_: pathlib.Path, ledger: ledger_lib.Ledger) -> tuple[str, str]:
  """Checks that what the run spent was reserved in the data set's budget."""
  found, problem = [], ""
  for place in ledger.allocations:
    budget = data_budget.DataBudget(place["root"], place["data"])
    allocation = budget.allocations.get(place["stake"])
    if allocation is None or budget.terms is None:
      return budget.root, "the run has no allocation in it"
    found.append(
      f"{budget.share(allocation.cost):.2%} reserved for this run, of epsilon"
      f" {budget.terms.epsilon:g} at delta {budget.terms.delta:g}"
    )
    if budget.reserved > budget.terms.divergence * (1 + _TOLERANCE):
      problem = "more is reserved than the data set may spend"
    if place != ledger.allocations[-1]:
      continue
    if not ledger.has_been_at(allocation.head):
      problem = "a copy of this run went on in its place"
    elif budget.cost(ledger.spent) > allocation.cost * (1 + _TOLERANCE):
      problem = "the run spent more than was reserved for it"
  return "; ".join(found) or "none shared", problem


def _checkpoints(
  workdir: pathlib.Path, ledger: ledger_lib.Ledger
) -> tuple[str, str]:
  whole, problem = 0, ""
  for i, saved in enumerate(reversed(ledger.checkpoints)):
    path = manifest.location(workdir / "checkpoints", saved)
    if i and not path.exists():
      continue  # Older checkpoints are deleted in time.
    wrong = manifest.problem(path, saved.digest)
    if wrong is None:
      whole += 1
      if not ledger.has_been_at(manifest.ledger_head(path)):
        wrong = "it was saved under a ledger head that the ledger lacks"
    if wrong is not None and not problem:
      problem = f"step {saved.step}: {wrong}"
  return f"{len(ledger.checkpoints)} recorded, {whole} there and whole", problem


def _statistics(
  workdir: pathlib.Path, ledger: ledger_lib.Ledger
) -> tuple[str, str]:
  """Compares the file of private statistics with the newest checkpoint's."""
  path, folder = workdir / statistics.FILE, workdir / "checkpoints"
  saved = manifest.newest(folder, ledger.checkpoints).saved
  kept = saved and manifest.statistics(manifest.location(folder, saved))
  if not kept:
    return "none in a checkpoint", ""
  found = f"with noise multiplier {kept['noise_multiplier']:g}"
  if not statistics.is_of(kept, ledger):
    return f"{found}; not released anew since settings changed", ""
  if not path.exists():
    return found, f"{statistics.FILE} is missing"
  if json_fields.parse(path.read_bytes(), statistics.FILE) != kept:
    return found, f"{statistics.FILE} differs from the newest checkpoint"
  return found, ""


def _metrics(
  workdir: pathlib.Path, ledger: ledger_lib.Ledger
) -> tuple[str, str]:
  rows = metrics.read(workdir)
  shown = max((row.get("epsilon", 0.0) for row in rows), default=0.0)
  spent = composition.epsilon(ledger.spent)
  spent = max([spent, *_values_recorded(ledger, "spent")])
  problem = ""
  if shown > spent * (1 + _TOLERANCE):
    problem = f"they tell of epsilon {shown:.6g}, the ledger of {spent:.6g}"
  last = max((row["step"] for row in rows), default=0)
  if last > max((branch.stop_step for branch in ledger.branches), default=0):
    problem = f"they tell of step {last}, which was not charged"
  return f"{len(rows)} rows, to step {last}", problem


def _result(
  workdir: pathlib.Path, ledger: ledger_lib.Ledger
) -> tuple[str, str]:
  path = workdir / "result.json"
  if not path.exists():
    return "none yet", ""
  result = json_fields.parse(path.read_bytes(), "result.json")
  plan = ledger.plan
  expected: dict[str, Any] = {
    "steps_charged": ledger.spent_steps,
    "guarantee": ledger.guarantee,
    "delta": plan.delta,
    "noise_multiplier": plan.noise_multiplier,
    "sampling_probability": plan.sampling_probability,
    "l2_clip_norm": plan.l2_clip_norm,
    "accountant": composition.accountant_of(ledger.spent),
    "neighboring_relation": plan.neighboring_relation,
  }
  problems = [
    f"{name} is {result.get(name)!r}, by the ledger {value!r}"
    for name, value in json_fields.strict(expected).items()
    if not _same(result.get(name), value)
  ]
  problems = _epsilons(ledger, result) + problems
  return f"epsilon {result.get('epsilon')}", "; ".join(problems)


def _epsilons(ledger: ledger_lib.Ledger, result: dict[str, Any]) -> list[str]:
  """Returns what is wrong with the epsilons of a result."""
  spent = ("spent", [ledger.spent])
  checked = {"epsilon": ("planned", ledger.bounds), "epsilon_spent": spent}
  if "epsilon_spent" not in result:  # Before 2026-12 there was one number.
    checked = {"epsilon": spent}
  problems = []
  for name, (recorded, ways) in checked.items():
    value = result.get(name)
    if value == json_fields.strict(math.inf):
      value = math.inf
    least = max(map(_least, ways), default=0.0)
    is_known = value in _values_recorded(ledger, recorded) or _same(
      value, composition.guaranteed(ways)
    )
    if not (is_known and _is_bound(value, least)):
      problems.append(f"{name} is {value!r}, by the ledger {least!r}")
  return problems


def _values_recorded(ledger: ledger_lib.Ledger, name: str) -> list[float]:
  """Returns the epsilons in the ledger; an older version's may be larger."""
  return [
    value
    for record in ledger.records
    if record["kind"] == "epsilons"
    for value in record[name].values()
    if value is not None
  ]


def _least(parts: list[plan_lib.PlanUse]) -> float:
  """Returns the least epsilon that the filter of any version gives."""
  return min(
    composition.epsilon(parts, by_one_order=by_one_order)
    for by_one_order in (False, True)
  )


def _is_bound(value: Any, right: float | None) -> bool:
  """Returns whether an epsilon is no less than it should be."""
  if right is None or not isinstance(value, float):
    return value is right
  return value >= right * (1 - _CELLS)


def _same(one: Any, other: Any) -> bool:
  if isinstance(one, float) and isinstance(other, float):
    return math.isclose(one, other, rel_tol=_TOLERANCE)
  return bool(one == other)


def _count(number: int, name: str) -> str:
  return f"{number} {name}" + ("es" if number != 1 else "")


_CHECKS: dict[
  str, Callable[[pathlib.Path, ledger_lib.Ledger], tuple[str, str]]
] = {
  "ledger": _records,
  "guarantee": _guarantee,
  "plan": _plan,
  "steps": _steps,
  "epsilon spent": _epsilon,
  "epsilons told": _recorded_epsilons,
  "data budget": _data_budget,
  "checkpoints": _checkpoints,
  "statistics": _statistics,
  "metrics": _metrics,
  "result": _result,
}
