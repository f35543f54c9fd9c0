"""The shapes of a step's arguments on a mesh, and its programs, without arrays.

The step that is compiled for these shapes is the step that runs. The shapes
serve to forecast a pod that is not at hand (`dpdist.profiling.forecast`), to
measure on this machine (`dpdist.profiling.measure`), and to restore checkpoints
(`dpdist.export.load_run`).

They also serve to name what a run computes. A task, a loss or an optimizer from
outside may be a function without a file, or hold numbers in its closure. The
programs hold all that it computes: so a run goes on under its keys only if
they are the same.

Guarantees of `lowered_sha256`:
  * The digest is of the StableHLO text of the run's programs, for its shapes
    and its mesh: what makes the first state, what accumulates a chunk, what
    accumulates one that the sentinel watches, and what applies a sum. Constants
    are in the text, places in source files are not.
  * What was lowered is what runs: Python runs once for both. So it makes no
    difference what a function finds if it is called again, as in a file or from
    a random generator.
  * A program that calls back into Python is refused: what it calls is not in
    the text. So is JAX's option to leave constants out of it.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import functools
import hashlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import ml_collections
import numpy as np

from dpdist import clipping
from dpdist import errors
from dpdist.data import users
from dpdist.distributed import mesh as mesh_lib
from dpdist.noise import noise
from dpdist.training import data_checks
from dpdist.training import exact_step
from dpdist.training import parameters
from dpdist.training import setup
from dpdist.training import step as step_lib

PyTree = Any

# What a call of Python becomes: a custom call by a name with the first word, or
# on a TPU an exchange with the host, which has no such name.
_CALLS_BACK = ("callback", "stablehlo.send", "stablehlo.recv")


def example(experiment: setup.Experiment) -> dict[str, Any]:
  """Returns the shapes of one example; the data are read only if they must."""
  if experiment.task.example is not None:
    return dict(experiment.task.example())
  one = data_checks.one_example(experiment.dataset.train)
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


def state(experiment: setup.Experiment, example: PyTree) -> PyTree:
  """Returns the shapes of a state, on the mesh, for such examples."""
  step = experiment.step
  found = jax.eval_shape(step.initial, _parts(experiment, example)[0])
  return placed(found, step.state_specs(found), step.mesh)


def frozen(experiment: setup.Experiment, example: PyTree) -> PyTree | None:
  """Returns the frozen parameters' shapes on the mesh; None without any."""
  step = experiment.step
  if step.mechanism.clipped_grad.frozen is None:
    return None
  found = _parts(experiment, example)[1]
  return placed(found, step.specs(found), step.mesh)


def _parts(
  experiment: setup.Experiment, example: PyTree
) -> tuple[PyTree, PyTree]:
  """Returns the shapes of trained parameters and of frozen ones."""
  key_data = jax.ShapeDtypeStruct((2,), jnp.uint32)
  make = functools.partial(parameters.make_params, experiment.task)
  params = jax.eval_shape(make, key_data, dict(example))
  is_frozen = experiment.step.mechanism.clipped_grad.frozen
  return clipping.partition(params, is_frozen)


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


def lowered_sha256(
  programs: Iterable[tuple[str, jax.stages.Lowered]],
) -> str:
  """Returns the digest of a run's `programs`, 64 hex digits."""
  if jax.config.values.get("jax_use_simplified_jaxpr_constants"):
    raise errors.ArgumentError(
      "jax_use_simplified_jaxpr_constants must be False for a task from"
      " outside, by whose constants a run is told apart, got True"
    )
  digest = hashlib.sha256()
  for name, program in programs:
    text = program.as_text()
    if any(word in text for word in _CALLS_BACK):
      raise errors.ArgumentError(
        f"what a task from outside computes must be JAX alone, got a {name}"
        " that calls back into Python (pure_callback, io_callback or"
        " debug.print), by whose code a run cannot be told apart"
      )
    text = _without_axes_of_one(text)
    digest.update(hashlib.sha256(text.encode()).digest())
  return digest.hexdigest()


def _without_axes_of_one(text: str) -> str:
  # Whether a layout names a mesh axis of size 1, which divides nothing, depends
  # on which of its calls JAX lowered first.
  for axis in re.findall(r'"(\w+)"=1\b', text):
    text = re.sub(rf', "{axis}"(?!=)|"{axis}"(?!=)(, )?', "", text)
  return text


def bound(
  step: step_lib.Step, lowered: Mapping[str, jax.stages.Lowered]
) -> step_lib.Step:
  """Returns the step that runs these very programs, compiled.

  They are named as by `programs`. JAX traces a function again when its caches
  are cleared or an option changes, and may find other code then.
  """
  compiled = {name: program.compile() for name, program in lowered.items()}

  def accumulate(*arguments: Any) -> Any:
    # A watched chunk has frozen parameters, or None, and a direction as well.
    name = "chunk" if len(arguments) < 8 else "watched chunk"
    return compiled[name](*arguments)

  found = dataclasses.replace(step)
  vars(found)["accumulate"] = accumulate
  vars(found)["apply"] = compiled["update"]
  return found


def programs(
  step: step_lib.Step,
  initial: parameters.Initializer,
  *,
  row: PyTree,
  chunk_size: int,
  frozen: PyTree | None,
  has_schedule: bool,
  is_watched: bool,
) -> Iterator[tuple[str, jax.stages.Lowered]]:
  """Yields the programs of a run and their names, not compiled.

  `initial` makes the state before the first step, and `row` has the shapes of a
  row of a chunk, of which the mesh computes chunk_size at once. With
  has_schedule the plan's numbers change, so that `apply` takes the number of
  the release. With is_watched the sentinel watches steps.
  """
  yield "initial state", initial.lowered()
  shapes = jax.eval_shape(step.initial, initial.shapes)
  key = jax.eval_shape(noise.as_key, np.zeros(2, np.uint32))
  if isinstance(step, exact_step.ExactStep):
    yield from _exact_programs(step, shapes, row, key, frozen, is_watched)
    return
  accumulate: Any = step.accumulate
  apply: Any = step.apply
  state = placed(shapes, step.state_specs(shapes), step.mesh)
  # Arguments of another form than the run's would be traced anew.
  params, accumulator, *chunk = arguments(step, state, row, chunk_size)[:4]
  given = (params, accumulator, *chunk, key, 0)
  more = [] if frozen is None else [frozen]
  yield "chunk", accumulate.lower(*given, *more)
  if is_watched:  # Along a direction like the parameters.
    yield "watched chunk", accumulate.lower(*given, frozen, params)
  release_index = [np.int32(0)] if has_schedule else []
  yield "update", apply.lower(state, accumulator, key, *release_index)


def _exact_programs(
  step: exact_step.ExactStep,
  state: step_lib.TrainState,
  row: PyTree,
  key: jax.ShapeDtypeStruct,
  frozen: PyTree | None,
  is_watched: bool,
) -> Iterator[tuple[str, jax.stages.Lowered]]:
  """Yields the programs of exact sums, which are for one device each."""
  size = step.mechanism.exact_group_size
  whole = jax.eval_shape(step.zeros, state.params)
  total = jax.eval_shape(step.reduce, whole)
  one = lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
  group = lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype)
  if frozen is not None:
    frozen = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen
    )
  directions: dict[str, PyTree | None] = {"group": None}
  if is_watched:
    directions["watched group"] = state.params
  for name, direction in directions.items():
    yield (
      name,
      exact_step.add_group.lower(
        step.mechanism,
        state.params,
        jax.tree.map(one, whole),
        jax.tree.map(group, row),
        group(jax.ShapeDtypeStruct((), jnp.bool_)),
        key,
        0,
        frozen,
        direction,
      ),
    )
  yield (
    "update",
    exact_step.finish.lower(
      step.mechanism, step.optimizer, step.ema_decay, state, *total, key
    ),
  )
