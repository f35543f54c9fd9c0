"""Compares a clipped sum of made-up examples, one by one, with `jax.grad`.

Each example is tried alone, among padding that holds NaN, with parameters that
are moved by public random numbers. Examples of ordinary sizes are tried twice
more: with the parameters as they are, where one that begins as 0 may leave
others without a gradient; and in all rows at once, since without padding other
parts of a program run.
"""

from collections.abc import Callable, Iterator
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpdist import clipping
from dpdist import errors
from dpdist.sensitivity import comparison
from dpdist.sensitivity import made_up_examples

PyTree = Any

INSTEAD = (
  "clipping.method=vmap (method='vmap') forms every gradient and needs no such"
  " rule"
)


class Report(NamedTuple):
  """The result of a check that found no fault."""

  num_examples: int  # Number of made-up examples that were tried.
  ways: dict[str, str]  # By each trained parameter's path, how it is clipped.


class Program(NamedTuple):
  """A program that is searched for a fault."""

  clipped_grad: clipping.ClippedGrad
  # Two trees of whole parameters: as they are, and moved.
  params: tuple[PyTree, PyTree]
  row: PyTree  # Shapes of an example.
  largest: PyTree  # Like `row`, largest integers.
  rows: int  # Rows of a batch.
  most: int  # Most rows that may hold an example at once.
  place: Callable[[int], int]  # Maps a case's number to its row.
  # (number of params, batch, is_padding, row) -> measurements of each compiled
  # program; for a batch without padding, those of the mean.
  run: Callable[..., Iterator[comparison.Measured]]
  # Maps a row to its key; None: the loss takes none.
  key: Callable[[int], jax.Array] | None
  # Maps whether this process found a fault to whether any did.
  any_process: Callable[[bool], bool] = bool
  # Of the trained parameters; None: their paths.
  names: list[str] | None = None


def search(program: Program) -> Report:
  """Tries all examples; raises SensitivityError for the first fault."""
  paths, ways = ways_of(
    program.clipped_grad,
    program.params[0],
    program.row,
    has_rng=program.key is not None,
  )
  # Use the dtypes that JAX converts to: float64 sizes would be lost in float32.
  row_shapes = jax.eval_shape(lambda x: x, program.row)
  filler = made_up_examples.padding(row_shapes)
  count = 0
  for case in made_up_examples.cases(row_shapes, program.largest):
    row = program.place(count)
    kinds = [(1, False)]
    if case.is_ordinary:
      kinds += [(0, False), (1, True)][: 1 + (program.rows <= program.most)]
    for number, is_full in kinds:
      batch = jax.tree.map(
        lambda rest, one, row=row: _chunk(rest, one, row, program.rows),
        case.example if is_full else filler,
        case.example,
      )
      is_padding = np.arange(program.rows) != row
      if is_full:
        is_padding[:] = False
      for measured in program.run(number, batch, is_padding, row):
        problem = _problem(program, case, number, measured, is_full=is_full)
        text = ""
        if problem is not None:
          key = None if program.key is None else program.key(row)
          try:
            leaf = _worst(program, number, case.example, key, problem)
          except Exception:
            # Memory may not suffice. Go on, since other processes wait.
            leaf = problem.leaves[0]
          name = (program.names or paths)[leaf]
          text = (
            f"the clipped sum of one made-up example ({case.name})"
            f" {problem.what}: {path(name)} ({ways[paths[leaf]]}) is not"
            f" clipped as it should be, and no noise would be enough; {INSTEAD}"
          )
        # All processes must agree, or those without a fault would wait.
        if program.any_process(problem is not None):
          raise errors.SensitivityError(
            text or "another process found a clipped sum that is too long"
          )
    count += 1
  return Report(count, ways)


def _problem(
  program: Program,
  case: made_up_examples.Case,
  number: int,
  found: comparison.Measured,
  *,
  is_full: bool,
) -> comparison.Problem | None:
  measured = jax.device_get(found)
  if is_full:
    # Each row has its own key, and so its own gradient.
    unknown = np.full_like(measured.truth, np.nan)
    measured = measured._replace(truth=unknown)
  return comparison.judge(
    program.clipped_grad,
    program.params[number],
    measured,
    is_ordinary=case.is_ordinary,
  )


def _worst(
  program: Program,
  number: int,
  example: PyTree,
  key: jax.Array | None,
  problem: comparison.Problem,
) -> int:
  """Returns the number of the parameter to name in the message."""
  params = program.params[number]
  if problem.what != "is not finite" and all(
    x.is_fully_replicated for x in jax.tree.leaves(params)
  ):
    alone = jax.tree.map(lambda x: x.addressable_data(0), params)
    wrong_alone = comparison.blamed(
      program.clipped_grad, alone, example, key, problem.leaves
    )
    if wrong_alone:
      return wrong_alone[0]
  return problem.leaves[0]


def ways_of(
  clipped_grad: clipping.ClippedGrad,
  params: PyTree,
  row: PyTree,
  *,
  has_rng: bool,
) -> tuple[list[str], dict[str, str]]:
  """Returns the trained parameters' paths, and how each is clipped."""
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), row
  )
  rng = jax.eval_shape(lambda: jax.random.key(0)) if has_rng else None
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
  )
  ways = clipped_grad.ways(shapes, batch, rng=rng)
  return list(ways), ways


def path(name: str) -> str:
  return f"params/{name}" if name else "params"


def _chunk(
  rest: np.ndarray, one: np.ndarray, row: int, rows: int
) -> np.ndarray:
  """Returns a batch of copies of `rest`, except for one row."""
  batch = np.repeat(rest[None], rows, axis=0)
  batch[row] = one
  return batch


def moved(params: PyTree, normal: PyTree) -> PyTree:
  """Moves parameters so that every one has a gradient; may be traced.

  A parameter that begins as 0, such as the second factor of an adapter or a
  last layer, leaves those before it without a gradient, and their rules
  untested. `normal` is a pytree like params of normal numbers.
  """

  def one(x: jax.Array, v: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    size = jnp.sqrt(jnp.mean(jnp.square(wide)))
    fresh = 0.1 / math.sqrt(max(1, math.prod(x.shape[:-1])))
    return (wide + v * jnp.where(size > 0, size / 2, fresh)).astype(x.dtype)

  return jax.tree.map(one, params, normal)
