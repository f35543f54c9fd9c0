"""A run's initial parameters, and which of them are trained.

Weights from disk replace initial ones. If `model.trainable` is set, parameters
that it does not name are frozen: they have no gradient, and so no part in
norms, sums and noise, and nothing is kept beside them. All frozen parameters
come from disk, so the weights and a checkpoint together are the whole model.

Weights from disk count as public: what they reveal of the data that they were
trained on is no part of the guarantee.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np

from dpdist import clipping
from dpdist.assets import weights as weights_lib
from dpdist.clipping import freezing
from dpdist.noise import noise
from dpdist.tasks import task as task_lib
from dpdist.training import step as step_lib
from dpdist.workdir import fingerprint

PyTree = Any


def frozen_paths(trainable: str) -> Callable[[str], bool] | None:
  """Returns a function from a path to whether it is frozen; None if none is."""
  if not trainable:
    return None
  try:
    pattern = re.compile(trainable)
  except re.error as error:
    raise ValueError(
      f"model.trainable must be a regular expression, got {trainable!r}:"
      f" {error}"
    ) from error
  return lambda path: pattern.search(path) is None


def of(task: task_lib.Task, key_data: Any, example: Any) -> "Parameters":
  """Returns a task's parameters; reads its weights from disk, if it has any.

  `key_data`, uint32 [2], is the key of the stream "init"; its shape is enough
  for all but `Parameters.init`. `example` has arrays of one example by name, or
  their shapes; no value is used. Raises ValueError or ModuleNotFoundError if
  the weights cannot be read, and as `Parameters` does.
  """
  zeros = {name: np.zeros(x.shape, x.dtype) for name, x in example.items()}
  return Parameters(
    make=functools.partial(make_params, task),
    key_data=key_data,
    example=zeros,
    weights=task_lib.weights(task),
    trainable=task.trainable,
    is_frozen=frozen_paths(task.trainable),
  )


def make_params(
  task: task_lib.Task, key_data: jax.Array, example: PyTree
) -> PyTree:
  """Returns a task's initial parameters, from data of the key of "init"."""
  return task.init(noise.as_key(key_data), example)


def frozen_sha256(frozen: PyTree | None) -> str:
  """Returns the SHA-256 of frozen parameters, in all processes; "": none."""
  return "" if frozen is None else fingerprint.params_sha256(frozen)


# Without a repr, which would show the key.
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Parameters:
  """The parameters of one run; none that is frozen may be random."""

  # (key_data, example) -> initial parameters of the whole model; traced.
  make: Callable[[Any, Any], PyTree]
  key_data: Any  # uint32 [2], the key of the stream "init".
  example: Any  # Zeros in the place of an example's arrays, by name.
  # From disk, by path; they replace initial ones.
  weights: Mapping[str, np.ndarray]
  trainable: str  # Of the task, for messages.
  is_frozen: Callable[[str], bool] | None  # From `frozen_paths`.

  def __post_init__(self) -> None:
    leaves = jax.tree.leaves(self._whole)
    whole = dict(zip(freezing.names(self._whole), leaves, strict=True))
    for path, array in self.weights.items():
      want = whole[path].shape if path in whole else None
      if array.shape != want:
        raise ValueError(
          f"model.weights must fit the model's settings, got {path!r} of shape"
          f" {array.shape} where the model has {want or 'none'}"
        )
    if self.is_frozen is None:
      return
    frozen = [path for path in whole if self.is_frozen(path)]
    if len(frozen) in (0, len(whole)):
      raise ValueError(
        "model.trainable must name some parameters, and not all, got"
        f" {self.trainable!r} for {sorted(whole)}"
      )
    random = sorted(set(frozen) - set(self.weights))
    if random:
      raise ValueError(
        "model.trainable must name the parameters that model.weights does not"
        f" hold, got {self.trainable!r} without {random}, which would stay as"
        " random as they begin"
      )

  @functools.cached_property
  def shapes(self) -> PyTree:
    """Returns the trained parameters' shapes; None where one is frozen."""
    return self._part(self._whole, is_frozen=False)

  @functools.cached_property
  def frozen_shapes(self) -> PyTree | None:
    """Returns the frozen parameters' shapes, None where one is trained."""
    if self.is_frozen is None:
      return None
    return self._part(self._whole, is_frozen=True)

  def init(self, step: step_lib.Step) -> step_lib.TrainState:
    """Returns the state before the first step, on the step's mesh."""
    return self.initializer(step)(self.key_data)

  def initializer(self, step: step_lib.Step) -> "Initializer":
    """Returns `init` as a function of the key_data, which compiles once."""
    return Initializer(self, step)

  def _trained_params(
    self, key_data: Any, example: Any, weights: Mapping[str, jax.Array]
  ) -> PyTree:
    params = _replaced(self.make(key_data, example), weights)
    return self._part(params, is_frozen=False)

  @property
  def _trained_weights(self) -> dict[str, np.ndarray]:
    return {k: v for k, v in self.weights.items() if not self._frozen(k)}

  def frozen(self, step: step_lib.Step) -> PyTree | None:
    """Returns the frozen parameters, on the step's mesh; None without any."""
    if self.is_frozen is None:
      return None
    # Each process passes what its devices hold, and no more.
    return step.placed(_replaced(self.frozen_shapes, self.weights))

  @functools.cached_property
  def weights_sha256(self) -> str:
    """Returns the SHA-256 of all weights from disk; "" without any."""
    return weights_lib.sha256(self.weights)

  @functools.cached_property
  def _whole(self) -> PyTree:
    return jax.eval_shape(self.make, self.key_data, self.example)

  def _frozen(self, path: str) -> bool:
    return self.is_frozen is not None and self.is_frozen(path)

  def _part(self, params: PyTree, *, is_frozen: bool) -> PyTree:
    if self.is_frozen is None:
      return params
    return clipping.partition(params, self.is_frozen)[is_frozen]


class Initializer:
  """Makes the state before the first step, on the step's mesh."""

  def __init__(self, start: Parameters, step: step_lib.Step):
    """Traces what makes the state; makes none yet."""
    self.shapes = start.shapes  # Of the trained parameters.
    self._step, self._key_data = step, start.key_data
    self._more = (start.example, start._trained_weights)
    self._program = step.initializer(
      start._trained_params, self._key_data, *self._more
    )

  def __call__(self, key_data: Any) -> step_lib.TrainState:
    """Returns the state."""
    return self._step.on_mesh(self._program(key_data, *self._more))

  def lowered(self) -> jax.stages.Lowered:
    """Returns the program that a call runs, not compiled."""
    return self._program.lower(self._key_data, *self._more)


def _replaced(params: PyTree, weights: Mapping[str, Any]) -> PyTree:
  """Returns params with the weights at their paths."""
  leaves, treedef = jax.tree.flatten(params)
  # mypy takes JAX's own class of tree structures for a mere name.
  structure: Any = treedef
  paths = freezing.names(params)
  return structure.unflatten(
    [weights.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
  )
