"""Makes tasks whose loss is the cross-entropy, of classes or of next tokens."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpdist import errors
from dpdist.tasks import chance
from dpdist.tasks import task as task_lib

PyTree = Any

_NAMES = ("inputs", "targets")


def classification(
  model: nn.Module,
  *,
  name: str = "",
  num_classes: int | None = None,
  vocabulary: int = 0,
  **options: Any,
) -> task_lib.Task:
  """Returns a task that trains a classifier by its cross-entropy.

  An example is {"inputs", "targets"}. Its target is a class number. A sequence
  has a target for each place, and a target below 0 marks padding. The held-out
  metrics are accuracy and loss.

  Args:
    model: maps example["inputs"] to logits [..., classes]. Dropout, if it has
      any, takes the rng "dropout".
    name: the model's name in messages; "": the name of its class.
    num_classes: the number of classes; None: the length of the logits' last
      axis.
    vocabulary: if above 0, inputs must be integers below it.
    **options: further attributes of `dpdist.Task`.
  """
  name = name or f"the model {type(model).__name__}"

  def predict(params: PyTree, example: Mapping[str, Any]) -> Any:
    return model.apply({"params": params}, example["inputs"])

  def init(key: jax.Array, example: Mapping[str, Any]) -> PyTree:
    return model.init(key, example["inputs"])["params"]

  def check(
    example: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray]
  ) -> None:
    _check_arrays(example, test, name, num_classes, vocabulary)
    logits = _shape_of_logits(model, init, predict, example, name)
    _check_values(test, name, num_classes or logits[-1], vocabulary)

  largest = {}
  if num_classes:
    largest["targets"] = num_classes - 1
    largest["inputs"] = max(num_classes, vocabulary) - 1
  elif vocabulary:
    largest["inputs"] = vocabulary - 1
  return task_lib.Task(
    init=init,
    loss=loss_of(model),
    metrics=lambda params, example: scores(
      predict(params, example), example["targets"]
    ),
    partitioning=getattr(model, "partitioning", ()),
    predict=predict,
    check=check,
    problem=lambda scores, test: chance.problem(scores, test["targets"]),
    largest_integers=largest,
    **options,
  )


def language_model(
  model: nn.Module,
  *,
  vocabulary: int,
  sequence_length: int | None = None,
  **options: Any,
) -> task_lib.Task:
  """Returns a task that trains a model to predict next tokens.

  An example is {"inputs", "targets"}, both int32 [sequence_length]. A target is
  the next token, or -1 where there is none.

  Args:
    model: maps tokens [length] to logits [length, vocabulary].
    vocabulary: how many tokens there are.
    sequence_length: the length of an example; None: as in the data. If it is
      given, the shapes of an example are known without data.
    **options: see `classification`.
  """
  if sequence_length is not None:
    tokens = jax.ShapeDtypeStruct((sequence_length,), jnp.int32)
    options["example"] = lambda: {"inputs": tokens, "targets": tokens}
  return classification(
    model, num_classes=vocabulary, vocabulary=vocabulary, **options
  )


def loss_of(model: nn.Module) -> Callable[..., tuple[jax.Array, None]]:
  """Returns the mean cross-entropy of a model's logits for one example.

  Targets outside [0, classes) do not count. The loss of a sequence is the mean
  over the targets that count, so a sequence may be padded with -1. If no target
  counts, loss and gradient are 0. This is all that can be done about a bad
  label in private data. Refusing it would reveal it. An index that wraps around
  would silently train on another class, and a NaN would drop the example.

  Args:
    model: maps example["inputs"] to logits [..., classes].

  Returns:
    loss_fn(params, example, rng) -> (loss, None); rng feeds the model's
    dropout, if it has any.
  """

  def loss_fn(
    params: PyTree, example: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[jax.Array, None]:
    logits: Any = model.apply(
      {"params": params}, example["inputs"], rngs={"dropout": rng}
    )
    targets = example["targets"]
    is_target = (targets >= 0) & (targets < logits.shape[-1])
    loss = _cross_entropy(logits, jnp.where(is_target, targets, 0))
    if not loss.ndim:
      return jnp.where(is_target, loss, 0), None
    count = jnp.maximum(1, jnp.sum(is_target))
    return jnp.sum(jnp.where(is_target, loss, 0)) / count, None

  return loss_fn


def scores(
  logits: jax.Array, targets: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns accuracy and loss of one example, each with its weight.

  The weights say which targets count. All do, except those below 0 in a
  sequence, which are padding.
  """
  loss = _cross_entropy(logits, targets)
  hits = jnp.argmax(logits, -1) == targets
  is_target = jnp.ones((), bool)
  if hits.ndim:
    is_target = targets >= 0
    loss = jnp.where(is_target, loss, 0)
  return {"accuracy": (hits & is_target, is_target), "loss": (loss, is_target)}


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]


def is_number(dtype: np.dtype) -> bool:
  """Returns whether JAX can compute with a dtype of NumPy."""
  kinds = (jnp.floating, jnp.integer, jnp.bool_)
  return any(jnp.issubdtype(dtype, kind) for kind in kinds)


# What a data set must hold; no message repeats a value of the training part.


def _check_arrays(
  example: Mapping[str, np.ndarray],
  test: Mapping[str, np.ndarray],
  name: str,
  num_classes: int | None,
  vocabulary: int,
) -> None:
  """Checks the names and dtypes of both parts."""
  held_out = {key: x[0] for key, x in test.items()}
  for part, arrays in (("training", example), ("held-out", held_out)):
    where = f"in the {part} part"
    if not set(_NAMES) <= set(arrays):
      raise errors.ArgumentError(
        f"the {part} part must have columns 'inputs' and 'targets', got"
        f" {sorted(arrays)}"
      )
    inputs, targets = (arrays[key] for key in _NAMES)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
      below = f" in [0, {num_classes}) for {name}" if num_classes else ""
      raise errors.ArgumentError(
        f"targets {where} must be integers, class numbers{below}, got"
        f" {targets.dtype} {targets.shape}"
      )
    if not is_number(inputs.dtype):
      raise errors.ArgumentError(
        f"inputs {where} must be numbers, got {inputs.dtype} {inputs.shape}"
      )
    if vocabulary and not jnp.issubdtype(inputs.dtype, jnp.integer):
      raise errors.ArgumentError(
        f"inputs {where} must be integers, tokens for {name}, got"
        f" {inputs.dtype} {inputs.shape}"
      )


def _shape_of_logits(
  model: nn.Module,
  init: Callable[..., PyTree],
  predict: Callable[..., Any],
  example: Mapping[str, np.ndarray],
  name: str,
) -> tuple[int, ...]:
  """Returns the logits' shape, once the model takes such inputs and targets."""
  inputs, targets = example["inputs"], example["targets"]
  takes_images = getattr(model, "takes_images", False)
  axes = ""
  if takes_images or inputs.ndim == 3:
    axes = ", (height, width, channels)"
  problem = (
    f"inputs must be what {name} takes of one example{axes}, got"
    f" {inputs.dtype} {inputs.shape}"
  )
  if takes_images:
    if inputs.ndim != 3:
      raise errors.ArgumentError(
        f"{problem}, which is no image (height, width, channels)"
      )
    first, *rest = inputs.shape
    if first in (1, 3) and rest[0] == rest[1] > 4:
      raise errors.ArgumentError(f"{problem}, whose channels come first")
  try:
    logits = jax.eval_shape(
      lambda example: predict(init(jax.random.key(0), example), example),
      dict(example),
    )
  except Exception as error:
    # A model that gets inputs it does not take may raise nearly anything.
    lines = str(error).strip().splitlines() or [""]
    raise errors.ArgumentError(
      f"{problem}: {type(error).__name__}: {lines[0]}"
    ) from error
  shape: tuple[int, ...] = logits.shape
  if targets.shape != shape[:-1]:
    is_one_hot = targets.shape == shape
    reason = ", which are one-hot rows" if is_one_hot else ""
    raise errors.ArgumentError(
      f"targets must be class numbers of shape {shape[:-1]} for an example, got"
      f" shape {targets.shape}{reason}"
    )
  return shape


def _check_values(
  test: Mapping[str, np.ndarray], name: str, num_classes: int, vocabulary: int
) -> None:
  """Checks the held-out examples' values."""
  inputs, targets = test["inputs"], test["targets"]
  if jnp.issubdtype(inputs.dtype, jnp.floating):
    bad = int(np.sum(~np.isfinite(inputs.reshape(len(inputs), -1)).all(1)))
    if bad:
      raise errors.ArgumentError(
        f"the held-out inputs must be finite, got {bad} of {len(inputs)}"
        " examples with NaN or infinity"
      )
  # In a sequence, a target below 0 means none: the place is padding.
  low, high = int(targets.min()), int(targets.max())
  if high >= num_classes or (low < 0 and targets.ndim == 1):
    raise errors.ArgumentError(
      f"the held-out targets must be in [0, {num_classes}), the classes of"
      f" {name}, got {low} to {high}"
    )
  if vocabulary and not 0 <= inputs.min() <= inputs.max() < vocabulary:
    raise errors.ArgumentError(
      f"the held-out inputs must be tokens in [0, {vocabulary}) for {name}, got"
      f" {inputs.min()} to {inputs.max()}"
    )
