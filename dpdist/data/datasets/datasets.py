"""Loads named data sets: from a configuration to a train and a test source."""

import glob
import gzip
import math
import os
from typing import NamedTuple
import zlib

import ml_collections
import numpy as np

from dpdist import errors
from dpdist import registry
from dpdist.assets import fetch
from dpdist.data import array_record
from dpdist.data import arrays as arrays_lib
from dpdist.data import parquet
from dpdist.data import sources
from dpdist.data import users
from dpdist.data.datasets import adult
from dpdist.data.datasets import chitchat
from dpdist.data.datasets import cifar10
from dpdist.data.datasets import movie_reviews
from dpdist.data.datasets import state_of_the_union
from dpdist.data.features import features

# The third byte of an idx file names its element type; all are big-endian.
_IDX_DTYPES = {
  0x08: ">u1",
  0x09: ">i1",
  0x0B: ">i2",
  0x0C: ">i4",
  0x0D: ">f4",
  0x0E: ">f8",
}


# Data sets of this project whose examples have users.
_OF_USERS = ("array_record", "chitchat", "npz", "parquet", "sotu")


class Splits(NamedTuple):
  """The two parts of a data set.

  Attributes:
    train: the set that the mechanism samples from; exactly this is protected.
    test: the held-out set; the privacy guarantee does not cover it.
  """

  train: sources.Source
  test: sources.Source


def load(config: ml_collections.ConfigDict) -> Splits:
  """Opens a named data set.

  Args:
    config: `name` is one of the below, or finds a loader of your own as
      `dpdist.registry.resolve` does: a function of this config that returns
      `Splits`. `path` is the path of the data ("" if unused). An example, the
      unit of privacy, is one image, text piece, record or row.

      * "digits": the 1,797 images of 8x8 pixels inside scikit-learn. Every
        fifth is held out: 1,438 to train, 359 to test. inputs float32
        (8, 8, 1) in [0, 1], targets int32 (). No path.
      * "text": the bytes of the file `path` or, for "", of the language
        reference that ships with Python (its content depends on Python's
        version), cut into pieces that do not overlap. `sequence_length`,
        `num_train` (the first pieces), `num_test` (the last). inputs and
        targets int32 (sequence_length,), targets one byte ahead.
      * "idx": a directory with the four files of MNIST or Fashion-MNIST,
        gzipped or not. inputs float32 (28, 28, 1) in [0, 1], targets int32 ().
      * "mnist", "fashion_mnist": the same, from `path` or where `python -m
        launch.fetch` puts them.
      * "cifar10": from the same places; see `dpdist.data.datasets.cifar10`.
      * "adult": from the same places; see `dpdist.data.datasets.adult`.
      * "npz": a directory with train.npz and test.npz.
      * "array_record": a directory with train*.array_record and
        test*.array_record, as `array_record.write_array_record` makes them.
      * "parquet": a directory with train*.parquet and test*.parquet;
        `inputs_column`, `targets_column`.
      * "chitchat": see `dpdist.data.datasets.chitchat`. Its units are users.
      * "sotu": see `dpdist.data.datasets.state_of_the_union`. Its units are
        pieces, or authors.
      * "rotten_tomatoes", "imdb": see `dpdist.data.datasets.movie_reviews`.

      The last four data sets take a `tokenizer` for their texts.

      With `examples_per_unit` above 0, the unit of privacy is a user, and train
      is a `units.UserSource`. `unit_column` holds the user of each example, an
      integer or a string: it is a column of the Parquet files, an array of
      train.npz and test.npz, or, for array_record, an array in the order of the
      records in train_{unit_column}.npy and test_{unit_column}.npy. Test stays
      a source of examples, and no user may be in both.

    With `features`, public features replace the inputs; see
    `dpdist.data.features.features`.

  Raises:
    ValueError: the name is unknown, the path lacks the files, there is too
      little text, or users are not given or are in both parts.
    ModuleNotFoundError: a package of an optional extra is missing.
  """
  loader = registry.resolve("dataset", config.name, setting="data.name")
  slots = _slots(config)
  if slots < 0:
    raise ValueError(f"data.examples_per_unit must be at least 0, got {slots}")
  splits = loader(config)
  if slots and not isinstance(splits.train, users.UserSource):
    raise ValueError(
      f"data.examples_per_unit must be 0 for data.name={config.name!r}, which"
      f" does not tell users apart ({', '.join(_OF_USERS)} do), got {slots}"
    )
  name = config.get("features", "")
  if not name:
    return splits
  if slots:
    raise ValueError(
      f"data.features must be '' with data.examples_per_unit={slots}, got"
      f" {name!r}"
    )
  return Splits(*(features.of(source, name) for source in splits))


def read_idx(path: sources.Path) -> np.ndarray:
  """Reads a file of the idx format, that of MNIST, gzipped or not.

  Returns:
    An array of the shape and type that the header names, in native byte order.

  Raises:
    ValueError: it is no such file, or is cut short or too long.
  """
  with open(path, "rb") as file:
    data = file.read()
  if data[:2] == b"\x1f\x8b":
    try:
      data = gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
      raise ValueError(f"{path} must be whole gzip data: {error}") from error
  if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_DTYPES:
    raise ValueError(
      f"{path} must begin with the idx magic 00 00 (08|09|0b|0c|0d|0e) ndim,"
      f" got {data[:4].hex(' ')!r}"
    )
  dtype = np.dtype(_IDX_DTYPES[data[2]])
  offset = 4 + 4 * data[3]
  if len(data) < offset:
    raise ValueError(f"{path} must hold {offset} header bytes, got {len(data)}")
  shape = np.frombuffer(data, ">u4", data[3], 4).tolist()
  size = offset + dtype.itemsize * math.prod(shape)
  if len(data) != size:
    raise ValueError(
      f"{path} must hold {size} bytes for shape {shape}, got {len(data)}"
    )
  array = np.frombuffer(data, dtype, offset=offset).reshape(shape)
  return array.astype(dtype.newbyteorder("="), copy=False)


def idx(
  images_path: sources.Path, labels_path: sources.Path
) -> arrays_lib.ArraySource:
  """Reads images and labels from a pair of idx files.

  Pixels stay uint8 in memory; the digest is over the decoded arrays, so a
  file and its gzipped copy have the same.

  Returns:
    A source of {"inputs": float32 (height, width, 1) in [0, 1], "targets":
    int32 ()}.

  Raises:
    ValueError: a bad file; images that are not uint8 (n, height, width); or
      labels that are not n integers.
  """
  images, labels = read_idx(images_path), read_idx(labels_path)
  if images.dtype != np.uint8 or images.ndim != 3:
    raise ValueError(
      f"{images_path} must hold uint8 (n, height, width), got"
      f" {images.dtype} {images.shape}"
    )
  if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
    raise ValueError(
      f"{labels_path} must hold {len(images)} integers, got"
      f" {labels.dtype} {labels.shape}"
    )

  def convert(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    pixels = batch["inputs"][..., None].astype(np.float32)
    return {
      "inputs": pixels / np.float32(255),
      "targets": batch["targets"].astype(np.int32),
    }

  return arrays_lib.ArraySource(
    {"inputs": images, "targets": labels}, convert=convert
  )


@registry.register("dataset", "digits")
def _digits(config: ml_collections.ConfigDict) -> Splits:
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
  return Splits(
    arrays_lib.ArraySource(
      {"inputs": inputs[~held_out], "targets": targets[~held_out]}
    ),
    arrays_lib.ArraySource(
      {"inputs": inputs[held_out], "targets": targets[held_out]}
    ),
  )


@registry.register("dataset", "text")
def _text(config: ml_collections.ConfigDict) -> Splits:
  if config.path:
    text = np.fromfile(config.path, np.uint8)
  else:
    from pydoc_data import topics

    pages = [page for _, page in sorted(topics.topics.items())]
    text = np.frombuffer("\n".join(pages).encode(), np.uint8)
  for field in ("sequence_length", "num_train", "num_test"):
    if config[field] < 1:
      raise ValueError(f"data.{field} must be at least 1, got {config[field]}")
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

  return Splits(
    arrays_lib.ArraySource(
      {"text": pieces[: config.num_train]}, convert=convert
    ),
    arrays_lib.ArraySource(
      {"text": pieces[-config.num_test :]}, convert=convert
    ),
  )


@registry.register("dataset", "idx", "mnist", "fashion_mnist")
def _idx(config: ml_collections.ConfigDict) -> Splits:
  path = config.path if config.name == "idx" else _fetched(config)

  def split(prefix: str) -> arrays_lib.ArraySource:
    return idx(
      _idx_file(path, f"{prefix}-images-idx3-ubyte"),
      _idx_file(path, f"{prefix}-labels-idx1-ubyte"),
    )

  return Splits(split("train"), split("t10k"))


def _idx_file(directory: str, name: str) -> str:
  for suffix in ("", ".gz"):
    path = os.path.join(directory, name + suffix)
    if os.path.isfile(path):
      return path
  raise errors.ArgumentError(
    f"data.path must be a directory with {name} or {name}.gz, got"
    f" {directory!r}; on Debian and Ubuntu"
    " `apt-get install dataset-fashion-mnist` puts Fashion-MNIST under"
    " /usr/share/datasets/fashion-mnist",
    hint=errors.Hint(text="apt-get install dataset-fashion-mnist"),
  )


@registry.register("dataset", "cifar10")
def _cifar10(config: ml_collections.ConfigDict) -> Splits:
  path = _fetched(config)
  return Splits(cifar10.load(path, "train"), cifar10.load(path, "test"))


@registry.register("dataset", "adult")
def _adult(config: ml_collections.ConfigDict) -> Splits:
  path = _fetched(config)
  train, test = (
    os.path.join(path, f"adult.{part}") for part in ("data", "test")
  )
  return Splits(adult.load(train), adult.load(test))


def _fetched(config: ml_collections.ConfigDict) -> str:
  """Returns the path of a fetched data set: as configured, or in the cache."""
  return config.path or os.fspath(fetch.find(config.name))


@registry.register("dataset", "chitchat")
def _chitchat(config: ml_collections.ConfigDict) -> Splits:
  if not _slots(config):
    raise ValueError(
      "data.examples_per_unit must be at least 1 for data.name='chitchat',"
      " whose units are users, got 0"
    )
  path = config.path or fetch.find("chitchat") / "dataset.json"
  train, test = chitchat.load(
    path,
    sequence_length=config.sequence_length,
    examples_per_unit=config.examples_per_unit,
    tokenizer=config.get("tokenizer", ""),
  )
  return Splits(train, test)


@registry.register("dataset", "sotu")
def _sotu(config: ml_collections.ConfigDict) -> Splits:
  path = config.path or fetch.find("sotu") / fetch.PACKAGES["sotu"].file
  train, test = state_of_the_union.load(
    path,
    sequence_length=config.sequence_length,
    examples_per_unit=_slots(config),
    tokenizer=config.get("tokenizer", ""),
  )
  return Splits(train, test)


@registry.register("dataset", *movie_reviews.CORPORA)
def _reviews(config: ml_collections.ConfigDict) -> Splits:
  path = config.path or fetch.find("movie_reviews") / movie_reviews.FILE
  train, test = movie_reviews.load(
    path,
    config.name,
    sequence_length=config.sequence_length,
    tokenizer=config.get("tokenizer", ""),
  )
  return Splits(train, test)


@registry.register("dataset", "npz")
def _npz(config: ml_collections.ConfigDict) -> Splits:
  def split(prefix: str) -> _Part:
    (path,) = _files(config.path, f"{prefix}.npz")
    if not _slots(config):
      return _Part(arrays_lib.ArraySource.from_npz(path), None)
    arrays = arrays_lib.load_npz(path)
    ids = arrays.pop(config.unit_column, None)
    if ids is None:
      raise ValueError(
        f"data.unit_column must be one of {sorted(arrays)} of {path}, got"
        f" {config.unit_column!r}"
      )
    return _Part(arrays_lib.ArraySource(arrays), ids)

  return _splits(config, split("train"), split("test"))


@registry.register("dataset", "array_record")
def _array_record(config: ml_collections.ConfigDict) -> Splits:
  def split(prefix: str) -> _Part:
    paths = _files(config.path, f"{prefix}*.array_record")
    source = array_record.ArrayRecordSource(paths)
    if not _slots(config):
      return _Part(source, None)
    (path,) = _files(config.path, f"{prefix}_{config.unit_column}.npy")
    return _Part(source, arrays_lib.load_npy(path))

  return _splits(config, split("train"), split("test"))


@registry.register("dataset", "parquet")
def _parquet(config: ml_collections.ConfigDict) -> Splits:
  columns = {"inputs": config.inputs_column, "targets": config.targets_column}

  def split(prefix: str) -> _Part:
    paths = _files(config.path, f"{prefix}*.parquet")
    source = parquet.ParquetSource(paths, columns)
    if not _slots(config):
      return _Part(source, None)
    return _Part(source, users.parquet_ids(paths, config.unit_column))

  return _splits(config, split("train"), split("test"))


class _Part(NamedTuple):
  """Examples, and the user of each."""

  source: sources.Source
  ids: np.ndarray | None


def _splits(
  config: ml_collections.ConfigDict, train: _Part, test: _Part
) -> Splits:
  """Makes units of the training examples, if ids give their users."""
  if train.ids is None or test.ids is None:
    return Splits(train.source, test.source)
  name = f"data.unit_column={config.unit_column!r}"
  for source, ids in (train.source, train.ids), (test.source, test.ids):
    if ids.shape != (len(source),):
      raise ValueError(
        f"{name} must say of each of the {len(source)} examples whose it is,"
        f" got {ids.dtype} {ids.shape}"
      )
  unit_of_example, num_units = users.number(train.ids, name=name)
  users.number(test.ids, name=name)
  # The held-out set is not protected: its metrics are released without noise.
  shared = len(np.intersect1d(train.ids, test.ids))
  if shared:
    raise ValueError(
      f"{name} must hold no user in both parts, or what is held out would give"
      f" away users that training protects, got {shared} who are"
    )
  return Splits(
    users.UserSource(
      train.source, unit_of_example, num_units, config.examples_per_unit
    ),
    test.source,
  )


def _slots(config: ml_collections.ConfigDict) -> int:
  return config.get("examples_per_unit", 0)


def _files(directory: str, pattern: str) -> list[str]:
  """Returns files in order of name, which fixes the order of the examples."""
  paths = sorted(glob.glob(os.path.join(glob.escape(directory), pattern)))
  if not paths:
    raise errors.ArgumentError(
      f"data.path must be a directory with {pattern}, got {directory!r}",
      hint=errors.Hint(flags=("--config.data.path=DIRECTORY",)),
    )
  return paths
