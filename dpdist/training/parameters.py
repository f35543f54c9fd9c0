"""What a run's parameters begin as, and which of them are trained.

Weights from disk take the place of initial ones. Where `model.trainable` is
given, what it does not name is frozen: it has no gradient, and so no part in
norms, sums and noise, and nothing is kept beside it. All that is frozen comes
from disk, so that who has the weights and a checkpoint has the model.

Weights from disk are taken for public: what they tell of the data that they
were made from is no part of the guarantee.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import re
from typing import Any

from flax import linen as nn
import jax
import ml_collections
import numpy as np

from dpdist import clipping
from dpdist import models
from dpdist.assets import weights as weights_lib
from dpdist.clipping import freezing
from dpdist.noise import noise
from dpdist.training import step as step_lib
from dpdist.workdir import fingerprint

PyTree = Any


def frozen_paths(
  config: ml_collections.ConfigDict,
) -> Callable[[str], bool] | None:
  """From a parameter's path to whether it is frozen; None: none is.

  Args:
    config: `config.model`.

  Raises:
    ValueError: trainable is no regular expression.
  """
  if not config.trainable:
    return None
  try:
    pattern = re.compile(config.trainable)
  except re.error as error:
    raise ValueError(
      f"model.trainable must be a regular expression, got"
      f" {config.trainable!r}: {error}"
    ) from error
  return lambda path: pattern.search(path) is None


def of(
  config: ml_collections.ConfigDict,
  model: nn.Module,
  words: Any,
  example: Any,
) -> "Parameters":
  """Reads a run's weights from disk, if it has any.

  Args:
    config: `config.model`.
    model: of the config.
    words: see `Parameters`; likewise example. Shapes are enough for all but
      `Parameters.init`.

  Raises:
    ValueError, ModuleNotFoundError: see `Parameters` and `models.from_disk`.
  """
  weights = models.from_disk(config, model)
  is_frozen = frozen_paths(config)
  make = functools.partial(make_params, model)
  return Parameters(make, words, example, weights, config.trainable, is_frozen)


def make_params(
  model: nn.Module, words: jax.Array, example: jax.Array
) -> PyTree:
  """A model's initial parameters.

  Args:
    model: maps the inputs of one example to logits.
    words: uint32 [2], of the key of the stream "init".
    example: inputs of one example, of which only the shape matters.
  """
  return model.init(noise.as_key(words), example)["params"]


def frozen_sha256(frozen: PyTree | None) -> str:
  """Of frozen parameters; "" without any. To be called in all processes."""
  return "" if frozen is None else fingerprint.params_sha256(frozen)


# Without a repr, which would show the key.
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Parameters:
  """Of one run.

  Attributes:
    make: (words, example) -> initial parameters of the whole model; traced.
    words: uint32 [2], of the key of the stream "init".
    example: inputs of one example, of which only the shape matters.
    weights: from disk, by path; in the place of initial ones.
    trainable: what `model.trainable` says, for messages.
    is_frozen: from `frozen_paths`.

  Raises:
    ValueError: weights that do not fit, or frozen parameters that would stay
      as random as they begin.
  """

  make: Callable[[Any, Any], PyTree]
  words: Any
  example: Any
  weights: Mapping[str, np.ndarray]
  trainable: str
  is_frozen: Callable[[str], bool] | None

  def __post_init__(self) -> None:
    whole = dict(zip(freezing.names(self._whole), self._leaves, strict=True))
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
    """Of the trained parameters; None where one is frozen."""
    return self._part(self._whole, is_frozen=False)

  @functools.cached_property
  def frozen_shapes(self) -> PyTree | None:
    """Of the frozen ones, None where one is trained; None: there are none."""
    if self.is_frozen is None:
      return None
    return self._part(self._whole, is_frozen=True)

  def init(self, step: step_lib.Step) -> step_lib.TrainState:
    """The state before the first step, on the step's mesh."""
    return self.initializer(step)(self.words)

  def initializer(
    self, step: step_lib.Step
  ) -> Callable[[Any], step_lib.TrainState]:
    """The same, of other words: one function, which compiles once."""

    def make(
      words: Any, example: Any, weights: Mapping[str, jax.Array]
    ) -> PyTree:
      return self._part(
        _replaced(self.make(words, example), weights), is_frozen=False
      )

    trained = {k: v for k, v in self.weights.items() if not self._frozen(k)}
    run = step.initializer(make, self.words, self.example, trained)
    return lambda words: run(words, self.example, trained)

  def frozen(self, step: step_lib.Step) -> PyTree | None:
    """The frozen parameters, on the step's mesh; None without any."""
    if self.is_frozen is None:
      return None
    # Each process hands over what its devices hold, and no more.
    return step.placed(_replaced(self.frozen_shapes, self.weights))

  @functools.cached_property
  def weights_sha256(self) -> str:
    """Of all weights from disk; "" without any."""
    return weights_lib.sha256(self.weights)

  @functools.cached_property
  def _whole(self) -> PyTree:
    return jax.eval_shape(self.make, self.words, self.example)

  @property
  def _leaves(self) -> list[Any]:
    return jax.tree.leaves(self._whole)

  def _frozen(self, path: str) -> bool:
    return self.is_frozen is not None and self.is_frozen(path)

  def _part(self, params: PyTree, *, is_frozen: bool) -> PyTree:
    if self.is_frozen is None:
      return params
    return clipping.partition(params, self.is_frozen)[is_frozen]


def _replaced(params: PyTree, weights: Mapping[str, Any]) -> PyTree:
  """Params with the weights at their paths."""
  leaves, treedef = jax.tree.flatten(params)
  # mypy takes JAX's own class of tree structures for a mere name.
  structure: Any = treedef
  paths = freezing.names(params)
  return structure.unflatten(
    [weights.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
  )
