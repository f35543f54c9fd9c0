"""The tables and results that a run shows at its start and its end."""

from collections.abc import Sequence
import datetime
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from dpdist.distributed import mesh as mesh_lib
from dpdist.files import atomic
from dpdist.files import json_fields
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rounding as rounding_lib
from dpdist.privacy import statement
from dpdist.reporting import console
from dpdist.tasks import held_out
from dpdist.tasks import parts as parts_lib
from dpdist.training import job as job_lib


def start_rows(
  job: job_lib.Job,
  planned: Sequence[plan_lib.PlanUse],
  *,
  epsilon: float,
  start_step: int,
  sentinel_every: int,
) -> list[tuple[str, str]]:
  """Returns (name, value) pairs shown before the first step and in the report.

  `planned` is what the run will have spent at its end, and epsilon its
  guarantee; see `dpdist.privacy.composition.guaranteed`. The restored state has
  start_step updates. One step in sentinel_every is watched, none if it is 0.
  """
  plan = job.plan
  axes = " x ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items())
  device = job.mesh.devices.flat[0]
  rows = [
    (f"{plan.unit}s", console.human_count(plan.num_examples)),
    ("expected batch size", f"{plan.expected_batch_size:,g}"),
    (
      "sampling probability q",
      f"{plan.sampling_probability:.6g}, {statement.sampling(plan)}",
    ),
    ("steps", console.human_count(sum(n for _, n in planned))),
    ("l2 clip norm", f"{plan.l2_clip_norm:g}"),
    ("noise multiplier sigma", f"{plan.noise_multiplier:g}"),
    (
      "epsilon",
      f"{statement.rounded_up(epsilon, 4)}"
      f" ({composition.accountant_of(planned)} accountant)",
    ),
    ("delta", f"{plan.delta:g}"),
    ("adjacency", f"{plan.neighboring_relation}, of one {plan.unit}"),
    ("mesh", f"{axes} ({device.device_kind})"),
    ("clipping method", job.step.mechanism.clipped_grad.method),
    (
      "watched by the sentinel",
      f"one step in {sentinel_every:,}" if sentinel_every else "no step",
    ),
    ("chunk size", console.human_count(job.chunk_size)),
    ("parameters", console.human_count(_num_params(job))),
    *_frozen_rows(job),
    ("rounding, in clip norms", str(rounding(job))),
    ("memory estimate", console.human_bytes(_memory(job)) + " a device"),
  ]
  group_size = job.step.mechanism.exact_group_size
  if group_size:
    rows.append(("sums", f"exact, of groups of {group_size}"))
  if start_step:
    rows.append(("resumed after step", console.human_count(start_step)))
  return rows


def in_short(
  values: dict[str, Any], plan: plan_lib.PrivacyPlan, workdir: pathlib.Path
) -> str:
  """Returns two lines: what a run guarantees, and where the statement is."""
  said = (
    f"What this run releases is ({statement.rounded_up(values['epsilon'])},"
    f" {values['delta']:g})-differentially private for any one"
    f" {plan.unit} ({plan.neighboring_relation})."
  )
  if values["guarantee"] != "holds":
    reason = values["guarantee"].removeprefix("void:").strip()
    said = f"This run has no privacy guarantee: {reason}."
  page = (workdir / "report.html").resolve().as_uri()
  return f"{said}\nThe whole statement, with its assumptions: {page}"


def about(config: ml_collections.ConfigDict) -> str:
  """Returns a sentence that says which run this is, and when it ended."""
  model, data = config.task or config.model.name, config.data.name
  model = "A model of its own" if model == parts_lib.GIVEN else model
  data = "data of its own" if data == parts_lib.GIVEN else data
  now = datetime.datetime.now(datetime.UTC)
  return f"{model}, trained on {data}; finished on {now:%Y-%m-%d} (UTC)."


def rounding(job: job_lib.Job) -> rounding_lib.Bound:
  """Returns what float rounding can add to the sensitivity of a run's steps."""
  mechanism, mesh = job.step.mechanism, job.mesh
  is_exact = mechanism.exact_group_size is not None
  shards = mesh_lib.num_example_shards(mesh)
  rows = job.chunk_size // shards
  rows = min(rows, mechanism.exact_group_size or rows)
  return rounding_lib.bound(
    job.plan,
    microbatch_size=min(rows, mechanism.clipped_grad.microbatch_size or rows),
    rows_per_device=rows,
    num_entries=_num_params(job),
    num_devices=shards,
    # Where parameters are divided, all devices of the axis are added up at
    # once.
    num_sharing=1 if is_exact else mesh.shape["fsdp"],
    is_cut=mesh.devices.flat[0].platform != "cpu",
    is_exact=is_exact,
  )


def result(
  job: job_lib.Job,
  ledger: ledger_lib.Ledger,
  *,
  num_steps: int,
  sentinel_every: int,
  scores: dict[str, float],
  tables: dict[str, dict[str, Any]],
  params_sha256: str,
  environment: dict[str, Any],
) -> dict[str, Any]:
  """Returns the contents of `result.json`, JSON-able.

  The final parameters, whose trained ones params_sha256 names, have num_steps
  updates. Scores are held-out metrics, "test/NAME" and perhaps "test_ema/NAME".
  Tables are those that are no numbers, "test_tables" and "test_ema_tables".
  """
  plan = job.plan
  values: dict[str, Any] = {
    "epsilon": composition.guaranteed(ledger.bounds),
    "epsilon_spent": composition.epsilon(ledger.spent),
    "delta": plan.delta,
    "guarantee": ledger.guarantee,
    "neighboring_relation": plan.neighboring_relation,
    "noise_multiplier": plan.noise_multiplier,
    "sampling_probability": plan.sampling_probability,
    "l2_clip_norm": plan.l2_clip_norm,
    "rounding": rounding(job).to_dict(),
    "num_steps": num_steps,
    "steps_charged": ledger.spent_steps,
    "segments": len(ledger.segments),
    "sentinel_every": sentinel_every,
    "accountant": composition.accountant_of(ledger.spent),
    "params_sha256": params_sha256,
    "ledger_head": ledger.head,
    "environment": environment,
  }
  for name in ("frozen_sha256", "weights_sha256"):
    if name in job.made_of:
      values[name] = job.made_of[name]
  for name, score in scores.items():
    group, metric = name.split("/")
    values.setdefault(group, {})[metric] = score
  values |= tables
  best = values.get("test_ema", values.setdefault("test", {}))
  problem = lambda scores: held_out.problem(job.task, scores, job.test)
  values["held_out_problem"] = problem(values["test"]) and problem(best)
  return values


def write_result(path: pathlib.Path, values: dict[str, Any]) -> None:
  """Writes JSON so that a reader finds the old file or the new, never half."""
  atomic.write(path, (json_fields.text(values) + "\n").encode())


def end_rows(
  values: dict[str, Any], workdir: pathlib.Path
) -> list[tuple[str, str]]:
  """Returns the table that is shown at the end."""
  rows = [
    (
      "epsilon",
      f"{statement.rounded_up(values['epsilon'], 4)} at delta"
      f" {values['delta']:g}",
    ),
    ("guarantee", values["guarantee"]),
  ]
  for group, which in (("test", ""), ("test_ema", ", average")):
    # The metric that a task names first is the one to look at.
    for name, value in [*values.get(group, {}).items()][:1]:
      rows.append((f"test {name}{which}", f"{value:.4f}"))
  if values.get("held_out_problem"):
    rows.append(("WARNING", values["held_out_problem"]))
  return rows + [
    ("result", str(workdir / "result.json")),
    ("report", str(workdir / "report.html")),
    ("TensorBoard files", str(workdir / "tensorboard")),
  ]


def _frozen_rows(job: job_lib.Job) -> list[tuple[str, str]]:
  rows = []
  if job.frozen is not None:
    count = console.human_count(_size(job.frozen))
    rows.append(("frozen parameters", count))
  if weights := job.made_of.get("weights_sha256"):
    rows.append(("weights from disk", f"taken for public, {weights[:12]}"))
  return rows


def _num_params(job: job_lib.Job) -> int:
  return _size(job.params)


def _size(params: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _memory(job: job_lib.Job) -> int:
  """Returns bytes of state, accumulator and example gradients on a device."""
  state = jax.eval_shape(job.step.initial, job.params)
  state_bytes = mesh_lib.bytes_per_device(
    state, job.step.state_specs(state), job.mesh
  )
  if job.frozen is not None:
    specs = job.step.specs(job.frozen)
    state_bytes += mesh_lib.bytes_per_device(job.frozen, specs, job.mesh)
  rows = job.chunk_size // mesh_lib.num_example_shards(job.mesh)
  mechanism = job.step.mechanism
  rows = min(rows, mechanism.exact_group_size or rows)
  size = mechanism.clipped_grad.microbatch_size
  gradients = min(rows, size or rows) + 2  # plus the sum, of two floats
  return state_bytes + gradients * _num_params(job) * np.dtype("f4").itemsize
