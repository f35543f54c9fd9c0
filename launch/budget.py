r"""Shows what a run may spend and has spent. Imports no jax.

  python -m launch.budget --workdir=/tmp/digits
  python -m launch.budget --config=configs/digits.py

Exit codes: 0 done; 2 wrong usage; anything else is a failure.
"""

from collections.abc import Sequence
import json
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from dpdist import config as config_lib
from dpdist import ledger as ledger_lib
from dpdist import plan as plan_lib
from launch import exit_codes
from launch import flag_parsing
from launch import ledgers

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file in configs/: what it plans to spend."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of a run: what it planned and has spent."
)
_LEDGER = flags.DEFINE_string(
  "ledger", None, "Where the run's ledger is, if not in the directory."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(argv: Sequence[str]) -> int:
  """Returns an exit code."""
  del argv
  try:
    if _WORKDIR.value is not None and _CONFIG.value is None:
      facts = _spent(_WORKDIR.value)
    elif _CONFIG.value is not None and _WORKDIR.value is None:
      config = config_lib.privacy_config(_CONFIG.value)
      plan = plan_lib.make_plan(config)
      facts = {"epsilon_planned": plan.epsilon(), **_numbers(plan)}
    else:
      raise ValueError("give exactly one of --workdir and --config")
  except ValueError as error:
    return flag_parsing.usage_error(error)
  except ledger_lib.LedgerError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  if _JSON.value:
    print(json.dumps(facts, indent=2))
  else:
    width = max(map(len, facts))
    for name, value in facts.items():
      shown = f"{value:.6g}" if isinstance(value, float) else value
      print(f"{name:<{width}}  {shown}")
  return exit_codes.DONE


def _numbers(plan: plan_lib.PrivacyPlan) -> dict[str, Any]:
  return {
    "delta": plan.delta,
    "accountant": plan.accountant,
    "neighboring_relation": plan.neighboring_relation,
    "num_examples": plan.num_examples,
    "expected_batch_size": plan.expected_batch_size,
    "sampling_probability": plan.sampling_probability,
    "noise_multiplier": plan.noise_multiplier,
    "l2_clip_norm": plan.l2_clip_norm,
    "steps_planned": plan.num_steps,
  }


def _spent(workdir: str) -> dict[str, Any]:
  ledger = ledgers.open_begun(workdir, _LEDGER.value)
  told = ledger.epsilons or _computed(ledger)
  spent, planned = told["spent"], told["planned"]
  accountant = ledger.plan.accountant
  if spent[accountant] is None or planned[accountant] is None:
    accountant = "rdp"
  return {
    "epsilon_spent": spent[accountant],
    **{f"epsilon_spent_{name}": value for name, value in spent.items()},
    "steps_spent": ledger.spent_steps,
    "guarantee": ledger.guarantee,
    "epsilon_planned": planned[accountant],
    **_numbers(ledger.plan),
    "accountant": accountant,
    "segments": len(ledger.segments),
  }


def _computed(ledger: ledger_lib.Ledger) -> dict[str, dict[str, float | None]]:
  # Here, since loading the accountants takes longer than all else.
  from dpdist import composition

  return {
    "spent": composition.epsilons(ledger.spent),
    "planned": composition.epsilons(ledger.planned),
  }


if __name__ == "__main__":
  flag_parsing.run(main)
