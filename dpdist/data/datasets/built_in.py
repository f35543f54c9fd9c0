"""Data sets that come with installed packages: digits, and any text."""

import ml_collections
import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist import registry
from dpdist.data import arrays as arrays_lib
from dpdist.data import dataset as dataset_lib


@registry.register("dataset", "digits")
def _digits(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  del config
  try:
    from sklearn import datasets
  except ModuleNotFoundError as error:
    raise errors.missing("digits", "scikit-learn", "examples") from error
  images, targets = datasets.load_digits(return_X_y=True)
  # Pixels are 0 to 16 by the format, so no statistic of the data is used.
  inputs = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
  targets = targets.astype(np.int32)
  held_out = np.arange(len(targets)) % 5 == 4
  return dataset_lib.Dataset(
    arrays_lib.ArraySource(
      {"inputs": inputs[~held_out], "targets": targets[~held_out]}
    ),
    arrays_lib.ArraySource(
      {"inputs": inputs[held_out], "targets": targets[held_out]}
    ),
  )


@registry.register("dataset", "text")
def _text(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  if config.path:
    text = np.fromfile(config.path, np.uint8)
  else:
    from pydoc_data import topics

    pages = [page for _, page in sorted(topics.topics.items())]
    text = np.frombuffer("\n".join(pages).encode(), np.uint8)
  for field in ("sequence_length", "num_train", "num_test"):
    _validation.check(f"data.{field}", config[field], _validation.COUNT)
  length = config.sequence_length + 1  # One byte more: the last target.
  num_pieces = len(text) // length
  if config.num_train + config.num_test > num_pieces:
    raise ValueError(
      f"data.num_train + data.num_test must be at most {num_pieces}, the"
      f" pieces of {length} bytes in the text, got {config.num_train} +"
      f" {config.num_test}"
    )
  pieces = text[: num_pieces * length].reshape(num_pieces, length)

  def convert(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    piece = batch["text"].astype(np.int32)
    return {"inputs": piece[:, :-1], "targets": piece[:, 1:]}

  return dataset_lib.Dataset(
    arrays_lib.ArraySource(
      {"text": pieces[: config.num_train]}, convert=convert
    ),
    arrays_lib.ArraySource(
      {"text": pieces[-config.num_test :]}, convert=convert
    ),
  )
