"""Writes what a finished session leaves: `result.json` and the report."""

from collections.abc import Mapping
import pathlib
from typing import Any

import ml_collections

from dpdist import errors
from dpdist.distributed import collectives
from dpdist.own_loop import life as life_lib
from dpdist.privacy import composition
from dpdist.privacy import statement
from dpdist.reporting import report
from dpdist.training import summary
from dpdist.workdir import fingerprint

# Errors that each process reaches by itself.
OWN_ERRORS = (
  errors.ArgumentError,
  errors.LedgerError,
  errors.ReplayError,
  errors.SensitivityError,
)


def write(
  workdir: pathlib.Path,
  life: life_lib.Life,
  *,
  config: ml_collections.ConfigDict,
  rounding: Mapping[str, Any],
  num_steps: int,
  scores: Mapping[str, float],
  state: Any,
) -> None:
  """Writes the result; must be called in all processes.

  `num_steps` steps were made to the state. Scores are held-out metrics by
  "test/NAME".
  """
  sha256 = fingerprint.params_sha256(state)

  def finish() -> None:
    ledger, plan = life.ledger, life.plan
    assert ledger is not None
    values = {
      "epsilon": composition.guaranteed(ledger.bounds),
      "epsilon_spent": composition.epsilon(ledger.spent),
      "delta": plan.delta,
      "guarantee": ledger.guarantee,
      "neighboring_relation": plan.neighboring_relation,
      "noise_multiplier": plan.noise_multiplier,
      "sampling_probability": plan.sampling_probability,
      "l2_clip_norm": plan.l2_clip_norm,
      "rounding": dict(rounding),
      "num_steps": num_steps,
      "steps_charged": ledger.spent_steps,
      "segments": len(ledger.segments),
      "sentinel_every": config.sentinel.every,
      "accountant": composition.accountant_of(ledger.spent),
      "params_sha256": sha256,
      "ledger_head": ledger.head,
      "environment": fingerprint.public(life.environment),
      "test": {name.removeprefix("test/"): x for name, x in scores.items()},
      "held_out_problem": "",
    }
    summary.write_result(workdir / "result.json", values)
    report.write(
      workdir,
      result=values,
      statement=composition.statement(ledger.planned, values["epsilon"]),
      rows=[
        (f"{plan.unit}s", f"{plan.num_examples:,}"),
        ("expected batch size", f"{plan.expected_batch_size:,g}"),
        (
          "sampling probability q",
          f"{plan.sampling_probability:.6g}, {statement.sampling(plan)}",
        ),
        ("charged steps", f"{plan.num_steps:,}"),
        ("l2 clip norm", f"{plan.l2_clip_norm:g}"),
        ("noise multiplier sigma", f"{plan.noise_multiplier:g}"),
        ("adjacency", f"{plan.neighboring_relation}, of one {plan.unit}"),
      ],
      notices=life.notices,
    )

  collectives.run_on_primary(finish)
