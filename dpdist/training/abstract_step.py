"""The shapes of a step's arguments on a mesh, without any arrays.

The step that is compiled for these shapes is the step that runs. The shapes
serve to forecast a pod that is not at hand (`dpdist.profiling.forecast`), to
measure on this machine (`dpdist.profiling.measure`), and to restore checkpoints
(`dpdist.export.load_run`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import ml_collections
import numpy as np

from dpdist import clipping
from dpdist.data import users
from dpdist.data.datasets import datasets
from dpdist.distributed import mesh as mesh_lib
from dpdist.noise import noise
from dpdist.training import data_checks
from dpdist.training import parameters
from dpdist.training import step as step_lib

PyTree = Any


def example(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the shapes of one example; for tokens, without loading the data."""
  if config.model.name in ("decoder", "stacked_decoder"):
    tokens = jax.ShapeDtypeStruct((config.data.sequence_length,), jnp.int32)
    return {"inputs": tokens, "targets": tokens}
  one = data_checks.one_example(datasets.load(config.data).train)
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in one.items()
  }


def unit(
  config: ml_collections.ConfigDict, one: dict[str, Any]
) -> dict[str, Any]:
  """Returns the shapes of one unit of privacy, which is a row of a chunk."""
  # `dpdist.training.setup` makes the same units: users, or groups of rows.
  slots = config.data.examples_per_unit
  if config.privacy.group_size > 1:
    slots = config.privacy.group_size
  if not slots:
    return one
  found = {
    name: jax.ShapeDtypeStruct((slots, *x.shape), x.dtype)
    for name, x in one.items()
  }
  return found | {
    users.SLOT_IS_EMPTY: jax.ShapeDtypeStruct((slots,), jnp.bool_)
  }


def placed(tree: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
  """Returns arrays or shapes as shapes that are laid out on a mesh by specs."""
  return jax.tree.map(
    lambda x, spec: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    ),
    tree,
    specs,
  )


def state(step: step_lib.Step, model: Any, inputs: Any) -> PyTree:
  """Returns the shapes of a state, on the mesh, of a model of such inputs."""
  found = jax.eval_shape(step.initial, _parts(step, model, inputs)[0])
  return placed(found, step.state_specs(found), step.mesh)


def frozen(step: step_lib.Step, model: Any, inputs: Any) -> PyTree | None:
  """Returns the frozen parameters' shapes on the mesh; None without any."""
  if step.mechanism.clipped_grad.frozen is None:
    return None
  found = _parts(step, model, inputs)[1]
  return placed(found, step.specs(found), step.mesh)


def _parts(
  step: step_lib.Step, model: Any, inputs: Any
) -> tuple[PyTree, PyTree]:
  """Returns the shapes of trained parameters and of frozen ones."""
  key_data = jax.ShapeDtypeStruct((2,), jnp.uint32)
  make = functools.partial(parameters.make_params, model)
  params = jax.eval_shape(make, key_data, inputs)
  return clipping.partition(params, step.mechanism.clipped_grad.frozen)


def arguments(
  step: step_lib.Step,
  state: PyTree,
  row: PyTree,
  chunk_size: int,
  frozen: PyTree | None = None,
) -> tuple[PyTree, ...]:
  """Returns the shapes that `accumulate` takes for chunks of such rows."""
  zeros = jax.eval_shape(step.zeros, state.params)
  accumulator = placed(zeros, step.accumulator_specs(state.params), step.mesh)
  over = lambda x: jax.ShapeDtypeStruct(
    (chunk_size, *x.shape), x.dtype, sharding=mesh_lib.examples(step.mesh)
  )
  everywhere = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=mesh_lib.replicated(step.mesh)
  )
  key = jax.eval_shape(noise.as_key, np.zeros(2, np.uint32))
  return (
    state.params,
    accumulator,
    jax.tree.map(over, row),
    over(jax.ShapeDtypeStruct((), jnp.bool_)),
    everywhere(key),
    everywhere(jax.ShapeDtypeStruct((), jnp.int32)),
    frozen,
  )


def memory(
  step: step_lib.Step, state: PyTree, given: tuple[PyTree, ...]
) -> dict[str, int]:
  """Returns the bytes that a device holds throughout a step, by kind."""

  def size(tree: PyTree) -> int:
    specs = jax.tree.map(lambda x: x.sharding.spec, tree)
    return mesh_lib.bytes_per_device(tree, specs, step.mesh)

  return {
    "parameters": size(state.params) + size(given[6]),
    "optimizer": size(state.opt_state),
    "average": size(state.ema_params),
    "accumulator": size((given[1].clipped_sum, given[1].low)),
    "batch": size(given[2]),
  }
