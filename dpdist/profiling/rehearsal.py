"""Does all that a run does before its first charge, and says what it found.

It loads the data, makes the plan, compiles the step, runs it on zeros, and
compares it with `jax.grad` on made-up examples, by the functions that
`dpdist.train` calls. Beyond that it measures the step on padding alone.

Guarantees:
  * It charges nothing and writes nothing: there is no ledger and no secret.
  * It reads of the training data what a run reads before its first charge, and
    what it returns depends on the length, shapes and dtypes alone. Only `tell`
    hears more.
"""

from collections.abc import Callable
import functools
import json
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import ml_collections
import numpy as np

from dpdist import config as config_lib
from dpdist.distributed import mesh as mesh_lib
from dpdist.distributed import progress as progress_lib
from dpdist.files import places
from dpdist.profiling import measure
from dpdist.tasks import parts as parts_lib
from dpdist.training import abstract_step
from dpdist.training import data_checks
from dpdist.training import dry_run
from dpdist.training import job as job_lib
from dpdist.training import setup
from dpdist.training import step_sentinel
from dpdist.workdir import fingerprint
from dpdist.workdir import outlook
from dpdist.workdir import resume

_LEFT = 0.1  # Of a device's memory, below which there is little left.


def rehearse(
  config: ml_collections.ConfigDict,
  parts: parts_lib.Parts = parts_lib.NAMED,
  *,
  workdir: str | os.PathLike[str] | None = None,
  progress: progress_lib.Progress | None = None,
  tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
  """Checks a config as a run would that starts or goes on; measures its step.

  `workdir` is the run's directory, which may not exist; None: a new run, on the
  disk of the current directory. `tell` is called with a sentence if rows of
  both parts are equal. PRIVATE: it is for the owner's screen alone; see
  `data_checks.shared_rows`. Returns, JSON-able, "labels" (None without integers
  to predict), "run" (see `dpdist.workdir.outlook.Outlook`), "budget" (None if
  the config names none), "memory" and "disk" in bytes, "time" in seconds,
  "warnings" in sentences, and more. Raises ValueError if the run or its data
  set's budget would refuse it, LedgerError if the run's record is damaged, and
  SensitivityError if the step does not clip as it must.
  """
  progress = progress or progress_lib.Progress()
  config_lib.check(config)
  config = parts.settings(config_lib.resolve(config))
  job_lib.load_code(config.privacy)
  place = places.directory("." if workdir is None else workdir)
  ledger = None if workdir is None else resume.open_ledger(config, place)
  job = job_lib.look(
    config,
    parts,
    workdir=None if ledger is None else place,
    ledger=ledger,
    progress=progress,
    try_out=functools.partial(dry_run.run, config, progress),
  )
  try:
    run = _run(config, job)
    budget = _budget(config, job, place)
    progress.enter(-1, "checking")
    report = step_sentinel.check_step(
      job.step,
      job.init().params,
      job.frozen,
      row=job.row,
      largest=setup.largest_integers(job.task, job.row, lambda: job.test),
      chunk_size=job.chunk_size,
      is_watched=config.sentinel.every > 0,
    )
    shared = data_checks.shared_rows(job.train_source, job.test)
    if shared and tell is not None:
      tell(shared)
    progress.enter(-1, "measuring")
    facts = {
      "data": _data(job),
      "labels": _labels(job),
      "model": _model(job),
      "plan": _plan(job),
      "run": run._asdict(),
      "budget": budget,
      "signal": _signal(job),
      "sensitivity": report._asdict(),
      "memory": _memory(config, job),
      "time": _time(job),
      "disk": _disk(config, job, place),
    }
  finally:
    progress.enter(-1, "starting")
    job.close()
  return facts | {"warnings": [*job.notices, *_warnings(facts)]}


def _data(job: job_lib.Job) -> dict[str, Any]:
  return {
    "num_train": job.plan.num_examples,
    "num_test": len(next(iter(job.test.values()))),
    "unit": job.plan.unit,
    "arrays": {
      name: {"shape": [*x.shape], "dtype": str(x.dtype)}
      for name, x in job.row.items()
    },
  }


def _labels(job: job_lib.Job) -> dict[str, Any] | None:
  """Describes held-out labels: those that are trained on are private."""
  targets = job.test.get("targets")
  if targets is None or not np.issubdtype(targets.dtype, np.integer):
    return None
  values, counts = np.unique(targets[targets >= 0], return_counts=True)
  if not len(values):
    return None
  return {
    "num_classes": len(values),
    "smallest": int(values[0]),
    "largest": int(values[-1]),
    "share_of_the_most_frequent": float(counts.max() / counts.sum()),
  }


def _model(job: job_lib.Job) -> dict[str, Any]:
  leaves = jax.tree.leaves(job.params)
  return {
    "parameters": sum(x.size for x in leaves),
    "arrays": len(leaves),
    "dtypes": sorted({str(x.dtype) for x in leaves}),
    "frozen": sum(x.size for x in jax.tree.leaves(job.frozen)),
    "clipping_method": job.step.mechanism.clipped_grad.method,
    "mesh": dict(job.mesh.shape),
    "device": job.mesh.devices.flat[0].device_kind,
    "chunk_size": job.chunk_size,
  }


def _plan(job: job_lib.Job) -> dict[str, Any]:
  plan = job.plan
  processed = sum(n * size for n, _, size in _phases(job))
  return {
    "epsilon": plan.epsilon(),
    "delta": plan.delta,
    "delta_times_examples": plan.delta * plan.num_examples,
    "accountant": plan.accountant,
    "noise_multiplier": plan.noise_multiplier,
    "expected_batch_size": plan.expected_batch_size,
    "sampling": plan.sampling,
    "sampling_probability": plan.sampling_probability,
    "num_steps": plan.num_steps,
    "epochs": processed / plan.num_examples,
  }


def _run(
  config: ml_collections.ConfigDict, job: job_lib.Job
) -> outlook.Outlook:
  environments = [json.loads(json.dumps(fingerprint.environment(job.mesh)))]
  return outlook.of(
    job.ledger,
    job.found,
    job.plan,
    job.changes,
    job_lib.fingerprint_of(config, job, environments),
  )


def _budget(
  config: ml_collections.ConfigDict, job: job_lib.Job, workdir: pathlib.Path
) -> dict[str, Any] | None:
  """Describes the budget that the data's runs share, with this run's part."""
  found = resume.look_at_budget(
    config,
    workdir,
    job.ledger,
    plan=job.plan,
    own_digest=job.own_digest,
    earlier=job.earlier,
    is_changed=bool(job.changes),
  )
  if found is None:
    return None
  budget, taken = found
  assert budget.terms is not None
  return {
    "location": budget.root,
    "epsilon": budget.terms.epsilon,
    "delta": budget.terms.delta,
    "share_reserved": budget.share(budget.reserved),
    "share_of_this_run": budget.share(taken),
    "reservation": config.data_budget.reservation,
  }


def _phases(job: job_lib.Job) -> list[tuple[int, float, float]]:
  """Returns steps, noise multiplier and expected batch of each phase."""
  phases = job.plan.phases
  ends = [*(phase.start for phase in phases[1:]), job.plan.num_steps]
  return [
    (max(0, end - x.start), x.noise_multiplier, x.expected_batch_size)
    for x, end in zip(phases, ends, strict=True)
  ]


def _signal(job: job_lib.Job) -> dict[str, Any]:
  """Compares the longest clipped mean with the noise; see docs/tuning.md."""
  num_entries = sum(x.size for x in jax.tree.leaves(job.params))
  group = job.plan.group_size
  ratios = [
    (n, size / group / (sigma * math.sqrt(num_entries)) if sigma else math.inf)
    for n, sigma, size in _phases(job)
  ]
  whole = math.sqrt(sum(n * ratio**2 for n, ratio in ratios))
  if whole < 1:
    advice = (
      "all steps together are quieter than their noise: nothing can be learned."
      " Take a larger batch (launch.budget --table), fewer parameters"
      " (features, LoRA, model.trainable) or a larger epsilon"
    )
  elif ratios[0][1] < 0.1:
    advice = (
      "a step is mostly noise: a larger batch helps until launch.budget --table"
      " says that the noise falls no further"
    )
  else:
    advice = "enough to learn from, if steps point the same way"
  return {"step": ratios[0][1], "all_steps": whole, "advice": advice}


def _memory(
  config: ml_collections.ConfigDict, job: job_lib.Job
) -> dict[str, Any]:
  """Returns what the compiled programs of a step take of a device."""
  state = jax.eval_shape(job.step.initial, job.params)
  bytes_of = lambda tree, specs: mesh_lib.bytes_per_device(
    tree, specs, job.mesh
  )
  held = bytes_of(state, job.step.state_specs(state))
  params = bytes_of(job.params, job.step.specs(job.params))
  programs = {}
  for name, lowered in abstract_step.programs(
    job.step,
    job.initial,
    row=job.row,
    chunk_size=job.chunk_size,
    frozen=job.frozen,
    has_schedule=len(job.plan.phases) > 1,
    is_watched=config.sentinel.every > 0,
  ):
    found: Any = lowered.compile().memory_analysis()
    # An update is given the whole state, other programs its parameters alone.
    beside = 0 if name in ("update", "initial state") else held - params
    programs[name] = {
      "arguments": int(found.argument_size_in_bytes),
      "temp": int(found.temp_size_in_bytes),
      "held_beside": beside,
    }
  most = max(sum(sizes.values()) for sizes in programs.values())
  free = measure.free_bytes(job.mesh)
  return {"programs": programs, "most": most, "free": free}


def _time(job: job_lib.Job) -> dict[str, Any]:
  chunk, update = dry_run.timed(job)
  chunks = [
    (n, math.ceil(size / job.plan.group_size / job.chunk_size))
    for n, _, size in _phases(job)
  ]
  return {
    "step": chunks[0][1] * chunk + update,
    "chunk": chunk,
    "update": update,
    "all_steps": sum(n * (count * chunk + update) for n, count in chunks),
    "measured": (
      "on this machine, on padding alone, for an expected batch; reading,"
      " evaluating and saving come on top"
    ),
  }


def _disk(
  config: ml_collections.ConfigDict, job: job_lib.Job, workdir: pathlib.Path
) -> dict[str, Any]:
  state = jax.eval_shape(job.step.initial, job.params)
  size = sum(
    math.prod(x.shape) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(state)
  )
  place = workdir.absolute()
  while not place.exists():
    place = place.parent
  return {
    "checkpoint": size,
    "kept": config.max_checkpoints,
    # One more exists while it is written, before the oldest is deleted.
    "needed": size * (config.max_checkpoints + 1),
    "free": shutil.disk_usage(place).free,
  }


def _warnings(facts: dict[str, Any]) -> list[str]:
  found = []
  plan, memory, disk = facts["plan"], facts["memory"], facts["disk"]
  if plan["delta_times_examples"] >= 1:
    found.append(
      f"delta {plan['delta']:g} is not below 1 over the number of"
      f" {facts['data']['unit']}s, {facts['data']['num_train']:,}: giving one"
      " away whole would meet it. Take a tenth of that or less"
    )
  if facts["signal"]["all_steps"] < 1:
    found.append(facts["signal"]["advice"])
  if memory["most"] > (1 - _LEFT) * memory["free"]:
    found.append(
      f"the step takes {memory['most'] / 1e9:.2f} GB of a device, which has"
      f" {memory['free'] / 1e9:.2f} GB free: take a smaller chunk_size"
    )
  if disk["needed"] > disk["free"]:
    found.append(
      f"checkpoints take {disk['needed'] / 1e9:.2f} GB, and"
      f" {disk['free'] / 1e9:.2f} GB are free"
    )
  return found
