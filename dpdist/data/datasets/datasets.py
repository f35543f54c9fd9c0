"""Loads named data sets: from a configuration to a train and a test source."""

import os

import ml_collections

from dpdist import _validation
from dpdist import errors
from dpdist import registry
from dpdist.assets import fetch
from dpdist.data import dataset as dataset_lib
from dpdist.data import sources
from dpdist.data import users
from dpdist.data.datasets import adult
from dpdist.data.datasets import built_in
from dpdist.data.datasets import chitchat
from dpdist.data.datasets import cifar10
from dpdist.data.datasets import files
from dpdist.data.datasets import idx
from dpdist.data.datasets import movie_reviews
from dpdist.data.datasets import settings
from dpdist.data.datasets import state_of_the_union
from dpdist.data.features import features

# These register their data sets.
_REGISTERED = (built_in, files, idx)
# Data sets of this project whose examples have users.
_OF_USERS = ("array_record", "chitchat", "npz", "parquet", "sotu")


def load(
  config: ml_collections.ConfigDict,
  dataset: dataset_lib.Dataset | None = None,
) -> dataset_lib.Dataset:
  """Opens a named data set, or takes one, and makes what the config asks for.

  `config.name` is one of those below, or finds a loader of your own as
  `dpdist.registry.resolve` does: a function of this config that returns a
  `dpdist.Dataset`. A `dataset` is taken instead. `config.path` is the path of
  the data ("" if unused). An example, the unit of privacy, is one image, text
  piece, record or row.

  * "digits": the 1,797 images of 8x8 pixels inside scikit-learn. Every fifth is
    held out: 1,438 to train, 359 to test. inputs float32 (8, 8, 1) in [0, 1],
    targets int32 (). No path.
  * "text": the bytes of the file `path` or, for "", of the language reference
    that ships with Python (its content depends on Python's version), cut into
    pieces that do not overlap. `sequence_length`, `num_train` (the first
    pieces), `num_test` (the last). inputs and targets int32 (sequence_length,),
    targets one byte ahead.
  * "idx": a directory with the four files of MNIST or Fashion-MNIST, gzipped or
    not. inputs float32 (28, 28, 1) in [0, 1], targets int32 ().
  * "mnist", "fashion_mnist": the same, from `path` or where `python -m
    launch.fetch` puts them.
  * "cifar10": from the same places; see `dpdist.data.datasets.cifar10`.
  * "adult": from the same places; see `dpdist.data.datasets.adult`.
  * "npz": a directory with train.npz and test.npz.
  * "array_record": a directory with train*.array_record and test*.array_record,
    as `array_record.write_array_record` makes them.
  * "parquet": a directory with train*.parquet and test*.parquet;
    `inputs_column`, `targets_column`.
  * "chitchat": see `dpdist.data.datasets.chitchat`. Its units are users.
  * "sotu": see `dpdist.data.datasets.state_of_the_union`. Its units are pieces,
    or authors.
  * "rotten_tomatoes", "imdb": see `dpdist.data.datasets.movie_reviews`. These
    and the two before take a `tokenizer` for their texts.

  With `examples_per_unit` above 0, the unit of privacy is a user, and train is
  a `users.UserSource`. `unit_column` holds the user of each example, an integer
  or a string: it is a column of the Parquet files, an array of train.npz and
  test.npz, or, for array_record, an array in the order of the records in
  train_{unit_column}.npy and test_{unit_column}.npy. Test stays a source of
  examples, and no user may be in both.

  With `features`, public features replace the inputs; see
  `dpdist.data.features.features`. Raises ValueError if the name is unknown, the
  path lacks the files, there is too little text, or users are not given or are
  in both parts.
  """
  slots = settings.slots(config)
  _validation.check("data.examples_per_unit", slots, _validation.integer(0))
  what = "a dpdist.Dataset without train_users"
  if dataset is None:
    what = f"data.name={config.name!r}"
    loader = registry.resolve("dataset", config.name, setting="data.name")
    if config.get("options"):
      _validation.require(
        bool(registry.code_sha256("dataset", config.name, setting="data.name")),
        "data.options",
        f"empty for data.name={config.name!r}, which reads none of them",
        config.options.to_dict(),
      )
    dataset = dataset_lib.of(loader(config))
  if slots and dataset.train_users is not None:
    name = f"data.unit_column={config.unit_column!r}"
    dataset = dataset.over_users(slots, name=name)
  if slots and not isinstance(dataset.train, users.UserSource):
    raise errors.ArgumentError(
      f"data.examples_per_unit must be 0 for {what}, which does not tell users"
      f" apart ({', '.join(_OF_USERS)} do), got {slots}"
    )
  name = config.get("features", "")
  return _with_features(dataset, name, slots) if name else dataset


def _with_features(
  dataset: dataset_lib.Dataset, name: str, slots: int
) -> dataset_lib.Dataset:
  """Replaces the inputs of both parts by features."""
  if slots:
    raise errors.ArgumentError(
      f"data.features must be '' with data.examples_per_unit={slots}, got"
      f" {name!r}"
    )
  _validation.require(
    sources.private_statistics(dataset.train) is None,
    "data.features",
    "'' with private_statistics, which are released later than features",
    name,
  )
  return dataset.map_sources(lambda source: features.of(source, name))


@registry.register("dataset", "cifar10")
def _cifar10(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  path = settings.fetched(config)
  return dataset_lib.Dataset(
    cifar10.load(path, "train"), cifar10.load(path, "test")
  )


@registry.register("dataset", "adult")
def _adult(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  path = settings.fetched(config)
  train, test = (
    os.path.join(path, f"adult.{part}") for part in ("data", "test")
  )
  return dataset_lib.Dataset(adult.load(train), adult.load(test))


@registry.register("dataset", "chitchat")
def _chitchat(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  if not settings.slots(config):
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
  return dataset_lib.Dataset(train, test)


@registry.register("dataset", "sotu")
def _sotu(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  path = config.path or fetch.find("sotu") / fetch.PACKAGES["sotu"].file
  train, test = state_of_the_union.load(
    path,
    sequence_length=config.sequence_length,
    examples_per_unit=settings.slots(config),
    tokenizer=config.get("tokenizer", ""),
  )
  return dataset_lib.Dataset(train, test)


@registry.register("dataset", *movie_reviews.CORPORA)
def _reviews(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  path = config.path or fetch.find("movie_reviews") / movie_reviews.FILE
  train, test = movie_reviews.load(
    path,
    config.name,
    sequence_length=config.sequence_length,
    tokenizer=config.get("tokenizer", ""),
  )
  return dataset_lib.Dataset(train, test)
