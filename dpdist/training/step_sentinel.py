"""The sentinel of `dpdist.train`: tests a step before the run, then watches it.

See `dpdist.sensitivity.sentinel` for the reasons and the terms.
"""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from dpdist.distributed import collectives
from dpdist.distributed import mesh as mesh_lib
from dpdist.keys import keys
from dpdist.mechanism import mechanism
from dpdist.noise import noise
from dpdist.sensitivity import comparison
from dpdist.sensitivity import sentinel as sentinel_lib
from dpdist.sensitivity import trials
from dpdist.training import step as step_lib

PyTree = Any


def check_step(
  step: step_lib.Step,
  params: PyTree,
  frozen: PyTree | None,
  *,
  row: PyTree,
  largest: PyTree,
  chunk_size: int,
  is_watched: bool = True,
) -> trials.Report:
  """Compares the step that will run, on its mesh, with `jax.grad`.

  Must be called in all processes. `row` has the shapes of a row of a chunk, and
  `largest` public upper bounds of its integers. The whole mesh computes
  chunk_size rows at once. See `step.accumulate` for `frozen`. With is_watched,
  watched steps are checked too. Raises SensitivityError, which names what is
  wrong, the parameter and its rule.
  """
  clipped_grad = step.mechanism.clipped_grad
  mesh, put = step.mesh, _putter(step.mesh)
  replicated = mesh_lib.replicated(mesh)
  measure = _on_one_device(comparison.measurer(clipped_grad), replicated)
  key = noise.as_key(keys.key_data(keys.insecure_secret(0)))
  drawn = drawer(step)(params, key)
  along = drawn if is_watched else None
  both = params, _moved(step, params, drawn)
  at = jax.jit(lambda x, row: x[row], out_shardings=replicated)
  fold = functools.partial(jax.random.fold_in, key)
  averaged = _averager(step)
  # A step that is not watched does not return its norms.
  unknown = [mesh_lib.replicate(jnp.array(jnp.nan, jnp.float32), mesh)]

  def run(
    number: int, batch: PyTree, is_padding: np.ndarray, row: int
  ) -> Iterator[comparison.Measured]:
    params, example = both[number], jax.tree.map(lambda x: x[row], batch)
    chunk, empty = jax.tree.map(put, (batch, is_padding))
    count = int(np.sum(~is_padding))
    given = (chunk, empty, key, 0)
    more = [] if frozen is None else [frozen]
    plain = step.accumulate(params, step.zeros(params), *given, *more)
    total = averaged(params, step.total(params, plain), count)
    yield measure(params, frozen, example, fold(row), total, unknown)
    if along is None:
      return
    after, seen = step.accumulate(
      params, step.zeros(params), *given, frozen, along
    )
    norms = [at(x, row) for x in jax.tree.leaves(seen.norms)]
    total = averaged(params, step.total(params, after), count)
    yield measure(params, frozen, example, fold(row), total, norms)

  wholes = [step_lib.whole(x, frozen) for x in both]
  program = trials.Program(
    clipped_grad,
    (wholes[0], wholes[1]),
    row,
    largest,
    chunk_size,
    step.mechanism.plan.num_units,
    _rows(mesh, chunk_size),
    run,
    fold,
    collectives.any_process,
  )
  return trials.search(program)


def _putter(mesh: Mesh) -> Callable[[np.ndarray], jax.Array]:
  """Divides an array of rows, the same in all processes, over the devices."""
  sharding = mesh_lib.examples(mesh)
  return lambda x: jax.make_array_from_callback(
    x.shape, sharding, lambda i: x[i]
  )


def _moved(step: step_lib.Step, params: PyTree, drawn: PyTree) -> PyTree:
  """Returns other parameters in the same layout; see `trials.moved`."""
  specs, mesh = step.specs(params), step.mesh
  move = lambda *args: mesh_lib.constrain(trials.moved(*args), specs, mesh)
  return jax.jit(move)(params, drawn)


def _averager(step: step_lib.Step) -> Callable[..., PyTree]:
  """Returns the compiled (params, sum, number of rows) -> mean."""

  @jax.jit
  def averaged(params: PyTree, total: PyTree, count: int) -> PyTree:
    return mesh_lib.constrain(
      sentinel_lib.mean(total, count), step.specs(params), step.mesh
    )

  return averaged


def _rows(mesh: Mesh, chunk_size: int) -> Callable[[int], int]:
  """Returns a function from a trial's number to its row in the chunk."""
  shards = mesh_lib.num_example_shards(mesh)
  size = chunk_size // shards
  return lambda number: number % shards * size + number // shards % size


def _on_one_device(
  measure: Callable[..., comparison.Measured], replicated: Any
) -> Callable[..., comparison.Measured]:
  """Compiles `measure` for one device, where that has all arguments."""
  alone = jax.jit(measure)
  together = jax.jit(measure, out_shardings=replicated)

  def run(*given: Any) -> comparison.Measured:
    arrays = [x for x in jax.tree.leaves(given) if isinstance(x, jax.Array)]
    if not all(x.is_fully_replicated for x in arrays):
      return together(*given)
    here = lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x
    return alone(*jax.tree.map(here, given))

  return run


def drawer(step: step_lib.Step) -> Callable[[PyTree, jax.Array], PyTree]:
  """Returns the compiled (params, key) -> normal numbers like params."""

  def draw(params: PyTree, key: jax.Array) -> PyTree:
    found = sentinel_lib.normal(params, key)
    return mesh_lib.constrain(found, step.specs(params), step.mesh)

  return jax.jit(draw)


class Sentinel:
  """Watches the steps of one branch of a run."""

  def __init__(
    self,
    step: step_lib.Step,
    frozen: PyTree | None,
    streams: mechanism.Streams,
    *,
    every: int,
    first_step: int,
  ):
    """Stores the arguments; watches nothing yet.

    One step in `every` is watched on average, or none if it is 0, and the first
    step of the branch. See `step.accumulate` for `frozen`.
    """
    self._step, self._frozen, self._streams = step, frozen, streams
    self._every, self._first_step = every, first_step
    self._draw = drawer(step)
    self._sum = jax.jit(
      lambda x: jnp.sum(x, axis=0),
      out_shardings=mesh_lib.replicated(step.mesh),
    )
    self._direction: PyTree | None = None
    self._found: jax.Array | None = None

  def is_watched(self, t: int) -> bool:
    """Returns whether a step is watched."""
    return sentinel_lib.is_watched(
      self._streams, t, every=self._every, first_step=self._first_step
    )

  def begin(self, t: int, params: PyTree) -> None:
    """Begins a step."""
    self._direction = self._found = None
    if self.is_watched(t):
      key = self._streams.key("sentinel_direction", t)
      self._direction = self._draw(params, key)

  def accumulate(
    self, params: PyTree, accumulator: PyTree, *chunk: Any
  ) -> PyTree:
    """Adds a chunk, like the step's `accumulate` without frozen."""
    if self._direction is None:
      # Passed only if there are any.
      more = [] if self._frozen is None else [self._frozen]
      return self._step.accumulate(params, accumulator, *chunk, *more)
    accumulator, seen = self._step.accumulate(
      params, accumulator, *chunk, self._frozen, self._direction
    )
    found = self._sum(seen.found)
    self._found = found if self._found is None else self._found + found
    return accumulator

  def end(self) -> list[int]:
    """Returns the numbers of parameters along which examples were too long."""
    self._direction = None
    if self._found is None:
      return []
    return [int(i) for i in np.flatnonzero(np.asarray(self._found))]
