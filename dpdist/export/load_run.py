"""Loads what a run has released, from outside: settings and parameters.

This spends nothing. The ledger is read and never written, and nothing is
computed from a protected example. A run whose record is not sound is refused,
since nothing could be said of the privacy of its parameters.
"""

from collections.abc import Callable
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from dpdist import config as config_lib
from dpdist import errors
from dpdist.distributed import mesh as mesh_lib
from dpdist.files import places
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.tasks import held_out
from dpdist.tasks import parts as parts_lib
from dpdist.tasks import task as task_lib
from dpdist.training import abstract_step
from dpdist.training import parameters
from dpdist.training import setup
from dpdist.training import step as step_lib
from dpdist.workdir import checkpoints
from dpdist.workdir import manifest
from dpdist.workdir import statistics as statistics_lib
from dpdist.workdir import verify


class Released(NamedTuple):
  """A checkpoint of a run."""

  config: ml_collections.ConfigDict  # The run's settings.
  ledger: ledger_lib.Ledger  # Its ledger, which is sound.
  saved: history.CheckpointRef  # The checkpoint's record.
  task: task_lib.Task  # What was trained.
  mesh: Mesh  # Of this machine's devices.
  # The checkpoint, with all parameters of the model, also the frozen ones;
  # `ema_params` is None if the run keeps no average.
  state: step_lib.TrainState
  test: dict[str, np.ndarray]  # All held-out examples, by name.
  # Versions, code and devices that the run ended with; empty if it has not
  # ended.
  environment: dict[str, Any]
  # The private statistics of the training data that the checkpoint was trained
  # with, and `test` is made with.
  statistics: dict[str, Any] | None = None


def load(
  workdir: str | os.PathLike[str],
  ledger: ledger_lib.Ledger,
  *,
  config: ml_collections.ConfigDict | None = None,
  step: int | None = None,
  parts: parts_lib.Parts = parts_lib.NAMED,
) -> Released:
  """Restores a checkpoint of a run, or raises UnsoundError for its record.

  Without a config, settings are those in the run directory; without a step, the
  checkpoint is the newest that is whole. `parts` were given to the run as
  objects. Raises ValueError if there is no such checkpoint, or the settings or
  parts are not the run's, or do not fit this machine.
  """
  workdir = places.directory(workdir)
  check_sound(workdir, ledger)
  saved = find(workdir, ledger, step)
  config = config_lib.load(workdir) if config is None else config
  _check_settings(config, ledger)
  _check_parts(parts.settings(config), workdir)
  experiment = setup.build(config, _mesh(config), plan=ledger.plan, parts=parts)
  task = experiment.task
  folder = workdir / "checkpoints"
  path = manifest.location(folder, saved)
  released = manifest.statistics(path)
  test_source = statistics_lib.of_test(experiment.dataset.test, released, path)
  test = test_source.read(np.arange(len(test_source)))
  example = {name: x[0] for name, x in test.items()}
  template = abstract_step.state(experiment, example)
  key_data = jax.ShapeDtypeStruct((2,), np.uint32)
  start = parameters.of(task, key_data, example)
  frozen = start.frozen(experiment.step)
  restored, _ = checkpoints.restore(
    folder,
    template,
    saved,
    frozen_sha256=parameters.frozen_sha256(frozen),
  )
  ema = restored.ema_params
  restored = restored._replace(
    params=step_lib.whole(restored.params, frozen),
    ema_params=None if ema is None else step_lib.whole(ema, frozen),
  )
  return Released(
    experiment.config,
    ledger,
    saved,
    task,
    experiment.mesh,
    restored,
    test,
    environment(workdir),
    released,
  )


def check_sound(workdir: pathlib.Path, ledger: ledger_lib.Ledger) -> None:
  """Raises UnsoundError unless the record and what the run left agree."""
  problems = [
    f"{finding.what}: {finding.problem}"
    for finding in verify.verify(workdir, ledger)
    if finding.problem
  ]
  if problems:
    raise errors.UnsoundError(
      f"the record of {str(workdir)!r} is not sound: {'; '.join(problems)}"
    )


def evaluate(released: Released) -> dict[str, Any]:
  """Computes a checkpoint's held-out metrics, and what the run has spent.

  Returns, JSON-able, "step", "test" and, for an average, "test_ema";
  "test_tables" and "test_ema_tables", if there are metrics that are lists;
  "held_out_problems", by these names, if they are no better than a constant
  guess; "num_test"; "epsilon", "delta" and "guarantee" of the run, wherever it
  stops; and "epsilon_spent", the odometer's value for what it may have released
  so far.
  """
  ledger, state = released.ledger, released.state
  task, test = released.task, released.test
  run = held_out.Evaluator(task, test, released.mesh, state.params)
  facts: dict[str, Any] = {
    "step": released.saved.step,
    "test": run(state.params),
  }
  if state.ema_params is not None:
    facts["test_ema"] = run(state.ema_params)
  for group, params in (("test", state.params), ("test_ema", state.ema_params)):
    tables = {} if params is None else run.tables(params)
    if tables:
      facts[f"{group}_tables"] = tables
    problem = group in facts and held_out.problem(task, facts[group], test)
    if problem:
      facts.setdefault("held_out_problems", {})[group] = problem
  return facts | {"num_test": len(next(iter(test.values())))} | spent(ledger)


def spent(ledger: ledger_lib.Ledger) -> dict[str, Any]:
  """Returns what a run has spent; see `evaluate`."""
  return {
    "epsilon": composition.guaranteed(ledger.bounds),
    "epsilon_spent": composition.epsilon(ledger.spent),
    "delta": ledger.plan.delta,
    "guarantee": ledger.guarantee,
  }


def environment(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what a run ended with; empty if it has not ended."""
  result = workdir / "result.json"
  if not result.exists():
    return {}
  return dict(json.loads(result.read_text())["environment"])


def find(
  workdir: pathlib.Path,
  ledger: ledger_lib.Ledger,
  step: int | None,
  step_of: Callable[[history.CheckpointRef], int] = lambda saved: saved.step,
) -> history.CheckpointRef:
  """Returns the newest whole checkpoint of a step, or of any.

  `step_of` says what step a checkpoint is of, as users count.
  """
  folder = workdir / "checkpoints"
  there = [
    saved
    for saved in ledger.checkpoints
    if manifest.location(folder, saved).exists()
  ]
  if not there:
    raise ValueError(
      f"workdir must hold a checkpoint, got {str(workdir)!r}, whose run has"
      " saved none yet: go on with it"
    )
  wanted = [x for x in there if step is None or step == step_of(x)]
  if not wanted:
    steps = sorted({*map(step_of, there)})
    raise errors.ArgumentError(
      f"step must be that of a checkpoint, one of {steps}, got {step}",
      hint=errors.Hint(flags=("--step=STEP",)),
    )
  found, rejected = manifest.newest(folder, wanted)
  if found is None:
    raise errors.UnsoundError("; ".join(rejected))
  return found


def _check_settings(
  config: ml_collections.ConfigDict, ledger: ledger_lib.Ledger
) -> None:
  plain = lambda values: json.loads(json.dumps(dict(values)))
  asked = plain(config_lib.privacy_dict(config))
  kept = plain(ledger.segment.config)
  kept.pop(ledger_lib.STATISTICS, None)  # Held against the checkpoint's.
  for name in sorted({*asked, *kept}):
    if asked.get(name) != kept.get(name):
      raise ValueError(
        f"privacy.{name} must be that of the run, {kept.get(name)!r} by its"
        f" ledger, got {asked.get(name)!r}"
      )


def _check_parts(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> None:
  """Raises ValueError if a part is named, or given, other than in the run."""
  try:
    recorded = config_lib.load(workdir)
  except ValueError:
    return  # The run saved no settings.
  for name in ("task", "model.name", "data.name", "optimizer.name"):
    section, _, key = name.rpartition(".")
    asked, kept = (
      (x[section] if section else x)[key] for x in (config, recorded)
    )
    # A data set may lie elsewhere, under another name.
    is_task = name in ("task", "model.name")
    if asked != kept and (is_task or parts_lib.GIVEN in (asked, kept)):
      raise errors.ArgumentError(
        f"{name} must be that of the run, {kept!r} by its settings, got"
        f" {asked!r}"
      )


def _mesh(config: ml_collections.ConfigDict) -> Mesh:
  """Returns the run's mesh if it fits this machine, which may be another."""
  try:
    return mesh_lib.make(config.mesh)
  except ValueError:
    return mesh_lib.make({"data": -1, "fsdp": 1, "model": 1})
