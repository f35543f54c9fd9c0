"""Makes the task that a config names; registers this project's own tasks."""

import dataclasses
import functools

from flax import linen as nn
import ml_collections
import numpy as np

from dpdist import errors
from dpdist import models
from dpdist import registry
from dpdist.data.features import features
from dpdist.tasks import cross_entropy
from dpdist.tasks import task as task_lib


def make(config: ml_collections.ConfigDict) -> task_lib.Task:
  """Returns the task of a config.

  Args:
    config: all settings. `dpdist.registry.resolve` finds what `config.task`
      names: a function that takes the whole config and returns a task. "": the
      task that the config's model is made for.

  Raises:
    ValueError: names the setting, its value and what would be right.
  """
  ahead = features.blocks_ahead(config.data.get("features", ""))
  if config.model.name == "bert" and config.model.first_block != ahead:
    raise errors.ArgumentError(
      f"model.first_block must be {ahead}, the blocks that are run ahead with"
      f" data.features={config.data.get('features', '')!r}, got"
      f" {config.model.first_block}"
    )
  maker = registry.resolve("task", name(config), setting="task")
  return task_lib.of(maker(config))


def name(config: ml_collections.ConfigDict) -> str:
  """Returns the name of a config's task."""
  if config.task:
    return str(config.task)
  return str(getattr(models.make(config.model), "task", "classification"))


@registry.register("task", "classification")
def _classification(config: ml_collections.ConfigDict) -> task_lib.Task:
  model = models.make(config.model)
  is_bert = config.model.name == "bert"
  has_embeddings = is_bert and not config.model.first_block
  task = cross_entropy.classification(
    model,
    name=_name(config),
    num_classes=config.model.num_outputs,
    vocabulary=config.model.vocabulary if has_embeddings else 0,
    pretrained=_pretrained(config, model),
    trainable=config.model.trainable,
  )
  return dataclasses.replace(task, review=None)  # Tests review our models.


@registry.register("task", "language_model")
def _language_model(config: ml_collections.ConfigDict) -> task_lib.Task:
  model = models.make(config.model)
  task = cross_entropy.language_model(
    model,
    name=_name(config),
    vocabulary=config.model.num_outputs,
    sequence_length=config.data.sequence_length,
    pretrained=_pretrained(config, model),
    trainable=config.model.trainable,
  )
  return dataclasses.replace(task, review=None)  # Tests review our models.


def _name(config: ml_collections.ConfigDict) -> str:
  return (
    f"model.name={config.model.name!r} with"
    f" model.num_outputs={config.model.num_outputs}"
  )


def _pretrained(
  config: ml_collections.ConfigDict, model: nn.Module
) -> functools.partial[dict[str, np.ndarray]]:
  return functools.partial(models.from_disk, config.model, model)
