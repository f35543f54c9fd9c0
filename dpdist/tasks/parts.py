"""The parts of a run that may come from outside: task, data set, optimizer.

Each is named by the config, or given as an object. Code from outside decides
what a run releases as much as ours does, so it enters the run's fingerprint:
see `Parts.code_sha256`, and `dpdist.training.abstract_step` for what code
without a file computes.
"""

import dataclasses
from typing import Any, NoReturn

import ml_collections
import optax

from dpdist import errors
from dpdist import registry
from dpdist.data import dataset as dataset_lib
from dpdist.data.datasets import datasets
from dpdist.tasks import from_config
from dpdist.tasks import optimizers
from dpdist.tasks import task as task_lib

GIVEN = "given as an object"
"""The name that a run's settings have for a part given as an object."""


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
  """The parts that were given as objects; None: the config names the part.

  Attributes:
    task: what is trained.
    dataset: what it is trained on.
    optimizer: what turns noisy means into updates.
  """

  task: task_lib.Task | None = None
  dataset: dataset_lib.Dataset | None = None
  optimizer: optax.GradientTransformation | None = None

  def settings(
    self, config: ml_collections.ConfigDict
  ) -> ml_collections.ConfigDict:
    """Returns a config that has `GIVEN` as the name of each given part.

    So the settings that are saved with a run name no part that it did not use.
    """
    if (self.task, self.dataset, self.optimizer) == (None, None, None):
      return config
    config = ml_collections.ConfigDict(config.to_dict())
    if self.task is not None:
      config.task = config.model.name = GIVEN
    if self.dataset is not None:
      config.data.name = GIVEN
    if self.optimizer is not None:
      config.optimizer.name = GIVEN
    return config

  def make_task(self, config: ml_collections.ConfigDict) -> task_lib.Task:
    """Returns the task.

    Raises:
      ValueError: names the setting, its value and what would be right.
    """
    if self.task is not None:
      return self.task
    if config.task == GIVEN:
      _missing("task")
    return from_config.make(config)

  def make_optimizer(
    self, config: ml_collections.ConfigDict
  ) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
    """Returns the optimizer, and its learning rate by step or None if unknown.

    Raises:
      ValueError: names the setting, its value and what would be right.
    """
    if self.optimizer is not None:
      return self.optimizer, None
    if config.optimizer.name == GIVEN:
      _missing("optimizer")
    return optimizers.make(config.optimizer, config.privacy.num_steps)

  def load_dataset(
    self, config: ml_collections.ConfigDict
  ) -> dataset_lib.Dataset:
    """Opens the data set; see `dpdist.data.datasets.datasets.load`.

    Raises:
      ValueError: names the setting, its value and what would be right.
    """
    if self.dataset is None and config.data.name == GIVEN:
      _missing("dataset")
    return datasets.load(config.data, self.dataset)

  def code_sha256(self, config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the SHA-256 of code outside of this project, by kind of part.

    This project's own parts are left out. A part that the config names must
    have been made before.

    Raises:
      ValueError: the code was changed after it was read, or the code of a data
        set is in no file.
    """
    found = {}
    if self.dataset is None:
      found["dataset"] = registry.code_sha256(
        "dataset", config.data.name, setting="data.name"
      )
    else:
      found["dataset"] = registry.code_sha256_of(
        dataset_lib.code(self.dataset), setting="dataset", needs_files=True
      )
    if self.task is None:
      name = from_config.name(config)
      found["task"] = registry.code_sha256("task", name, setting="task")
    else:
      functions = [
        value
        for value in vars(self.task).values()
        if callable(value) and value is not None
      ]
      found["task"] = _code_of(functions, "task")
    # A task from outside need not look at the model.
    name = config.model.name
    if ":" in name or registry.is_known("model", name):
      found["model"] = registry.code_sha256(
        "model", config.model.name, setting="model.name"
      )
    if self.optimizer is not None:
      found["optimizer"] = _code_of([*self.optimizer], "optimizer")
    elif optimizers.is_registered(config.optimizer.name):
      found["optimizer"] = registry.code_sha256(
        "optimizer", config.optimizer.name, setting="optimizer.name"
      )
    return {f"{kind}_code_sha256": x for kind, x in found.items() if x}

  @property
  def is_any_given(self) -> bool:
    """Returns whether a part is given as an object."""
    return any(
      part is not None for part in (self.task, self.dataset, self.optimizer)
    )


NAMED = Parts()
"""Parts of which the config names all."""


def of(task: Any = None, dataset: Any = None, optimizer: Any = None) -> Parts:
  """Returns the parts that a user gave; None: the config names the part.

  Raises:
    ValueError: a part does not have the type or attributes that it needs.
  """
  if optimizer is not None:
    optimizers.check(optimizer, "optimizer")
  return Parts(
    None if task is None else task_lib.of(task),
    None if dataset is None else dataset_lib.of(dataset),
    optimizer,
  )


def name_of_data(config: ml_collections.ConfigDict) -> str:
  """Returns what messages call the data set of a config."""
  name, path = config.data.name, config.data.path
  if name == GIVEN:
    return "the data set (of get_dataset or dataset=)"
  return f"data set {name!r}" + (f" in {path!r}" if path else "")


def _code_of(functions: list[Any], name: str) -> str:
  # Code without a file, as of a notebook, is told apart by what it computes.
  return registry.code_sha256_of(functions, setting=name, needs_files=False)


def _missing(name: str) -> NoReturn:
  raise errors.ArgumentError(
    f"{name} must be given as it was to the run: by get_{name}(config) of the"
    f" file in --config, or as the argument {name}, got none",
    hint=errors.Hint(flags=("--config=FILE",)),
  )
