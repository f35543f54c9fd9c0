"""Checks that a data set has the columns that a task takes.

The training part's contents are private: only its names, shapes and dtypes are
looked at, and no message repeats a value of it.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpdist import errors

PyTree = Any
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Columns:
  """The names of an example's arrays, and what a message calls the model.

  Attributes:
    inputs: what the model takes.
    targets: what it is to predict.
    weights: a number for each example; None: all count alike.
    name: of the model.
  """

  inputs: str
  targets: str
  weights: str | None
  name: str


def is_number(dtype: np.dtype) -> bool:
  """Returns whether JAX can compute with a dtype of NumPy."""
  kinds = (jnp.floating, jnp.integer, jnp.bool_)
  return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def check_arrays(
  columns: Columns,
  example: Arrays,
  test: Arrays,
  *,
  classes: str = "",
  vocabulary: int = 0,
) -> None:
  """Checks the names and dtypes of both parts.

  Targets must be integers if `classes` says what they are, else numbers.
  """
  names = [columns.inputs, columns.targets]
  names += [] if columns.weights is None else [columns.weights]
  held_out = {key: x[0] for key, x in test.items()}
  for part, arrays in (("training", example), ("held-out", held_out)):
    where = f"in the {part} part"
    if not set(names) <= set(arrays):
      listed = " and ".join(map(repr, names))
      raise errors.ArgumentError(
        f"the {part} part must have columns {listed}, got {sorted(arrays)}"
      )
    inputs, targets = arrays[columns.inputs], arrays[columns.targets]
    if classes and not jnp.issubdtype(targets.dtype, jnp.integer):
      raise errors.ArgumentError(
        f"{columns.targets} {where} must be integers, {classes}, got"
        f" {targets.dtype} {targets.shape}"
      )
    for name in names:
      if not is_number(arrays[name].dtype):
        raise errors.ArgumentError(
          f"{name} {where} must be numbers, got {arrays[name].dtype}"
          f" {arrays[name].shape}"
        )
    if columns.weights is not None and arrays[columns.weights].shape:
      raise errors.ArgumentError(
        f"{columns.weights} {where} must be one number for each example, its"
        f" weight, got shape {arrays[columns.weights].shape}"
      )
    if vocabulary and not jnp.issubdtype(inputs.dtype, jnp.integer):
      raise errors.ArgumentError(
        f"{columns.inputs} {where} must be integers, tokens for {columns.name},"
        f" got {inputs.dtype} {inputs.shape}"
      )


def shape_of_outputs(
  columns: Columns,
  init: Callable[..., PyTree],
  predict: Callable[..., Any],
  example: Arrays,
  *,
  takes_images: bool = False,
) -> tuple[int, ...]:
  """Returns the outputs' shape, once the model takes such inputs."""
  inputs = example[columns.inputs]
  axes = ""
  if takes_images or inputs.ndim == 3:
    axes = ", (height, width, channels)"
  problem = (
    f"{columns.inputs} must be what {columns.name} takes of one example{axes},"
    f" got {inputs.dtype} {inputs.shape}"
  )
  if takes_images:
    if inputs.ndim != 3:
      raise errors.ArgumentError(
        f"{problem}, which is no image (height, width, channels)"
      )
    first, *rest = inputs.shape
    if first in (1, 3) and rest[0] == rest[1] > 4:
      raise errors.ArgumentError(f"{problem}, whose channels come first")
  # Others are refused by the name that they have, and not the inputs' name.
  numbers = {name: x for name, x in example.items() if is_number(x.dtype)}
  try:
    outputs = jax.eval_shape(
      lambda example: predict(init(jax.random.key(0), example), example),
      numbers,
    )
  except Exception as error:
    # A model that gets inputs it does not take may raise nearly anything.
    lines = str(error).strip().splitlines() or [""]
    raise errors.ArgumentError(
      f"{problem}: {type(error).__name__}: {lines[0]}"
    ) from error
  if not isinstance(outputs, jax.ShapeDtypeStruct):
    raise errors.ArgumentError(
      f"{columns.name} must return one array, got a {type(outputs).__name__}"
    )
  shape: tuple[int, ...] = outputs.shape
  return shape


def check_classes(
  columns: Columns,
  example: Arrays,
  test: Arrays,
  shape: tuple[int, ...],
  *,
  num_classes: int | None,
) -> None:
  """Checks the targets of a classifier with outputs of such a shape."""
  name = columns.targets
  targets = example[name]
  if targets.shape != shape[:-1]:
    is_one_hot = targets.shape == shape
    reason = ", which are one-hot rows" if is_one_hot else ""
    raise errors.ArgumentError(
      f"{name} must be class numbers of shape {shape[:-1]} for an example, got"
      f" shape {targets.shape}{reason}"
    )
  check_finite(columns, test)
  if num_classes and num_classes > shape[-1]:
    raise errors.ArgumentError(
      f"num_classes, or vocabulary, must be at most {shape[-1]}, the outputs of"
      f" {columns.name}, got {num_classes}"
    )
  num_classes = num_classes or shape[-1]
  # In a sequence, a target below 0 means none: the place is padding.
  low, high = int(test[name].min()), int(test[name].max())
  if high >= num_classes or (low < 0 and test[name].ndim == 1):
    raise errors.ArgumentError(
      f"the held-out {name} must be in [0, {num_classes}), the classes of"
      f" {columns.name}, got {low} to {high}"
    )


def check_tokens(columns: Columns, test: Arrays, vocabulary: int) -> None:
  """Checks that the held-out inputs are tokens of a vocabulary."""
  inputs = test[columns.inputs]
  if not 0 <= inputs.min() <= inputs.max() < vocabulary:
    raise errors.ArgumentError(
      f"the held-out {columns.inputs} must be tokens in [0, {vocabulary}) for"
      f" {columns.name}, got {inputs.min()} to {inputs.max()}"
    )


def check_numbers(
  columns: Columns,
  example: Arrays,
  test: Arrays,
  shape: tuple[int, ...],
  *,
  low: float = -np.inf,
  high: float = np.inf,
  missing: float | None = None,
) -> None:
  """Checks targets that are numbers of the outputs' shape, between bounds.

  `missing` is the number of a target that there is none.
  """
  name = columns.targets
  wanted = example[name].shape
  if shape not in (wanted, (*wanted, 1)):
    raise errors.ArgumentError(
      f"{name} must be numbers of the outputs' shape {shape} of {columns.name},"
      f" got shape {wanted}"
    )
  check_finite(columns, test)
  values = np.asarray(test[name], np.float64)
  is_right = np.isfinite(values) & (low <= values) & (values <= high)
  if missing is not None:
    is_right |= values == missing
  bad = int(np.sum(~is_right.reshape(len(values), -1).all(1)))
  if bad:
    bounds = "finite" if low == -np.inf else f"in [{low:g}, {high:g}]"
    or_none = "" if missing is None else f", or {missing:g} where there is none"
    raise errors.ArgumentError(
      f"the held-out {name} must be {bounds}{or_none}, got {bad} of"
      f" {len(values)} examples with others"
    )


def check_finite(columns: Columns, test: Arrays) -> None:
  """Checks that all held-out inputs are finite."""
  inputs = test[columns.inputs]
  if not jnp.issubdtype(inputs.dtype, jnp.floating):
    return
  bad = int(np.sum(~np.isfinite(inputs.reshape(len(inputs), -1)).all(1)))
  if bad:
    raise errors.ArgumentError(
      f"the held-out {columns.inputs} must be finite, got {bad} of"
      f" {len(inputs)} examples with NaN or infinity"
    )
