"""The shapes of all that a step takes, on a mesh, without any of it.

What is compiled for shapes alone is the step that runs: for a pod without one
(`dpdist.profiling.forecast`), for this machine (`dpdist.profiling.measure`), or
to know how a checkpoint is to be restored (`dpdist.export.load_run`).
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
  """One example; of tokens, without the data."""
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
  """One unit of privacy, which is a row of a chunk, of such examples."""
  # As `dpdist.training.setup` makes units: of users, or of groups of rows.
  slots = config.data.examples_per_unit
  if config.privacy.group_size > 1:
    slots = config.privacy.group_size
  if not slots:
    return one
  found = {
    name: jax.ShapeDtypeStruct((slots, *x.shape), x.dtype)
    for name, x in one.items()
  }
  return found | {users.EMPTY_SLOT: jax.ShapeDtypeStruct((slots,), jnp.bool_)}


def placed(tree: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
  """Arrays or shapes, as shapes that lie on a mesh by their specs."""
  return jax.tree.map(
    lambda x, spec: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    ),
    tree,
    specs,
  )


def state(step: step_lib.Step, model: Any, inputs: Any) -> PyTree:
  """A state, on the mesh, of a model of such inputs."""
  found = jax.eval_shape(step.initial, _parts(step, model, inputs)[0])
  return placed(found, step.state_specs(found), step.mesh)


def frozen(step: step_lib.Step, model: Any, inputs: Any) -> PyTree | None:
  """The frozen parameters, on the mesh; None without any."""
  if step.mechanism.clipped_grad.frozen is None:
    return None
  found = _parts(step, model, inputs)[1]
  return placed(found, step.specs(found), step.mesh)


def _parts(
  step: step_lib.Step, model: Any, inputs: Any
) -> tuple[PyTree, PyTree]:
  """Of trained parameters and of frozen ones."""
  words = jax.ShapeDtypeStruct((2,), jnp.uint32)
  make = functools.partial(parameters.make_params, model)
  params = jax.eval_shape(make, words, inputs)
  return clipping.partition(params, step.mechanism.clipped_grad.frozen)


def arguments(
  step: step_lib.Step,
  state: PyTree,
  row: PyTree,
  chunk_size: int,
  frozen: PyTree | None = None,
) -> tuple[PyTree, ...]:
  """What `accumulate` takes, on the mesh, for chunks of such rows."""
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
  """Bytes that a device holds throughout a step, by kind."""

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
