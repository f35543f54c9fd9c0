"""Measures what the ledger costs: a step, a start, an audit.

  python -m tests.benchmarks.ledger [--json]

Records are written as `dpdist.train` writes them, on a local disk, synced.
"""

import argparse
from collections.abc import Callable
import contextlib
import functools
import json
import os
import pathlib
import signal
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from dpdist.ledger import epsilon_recorder
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import plan as plan_lib
from tests.support import training

_ROUNDS = 5
_NUM_STEPS = 10_000
_RESERVE = "dpdist.ledger.ledger:Ledger:reserve_through"
_POLL = "dpdist.ledger.epsilon_recorder:EpsilonRecorder:poll"  # Once a step.


def _open(path: pathlib.Path, num_steps: int) -> ledger_lib.Ledger:
  """A new ledger that this process writes."""
  ledger = ledger_lib.Ledger(path)
  ledger.acquire()
  plan = plan_lib.PrivacyPlan(
    num_examples=1_000_000,
    expected_batch_size=1000.0,
    num_steps=num_steps,
    l2_clip_norm=1.0,
    noise_multiplier=1.0,
    delta=1e-8,
    accountant="rdp",
    neighboring_relation="add_or_remove_one",
    target_epsilon=None,
  )
  ledger.open(config={}, plan=plan, data="", secret_hash="", run="")
  ledger.resume(step=0, digest="", ledger_head="", fingerprint="")
  return ledger


def _charge(
  ledger: ledger_lib.Ledger,
  step: int,
  save_every: int,
  last: int,
  odometer: epsilon_recorder.EpsilonRecorder | None = None,
) -> None:
  """What training does about a step, but for the step itself."""
  ledger.reserve_through(min(last, step - step % save_every + save_every))
  if odometer is not None:
    odometer.poll()
  if (step + 1) % save_every == 0:
    ledger.record_checkpoint(step + 1, f"{step:064x}")


def _seconds(do: Callable[[], object]) -> float:
  started = time.perf_counter()
  do()
  return time.perf_counter() - started


def step_cost(path: pathlib.Path) -> dict[str, float]:
  """Of `_NUM_STEPS` tiny steps, with the ledger and without, in turn."""
  weights = jnp.ones((256, 10))
  inputs = jnp.ones((64, 256))

  @jax.jit
  def update(w: jax.Array) -> jax.Array:
    return w - 1e-3 * jax.grad(lambda w: jnp.mean((inputs @ w) ** 2))(w)

  def train(ledger: ledger_lib.Ledger | None) -> None:
    w = weights
    told = (
      contextlib.nullcontext()
      if ledger is None
      else epsilon_recorder.EpsilonRecorder(ledger)
    )
    with told as odometer:
      for step in range(_NUM_STEPS):
        if ledger is not None:
          _charge(ledger, step, _NUM_STEPS // 10, _NUM_STEPS, odometer)
        w = jax.block_until_ready(update(w))

  train(None)
  alone, charged, ledger_only = [], [], []
  for number in range(_ROUNDS):
    alone.append(_seconds(lambda: train(None)))
    with _open(path / f"steps-{number}", _NUM_STEPS) as ledger:
      charged.append(_seconds(functools.partial(train, ledger)))
    with _open(path / f"only-{number}", _NUM_STEPS) as ledger:
      ledger_only.append(
        _seconds(
          lambda ledger=ledger: [
            _charge(ledger, step, _NUM_STEPS // 10, _NUM_STEPS)
            for step in range(_NUM_STEPS)
          ]
        )
      )
  per_step = 1e3 / _NUM_STEPS
  ratios = [a / b for a, b in zip(charged, alone, strict=True)]
  return {
    "ledger alone, ms a step": per_step * statistics.median(ledger_only),
    "tiny step without, ms": per_step * statistics.median(alone),
    "tiny step with, ms": per_step * statistics.median(charged),
    "ratio": statistics.median(ratios),
  }


def audit_cost(path: pathlib.Path, saves: int) -> dict[str, float]:
  """Of opening and adding up a ledger of a million steps."""
  num_steps = 1_000_000
  location = path / f"audit-{saves}"
  with _open(location, num_steps) as ledger:
    # Between these steps nothing is written.
    every = num_steps // saves
    for step in range(0, num_steps, every):
      _charge(ledger, step, every, num_steps)
      _charge(ledger, step + every - 1, every, num_steps)
    count = len(ledger.records)
  spent = []

  def audit() -> None:
    spent.append(ledger_lib.Ledger(location).spent_steps)

  times = [_seconds(audit) for _ in range(_ROUNDS)]
  assert spent == [num_steps] * _ROUNDS
  return {"records": count, "median s": statistics.median(times)}


def start_cost(path: pathlib.Path, step: int) -> dict[str, float]:
  """Of a real run that goes on after a step, until its first step."""
  run = functools.partial(
    training.Run,
    path / f"start-{step}",
    "--config.privacy.num_steps=20000",
    "--config.checkpoint_every=20000",
    "--config.eval_every=20000",
  )
  stop = training.before(_POLL, step, training.send(signal.SIGTERM))
  first = run(change=stop)
  assert first.wait() == 75, first.screen
  end = training.before(_RESERVE, 1, _leave)
  times = []
  for _ in range(_ROUNDS):
    started = time.perf_counter()
    again = run(change=end)
    assert again.wait() == 0, again.screen
    words = " ".join(again.screen.split())
    assert f"resumed after step {step:,}" in words, again.screen
    times.append(time.perf_counter() - started)
  return {"median s": statistics.median(times), "min s": min(times)}


def _leave() -> None:
  sys.stdout.flush()
  os._exit(0)


def main() -> None:
  """Prints a table, or JSON."""
  parser = argparse.ArgumentParser(description="Cost of the ledger.")
  parser.add_argument("--json", action="store_true", help="print JSON")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    path = pathlib.Path(name)
    rows = {f"{_NUM_STEPS:,} steps": step_cost(path)}
    for saves in (10, 1000):
      title = f"audit of 1,000,000 steps, {saves:,} checkpoints"
      rows[title] = audit_cost(path, saves)
    for step in (10, 1000, 10_000):
      rows[f"start after step {step:,}"] = start_cost(path, step)
  if arguments.json:
    print(json.dumps({"benchmark": "ledger", "rows": rows}, indent=2))
    return
  for title, values in rows.items():
    print(f"{title}:")
    for what, value in values.items():
      print(f"  {what:<26} {value:10.4f}")


if __name__ == "__main__":
  main()
