"""A clipped sum on made-up examples, one after the other, against `jax.grad`.

Each example goes alone, among padding that holds NaN. Those of ordinary sizes
go twice more: as they are, where a parameter that begins as 0 may leave others
without a gradient; and in every row at once, since without padding other parts
of a program run. Else the parameters are moved by public random numbers.
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
  """What a check came to.

  Attributes:
    num_examples: made-up examples that were tried.
    ways: by each trained parameter's path, how it is clipped.
  """

  num_examples: int
  ways: dict[str, str]


class Program(NamedTuple):
  """What is searched for a fault.

  Attributes:
    clipped_grad: what it clips by.
    params: whole: as they are, and moved.
    row: shapes of an example.
    largest: of its integers.
    rows: of a batch.
    most: rows that may hold an example at once.
    place: from a case's number to its row.
    run: (number of params, batch, is_padding, row) -> what was measured, of
      each program that there is; of a batch without padding, of the mean.
    key: from a row to its key; None: the loss takes none.
    any_process: from whether this process found a fault to whether one did.
    names: what the trained parameters are called; None: by their paths.
  """

  clipped_grad: clipping.ClippedGrad
  params: tuple[PyTree, PyTree]
  row: PyTree
  largest: PyTree
  rows: int
  most: int
  place: Callable[[int], int]
  run: Callable[..., Iterator[comparison.Measured]]
  key: Callable[[int], jax.Array] | None
  any_process: Callable[[bool], bool] = bool
  names: list[str] | None = None


def search(program: Program) -> Report:
  """Tries all examples.

  Raises:
    SensitivityError: names what is wrong, the parameter and its rule.
  """
  paths, ways = ways_of(
    program.clipped_grad,
    program.params[0],
    program.row,
    has_rng=program.key is not None,
  )
  # In the dtypes that JAX gives them: as float64, most sizes would be lost.
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
      for found in program.run(number, batch, is_padding, row):
        problem = _problem(program, case, number, found, is_full=is_full)
        text = ""
        if problem is not None:
          key = None if program.key is None else program.key(row)
          try:
            leaf = _worst(program, number, case.example, key, problem)
          except Exception:
            # Such as no memory for it: the others wait for this process.
            leaf = problem.leaves[0]
          name = (program.names or paths)[leaf]
          text = (
            f"the clipped sum of one made-up example ({case.name})"
            f" {problem.what}: {path(name)} ({ways[paths[leaf]]}) is not"
            f" clipped as it should be, and no noise would be enough; {INSTEAD}"
          )
        # Or those who found nothing would wait for the others.
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
    # The rows have keys of their own, and with them gradients.
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
  """The number of the parameter to name."""
  params = program.params[number]
  if problem.what != "is not finite" and all(
    x.is_fully_replicated for x in jax.tree.leaves(params)
  ):
    alone = jax.tree.map(lambda x: x.addressable_data(0), params)
    found = comparison.blamed(
      program.clipped_grad, alone, example, key, problem.leaves
    )
    if found:
      return found[0]
  return problem.leaves[0]


def ways_of(
  clipped_grad: clipping.ClippedGrad,
  params: PyTree,
  row: PyTree,
  *,
  has_rng: bool,
) -> tuple[list[str], dict[str, str]]:
  """Paths of the trained parameters, and how each is clipped."""
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
  """A batch of `rest`, but for one row."""
  batch = np.repeat(rest[None], rows, axis=0)
  batch[row] = one
  return batch


def moved(params: PyTree, normal: PyTree) -> PyTree:
  """Parameters by which no gradient is hidden; traced.

  One that begins as 0, as the second factor of an adapter or the last layer
  does, leaves those before it without a gradient, and with them their rules
  untried.

  Args:
    params: floating arrays.
    normal: like params, normal numbers.
  """

  def one(x: jax.Array, v: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    size = jnp.sqrt(jnp.mean(jnp.square(wide)))
    fresh = 0.1 / math.sqrt(max(1, math.prod(x.shape[:-1])))
    return (wide + v * jnp.where(size > 0, size / 2, fresh)).astype(x.dtype)

  return jax.tree.map(one, params, normal)
