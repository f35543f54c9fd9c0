r"""Prints held-out metrics of any checkpoint of a run, or of its average.

  dpdist eval --workdir=/tmp/digits
  dpdist eval --workdir=/tmp/digits --step=360

Spends nothing: reads the ledger, which must be sound, and computes nothing from
an example that was trained on. The settings are those in the run directory;
--config with --config.a.b gives others, such as the data's new path.

Of a loop of one's own (dpdist.Session) nothing here knows the model: this
prints what the loop logged at that step.

Exit codes: 0 done; 1 the record is not sound; 2 wrong usage.
"""

from typing import Any

from dpdist.files import json_fields

from .cli import common_flags
from .cli import config_parts
from .cli import exit_codes
from .cli import flag_parsing
from .cli import runs

_CONFIG, _STEP = common_flags.checkpoint()
_WORKDIR = common_flags.workdir()
_LEDGER = common_flags.ledger()
_JSON = common_flags.json()


def main() -> int:
  """Returns an exit code."""
  # Imported here: flags are parsed before jax is imported.
  from dpdist.export import load_run
  from dpdist.export import session_run

  try:
    if session_run.is_in(_WORKDIR.value):
      runs.refuse_of_a_loop("config", _CONFIG.value)
      ledger = runs.open_begun(_WORKDIR.value, _LEDGER.value)
      saved = session_run.load(_WORKDIR.value, ledger, step=_STEP.value)
      return _show(session_run.evaluate(saved))
    released = load_run.load(
      _WORKDIR.value,
      runs.open_begun(_WORKDIR.value, _LEDGER.value),
      config=_CONFIG.value,
      step=_STEP.value,
      parts=config_parts.load("config"),
    )
  except ValueError as error:
    return flag_parsing.usage_error(error)
  return _show(load_run.evaluate(released))


def _show(facts: dict[str, Any]) -> int:
  from dpdist.reporting import console

  if _JSON.value:
    print(json_fields.text(facts))
  else:
    console.show_table("Held out", _rows(facts))
  return exit_codes.DONE


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
  from dpdist.privacy import statement

  rows = [
    ("checkpoint", f"after step {facts['step']:,}"),
    ("examples", f"{facts['num_test']:,}, not trained on")
    if "num_test" in facts
    else ("metrics", "as the loop logged them" if facts["test"] else "none"),
  ]
  for group, what in (("test", ""), ("test_ema", ", average")):
    for name, value in facts.get(group, {}).items():
      rows.append((f"{name}{what}", f"{value:.4f}"))
  problems = facts.get("held_out_problems", {}).values()
  rows += [("WARNING", problem) for problem in problems]
  return [
    *rows,
    (
      "epsilon of the run",
      f"{statement.rounded_up(facts['epsilon'], 4)} at delta"
      f" {facts['delta']:g}",
    ),
    ("read by its odometer", statement.rounded_up(facts["epsilon_spent"], 4)),
    ("guarantee", facts["guarantee"]),
  ]


if __name__ == "__main__":
  flag_parsing.run(main)
