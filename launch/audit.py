r"""Attacks a config's own step, and prints a lower bound on epsilon.

  python -m launch.audit --config=configs/digits.py
  python -m launch.audit --config=configs/digits.py --mode=one_run
  python -m launch.audit --config=configs/digits.py --plot=/tmp/audit.svg

The step is compiled for this machine's devices and run on canaries, units that
are as easy to detect as possible, instead of the data; only the data's shapes
are used. Its keys are thrown away: no budget is spent, and nothing meaningful
is released. A bound above the claim shows that the claim is wrong; a bound
below it shows only that this attack did not refute it.

  worst_case  canaries that are tried apart; --canaries_per_run=1 gives each a
              run of its own, which takes long, and --canary=example makes them
              gradients of the model itself
  one_run     all canaries at once, and a bound that holds however they hang
              together; weaker

Exit codes: 0 the bound is at most the claim; 1 it is above; 2 wrong usage.
"""

import pathlib
from typing import Any

from absl import flags

from dpdist.audit import audit
from dpdist.audit import canaries
from dpdist.audit import plot
from dpdist.files import json_fields
from dpdist.privacy import statement
from dpdist.reporting import console
from dpdist.reporting import plots

from .cli import common_flags
from .cli import config_parts
from .cli import exit_codes
from .cli import flag_parsing

_CONFIG = common_flags.config()
_MODE = flags.DEFINE_enum(
  "mode", "worst_case", audit.MODES, "Which game is played."
)
_TRIALS = flags.DEFINE_integer(
  "num_trials", 0, "The number of canaries; 0: enough.", lower_bound=0
)
_PER_RUN = flags.DEFINE_integer(
  "canaries_per_run",
  0,
  "The canaries of a run in worst_case; 0: as many as allowed.",
  lower_bound=0,
)
_STEPS = flags.DEFINE_integer(
  "num_steps", 0, "The steps of each run; 0: the plan's.", lower_bound=0
)
_CANARY = flags.DEFINE_enum(
  "canary", "entry", canaries.KINDS, "What a canary's gradient is."
)
_CONFIDENCE = flags.DEFINE_float(
  "confidence", 0.95, "The confidence of the bounds."
)
_PLOT = common_flags.plot("A file for a plot, as audit.svg or audit.png.")
_JSON = common_flags.json()


def main() -> int:
  """Returns an exit code."""
  try:
    if _PLOT.value is not None:
      plots.check_path(_PLOT.value)
    program = canaries.prepare(
      _CONFIG.value, canary=_CANARY.value, parts=config_parts.load("config")
    )
    result = audit.audit(
      program,
      mode=_MODE.value,
      num_trials=_TRIALS.value,
      canaries_per_run=_PER_RUN.value,
      num_steps=_STEPS.value,
      confidence=_CONFIDENCE.value,
    )
  except ValueError as error:
    return flag_parsing.usage_error(error)
  facts = result.facts()
  if _PLOT.value is not None:
    facts["plot"] = str(pathlib.Path(_PLOT.value).resolve())
    plot.draw(result, _PLOT.value)
  if _JSON.value:
    print(json_fields.text(facts))
  else:
    console.show_table("Audit", _rows(facts))
  return exit_codes.UNSOUND if result.is_refuted else exit_codes.DONE


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
  rows = [
    (
      "claimed",
      f"epsilon {statement.rounded_up(facts['epsilon_claimed'], 4)} at delta"
      f" {facts['delta']:g} after {facts['num_steps']:,} steps",
    ),
    (
      "shown",
      f"epsilon {facts['epsilon_lower_bound']:.4f} at least, with confidence"
      f" {facts['confidence']:g}",
    ),
    *(
      (f"  by {name}", f"{bound:.4f}")
      for name, bound in facts["bounds"].items()
    ),
    (
      "canaries",
      f"{facts['num_canaries']:,} in each of {facts['num_runs']:,} runs",
    ),
    ("verdict", facts["verdict"]),
  ]
  rows += [("assumed", line) for line in facts["assumed"]]
  if "plot" in facts:
    rows.append(("plot", facts["plot"]))
  return rows


if __name__ == "__main__":
  flag_parsing.run(main)
