"""Times training steps with exact sums against those without, in one process.

  python -m tests.benchmarks.exact_sum [--json] [--rounds=9]
    [--models="mlp;cnn"] [--groups="32;128"]

A step is a chunk of the model's batch, then noise and an update with momentum,
on one device. The two kinds of step run in turn; a ratio is the median over
rounds of the time over that of the float step in the same round. Groups larger
than the batch are left out. Runs on a GPU unchanged.
"""

import argparse
from collections.abc import Callable
import json
import statistics
import time
from typing import Any

import jax
import numpy as np
import optax

import dpdist
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism
from dpdist.training import exact_step
from dpdist.training import step as step_lib
from tests.benchmarks import clipping
from tests.benchmarks import clipping_models

_GROUPS = (16, 32, 64, 128, 256)


def _runner(
  problem: clipping_models.Problem, group_size: int | None
) -> Callable[[], None]:
  """Makes a function that takes one step; without groups, in floats."""
  size = len(jax.tree.leaves(problem.batch)[0])
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=60_000,
      expected_batch_size=size,
      num_steps=1000,
      l2_clip_norm=1.0,
      target_delta=1e-5,
      noise_multiplier=1.0,
    )
  )
  bound = mechanism.make(
    plan,
    lambda params, example, rng: (problem.loss(params, example), None),
    exact_group_size=group_size,
  )
  mesh = mesh_lib.make({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
  make = step_lib.Step if group_size is None else exact_step.ExactStep
  step = make(bound, optax.sgd(0.1, momentum=0.9), mesh)
  place = lambda x: jax.device_put(x, mesh_lib.examples(mesh))
  batch = jax.tree.map(place, problem.batch)
  is_padding_example = place(np.zeros(size, bool))
  state = step.init(jax.tree.map(jax.numpy.array, problem.params))
  key = jax.random.key(0)

  def run() -> None:
    nonlocal state
    accumulator = step.accumulate(
      state.params,
      step.zeros(state.params),
      batch,
      is_padding_example,
      key,
      0,
    )
    state, released = step.apply(state, accumulator, key)
    jax.block_until_ready((state, released))

  return run


def measure(
  name: str, groups: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
  """Returns a row for each group size on one model; floats come first."""
  problem = clipping_models.make(name)
  size = len(jax.tree.leaves(problem.batch)[0])
  sizes = [None] + [group for group in groups if size % group == 0]
  runs = {group: _runner(problem, group) for group in sizes}
  seconds: dict[int | None, list[float]] = {group: [] for group in runs}
  for run in runs.values():
    run()
  for _ in range(rounds):
    for group, run in runs.items():
      # Once for the caches, which the one before has emptied.
      run()
      start = time.perf_counter()
      run()
      seconds[group].append(time.perf_counter() - start)
  return [
    {
      "model": name,
      "batch": size,
      "group": group,
      "milliseconds": 1e3 * statistics.median(seconds[group]),
      "time_ratio": statistics.median(
        mine / theirs
        for mine, theirs in zip(seconds[group], seconds[None], strict=True)
      ),
    }
    for group in runs
  ]


def main() -> None:
  """Prints a table, or JSON."""
  parser = argparse.ArgumentParser(description="Cost of exact sums.")
  parser.add_argument("--json", action="store_true", help="print JSON")
  parser.add_argument("--models", help="names, separated by semicolons")
  parser.add_argument("--groups", help="examples a group, likewise")
  parser.add_argument(
    "--rounds", type=int, default=9, help="timed steps of each"
  )
  arguments = parser.parse_args()
  names = clipping.chosen(
    "models", arguments.models, clipping_models.NAMES, clipping_models.ALL
  )
  known = tuple(map(str, _GROUPS))
  groups = clipping.chosen("groups", arguments.groups, known, known)
  rows = []
  for name in names:
    more = measure(name, tuple(map(int, groups)), arguments.rounds)
    rows += more
    for row in more if not arguments.json else ():
      print(
        f"{row['model']:<18} batch {row['batch']:>4}"
        f" group {row['group'] or '-':>4} {row['milliseconds']:8.1f} ms"
        f" {row['time_ratio']:6.2f}",
        flush=True,
      )
  if arguments.json:
    device = jax.devices()[0].device_kind
    print(
      json.dumps(
        {"benchmark": "exact_sum", "device": device, "rows": rows}, indent=2
      )
    )


if __name__ == "__main__":
  main()
