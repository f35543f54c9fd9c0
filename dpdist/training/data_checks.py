"""Compares what is public of a data set with the model, before any charge.

Public are the names, shapes and dtypes of all arrays, and the held-out set,
whose metrics are released without noise. The training set's contents are
private: no check here depends on a value of it. A label there that no class has
counts as no label, with loss 0; see `dpdist.tasks.classification`.
"""

from collections.abc import Mapping
import hashlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dpdist.data import augment
from dpdist.data import sources
from dpdist.data import users
from dpdist.data.datasets import datasets
from dpdist.training import parameters

_NAMES = ("inputs", "targets")
# The most rows of each part that are compared.
_MOST_ROWS = 65_536
_MOST_BYTES = 1 << 28
_BLOCK = 1024


def fit(
  config: ml_collections.ConfigDict,
  splits: datasets.Splits,
  model: nn.Module,
  key_data: np.ndarray,
) -> tuple[
  dict[str, np.ndarray],
  dict[str, jax.ShapeDtypeStruct],
  parameters.Parameters,
]:
  """Checks that data and model fit one another.

  Args:
    config: all settings.
    splits: the data.
    model: the config's model.
    key_data: for `parameters.of`.

  Returns:
    All held-out examples; the shapes of a row of the training part; the
    model's parameters.

  Raises:
    ValueError: names what does not fit, its value and what would be right.
  """
  test = splits.test.read(np.arange(len(splits.test)))
  example = one_example(splits.train)
  check(config, example, test)
  augment.check(config, example["inputs"].shape)
  check_model(
    config,
    example,
    lambda: model.init_with_output(jax.random.key(0), example["inputs"])[0],
  )
  row = splits.train.read(np.zeros(1, np.int64))
  return (
    test,
    {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in row.items()},
    parameters.of(config.model, model, key_data, example["inputs"]),
  )


def one_example(source: sources.Source) -> dict[str, np.ndarray]:
  """Returns one example, for its shapes.

  Of a source of units, it is one example without the axis of slots.
  """
  row = {k: x[0] for k, x in source.read(np.zeros(1, np.int64)).items()}
  if isinstance(source, users.UserSource):
    del row[users.SLOT_IS_EMPTY]
    return {k: x[0] for k, x in row.items()}
  return row


def check(
  config: ml_collections.ConfigDict,
  example: Mapping[str, np.ndarray],
  test: Mapping[str, np.ndarray],
) -> None:
  """Checks a data set against the settings.

  Args:
    config: all settings.
    example: an example of the training set, whose values are not read.
    test: all held-out examples.

  Raises:
    ValueError: names the array, what it has and what would be right.
  """
  parts = {
    "training": {name: (x.dtype, x.shape) for name, x in example.items()},
    "held-out": {name: (x.dtype, x.shape[1:]) for name, x in test.items()},
  }
  for part, found in parts.items():
    _check_arrays(config, part, found)
  shapes = [
    {name: s for name, (_, s) in part.items()} for part in parts.values()
  ]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"{_what(config)} must have examples of one shape in both parts, got"
      f" {shapes[0]} to train on and {shapes[1]} held out"
    )
  if not len(test["targets"]):
    raise ValueError(f"{_what(config)} must hold out 1 example or more, got 0")
  inputs, targets = test["inputs"], test["targets"]
  if jnp.issubdtype(inputs.dtype, jnp.floating):
    bad = int(np.sum(~np.isfinite(inputs.reshape(len(inputs), -1)).all(1)))
    if bad:
      raise ValueError(
        f"the held-out inputs of {_what(config)} must be finite, got {bad} of"
        f" {len(inputs)} examples with NaN or infinity"
      )
  classes = config.model.num_outputs
  # In a sequence, a target below 0 means none: the place is padding.
  low, high = int(targets.min()), int(targets.max())
  if high >= classes or (low < 0 and targets.ndim == 1):
    raise ValueError(
      f"the held-out targets of {_what(config)} must be in [0, {classes}), for"
      f" model.num_outputs={classes}, got {low} to {high}"
    )
  vocabulary = _vocabulary(config)
  if vocabulary and not 0 <= inputs.min() <= inputs.max() < vocabulary:
    raise ValueError(
      f"the held-out inputs of {_what(config)} must be tokens in [0,"
      f" {vocabulary}) for model.name={config.model.name!r}, got"
      f" {inputs.min()} to {inputs.max()}"
    )


def check_model(
  config: ml_collections.ConfigDict,
  example: Mapping[str, np.ndarray],
  logits: Any,
) -> None:
  """Checks the targets' shape against that of the model's logits.

  Args:
    config: all settings.
    example: an example of the training set, whose values are not read.
    logits: a function without arguments that returns the logits; traced.

  Raises:
    ValueError: the model does not take such inputs, or needs other targets.
  """
  inputs, targets = example["inputs"], example["targets"]
  name = config.model.name
  like = f"{inputs.dtype} {inputs.shape}"
  is_image = inputs.ndim == 3 or name in ("cnn", "wide_resnet")
  axes = ", (height, width, channels)" if is_image else ""
  problem = (
    f"inputs of {_what(config)} must be what model.name={name!r} takes of one"
    f" example{axes}, got {like}"
  )
  if name in ("cnn", "wide_resnet"):
    if inputs.ndim != 3:
      raise ValueError(
        f"{problem}, which is no image (height, width, channels)"
      )
    first, *rest = inputs.shape
    if first in (1, 3) and rest[0] == rest[1] > 4:
      raise ValueError(f"{problem}, whose channels come first")
  try:
    shape = jax.eval_shape(logits).shape
  except Exception as error:
    # A model that gets inputs it does not take may raise nearly anything.
    lines = str(error).strip().splitlines() or [""]
    raise ValueError(
      f"{problem}: {type(error).__name__}: {lines[0]}"
    ) from error
  if targets.shape != shape[:-1]:
    one_hot = targets.shape == shape
    reason = ", which are one-hot rows" if one_hot else ""
    raise ValueError(
      f"targets of {_what(config)} must be class numbers of shape"
      f" {shape[:-1]} for an example, got shape {targets.shape}{reason}"
    )


def shared_rows(train: sources.Source, test: Mapping[str, np.ndarray]) -> str:
  """Compares the first rows of both parts.

  PRIVATE: that a held-out row equals a training row reveals something of the
  training data. Show the returned text on its owner's screen alone.

  Args:
    train: the training set: examples, or units of them.
    test: all held-out examples.

  Returns:
    A sentence if rows are in both parts; else "".
  """
  if isinstance(train, users.UserSource):
    train = train.examples
  size = max(1, sum(x[:1].nbytes for x in test.values()))
  most = max(1, min(_MOST_ROWS, _MOST_BYTES // size))
  held_out = min(most, len(test["targets"]))
  kept = set(_hashes({name: x[:held_out] for name, x in test.items()}))
  trained_on = min(most, len(train))
  found: set[bytes] = set()
  for start in range(0, trained_on, _BLOCK):
    rows = np.arange(start, min(start + _BLOCK, trained_on))
    found.update(kept.intersection(_hashes(train.read(rows))))
  if not found:
    return ""
  return (
    f"{len(found):,} of the first {held_out:,} held-out examples are equal to"
    f" one of the first {trained_on:,} that are trained on: held-out metrics"
    " are released as they are, so such an example is not protected, and they"
    " say less about new data. This line tells of the training data: it is for"
    " its owner alone"
  )


def _hashes(arrays: Mapping[str, np.ndarray]) -> list[bytes]:
  """Returns a hash of each row, over all arrays in order of name."""
  names = sorted(arrays)
  columns = [np.ascontiguousarray(arrays[name]) for name in names]
  return [
    hashlib.blake2b(
      b"".join(x[i].tobytes() for x in columns), digest_size=16
    ).digest()
    for i in range(len(columns[0]))
  ]


def _check_arrays(
  config: ml_collections.ConfigDict,
  part: str,
  found: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
) -> None:
  where = f"the {part} part of {_what(config)}"
  if not set(_NAMES) <= set(found):
    raise ValueError(
      f"{where} must have columns 'inputs' and 'targets', got {sorted(found)}"
    )
  for name, (dtype, shape) in found.items():
    is_number = any(
      jnp.issubdtype(dtype, kind)
      for kind in (jnp.floating, jnp.integer, jnp.bool_)
    )
    if name != "targets" and not is_number:
      raise ValueError(
        f"{name} in {where} must be numbers, got {dtype} {shape}"
      )
  classes = config.model.num_outputs
  dtype, shape = found["targets"]
  if not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(
      f"targets in {where} must be integers, class numbers in [0, {classes})"
      f" for model.num_outputs={classes}, got {dtype} {shape}"
    )
  dtype, shape = found["inputs"]
  if _vocabulary(config) and not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(
      f"inputs in {where} must be integers, tokens for model.name="
      f"{config.model.name!r}, got {dtype} {shape}"
    )


def _vocabulary(config: ml_collections.ConfigDict) -> int:
  """Returns the vocabulary size of a model of tokens; 0 of another model."""
  model = config.model
  if model.name in ("decoder", "stacked_decoder"):
    return model.num_outputs
  if model.name == "bert" and not model.first_block:
    return model.vocabulary
  return 0


def _what(config: ml_collections.ConfigDict) -> str:
  path = config.data.path
  return f"data set {config.data.name!r}" + (f" in {path!r}" if path else "")
