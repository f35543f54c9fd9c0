"""Runs a step on zeros, before anything is written or charged.

A step that fails when it first runs would otherwise be charged anew at every
start: because of a loss that does not take the data's dtypes, or a chunk that
does not fit the memory. So exactly the functions that the run will use are
compiled and run once, on zeros of the data's shapes and dtypes, in every
process and on the run's mesh.

Guarantees:
  * It uses no example and no key of the run: its key is a public constant, and
    what it computes is dropped. A run's key is made of its secret, and equals
    that constant with a probability of 2**-64.
  * Nothing compiles again in the run's steps.
  * Where it fails in one process, all stop, and nothing is spent.
"""

import math
import statistics
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from dpdist import errors
from dpdist.distributed import collectives
from dpdist.distributed import mesh as mesh_lib
from dpdist.distributed import progress as progress_lib
from dpdist.noise import noise
from dpdist.reporting import console
from dpdist.training import job as job_lib
from dpdist.training import setup
from dpdist.training import step as step_lib

PyTree = Any


def run(
  config: ml_collections.ConfigDict,
  progress: progress_lib.Progress,
  job: job_lib.Job,
) -> int:
  """Compiles and runs a step; must be called in all processes.

  Returns the number of examples, or users, that the mesh computes at once. If
  no chunk size was set and a chunk is too large for the memory, it is halved
  until it fits; a size that was set raises ValueError then. The job has not
  begun, and its state is made with `job_lib.PUBLIC_KEY_DATA`. Raises PeerError
  if another process failed.
  """
  if not collectives.run_on_primary(lambda: _is_to_train(job)):
    return job.chunk_size
  progress.enter(-1, "compiling")
  state = collectives.run_on_all(job.init)
  multiple, _ = mesh_lib.chunk_multiple(config.clipping, job.mesh)
  size = job.chunk_size
  while True:
    accumulator, problem = _accumulated(job, state, size)
    # Before a collective, in which the others would wait for a failed process.
    problems = [text for text in collectives.gather(problem) if text]
    if not problems:
      break
    del accumulator
    size = _smaller(config, size, multiple, problems[0])
  _finish(config, job, state, accumulator)
  progress.enter(-1, "starting")
  return size


def timed(job: job_lib.Job, *, rounds: int = 3) -> tuple[float, float]:
  """Returns the seconds of a chunk and of an update: medians over rounds.

  Every row of the chunk is padding: no example is read, and a row takes as long
  whatever it holds. To be called after `run`, which compiles both.
  """
  state = job.init()
  chunk, update = [], []
  for _ in range(rounds + 1):
    accumulator = job.step.begin(state)
    start = time.perf_counter()
    accumulator = _with_chunk(job, state, accumulator, job.chunk_size, 0, True)
    jax.block_until_ready(accumulator)
    middle = time.perf_counter()
    state, released = _applied(job, state, accumulator)
    jax.block_until_ready(released)
    chunk.append(middle - start)
    update.append(time.perf_counter() - middle)
  # The first round is not counted.
  return statistics.median(chunk[1:]), statistics.median(update[1:])


def _is_to_train(job: job_lib.Job) -> bool:
  """Returns whether a step is left; for the primary process."""
  ledger, saved = job.ledger, job.found.saved
  if ledger is None:  # A new run that is only looked at.
    return True
  if job.changes or saved is None or not ledger.branches:
    return True
  # Whether the run uses the present branch or a new one is decided later; a new
  # one begins at the checkpoint's step.
  is_charged = saved.step < ledger.branches[-1].stop_step
  return is_charged or ledger.segment.charged < ledger.plan.num_steps


def _accumulated(
  job: job_lib.Job, state: step_lib.TrainState, size: int
) -> tuple[step_lib.Accumulator | None, str]:
  """Returns a step's sum, or why there was not enough memory for one."""

  def accumulate() -> tuple[step_lib.Accumulator | None, str]:
    try:
      accumulator = job.step.begin(state)
      # Two chunks, like a draw of the run that needs more than one.
      for first_row in (0, size):
        accumulator = _with_chunk(
          job, state, accumulator, size, first_row, False
        )
      jax.block_until_ready(accumulator)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      if not _is_out_of_memory(error):
        raise
      return None, str(error).splitlines()[0]
    return accumulator, ""

  made: tuple[step_lib.Accumulator | None, str] = collectives.run_on_all(
    accumulate
  )
  return made


def _with_chunk(
  job: job_lib.Job,
  state: step_lib.TrainState,
  accumulator: step_lib.Accumulator,
  size: int,
  first_row: int,
  is_padding: bool,
) -> step_lib.Accumulator:
  """Adds a chunk of zeros, or of padding alone, to a sum."""
  made: step_lib.Accumulator = job.step.accumulate(
    state.params,
    accumulator,
    *_zeros(job, size, is_padding),
    noise.as_key(setup.PUBLIC_KEY_DATA),
    first_row,
    *([] if job.frozen is None else [job.frozen]),
  )
  return made


def _applied(
  job: job_lib.Job, state: step_lib.TrainState, accumulator: Any
) -> tuple[step_lib.TrainState, dict[str, jax.Array]]:
  release_index = [np.int32(0)] if len(job.plan.phases) > 1 else []
  made: tuple[step_lib.TrainState, dict[str, jax.Array]] = job.step.apply(
    state, accumulator, noise.as_key(setup.PUBLIC_KEY_DATA), *release_index
  )
  return made


def _finish(
  config: ml_collections.ConfigDict,
  job: job_lib.Job,
  state: step_lib.TrainState,
  accumulator: Any,
) -> None:
  """Does what the run does with a step's sum."""
  if config.unsafe_metrics:
    jax.block_until_ready(job.step.stats(accumulator))
  state, released = _applied(job, state, accumulator)
  jax.block_until_ready(released)
  for params in (state.params, state.ema_params):
    if params is not None:
      whole = step_lib.whole(params, job.frozen)
      scores = job.evaluate(whole, num_passes=1)
      if not all(map(math.isfinite, scores.values())):
        _check_finite(job.init().params)
      job.evaluate.tables(whole, num_passes=1)


def _check_finite(params: PyTree) -> None:
  """Raises ValueError for initial parameters that nothing can be made of."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  wrong = [
    jax.tree_util.keystr(path)
    for path, leaf in leaves
    if not np.isfinite(mesh_lib.whole(leaf).astype(np.float64)).all()
  ]
  if wrong:
    raise errors.ArgumentError(
      "init of the task must return finite numbers, got NaN or infinity in"
      f" {', '.join(wrong)}"
    )


def _zeros(
  job: job_lib.Job, size: int, is_padding: bool
) -> tuple[PyTree, jax.Array]:
  """Makes a chunk of zeros in the data's shapes; all or none are padding."""
  rows = len(mesh_lib.local_rows(job.mesh, size))
  put = lambda x: mesh_lib.put_rows(x, size, job.mesh)
  zeros = lambda x: put(np.zeros((rows, *x.shape), x.dtype))
  return jax.tree.map(zeros, job.row), put(np.full(rows, is_padding))


def _is_out_of_memory(error: BaseException) -> bool:
  return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _smaller(
  config: ml_collections.ConfigDict, size: int, multiple: int, problem: str
) -> int:
  """Returns the chunk size to try next, unless there is none or it was set."""
  half = max(multiple, size // 2 // multiple * multiple)
  if config.chunk_size:
    raise errors.ArgumentError(
      "chunk_size must be small enough for the memory of the devices, or 0 for"
      f" what fits, got {size}, which ran out of it before anything was"
      f" charged; {half} may fit",
      hint=errors.Hint(flags=("--config.chunk_size=0",)),
    )
  if size == multiple:
    raise ValueError(
      f"model must be small enough for the memory of the devices: even the"
      f" smallest chunk_size, {multiple}, ran out of it before anything was"
      f" charged ({problem})"
    )
  if collectives.is_primary():
    console.warn(
      f"a chunk of {size:,} ran out of memory; trying chunk_size {half:,}"
    )
  return half
