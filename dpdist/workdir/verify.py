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

# Two machines may differ in the last digits of an epsilon.
_TOLERANCE = 1e-6
# An older version discretized losses into other cells; its epsilons are upper
# bounds as well.
_CELLS = 1e-4


class Finding(NamedTuple):
  """The result of one check.

  Attributes:
    what: what was checked.
    found: what was found.
    problem: what is wrong with it; "" if nothing is.
  """

  what: str
  found: str
  problem: str


def verify(
  workdir: str | os.PathLike[str], ledger: ledger_lib.Ledger
) -> list[Finding]:
  """Checks the record of a run.

  Args:
    workdir: its directory.
    ledger: its ledger, whose chain was checked when it was read.

  Returns:
    What was found, in the order of the checks. The record is sound if no
    finding has a problem.
  """
  workdir = pathlib.Path(workdir)
  return [
    Finding(
      "ledger",
      f"{len(ledger.records)} records, unaltered; written to by"
      f" {ledger.writer} process{'es' * (ledger.writer != 1)}",
      "",
    ),
    Finding("guarantee", ledger.guarantee, "; ".join(ledger.unsound)),
    _found("plan", lambda: _plan(ledger)),
    _steps(ledger),
    _found("epsilon spent", lambda: _epsilon(ledger)),
    _found("epsilons told", lambda: _recorded_epsilons(ledger)),
    _found("data budget", lambda: _data_budget(ledger)),
    _found("checkpoints", lambda: _checkpoints(workdir, ledger)),
    _found("metrics", lambda: _metrics(workdir, ledger)),
    _found("result", lambda: _result(workdir, ledger)),
  ]


def _found(what: str, check: Callable[[], Finding]) -> Finding:
  """Returns a check's finding; a check that fails to run is a finding too."""
  try:
    return check()
  except (ValueError, OSError, errors.LedgerError) as error:
    return Finding(what, "cannot be checked", str(error))


def _plan(ledger: ledger_lib.Ledger) -> Finding:
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
  problem = ""
  if target is not None and not _is_bound(target, _least(planned)):
    problem = f"it spends more than its target epsilon {target:g}"
  return Finding("plan", found, problem)


def _steps(ledger: ledger_lib.Ledger) -> Finding:
  planned = sum(part.num_steps for part in ledger.planned)
  branches = len(ledger.branches)
  found = (
    f"{ledger.spent_steps} of {planned} charged, on"
    f" {branches} branch{'es' * (branches != 1)}"
  )
  if ledger.refunded_steps:
    found += f"; {ledger.refunded_steps} charged ahead were given back"
  # When the records were read, it was checked that each plan holds, that each
  # checkpoint is of steps that were charged, and that nothing was given back
  # that another writer charged or that a checkpoint has.
  return Finding("steps", found, "")


def _epsilon(ledger: ledger_lib.Ledger) -> Finding:
  found = ", ".join(
    f"{value:.6g} ({name})"
    for name, value in composition.epsilons(ledger.spent).items()
    if value is not None
  )
  return Finding("epsilon spent", found, "")


def _recorded_epsilons(ledger: ledger_lib.Ledger) -> Finding:
  """Recomputes every epsilon that the ledger recorded during the run.

  An older version may have recorded a larger one, with a looser bound.
  """
  count, problems = 0, []
  for by_one_order in (False, True):
    found, count = "", 0
    past = history.History()
    for record in ledger.records:
      past.apply(record)
      if record["kind"] != "epsilons":
        continue
      count += 1
      for name, parts in (("spent", past.spent), ("planned", past.planned)):
        right = composition.epsilons(parts, by_one_order=by_one_order)
        told = record[name]
        if not found and (
          right.keys() != told.keys()
          or not all(_is_bound(told[k], right[k]) for k in right)
        ):
          found = f"record {record['seq']} says {name} {told}, it is {right}"
    problems.append(found)
    if len(ledger.segments) < 2:
      break  # There is no filter.
  return Finding(
    "epsilons told",
    f"{count} recorded on the way",
    "" if "" in problems else problems[0],
  )


def _data_budget(ledger: ledger_lib.Ledger) -> Finding:
  """Checks that what the run spent was reserved in the data set's budget."""
  what, found, problem = "data budget", [], ""
  for place in ledger.allocations:
    budget = data_budget.DataBudget(place["root"], place["data"])
    allocation = budget.allocations.get(place["stake"])
    if allocation is None or budget.terms is None:
      return Finding(what, budget.root, "the run has no allocation in it")
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
  return Finding(what, "; ".join(found) or "none shared", problem)


def _checkpoints(workdir: pathlib.Path, ledger: ledger_lib.Ledger) -> Finding:
  whole, problem = 0, ""
  for i, saved in enumerate(reversed(ledger.checkpoints)):
    path = manifest.location(workdir / "checkpoints", saved)
    if i and not path.exists():
      continue  # Older checkpoints are deleted in time.
    wrong = manifest.problem(path, saved.digest)
    if wrong is None:
      whole += 1
      meta = json_fields.parse(
        (path / "meta" / "metadata").read_bytes(), "its metadata"
      )
      json_fields.check(meta, {"ledger_head": str})
      if not ledger.has_been_at(meta["ledger_head"]):
        wrong = "it was saved under a ledger head that the ledger lacks"
    if wrong is not None and not problem:
      problem = f"step {saved.step}: {wrong}"
  return Finding(
    "checkpoints",
    f"{len(ledger.checkpoints)} recorded, {whole} there and whole",
    problem,
  )


def _metrics(workdir: pathlib.Path, ledger: ledger_lib.Ledger) -> Finding:
  rows = metrics.read(workdir)
  told = max((row.get("epsilon", 0.0) for row in rows), default=0.0)
  spent = composition.epsilon(ledger.spent)
  spent = max([spent, *_told(ledger, "spent")])
  problem = ""
  if told > spent * (1 + _TOLERANCE):
    problem = f"they tell of epsilon {told:.6g}, the ledger of {spent:.6g}"
  last = max((row["step"] for row in rows), default=0)
  if last > max((branch.stop_step for branch in ledger.branches), default=0):
    problem = f"they tell of step {last}, which was not charged"
  return Finding("metrics", f"{len(rows)} rows, to step {last}", problem)


def _result(workdir: pathlib.Path, ledger: ledger_lib.Ledger) -> Finding:
  path = workdir / "result.json"
  if not path.exists():
    return Finding("result", "none yet", "")
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
  return Finding(
    "result", f"epsilon {result.get('epsilon')}", "; ".join(problems)
  )


def _epsilons(ledger: ledger_lib.Ledger, result: dict[str, Any]) -> list[str]:
  """Returns what is wrong with the epsilons of a result."""
  spent = ("spent", [ledger.spent])
  checked = {"epsilon": ("planned", ledger.bounds), "epsilon_spent": spent}
  if "epsilon_spent" not in result:  # Before 2026-12 there was one number.
    checked = {"epsilon": spent}
  problems = []
  for name, (recorded, ways) in checked.items():
    told = result.get(name)
    if told == json_fields.strict(math.inf):
      told = math.inf
    least = max(map(_least, ways), default=0.0)
    is_known = told in _told(ledger, recorded) or _same(
      told, composition.guaranteed(ways)
    )
    if not (is_known and _is_bound(told, least)):
      problems.append(f"{name} is {told!r}, by the ledger {least!r}")
  return problems


def _told(ledger: ledger_lib.Ledger, name: str) -> list[float]:
  """Returns the epsilons in the ledger; an older version's may be larger.

  Args:
    ledger: the run's.
    name: "spent" or "planned".
  """
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


def _is_bound(told: Any, right: float | None) -> bool:
  """Returns whether an epsilon is no less than it should be."""
  if right is None or not isinstance(told, float):
    return told is right
  return told >= right * (1 - _CELLS)


def _same(one: Any, other: Any) -> bool:
  if isinstance(one, float) and isinstance(other, float):
    return math.isclose(one, other, rel_tol=_TOLERANCE)
  return bool(one == other)
