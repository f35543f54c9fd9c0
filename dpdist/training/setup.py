"""Builds what a run trains from its settings, checked before any charge."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import linen as nn
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from dpdist import config as config_lib
from dpdist import errors
from dpdist import models
from dpdist.data import augment
from dpdist.data import users
from dpdist.data.features import features
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rules
from dpdist.tasks import classification
from dpdist.tasks import optimizers
from dpdist.training import exact_step
from dpdist.training import parameters
from dpdist.training import step as step_lib

# The key of a state that is made before the run's secret exists.
PUBLIC_KEY_DATA = np.zeros(2, np.uint32)


def largest_integers(
  config: ml_collections.ConfigDict, row: dict[str, Any]
) -> dict[str, int]:
  """Returns the largest integers of each array, from the settings alone."""
  inputs = max(config.model.num_outputs, config.model.vocabulary) - 1
  others = config.model.num_outputs - 1
  return {name: inputs if name == "inputs" else others for name in row}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config trains, on a mesh; it holds no array.

  Attributes:
    config: all settings.
    plan: the numbers.
    model: maps the inputs of one example to logits.
    step: the two halves of a step.
    learning_rate: as a function of the step.
  """

  config: ml_collections.ConfigDict
  plan: plan_lib.PrivacyPlan
  model: nn.Module
  step: step_lib.Step
  learning_rate: optax.Schedule

  @property
  def mesh(self) -> Mesh:
    """Returns the mesh of all devices."""
    return self.step.mesh

  @property
  def chunk_size(self) -> int:
    """Returns how many examples, or users, the whole mesh computes at once.

    Raises:
      ValueError: the configured chunk_size cannot be divided evenly.
    """
    return chunk_size(self.config, self.plan, self.mesh)

  def parameters(self, key_data: Any, inputs: Any) -> parameters.Parameters:
    """Returns the initial parameters.

    Args:
      key_data: uint32 [2], the key of the stream "init".
      inputs: of one example; shapes are enough for all but `Parameters.init`.

    Raises:
      ValueError: weights from disk do not fit the model.
    """
    return parameters.of(self.config.model, self.model, key_data, inputs)


def build(
  config: ml_collections.ConfigDict,
  mesh: Mesh | None = None,
  *,
  plan: plan_lib.PrivacyPlan | None = None,
  platform: str | None = None,
) -> Experiment:
  """Builds what a config trains.

  Args:
    config: all settings.
    mesh: None: a mesh of this machine's devices, as the config divides them.
    plan: None: a plan made from the config.
    platform: the platform it is compiled for; see `dpdist.clipped_grad`.

  Raises:
    ValueError: names the setting, its value and what would be right.
  """
  check(config)
  if plan is None:
    plan = plan_lib.make_plan(config_lib.privacy_config(config))
  if mesh is None:
    mesh = mesh_lib.make(config.mesh)
  model = models.make(config.model)
  optimizer, learning_rate = optimizers.make(
    config.optimizer, config.privacy.num_steps
  )
  step = _step(config, plan, model, optimizer, mesh, platform)
  return Experiment(config, plan, model, step, learning_rate)


def _step(
  config: ml_collections.ConfigDict,
  plan: plan_lib.PrivacyPlan,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  platform: str | None,
) -> step_lib.Step:
  exact = config.clipping.exact_sum
  make = exact_step.ExactStep if exact else step_lib.Step
  rules = models.partitioning(model)
  if mesh.shape["model"] > 1 and (exact or not rules):
    reason = (
      "with clipping.exact_sum"
      if exact
      else f"for model.name={config.model.name!r}, which has no rules for it"
    )
    raise errors.ArgumentError(
      f"mesh.model must be 1 {reason}, got {mesh.shape['model']}",
      hint=errors.Hint(flags=("--config.mesh.model=1",)),
    )
  return make(
    mechanism.make(
      plan,
      loss_fn(config, model),
      method=config.clipping.method,
      microbatch_size=config.clipping.microbatch_size or None,
      exact_group_size=config.clipping.exact_group_size if exact else None,
      platform=platform,
      frozen=parameters.frozen_paths(config.model),
    ),
    optimizer,
    mesh,
    config.ema_decay,
    rules,
  )


def loss_fn(
  config: ml_collections.ConfigDict, model: nn.Module
) -> Callable[..., Any]:
  """Returns the loss of what is clipped as one: of an example, or a mean."""
  loss = classification.cross_entropy(model)
  copies = config.augmentation
  if copies.multiplicity:
    change = augment.flip_and_crop(flip=copies.flip, crop=copies.crop)
    loss = classification.mean_over_copies(loss, change, copies.multiplicity)
  if config.data.examples_per_unit or config.privacy.group_size > 1:
    return classification.mean_over_unit(loss, empty_slot=users.SLOT_IS_EMPTY)
  return loss


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for settings that are otherwise checked too late."""
  if not 0 <= config.ema_decay < 1:
    raise ValueError(
      f"ema_decay must be at least 0 and below 1, got {config.ema_decay}"
    )
  if config.max_checkpoints < 2:
    raise ValueError(
      "max_checkpoints must be at least 2, so that one is whole while the next"
      f" is written, got {config.max_checkpoints}"
    )
  for section, name in (
    (config, "eval_every"),
    (config, "checkpoint_every"),
    (config, "stuck_after"),
    (config.data, "num_threads"),
    (config.data, "prefetch"),
    (config.sentinel, "every"),
  ):
    if section[name] < 0:
      raise ValueError(f"{name} must be at least 0, got {section[name]}")
  ahead = features.blocks_ahead(config.data.get("features", ""))
  if config.model.name == "bert" and config.model.first_block != ahead:
    raise ValueError(
      f"model.first_block must be {ahead}, the blocks that are run ahead with"
      f" data.features={config.data.get('features', '')!r}, got"
      f" {config.model.first_block}"
    )


def chunk_size(
  config: ml_collections.ConfigDict, plan: plan_lib.PrivacyPlan, mesh: Mesh
) -> int:
  """Returns how many examples the whole mesh computes at once, set or chosen.

  Raises:
    ValueError: the configured chunk_size cannot be divided evenly.
  """
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
