"""Forecasts what a config needs on a pod of TPUs, without one.

The step that would run is compiled here, by the pod's own compiler, for shapes
alone: no device, no data, no budget. The compiler's facts (memory, collectives)
are exact for its version. Times are lower bounds: the busiest of arithmetic,
memory and network at its published peak, if it hides all the others.
"""

import math
from typing import Any

import jax
import ml_collections

from dpdist import _validation
from dpdist.distributed import mesh as mesh_lib
from dpdist.profiling import roofline
from dpdist.tasks import parts as parts_lib
from dpdist.training import abstract_step
from dpdist.training import setup

PyTree = Any


def forecast(
  config: ml_collections.ConfigDict,
  topology: str,
  num_slices: int = 1,
  parts: parts_lib.Parts = parts_lib.NAMED,
) -> dict[str, Any]:
  """Compiles a config's step for a pod.

  For models of tokens the config's data need not exist. See
  `dpdist.profiling.roofline.devices` for the topology.

  Returns, JSON-able, "epsilon" of the plan, "num_chips", "parameters",
  "chunk_size", "chunks_per_step"; "memory", bytes a chip by kind, with "peak"
  and "capacity"; "fits"; "accumulate" and "apply", each with "flops", "bytes",
  "seconds" and "collectives"; "step_seconds"; and "scaling", a row for each
  number of chips. For a program that does not fit, its work is left out.
  """
  setup.check(config)
  devices = roofline.devices(topology, num_slices)
  chip = roofline.CHIPS[topology.partition(":")[0]]
  experiment = setup.build(
    config, mesh_lib.make(config.mesh, devices), parts=parts, platform="tpu"
  )
  step = experiment.step
  _validation.require(
    not config.clipping.exact_sum,
    "clipping.exact_sum",
    "False to compile for a topology, since its programs are for one device"
    " each",
    True,
  )
  example = abstract_step.example(experiment)
  state = abstract_step.state(experiment, example)
  arguments = abstract_step.arguments(
    step,
    state,
    abstract_step.unit(config, example),
    experiment.chunk_size,
    abstract_step.frozen(experiment, example),
  )
  key = arguments[4]
  memory = abstract_step.memory(step, state, arguments)
  facts: dict[str, Any] = {
    "topology": topology,
    "num_slices": num_slices,
    "num_chips": len(devices),
    **_of_run(experiment, state.params),
    "memory": memory | {"capacity": chip.memory_bytes},
  }
  held = sum(memory.values())
  peaks = []
  programs: list[tuple[str, Any, tuple[PyTree, ...]]] = [
    ("accumulate", step.accumulate, arguments),
    ("apply", step.apply, (state, arguments[1], key)),
  ]
  for name, function, args in programs:
    traced = function.trace(*args)
    try:
      program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return facts | {"fits": False, "reason": _reason(error)}
    memory[f"{name}_temp"] = roofline.temp_bytes(program)
    peaks.append(held + memory[f"{name}_temp"])
    facts[name] = roofline.work(
      name, traced, program, chip, step.mesh.shape["model"]
    )
  facts["memory"] |= memory | {"peak": max(peaks)}
  facts["fits"] = max(peaks) <= chip.memory_bytes
  facts["scaling"] = scaling(facts)
  facts["step_seconds"] = facts["scaling"][-1]["step_seconds"]
  return facts


def _of_run(experiment: setup.Experiment, params: PyTree) -> dict[str, Any]:
  """Returns the facts that do not depend on the chips."""
  plan, chunk_size = experiment.plan, experiment.chunk_size
  return {
    "mesh": dict(experiment.mesh.shape),
    "epsilon": plan.epsilon(),
    "delta": experiment.config.privacy.target_delta,
    "noise_multiplier": plan.noise_multiplier,
    "num_steps": plan.num_steps,
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "expected_batch_size": plan.expected_batch_size,
    "chunk_size": chunk_size,
    "chunks_per_step": math.ceil(plan.expected_batch_size / chunk_size),
  }


def scaling(facts: dict[str, Any]) -> list[dict[str, float]]:
  """Returns forecasts for fewer chips, which hold fewer examples of a chunk."""
  accumulate = max(facts["accumulate"]["seconds"].values())
  apply = max(facts["apply"]["seconds"].values())
  data = facts["mesh"]["data"]
  rows: list[dict[str, float]] = []
  for share in (8, 4, 2, 1):
    if data % share:
      continue
    num_chips = facts["num_chips"] // share
    chunk_size = facts["chunk_size"] / share
    chunks = math.ceil(facts["expected_batch_size"] / chunk_size)
    seconds = chunks * accumulate + apply
    first = rows[0] if rows else None
    work = num_chips * seconds
    rows.append(
      {
        "num_chips": num_chips,
        "chunks_per_step": chunks,
        "step_seconds": seconds,
        "efficiency": first["num_chips"] * first["step_seconds"] / work
        if first
        else 1.0,
      }
    )
  return rows


def _reason(error: Exception) -> str:
  """Returns what the compiler says of its memory, on one line."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  memory = [
    line for line in lines if "Used" in line or "exceed" in line.lower()
  ]
  return (memory or lines)[0]
