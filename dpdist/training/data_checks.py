"""Compares what is public of a data set with the task, before any charge.

Public are the names, shapes and dtypes of all arrays, and the held-out set,
whose metrics are released without noise. The training set's contents are
private: no check here depends on a value of it. A label there that no class has
counts as no label, with loss 0; see `dpdist.tasks.scoring.losses`.
"""

from collections.abc import Mapping
import hashlib

import jax
import ml_collections
import numpy as np

from dpdist import errors
from dpdist.data import augment
from dpdist.data import dataset as dataset_lib
from dpdist.data import sources
from dpdist.data import users
from dpdist.noise import noise
from dpdist.tasks import columns
from dpdist.tasks import parts
from dpdist.tasks import task as task_lib
from dpdist.training import parameters

# The most rows of each part that are compared.
_MOST_ROWS = 65_536
_MOST_BYTES = 1 << 28
_BLOCK = 1024


def fit(
  config: ml_collections.ConfigDict,
  dataset: dataset_lib.Dataset,
  task: task_lib.Task,
  key_data: np.ndarray,
) -> tuple[
  dict[str, np.ndarray],
  dict[str, jax.ShapeDtypeStruct],
  parameters.Parameters,
  list[str],
]:
  """Checks that data and task fit one another, or raises ValueError.

  Returns all held-out examples, the shapes of a row of the training part, the
  task's parameters, which `parameters.of` makes with key_data, and notices on
  its model.
  """
  test = dataset.test.read(np.arange(len(dataset.test)))
  example = one_example(dataset.train)
  notices = task_lib.reviewed(task, example)
  try:
    check(task, example, test)
  except ValueError as error:
    raise errors.ArgumentError(
      f"{parts.name_of_data(config)} must fit the task: {error}",
      hint=getattr(error, "hint", None),
    ) from error
  key = noise.as_key(key_data)
  params = task_lib.params_of(task.init, key, example)
  task_lib.check_loss(task.loss, params, example, key)
  inputs = example.get(task.inputs)
  augment.check(config, () if inputs is None else inputs.shape)
  row = dataset.train.read(np.zeros(1, np.int64))
  return (
    test,
    {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in row.items()},
    parameters.of(task, key_data, example),
    notices,
  )


def one_example(source: sources.Source) -> dict[str, np.ndarray]:
  """Returns zeros of one example's shapes and dtypes, without slots."""
  row = {k: x[0] for k, x in source.read(np.zeros(1, np.int64)).items()}
  if isinstance(source, users.UserSource):
    del row[users.SLOT_IS_EMPTY]
    row = {k: x[0] for k, x in row.items()}
  return {k: np.zeros(x.shape, x.dtype) for k, x in row.items()}


def check(
  task: task_lib.Task,
  example: Mapping[str, np.ndarray],
  test: Mapping[str, np.ndarray],
) -> None:
  """Raises ValueError unless both parts of a data set fit its task."""
  if not all(len(x) for x in test.values()):
    raise errors.ArgumentError("it must hold out 1 example or more, got 0")
  held_out = {name: x[0] for name, x in test.items()}
  if task.check is not None:
    task_lib.called("check", task.check, example, test)
  shapes = [
    {name: x.shape for name, x in arrays.items()}
    for arrays in (example, held_out)
  ]
  if shapes[0] != shapes[1]:
    raise errors.ArgumentError(
      "it must have examples of one shape in both parts, got"
      f" {shapes[0]} to train on and {shapes[1]} held out"
    )
  for part, arrays in (("training", example), ("held-out", held_out)):
    for name, x in arrays.items():
      if not columns.is_number(x.dtype):
        raise errors.ArgumentError(
          f"{name} in the {part} part must be numbers, got {x.dtype} {x.shape}"
        )


def shared_rows(train: sources.Source, test: Mapping[str, np.ndarray]) -> str:
  """Compares the first rows of both parts.

  Returns a sentence if some of them are equal, else "".

  PRIVATE: that a held-out row equals a training row reveals something of the
  training data. Show the returned text on its owner's screen alone.
  """
  if isinstance(train, users.UserSource):
    train = train.examples
  size = max(1, sum(x[:1].nbytes for x in test.values()))
  most = max(1, min(_MOST_ROWS, _MOST_BYTES // size))
  held_out = min(most, len(next(iter(test.values()))))
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
