"""Times clipped gradients against the ordinary gradient, in one process.

  python -m tests.benchmarks.clipping [--json] [--rounds=9]
    [--models="mlp;cnn"] [--methods="auto;two_pass"]

For each model the ordinary gradient, every method and, where it is installed,
jax-privacy at its best microbatch size (`pip install jax-privacy==2.0.0`) are
compiled, warmed up, and then run in turn. A ratio is the median over rounds of
the time over that of the ordinary gradient in the same round, so that it holds
on a machine whose speed drifts. Where torch and opacus are installed in the
environment that --torch_python names, Opacus is timed in a process of its own
against its own torch step. Memory is what the compiled program allocates beside
its arguments and results. Runs on a GPU unchanged.
"""

import argparse
from collections.abc import Callable
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from typing import Any

import jax

import dpdist
from tests.benchmarks import clipping_models

_JAX_PRIVACY = "jax-privacy"
METHODS = ("auto", "bookkeeping", "two_pass", "vmap", _JAX_PRIVACY)


def candidates(
  problem: clipping_models.Problem,
  methods: tuple[str, ...],
  platform: str | None = None,
) -> dict[str, Callable[..., Any]]:
  """What is compared, by name; the ordinary gradient first."""
  mean = lambda params, batch: problem.losses(params, batch).mean()
  found: dict[str, Callable[..., Any]] = {"ordinary": jax.grad(mean)}
  for method in methods:
    if method == _JAX_PRIVACY:
      found |= _jax_privacy(problem)
      continue
    fn = dpdist.clipped_grad(
      problem.loss, l2_clip_norm=1.0, method=method, platform=platform
    )
    found[method] = lambda p, b, fn=fn: fn(p, b).sum
  return found


def _jax_privacy(
  problem: clipping_models.Problem,
) -> dict[str, Callable[..., Any]]:
  if importlib.util.find_spec("jax_privacy") is None:
    return {}
  from jax_privacy import clipping as jax_privacy_clipping

  found: dict[str, Callable[..., Any]] = {}
  size = len(jax.tree.leaves(problem.batch)[0])
  loss = lambda params, batch: problem.losses(params, batch).mean()
  for microbatch in (None, size // 4, size // 16):
    fn = jax_privacy_clipping.clipped_grad(
      loss, l2_clip_norm=1.0, microbatch_size=microbatch
    )
    found[f"{_JAX_PRIVACY}, microbatch {microbatch or size}"] = fn
  return found


def measure(
  name: str, methods: tuple[str, ...], rounds: int
) -> list[dict[str, Any]]:
  """Returns a row for each candidate on one model."""
  problem = clipping_models.make(name)
  args = (problem.params, problem.batch)
  size = len(jax.tree.leaves(problem.batch)[0])
  programs = {
    key: jax.jit(fn).lower(*args).compile()
    for key, fn in candidates(problem, methods).items()
  }
  memory = {
    key: program.memory_analysis().temp_size_in_bytes
    for key, program in programs.items()
  }
  seconds: dict[str, list[float]] = {key: [] for key in programs}
  for program in programs.values():
    jax.block_until_ready(program(*args))
  for _ in range(rounds):
    for key, program in programs.items():
      # Once for the caches, which the one before has emptied.
      jax.block_until_ready(program(*args))
      start = time.perf_counter()
      jax.block_until_ready(program(*args))
      seconds[key].append(time.perf_counter() - start)
  return [
    {
      "model": name,
      "method": key,
      "milliseconds": 1e3 * statistics.median(seconds[key]),
      "time_ratio": statistics.median(
        mine / theirs
        for mine, theirs in zip(seconds[key], seconds["ordinary"], strict=True)
      ),
      "memory_mebibytes": memory[key] / 2**20,
      "memory_ratio": memory[key] / max(1, memory["ordinary"]),
      "examples_per_second": size / statistics.median(seconds[key]),
    }
    for key in programs
  ]


def _opacus(python: str) -> list[dict[str, Any]]:
  run = subprocess.run(
    [python, "-m", "tests.benchmarks.clipping_opacus"],
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(run.stdout)


def main() -> None:
  """Prints a table, or JSON."""
  parser = argparse.ArgumentParser(description="Cost of clipped gradients.")
  parser.add_argument("--json", action="store_true", help="print JSON")
  parser.add_argument("--models", help="names, separated by semicolons")
  parser.add_argument("--methods", help="the same; the default is all")
  parser.add_argument(
    "--rounds", type=int, default=9, help="timed runs of each"
  )
  parser.add_argument(
    "--torch_python", help="a Python with torch and opacus, to time Opacus too"
  )
  arguments = parser.parse_args()
  names = chosen(
    "models", arguments.models, clipping_models.NAMES, clipping_models.ALL
  )
  methods = chosen("methods", arguments.methods, METHODS, METHODS)
  rows = []
  if not arguments.json:
    print(
      f"{'model':<22} {'method':<28} {'ms':>8} {'time':>6} {'memory':>7}"
      f" {'MiB':>7} {'examples/s':>11}"
    )
  for name in names:
    more = measure(name, methods, arguments.rounds)
    rows += more
    if not arguments.json:
      for row in more:
        _show(row)
  if arguments.torch_python:
    more = _opacus(arguments.torch_python)
    rows += more
    if not arguments.json:
      for row in more:
        _show(row)
  ratios = [row["time_ratio"] for row in rows if row["method"] == "auto"]
  mean = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None
  if arguments.json:
    print(
      json.dumps(
        {
          "benchmark": "clipping",
          "device": jax.devices()[0].device_kind,
          "rows": rows,
          "geometric_mean_of_auto": mean,
        },
        indent=2,
      )
    )
  elif mean is not None:
    print(f"geometric mean of auto's time ratios: {mean:.3f}")


def chosen(
  flag: str,
  given: str | None,
  default: tuple[str, ...],
  known: tuple[str, ...],
) -> tuple[str, ...]:
  """The names that a flag gives, separated by semicolons."""
  names = tuple(given.split(";")) if given else default
  for name in names:
    if name not in known:
      sys.exit(f"--{flag} must be some of {'; '.join(known)}, got {name!r}")
  return names


def _show(row: dict[str, Any]) -> None:
  number = lambda key, form: "-" if row[key] is None else format(row[key], form)
  print(
    f"{row['model']:<22} {row['method']:<28} {row['milliseconds']:8.1f}"
    f" {row['time_ratio']:6.2f} {number('memory_ratio', '.2f'):>7}"
    f" {number('memory_mebibytes', '.0f'):>7}"
    f" {row['examples_per_second']:11.0f}",
    flush=True,
  )


if __name__ == "__main__":
  main()
