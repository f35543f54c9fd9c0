"""Checks the sensitivity of a Keras fit; see `dpdist.sensitivity.sentinel`."""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpdist import clipping
from dpdist.frontends import keras_data
from dpdist.sensitivity import comparison
from dpdist.sensitivity import sentinel
from dpdist.sensitivity import trials
from dpdist.sums import compensated

PyTree = Any
State = dict[str, list[jax.Array]]

normal = jax.jit(sentinel.normal)


def check(
  model: Any,
  clipped_grad: Callable[[list[jax.Array]], clipping.ClippedGrad],
  accumulate: Callable[..., Any],
  state: State,
  zeros: compensated.Sum,
  data: keras_data.Arrays,
  *,
  chunk_size: int,
  most: int,
  is_watched: bool,
) -> None:
  """Compares the sums that a fit will make with `jax.grad`.

  Only the shapes and the largest integers of the data are used. `clipped_grad`
  and `accumulate` are those of `keras_step.Functions`, and `zeros` is an empty
  sum. A chunk has `chunk_size` examples, and the data `most`. `is_watched` says
  that watched updates will be made too. A SensitivityError names what is wrong,
  the parameter and its rule.
  """
  trainable, constants = state["trainable"], state["non_trainable"]
  one, key = clipped_grad(constants), jax.random.key(0)
  drawn = normal(trainable, key)
  both = trainable, jax.jit(trials.moved)(trainable, drawn)
  measure = jax.jit(comparison.measurer(one))
  fold = functools.partial(jax.random.fold_in, key)

  def run(
    number: int, batch: PyTree, is_padding: np.ndarray, row: int
  ) -> Iterator[comparison.Measured]:
    example = jax.tree.map(lambda x: x[row], batch)
    count = int(np.sum(~is_padding))
    for direction in ((), (drawn,)) if is_watched else ((),):
      total, _, seen = accumulate(
        *(both[number], constants, zeros),
        *(batch, is_padding, key, jnp.int32(0), *direction),
      )
      norm = jnp.float32(jnp.nan) if seen is None else seen.norms[row]
      mean = sentinel.mean(jax.tree.map(jnp.add, *total), count)
      yield measure(both[number], None, example, fold(row), mean, [norm])

  trials.search(
    trials.Program(
      one,
      both,
      data.example(),
      data.largest(),
      chunk_size,
      most,
      lambda number: number % chunk_size,
      run,
      fold,
      names=_names(model),
    )
  )


def fault(
  model: Any,
  clipped_grad: Callable[[list[jax.Array]], clipping.ClippedGrad],
  state: State,
  data: keras_data.Arrays,
  found: np.ndarray,
) -> str:
  """Describes what a watched update found, one number for each parameter."""
  return sentinel.fault(
    clipped_grad(state["non_trainable"]),
    state["trainable"],
    data.example(),
    np.flatnonzero(found).tolist(),
    names=_names(model),
  )


def _names(model: Any) -> list[str]:
  return [variable.path for variable in model.trainable_variables]
