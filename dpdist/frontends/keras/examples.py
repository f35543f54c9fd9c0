"""The private examples of a Keras fit: arrays, or a data set that has an index.

Each step draws examples by their numbers. So data is taken that can be asked
for any of them: arrays, a `keras.utils.PyDataset`, and whatever has a length
and an item (x, y) or (x, y, weight) for each index.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import math
from typing import Any

import jax
import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.data import arrays as arrays_lib
from dpdist.data import sources
from dpdist.data import users as users_lib
from dpdist.frontends import keras_loss
from dpdist.frontends.keras import indexed
from dpdist.privacy import plan as plan_lib
from dpdist.sensitivity import sentinel

PyTree = Any

_WEIGHT = "class_weight"
_MOST_WORK = 100_000  # Of the search for an overlap of strided arrays.
_WAY_OUT = (
  "examples are drawn by their numbers, and not in the order of a pipeline."
  " Give arrays (for a tf.data.Dataset: x, y = next(iter(dataset.batch(n)))), a"
  " keras.utils.PyDataset, or what has a length and an item (x, y) for each"
  " index, as tfds.data_source(...) and map-style data sets have"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """The examples as rows of named arrays, and how they are put together.

  Attributes:
    rows: the source of the named arrays.
    names: of the leaves of an example, in order.
    structure: of an example: (x, y) or (x, y, weight).
    largest: by name, the largest integer of each array.
    source: what was given, if it has an index.
    arrays: the inputs that were given, if they are arrays.
    class_weight: by class, what its examples' losses are multiplied by.
  """

  rows: sources.Source
  names: tuple[str, ...]
  structure: Any
  largest: Mapping[str, int]
  source: Any = ()
  arrays: tuple[np.ndarray, ...] = ()
  class_weight: Mapping[int, float] | None = None

  def __len__(self) -> int:
    return len(self.rows)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """See `dpdist.data.sources.Source.read`; in the dtypes that JAX has."""
    read = self.rows.read(indices)
    batch = {
      name: np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
      for name, x in read.items()
    }
    if self.class_weight is not None:
      batch[_WEIGHT] = _class_weights(read["[1]"], self.class_weight)
    return batch

  def content_digest(self) -> str:
    """See `dpdist.data.sources.Source.content_digest`."""
    return self.rows.content_digest()

  def encoding_digest(self) -> str:
    """See `dpdist.data.sources.encoding_digest`."""
    if self.class_weight is None:
      return ""
    text = json.dumps(sorted(self.class_weight.items()))
    return hashlib.sha256(text.encode()).hexdigest()

  def changed_files(self) -> list[str]:
    """See `dpdist.data.sources.changed_files`."""
    return sources.changed_files(self.rows)

  def is_touched(self) -> bool:
    """See `dpdist.data.sources.is_touched`."""
    return sources.is_touched(self.rows)

  @property
  def is_in_memory(self) -> bool:
    """Returns whether no read touches a file or runs a user's code."""
    return bool(getattr(self.rows, "is_in_memory", False))

  def join(self, row: Mapping[str, Any]) -> tuple[PyTree, ...]:
    """Returns the example (x, y) or (x, y, weight) of a row."""
    joined: tuple[PyTree, ...] = self.structure.unflatten(
      [row[name] for name in self.names]
    )
    if self.class_weight is not None:
      joined = (*joined, row[_WEIGHT])
    return joined

  def row(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example's arrays."""
    one = self.read(np.zeros(1, np.int64))
    return {
      name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
      for name, x in one.items()
    }

  @property
  def is_weighted(self) -> bool:
    """Returns whether losses are weighted."""
    return self.class_weight is not None or any(
      name.startswith("[2]") for name in self.names
    )

  def shares(self, other: PyTree) -> bool:
    """Returns whether inputs are, or overlap, those that are trained on."""
    if other is self.source:
      return True
    return any(
      _overlap(mine, leaf)
      for leaf in jax.tree.leaves(other)
      if isinstance(leaf, np.ndarray)
      for mine in self.arrays
    )


def of(
  x: PyTree,
  y: PyTree = None,
  sample_weight: Any = None,
  class_weight: Mapping[int, float] | None = None,
  *,
  num_examples: int | None = None,
) -> Examples:
  """Returns the examples that a `fit` was given.

  Raises ValueError if they cannot be read by their numbers, do not fit one
  another, or are not as many as the plan says; None: it says nothing.
  """
  keras = keras_loss.keras
  if isinstance(x, keras.utils.PyDataset):
    made = _indexed(x, x.num_batches, (y, sample_weight), is_batched=True)
  elif _is_pipeline(x):
    raise errors.ArgumentError(
      f"x must be data that has an index, got {_type(x)}: {_WAY_OUT}"
    )
  elif _is_indexed(x):
    made = _indexed(x, len(x), (y, sample_weight), is_batched=False)
  else:
    if num_examples is not None:
      _check_number((x, y, sample_weight), num_examples)
    made = _of_arrays(x, y, sample_weight)
  _validation.require(
    num_examples in (None, len(made)),
    "x",
    f"the plan's num_examples={num_examples} examples",
    len(made),
  )
  if class_weight is None:
    return made
  if made.is_weighted:
    raise errors.ArgumentError(
      "class_weight must be None where examples have weights of their own, got"
      f" {dict(class_weight)}: multiply sample_weight by it"
    )
  if [name for name in made.names if name.startswith("[1]")] != ["[1]"]:
    raise errors.ArgumentError(
      "class_weight must be None for a model of several targets, got"
      f" {dict(class_weight)}: give sample_weight"
    )
  weights = {
    int(
      _validation.check("a class of class_weight", k, _validation.integer(0))
    ): _validation.check(f"class_weight[{k}]", v, _validation.real(at_least=0))
    for k, v in class_weight.items()
  }
  return dataclasses.replace(
    made, class_weight=weights, largest={**made.largest, _WEIGHT: 0}
  )


def split(
  given: tuple[PyTree, PyTree, Any],
  fraction: float | None,
  held_out: Any,
  num_examples: int,
) -> tuple[tuple[PyTree, PyTree, Any], Any]:
  """Holds out the last part of arrays, by the rule of Keras.

  The first floor(n * (1 - fraction)) rows are trained on. Which these are
  depends on their number alone. If fraction is None, `held_out` is.

  Returns:
    (x, y, sample_weight) to train on, and what to evaluate.

  Raises:
    ValueError: these are not arrays, or another number than the plan's
      num_examples is left to train on.
  """
  if fraction is None:
    return given, held_out
  if held_out is not None:
    raise errors.ArgumentError(
      "validation_split must be None where validation_data is given, got"
      f" {fraction}"
    )
  rule = _validation.real(above=0, below=1)
  fraction = _validation.check("validation_split", fraction, rule)
  if _is_pipeline(given[0]) or _is_indexed(given[0]):
    raise errors.ArgumentError(
      "validation_split must be None for data that is not in arrays, got"
      f" {fraction}: give validation_data"
    )
  arrays = jax.tree.map(np.asarray, given)
  total = len(jax.tree.leaves(arrays)[0])
  left = math.floor(total * (1.0 - fraction))
  if left != num_examples:
    raise errors.ArgumentError(
      f"validation_split must leave the plan's num_examples={num_examples} to"
      f" train on, which alone are protected, got {fraction} of {total}, which"
      f" leaves {left}: make the budget for num_examples={left}"
    )
  train = jax.tree.map(lambda a: a[:left], arrays)
  last = jax.tree.map(lambda a: a[left:], arrays)
  return train, last[:2] if last[2] is None else last


def drawn(
  data: Examples, plan: plan_lib.PrivacyPlan, users: Any, slots: int | None
) -> sources.Source:
  """Returns the rows that are drawn: examples, groups, or users.

  Of a user's examples at most `slots` are used in an update. Raises ValueError
  if `users` does not fit the examples, or the plan.
  """
  _validation.require(
    (users is None) == (slots is None),
    "users",
    "given where users are the unit, and None elsewhere",
    None if users is None else type(users).__name__,
  )
  if plan.group_size > 1:
    return users_lib.in_groups(data, plan.group_size)
  if users is None or slots is None:
    return data
  ids = np.asarray(users)
  if ids.shape != (len(data),):
    raise errors.ArgumentError(
      f"users must say of each of the {len(data)} examples whose it is, got"
      f" {ids.dtype} {ids.shape}"
    )
  unit_of_example, count = users_lib.number(ids, name="users")
  _validation.require(
    count == plan.num_examples,
    "users",
    f"as many as the plan's num_examples={plan.num_examples}, which counts"
    " users",
    count,
  )
  return users_lib.UserSource(data, unit_of_example, count, slots)


def _of_arrays(x: PyTree, y: PyTree, sample_weight: Any) -> Examples:
  given = (x, y) if sample_weight is None else (x, y, sample_weight)
  tree = jax.tree.map(np.asarray, given)
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
  if sample_weight is not None:
    shape = tree[2].shape
    _validation.require(
      len(shape) == 1, "sample_weight", "one number for each example", shape
    )
  # Made before anything is read, so that it misses no change of a file.
  lengths = {leaf.shape[:1] for leaf in named.values()}
  if len(lengths) != 1 or () in lengths:
    raise errors.ArgumentError(
      "x, y and sample_weight must hold as many examples along their first"
      f" axis, got shapes {[leaf.shape for leaf in named.values()]}"
    )
  return Examples(
    arrays_lib.ArraySource(named),
    tuple(named),
    structure,
    {name: sentinel.largest_integer(leaf) for name, leaf in named.items()},
    arrays=tuple(jax.tree.leaves(tree[0])),
  )


def _is_pipeline(x: Any) -> bool:
  """Returns whether this yields examples in an order of its own."""
  is_tf = type(x).__module__.split(".")[0] == "tensorflow"
  is_like_tf = hasattr(x, "element_spec") and hasattr(x, "as_numpy_iterator")
  if hasattr(x, "__array__") or isinstance(x, list | tuple | Mapping):
    return False
  return is_tf or is_like_tf or not hasattr(x, "__getitem__")


def _is_indexed(x: Any) -> bool:
  if hasattr(x, "__array__") or isinstance(x, list | tuple | Mapping | str):
    return False
  return hasattr(x, "__getitem__") and hasattr(x, "__len__")


def _type(x: Any) -> str:
  return f"{type(x).__module__}.{type(x).__name__}"


def _indexed(
  items: Any,
  count: int | None,
  others: tuple[Any, Any],
  *,
  is_batched: bool,
) -> Examples:
  for name, value in zip(("y", "sample_weight"), others, strict=True):
    if value is not None:
      raise errors.ArgumentError(
        f"{name} must be None where x has items (x, y), got"
        f" {type(value).__name__}"
      )
  _validation.require(
    bool(count), "x", f"a data set of a known length above 0: {_WAY_OUT}", count
  )
  assert count is not None
  rows = indexed.Indexed(items, count, is_batched=is_batched)
  return Examples(rows, rows.names, rows.structure, rows.largest, items)


def _class_weights(
  targets: np.ndarray, weights: Mapping[int, float]
) -> np.ndarray:
  """Returns each example's weight; 1 for a class that has none, as in Keras."""
  classes = targets
  if targets.ndim > 1:
    one_hot = targets.shape[-1] != 1
    classes = np.argmax(targets, -1) if one_hot else targets[..., 0]
  _validation.require(
    classes.ndim == 1,
    "class_weight",
    "None where targets are not one class for each example",
    dict(weights),
  )
  classes = np.round(classes).astype(np.int64)
  found = np.ones(len(classes), np.float32)
  for one, weight in weights.items():
    found[classes == one] = weight
  return found


def _check_number(given: Sequence[Any], num_examples: int) -> None:
  """Raises ValueError unless arrays hold the plan's number of examples."""
  for name, part in zip(("x", "y", "sample_weight"), given, strict=False):
    for leaf in jax.tree.leaves(jax.tree.map(np.asarray, part)):
      if not leaf.ndim or len(leaf) != num_examples:
        raise errors.ArgumentError(
          f"{name} must hold the plan's num_examples={num_examples} examples"
          f" along its first axis, got shape {leaf.shape}"
        )


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
  try:
    return np.shares_memory(one, other, max_work=_MOST_WORK)  # type: ignore[arg-type]
  except np.exceptions.TooHardError:
    return False
