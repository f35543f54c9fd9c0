r"""Shows what a run, or all runs on a data set, may spend and have spent.

  dpdist budget --workdir=/tmp/digits
  dpdist budget --config=digits
  dpdist budget --config=digits --curve
  dpdist budget --dataset=/data/budgets

Before training: what would epsilon 3 cost, which noise does each batch size
need, and how does epsilon depend on noise, batch and steps?

  dpdist budget --config=digits --target_epsilon=3
  dpdist budget --config=digits --table
  dpdist budget --config=digits --plot=budget.png

Runs that share a budget keep it under a root, their
--config.data_budget.location. What a run that will never go on did not spend,
and the reservation of a search whose runs never came (see launch.reserve), can
be given back:

  dpdist budget --workdir=/tmp/digits --end
  dpdist budget --dataset=/data/budgets --cancel=search

Imports no jax. Exit codes: 0 done; 2 wrong usage; anything else is a failure.
"""

import textwrap
from typing import TYPE_CHECKING, Any

from absl import flags

from dpdist import config as config_lib
from dpdist.files import json_fields

from .cli import common_flags
from .cli import exit_codes
from .cli import flag_parsing
from .cli import runs

if TYPE_CHECKING:
  from dpdist.ledger import ledger as ledger_lib
  from dpdist.privacy import plan as plan_lib

_CONFIG = common_flags.config(
  "A file in configs/: what it plans to spend.", required=False
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of a run: what it planned and has spent."
)
_DATASET = flags.DEFINE_string(
  "dataset", None, "Root of shared budgets: who spent what of each data set's."
)
_LEDGER = common_flags.ledger()
_CANCEL = flags.DEFINE_string(
  "cancel", None, "With --dataset: give back the reservation of this label."
)
_END = flags.DEFINE_bool(
  "end", False, "With --workdir: end the run for good, and give back the rest."
)
_CURVE = flags.DEFINE_bool(
  "curve", False, "With --config: the plan's epsilon at other deltas, too."
)
_TARGET = flags.DEFINE_float(
  "target_epsilon",
  None,
  "With --config: the noise, the batch or the steps that it would take.",
)
_TABLE = flags.DEFINE_bool(
  "table", False, "With --config: noise and compute for other batch sizes."
)
_PLOT = common_flags.plot(
  "With --config: draw epsilon against noise, batch and steps."
)
_JSON = common_flags.json()

_NUMBERS = (
  "delta",
  "accountant",
  "neighboring_relation",
  "unit",
  "sampling",
  "num_examples",
  "expected_batch_size",
  "sampling_probability",
  "noise_multiplier",
  "l2_clip_norm",
)
_DELTAS = tuple(10.0**-k for k in range(3, 13))


def main() -> int:
  """Returns an exit code."""
  try:
    facts = _facts()
  except ValueError as error:
    return flag_parsing.usage_error(error)
  if _JSON.value:
    print(json_fields.text(facts))
  else:
    _show(facts)
  return exit_codes.DONE


def _facts() -> dict[str, Any]:
  given = [f for f in (_WORKDIR, _CONFIG, _DATASET) if f.value is not None]
  if len(given) != 1:
    raise ValueError("give exactly one of --workdir, --config and --dataset")
  for action, wanted in (
    (_CANCEL, _DATASET),
    (_END, _WORKDIR),
    (_CURVE, _CONFIG),
    (_TARGET, _CONFIG),
    (_TABLE, _CONFIG),
    (_PLOT, _CONFIG),
  ):
    if action.value not in (None, False) and given[0] is not wanted:
      raise ValueError(f"--{action.name} goes with --{wanted.name}")
  if _WORKDIR.value is not None:
    return _ended(_WORKDIR.value) if _END.value else _spent(_WORKDIR.value)
  if _DATASET.value is not None:
    return _shared(_DATASET.value, _CANCEL.value)
  # Imported here: flags are parsed without what takes long to import.
  from dpdist.privacy import plan as plan_lib

  config = config_lib.privacy_config(_CONFIG.value)
  plan = plan_lib.make_plan(config)
  facts: dict[str, Any] = {"epsilon_planned": plan.epsilon(), **_numbers(plan)}
  if _CURVE.value:
    curve = zip(_DELTAS, plan.curve(_DELTAS), strict=True)
    facts["curve"] = [{"delta": x, "epsilon": epsilon} for x, epsilon in curve]
  # Imported here, since its numbers take an accountant.
  from dpdist.privacy import planning
  from dpdist.privacy import statement as statement_lib

  if _TARGET.value is not None:
    facts["answers"] = planning.answers(config, _TARGET.value)
  if _TABLE.value:
    facts["batches"] = planning.batches(config, _TARGET.value)
  if _PLOT.value is not None:
    # Imported here, since loading matplotlib takes longer than all else.
    from dpdist.reporting import planning_plot

    planning_plot.draw(_PLOT.value, plan, planning.curves(plan), _TARGET.value)
    facts["plot"] = _PLOT.value
  return facts | {"statement": statement_lib.of_plan(plan)}


def _numbers(plan: "plan_lib.PrivacyPlan") -> dict[str, Any]:
  numbers = {name: getattr(plan, name) for name in _NUMBERS}
  return numbers | {"steps_planned": plan.num_steps}


def _spent(workdir: str) -> dict[str, Any]:
  ledger = runs.open_begun(workdir, _LEDGER.value)
  epsilons = ledger.epsilons
  if epsilons is None or any(
    x.keys() != {"pld", "rdp"} for x in epsilons.values()
  ):
    epsilons = _computed(ledger)
  spent, planned = epsilons["spent"], epsilons["planned"]
  accountant = ledger.plan.accountant
  if spent[accountant] is None or planned[accountant] is None:
    accountant = "rdp"
  total = sum(part.num_steps for part in ledger.planned)
  return {
    "epsilon": _guaranteed(ledger, planned[accountant]),
    "epsilon_spent": spent[accountant],
    **{f"epsilon_spent_{name}": value for name, value in spent.items()},
    "steps_spent": ledger.spent_steps,
    "guarantee": ledger.guarantee,
    "epsilon_planned": planned[accountant],
    **_numbers(ledger.plan),
    "steps_planned": total,
    "accountant": accountant,
    "segments": len(ledger.segments),
    **({"note": _NOTE} if 0 < ledger.spent_steps < total else {}),
  }


# A short form of `dpdist.privacy.statement.stopped_early`.
_NOTE = (
  "epsilon is the guarantee, that of the whole plan, wherever the run stops;"
  " epsilon_spent is a reading of its odometer, which bounds nothing once"
  " someone has looked"
)


def _guaranteed(
  ledger: "ledger_lib.Ledger", planned: float | None
) -> float | None:
  """Returns the run's epsilon, wherever it stops: `composition.guaranteed`."""
  if not ledger.spent_steps:
    return 0.0
  if len(ledger.segments) == 1:
    return planned
  # Imported here, since loading the accountants takes longer than all else.
  from dpdist.privacy import composition

  return composition.guaranteed(ledger.bounds)


def _computed(
  ledger: "ledger_lib.Ledger",
) -> dict[str, dict[str, float | None]]:
  # Imported here, since loading the accountants takes longer than all else.
  from dpdist.privacy import composition

  return {
    "spent": composition.epsilons(ledger.spent),
    "planned": composition.epsilons(ledger.planned),
  }


def _ended(workdir: str) -> dict[str, Any]:
  """Ends a run, and gives back what it left of its data set's budget."""
  from dpdist.ledger import data_budget

  with runs.open_begun(workdir, _LEDGER.value) as ledger:
    if not ledger.is_ended:
      ledger.acquire()
      ledger.end()
    facts: dict[str, Any] = {"steps_spent": ledger.spent_steps, "ended": True}
    places = {(place["root"], place["data"]) for place in ledger.places}
    for root, data in sorted(places):
      budget = data_budget.DataBudget(root, data)
      if budget.holds(ledger):
        given = budget.refund(ledger)
        facts[f"share_given_back_{data[:12]}"] = budget.share(given)
    return facts


def _shared(root: str, cancel: str | None) -> dict[str, Any]:
  """Returns what the runs on each data set under a root have reserved."""
  from dpdist.ledger import budgets as budgets_lib

  budgets = budgets_lib.all_below(root)
  if cancel is not None:
    holders = [b for b in budgets if cancel in b.reservations]
    if len(holders) != 1:
      raise ValueError(
        "cancel must be a label of one data set's budget, got"
        f" {cancel!r}, which {len(holders)} have"
      )
    holders[0].cancel(cancel)
  made = [budget for budget in budgets if budget.terms is not None]
  return {budget.data: _of_data(budget) for budget in made}


def _of_data(budget: Any) -> dict[str, Any]:
  terms = budget.terms
  rows = [
    {
      "share": budget.share(allocation.cost),
      "state": "ended" if allocation.is_ended else "may go on",
      "run": allocation.label,
    }
    for allocation in budget.allocations.values()
  ]
  rows += [
    {
      "share": budget.share(reservation.cost * reservation.free),
      "state": f"room for {reservation.free}",
      "run": reservation.label,
    }
    for reservation in budget.reservations.values()
    if reservation.free
  ]
  return {
    "epsilon": terms.epsilon,
    "delta": terms.delta,
    "neighboring_relation": terms.neighboring_relation,
    "epsilon_reserved": budget.epsilon,
    "share_reserved": budget.share(budget.reserved),
    "runs": rows,
  }


def _show(facts: dict[str, Any], indent: str = "") -> None:
  """Prints names and values; nested values are indented below their name."""
  facts = dict(facts)
  statement = facts.pop("statement", "")
  answers, batches = facts.pop("answers", None), facts.pop("batches", None)
  plain = {k: v for k, v in facts.items() if not isinstance(v, dict | list)}
  width = max(map(len, plain), default=0)
  for name, value in plain.items():
    print(f"{indent}{name:<{width}}  {_text(value)}")
  for name, value in facts.items():
    if isinstance(value, dict):
      print(f"{indent}{name}")
      _show(value, indent + "  ")
    elif isinstance(value, list):
      print(f"{indent}{name}" if value else f"{indent}{name}  none")
      for row in value:
        print(
          f"{indent}  " + "  ".join(f"{_text(v):<10}" for v in row.values())
        )
  if answers:
    target = _TARGET.value
    _show_rows(f"What epsilon {target:g} takes, changing one number", answers)
  if batches:
    _show_rows("The same epsilon and steps with other batches", batches)
  if answers or batches:
    print(
      "\n  examples: processed in all. noise/mean: standard deviation of the"
      " noise on\n  an entry of the mean gradient."
    )
  if statement:
    print("\n" + textwrap.fill(statement, 80))


_HEADS = {
  "noise_multiplier": "noise",
  "expected_batch_size": "batch",
  "num_steps": "steps",
  "epsilon": "epsilon",
  "examples_processed": "examples",
  "epochs": "epochs",
  "noise_on_mean_gradient": "noise/mean",
}


def _show_rows(title: str, rows: list[dict[str, Any]]) -> None:
  """Prints rows of `dpdist.privacy.planning` as a table of 80 columns."""
  print(f"\n{title}")
  print(_columns({"change": "", **_HEADS}))
  for row in rows:
    if "problem" in row:
      print(f"  {_change(row)} cannot: {row['problem']}")
    else:
      print(_columns({"change": "", **row}))


def _columns(row: dict[str, Any]) -> str:
  return f"  {_change(row)}" + "".join(
    (value if isinstance(value, str) else _short(value)).rjust(width)
    for name, width in zip(_HEADS, (8, 8, 8, 9, 12, 8, 11), strict=True)
    for value in [row[name]]
  )


def _change(row: dict[str, Any]) -> str:
  return _HEADS.get(row["change"], row["change"]).ljust(10)


def _short(value: float) -> str:
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _text(value: Any) -> str:
  if value is None:
    return "not valid"
  return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
  flag_parsing.run(main)
