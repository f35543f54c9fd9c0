"""Measures a config's private step against the same step without privacy.

It runs on this machine, its devices and the config's mesh. Arrays of the right
shapes are made up, so that nothing private is read, nothing is released and no
budget is spent. Both steps process the same chunks, take turns, and are
compared within a turn, so that a ratio holds on a machine whose speed drifts.
"""

from collections.abc import Callable
import functools
import math
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import ml_collections
import numpy as np
import optax

from dpdist import _validation
from dpdist.privacy import plan as plan_lib
from dpdist.profiling import roofline
from dpdist.tasks import parts as parts_lib
from dpdist.training import abstract_step
from dpdist.training import setup
from dpdist.training import step as step_lib

PyTree = Any

_MEMINFO = pathlib.Path("/proc/meminfo")


class Bench(NamedTuple):
  """The step that is measured, made once for all chunk sizes."""

  config: ml_collections.ConfigDict
  plan: plan_lib.PrivacyPlan
  step: step_lib.Step  # The private step, on the mesh.
  loss_fn: Callable[..., Any]  # Of a row of a chunk.
  state: PyTree  # Shapes, on the mesh.
  frozen: PyTree | None
  row: PyTree  # Shapes of a row of a chunk.


class Program(NamedTuple):
  """A half of a step, compiled."""

  run: Callable[..., Any]
  # Bytes that a device needs beside what it holds throughout a step.
  temp_bytes: int


def prepare(
  config: ml_collections.ConfigDict,
  parts: parts_lib.Parts = parts_lib.NAMED,
) -> Bench:
  """Makes a bench; raises ValueError for settings that cannot be measured."""
  _validation.require(
    not config.clipping.exact_sum,
    "clipping.exact_sum",
    "False to be measured, since its programs are for one device each",
    True,
  )
  experiment = setup.build(config, parts=parts)
  example = abstract_step.example(experiment)
  return Bench(
    config,
    experiment.plan,
    experiment.step,
    setup.loss_fn(config, experiment.task),
    abstract_step.state(experiment, example),
    abstract_step.frozen(experiment, example),
    abstract_step.unit(config, example),
  )


def compare(bench: Bench, *, rounds: int = 5) -> dict[str, Any]:
  """Measures both steps, in `rounds` turns of each, and takes medians.

  Returns, JSON-able, "chunk_size" and "chunks_per_step"; "private" and
  "ordinary", each with "chunk_seconds", "update_seconds", "step_seconds",
  "examples_per_second" (of the expected batch) and "bytes", of a device;
  "time_ratio" and "memory_ratio", private over ordinary; "free_bytes", for a
  device, and "fits"; "clipping", how each layer is clipped; "advice", in
  sentences; and facts that identify the machine and the run.
  """
  _validation.check("rounds", rounds, _validation.COUNT)
  size = setup.chunk_size(bench.config, bench.plan, bench.step.mesh)
  chunks = math.ceil(bench.plan.expected_batch_size / size)
  programs, arguments, held = _both(bench, size)
  seconds = _interleaved(programs, arguments, bench, rounds)
  facts: dict[str, Any] = _machine(bench) | {
    "parameters": sum(x.size for x in jax.tree.leaves(bench.state.params)),
    "expected_batch_size": bench.plan.expected_batch_size,
    "chunk_size": size,
    "chunks_per_step": chunks,
    "rounds": rounds,
  }
  steps = {}
  for name in ("private", "ordinary"):
    work, update = seconds[name, "chunk"], seconds[name, "update"]
    steps[name] = [chunks * a + b for a, b in zip(work, update, strict=True)]
    whole = statistics.median(steps[name])
    temp = max(programs[name, part].temp_bytes for part in ("chunk", "update"))
    facts[name] = {
      "chunk_seconds": statistics.median(work),
      "update_seconds": statistics.median(update),
      "step_seconds": whole,
      "examples_per_second": bench.plan.expected_batch_size / whole,
      "bytes": held + temp,
    }
  free = free_bytes(bench.step.mesh)
  facts["time_ratio"] = statistics.median(
    a / b for a, b in zip(steps["private"], steps["ordinary"], strict=True)
  )
  private, ordinary = facts["private"]["bytes"], facts["ordinary"]["bytes"]
  facts["memory_ratio"] = private / ordinary
  facts["free_bytes"], facts["fits"] = free, private <= free
  facts["clipping"] = _clipping(bench, arguments)
  facts["advice"] = advice(bench, facts)
  return facts


def advice(bench: Bench, facts: dict[str, Any]) -> list[str]:
  """Returns what the measurements say about the chunk size, in sentences."""
  size, chunks = facts["chunk_size"], facts["chunks_per_step"]
  used, free = facts["private"]["bytes"], facts["free_bytes"]
  whole = most_useful(bench)
  if used > free:
    return [
      f"A chunk of {size:,} needs {used / 1e9:.2f} GB and {free / 1e9:.2f} GB"
      " are free: take a smaller --config.chunk_size, or let --autotune find"
      " it."
    ]
  share = "less than 0.1%" if used < 1e-3 * free else f"{used / free:.1%}"
  said = [f"A chunk of {size:,} takes {share} of the free memory."]
  if size >= whole:
    said.append(
      "It holds nearly every draw (three standard deviations above the mean):"
      " a larger one gains nothing."
    )
  elif 2 * used <= free:
    said.append(
      f"A step takes {chunks} of them, and there is room for more: --autotune"
      " tries larger ones."
    )
  else:
    said.append(f"A step takes {chunks} of them; twice the size would not fit.")
  return said


def most_useful(bench: Bench) -> int:
  """Returns the chunk size that holds nearly every draw."""
  config = ml_collections.ConfigDict(bench.config.to_dict())
  config.chunk_size = 0
  return setup.chunk_size(config, bench.plan, bench.step.mesh)


def trial(bench: Bench, size: int) -> tuple[int, Callable[[], float]]:
  """Compiles the private step for a chunk size.

  Returns the bytes that a device needs, and a function that runs a step of one
  chunk and returns its seconds, after one that is not measured.
  """
  accumulate, update, arguments, held = _private(bench, size)
  needed = held + max(accumulate.temp_bytes, update.temp_bytes)

  def run() -> float:
    args = list(jax.tree.map(_made_up, arguments))
    state = jax.tree.map(_made_up, bench.state)
    args[0] = state.params
    for _ in range(2):
      start = time.perf_counter()
      args[1] = jax.block_until_ready(accumulate.run(*args))
      seconds = time.perf_counter() - start
    # A run needs this too, at its end.
    jax.block_until_ready(update.run(state, args[1], args[4]))
    return seconds

  return needed, run


def free_bytes(mesh: Mesh) -> int:
  """Returns the free memory for a device of the mesh, less than it on a CPU."""
  device = mesh.devices.flat[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
  return _machine_free() // jax.local_device_count()


def _machine_free() -> int:
  for line in _MEMINFO.read_text().splitlines():
    name, _, value = line.partition(":")
    if name == "MemAvailable":
      return int(value.split()[0]) * 1024
  raise RuntimeError(f"{_MEMINFO} has no line MemAvailable")


def _machine(bench: Bench) -> dict[str, Any]:
  mesh = bench.step.mesh
  device = mesh.devices.flat[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "num_devices": mesh.devices.size,
    "mesh": dict(mesh.shape),
  }


def _private(
  bench: Bench, size: int
) -> tuple[Program, Program, tuple[PyTree, ...], int]:
  """Returns both private programs, the first's argument shapes, bytes held."""
  step, state = bench.step, bench.state
  arguments = abstract_step.arguments(
    step, state, bench.row, size, bench.frozen
  )
  return (
    _compiled(step.accumulate, arguments),
    _compiled(step.apply, (state, arguments[1], arguments[4])),
    arguments,
    sum(abstract_step.memory(step, state, arguments).values()),
  )


def _both(
  bench: Bench, size: int
) -> tuple[dict[tuple[str, str], Program], tuple[PyTree, ...], int]:
  """Returns all four programs, the first one's argument shapes, bytes held."""
  step = bench.step
  accumulate, apply, arguments, held = _private(bench, size)
  chunk, update = _ordinary(bench)
  params, _, batch, _, key, _, frozen = arguments
  total = abstract_step.placed(params, step.specs(params), step.mesh)
  programs = {
    ("private", "chunk"): accumulate,
    ("private", "update"): apply,
    ("ordinary", "chunk"): _compiled(
      chunk, (params, total, batch, key, frozen)
    ),
    ("ordinary", "update"): _compiled(update, (bench.state, total)),
  }
  return programs, arguments, held


def _ordinary(bench: Bench) -> tuple[Any, Any]:
  """Returns a step without clipping and noise: mean gradients, an update."""
  step = bench.step
  specs = step.specs(bench.state.params)
  shardings = jax.tree.map(functools.partial(NamedSharding, step.mesh), specs)

  @functools.partial(jax.jit, donate_argnums=(1,), out_shardings=shardings)
  def chunk(
    params: PyTree, total: PyTree, batch: PyTree, key: Any, frozen: PyTree
  ) -> PyTree:
    rows = len(jax.tree.leaves(batch)[0])
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(
      jnp.arange(rows)
    )

    def mean(params: PyTree) -> jax.Array:
      whole = step_lib.whole(params, frozen)
      loss = lambda example, key: bench.loss_fn(whole, example, key)[0]
      return jnp.mean(jax.vmap(loss)(batch, keys))

    return jax.tree.map(jnp.add, total, jax.grad(mean)(params))

  @functools.partial(jax.jit, donate_argnums=(0,))
  def update(state: PyTree, total: PyTree) -> PyTree:
    updates, opt_state = step.optimizer.update(
      total, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    ema = state.ema_params
    if ema is not None:
      ema = optax.incremental_update(params, ema, 1 - step.ema_decay)
    return state._replace(params=params, opt_state=opt_state, ema_params=ema)

  return chunk, update


def _compiled(function: Any, arguments: tuple[PyTree, ...]) -> Program:
  program = function.lower(*arguments).compile()
  return Program(program, roofline.temp_bytes(program))


def _interleaved(
  programs: dict[tuple[str, str], Program],
  arguments: tuple[PyTree, ...],
  bench: Bench,
  rounds: int,
) -> dict[tuple[str, str], list[float]]:
  """Returns the seconds of each program in each round but the first."""
  params, accumulator, *rest = jax.tree.map(_made_up, arguments)
  batch, key, frozen = rest[0], rest[2], rest[4]
  del params
  states = {
    name: jax.tree.map(_made_up, bench.state)
    for name in ("private", "ordinary")
  }
  total = jax.tree.map(_made_up, bench.state.params)
  seconds: dict[tuple[str, str], list[float]] = {key: [] for key in programs}

  def timed(name: str, part: str, *args: Any) -> Any:
    start = time.perf_counter()
    result = jax.block_until_ready(programs[name, part].run(*args))
    seconds[name, part].append(time.perf_counter() - start)
    return result

  for _ in range(rounds + 1):
    accumulator = timed(
      "private", "chunk", states["private"].params, accumulator, *rest
    )
    total = timed(
      "ordinary", "chunk", states["ordinary"].params, total, batch, key, frozen
    )
    states["private"], _ = timed(
      "private", "update", states["private"], accumulator, key
    )
    states["ordinary"] = timed("ordinary", "update", states["ordinary"], total)
  return {name: values[1:] for name, values in seconds.items()}


def _made_up(shape: Any) -> jax.Array:
  """Makes an array of a shape: small numbers of a floating type, else zeros."""
  if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
    key = jax.random.key(0)
    return jax.device_put(key, shape.sharding)
  if not jnp.issubdtype(shape.dtype, jnp.floating):
    return jax.device_put(np.zeros(shape.shape, shape.dtype), shape.sharding)

  def part(index: Any) -> np.ndarray:
    size = np.empty(shape.shape, np.bool_)[index].shape
    values = np.random.default_rng(0).normal(size=size, scale=0.05)
    return values.astype(shape.dtype)

  return jax.make_array_from_callback(shape.shape, shape.sharding, part)


def _clipping(bench: Bench, arguments: tuple[PyTree, ...]) -> list[str]:
  """Returns how each layer is clipped, as lines to read."""
  batch, key = arguments[2], arguments[4]
  plain = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  text = bench.step.mechanism.clipped_grad.explanation(
    jax.tree.map(plain, step_lib.whole(bench.state.params, bench.frozen)),
    jax.tree.map(plain, batch),
    rng=plain(key),
  )
  return text.splitlines()
