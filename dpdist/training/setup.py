"""Builds what a run trains from its settings, checked before any charge."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from dpdist import _validation
from dpdist import config as config_lib
from dpdist import errors
from dpdist.clipping import checks as clipping_checks
from dpdist.data import augment
from dpdist.data import dataset as dataset_lib
from dpdist.data import users
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rules
from dpdist.tasks import parts as parts_lib
from dpdist.tasks import per_unit
from dpdist.tasks import task as task_lib
from dpdist.training import exact_step
from dpdist.training import parameters
from dpdist.training import step as step_lib

# The key of a state that is made before the run's secret exists.
PUBLIC_KEY_DATA = np.zeros(2, np.uint32)


def largest_integers(
  task: task_lib.Task,
  row: Mapping[str, Any],
  held_out: Callable[[], Mapping[str, np.ndarray]],
) -> dict[str, int]:
  """Returns public upper bounds of integers, from held-out ones if unknown."""
  largest = {}
  for name, shape in row.items():
    if name in task.largest_integers:
      largest[name] = task.largest_integers[name]
    elif np.issubdtype(shape.dtype, np.integer):
      largest[name] = int(held_out()[name].max())
    else:
      largest[name] = 1
  return largest


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config trains, on a mesh; it holds no array."""

  config: ml_collections.ConfigDict
  parts: parts_lib.Parts
  plan: plan_lib.PrivacyPlan
  task: task_lib.Task
  step: step_lib.Step
  learning_rate: optax.Schedule | None  # Of a step; None if it is unknown.

  @property
  def mesh(self) -> Mesh:
    """Returns the mesh of all devices."""
    return self.step.mesh

  @property
  def chunk_size(self) -> int:
    """Returns how many examples, or users, the whole mesh computes at once."""
    return chunk_size(self.config, self.plan, self.mesh)

  @functools.cached_property
  def dataset(self) -> dataset_lib.Dataset:
    """Returns the data set, which is opened when it is first used."""
    return self.parts.load_dataset(self.config)

  @functools.cached_property
  def held_out(self) -> dict[str, np.ndarray]:
    """Returns all held-out examples."""
    return self.dataset.test.read(np.arange(len(self.dataset.test)))

  def largest_integers(self, row: Mapping[str, Any]) -> dict[str, int]:
    """Returns public upper bounds of the integers in a row of a chunk."""
    return largest_integers(self.task, row, lambda: self.held_out)


def build(
  config: ml_collections.ConfigDict,
  mesh: Mesh | None = None,
  *,
  plan: plan_lib.PrivacyPlan | None = None,
  parts: parts_lib.Parts = parts_lib.NAMED,
  platform: str | None = None,
) -> Experiment:
  """Builds what a config trains, or raises ValueError for a wrong setting.

  By default the mesh is of this machine's devices, as the config divides them,
  and the plan is made from the config. See `dpdist.clipped_grad` for platform.
  """
  config = parts.settings(config_lib.resolve(config))
  check(config)
  if plan is None:
    plan = plan_lib.make_plan(config_lib.privacy_config(config))
  if mesh is None:
    mesh = mesh_lib.make(config.mesh)
  task = parts.make_task(config)
  optimizer, learning_rate = parts.make_optimizer(config)
  step = _step(config, plan, task, optimizer, mesh, platform)
  return Experiment(config, parts, plan, task, step, learning_rate)


def _step(
  config: ml_collections.ConfigDict,
  plan: plan_lib.PrivacyPlan,
  task: task_lib.Task,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  platform: str | None,
) -> step_lib.Step:
  exact = config.clipping.exact_sum
  make = exact_step.ExactStep if exact else step_lib.Step
  rules = task.partitioning
  if mesh.shape["model"] > 1 and (exact or not rules):
    reason = (
      "with clipping.exact_sum"
      if exact
      else "for a model without rules of partitioning for it"
      if config.model.name == parts_lib.GIVEN
      else f"for model.name={config.model.name!r}, which has no rules for it"
    )
    raise errors.ArgumentError(
      f"mesh.model must be 1 {reason}, got {mesh.shape['model']}",
      hint=errors.Hint(flags=("--config.mesh.model=1",)),
    )
  return make(
    mechanism.make(
      plan,
      loss_fn(config, task),
      method=config.clipping.method,
      microbatch_size=config.clipping.microbatch_size or None,
      exact_group_size=config.clipping.exact_group_size if exact else None,
      platform=platform,
      frozen=parameters.frozen_paths(task.trainable),
    ),
    optimizer,
    mesh,
    config.ema_decay,
    rules,
  )


def loss_fn(
  config: ml_collections.ConfigDict, task: task_lib.Task
) -> Callable[..., Any]:
  """Returns the loss of what is clipped as one: of an example, or a mean."""

  def loss(params: Any, example: Any, rng: Any) -> tuple[Any, None]:
    value = task.loss(params, example, rng)
    if not isinstance(value, tuple) or len(value) != 2:
      raise errors.ArgumentError(
        f"loss of a task must return (loss, aux), got {type(value).__name__}"
      )
    # What it returns besides is computed from one private example.
    return value[0], None

  copies = config.augmentation
  if copies.multiplicity:
    change = augment.flip_and_crop(flip=copies.flip, crop=copies.crop)
    loss = per_unit.mean_over_copies(
      loss, change, copies.multiplicity, inputs=task.inputs
    )
  if config.data.examples_per_unit or config.privacy.group_size > 1:
    return per_unit.mean_over_unit(loss, empty_slot=users.SLOT_IS_EMPTY)
  return loss


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for settings that are otherwise checked too late."""
  check = _validation.check
  check("ema_decay", config.ema_decay, _validation.real(at_least=0, below=1))
  _validation.require(
    config.max_checkpoints >= 2,
    "max_checkpoints",
    "at least 2, so that one is whole while the next is written",
    config.max_checkpoints,
  )
  check("store_timeout", config.store_timeout, _validation.real(at_least=0))
  check("clipping.method", config.clipping.method, clipping_checks.METHOD)
  check("stuck_after", config.stuck_after, _validation.real(at_least=0))
  for name in (
    "eval_every",
    "checkpoint_every",
    "data.num_threads",
    "data.prefetch",
    "sentinel.every",
    "clipping.microbatch_size",
  ):
    section, _, key = name.rpartition(".")
    value = (config[section] if section else config)[key]
    check(name, value, _validation.integer(0))


def chunk_size(
  config: ml_collections.ConfigDict, plan: plan_lib.PrivacyPlan, mesh: Mesh
) -> int:
  """Returns how many examples the whole mesh computes at once."""
  multiple, name = mesh_lib.chunk_multiple(config.clipping, mesh)
  if config.chunk_size:
    if config.chunk_size < 0 or config.chunk_size % multiple:
      raise errors.ArgumentError(
        f"chunk_size must be 0 or a multiple of {multiple} (devices that divide"
        f" the examples times clipping.{name}), got {config.chunk_size}",
        hint=errors.Hint(flags=("--config.chunk_size=0",)),
      )
    return config.chunk_size
  size = rules.sampling_of(plan).typical_rows(
    plan, max(x.expected_batch_size for x in plan.phases)
  )
  return size + -size % multiple
