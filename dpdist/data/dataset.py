"""Defines a data set: a training part, a held-out part, and their users.

    dataset = dpdist.Dataset(train={"x": x, "y": y}, test={"x": ..., "y": ...})

Each part is a `dpdist.data.sources.Source`, or a mapping from names to arrays
of equal leading length. Exactly the training part is protected.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.data import arrays
from dpdist.data import sources
from dpdist.data import users

_METHODS = ("__len__", "read", "content_digest")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """The two parts of a data set.

  Attributes:
    train: the set that the mechanism samples from; exactly this is protected.
    test: the held-out set; the privacy guarantee does not cover it.
    train_users: integers or strings, the user of each training example. They
      are used if `data.examples_per_unit` makes users the unit of privacy.
    test_users: the user of each held-out example. It is needed with
      train_users, since no user may be in both parts.

  Raises:
    ValueError: a part is neither a source nor arrays, or only one of the parts
      says who its users are.
  """

  train: sources.Source
  test: sources.Source
  train_users: np.ndarray | None = None
  test_users: np.ndarray | None = None

  if TYPE_CHECKING:

    def __init__(
      self,
      train: sources.Source | Mapping[str, Any],
      test: sources.Source | Mapping[str, Any],
      train_users: np.ndarray | None = None,
      test_users: np.ndarray | None = None,
    ):
      """Takes arrays by name for a source, too."""

  def __post_init__(self) -> None:
    for name in ("train", "test"):
      object.__setattr__(self, name, _source(name, getattr(self, name)))
    if (self.train_users is None) != (self.test_users is None):
      raise errors.ArgumentError(
        "train_users and test_users must be given together, so that no user is"
        " in both parts, got one of them"
      )

  def over_users(self, slots: int, *, name: str) -> "Dataset":
    """Returns the data set with users as the rows of its training part.

    See `dpdist.data.users.UserSource` for slots; `name` is the users' column,
    for messages. Raises ValueError if an example has not exactly one user, or a
    user is in both parts.
    """
    parts = (self.train, self.train_users), (self.test, self.test_users)
    for source, ids in parts:
      owners = np.asarray(ids)
      if owners.shape != (len(source),):
        raise errors.ArgumentError(
          f"{name} must say of each of the {len(source)} examples whose it is,"
          f" got {owners.dtype} {owners.shape}"
        )
    train_ids, test_ids = np.asarray(self.train_users), self.test_users
    unit_of_example, num_units = users.number(train_ids, name=name)
    users.number(np.asarray(test_ids), name=name)
    # The held-out set is not protected: its metrics are released without noise.
    shared = len(np.intersect1d(train_ids, np.asarray(test_ids)))
    if shared:
      raise errors.ArgumentError(
        f"{name} must hold no user in both parts, or what is held out would"
        f" give away users that training protects, got {shared} who are"
      )
    train = users.UserSource(self.train, unit_of_example, num_units, slots)
    return Dataset(train, self.test)

  def map_sources(
    self, change: Callable[[sources.Source], sources.Source]
  ) -> "Dataset":
    """Returns the data set with both parts changed."""
    return dataclasses.replace(
      self, train=change(self.train), test=change(self.test)
    )


def of(thing: Any) -> Dataset:
  """Returns a data set, made of a `Dataset` or of any object with its parts."""
  if isinstance(thing, Dataset):
    return thing
  if not (hasattr(thing, "train") and hasattr(thing, "test")):
    raise errors.ArgumentError(
      "dataset must be a dpdist.Dataset, or have its parts train and test, got"
      f" {_validation.described(thing)}"
    )
  names = [field.name for field in dataclasses.fields(Dataset)]
  return Dataset(**{x: getattr(thing, x) for x in names if hasattr(thing, x)})


def code(dataset: Dataset) -> list[Any]:
  """Returns the classes and functions that read the training examples.

  Their code decides what the examples are, and the digest of a source's content
  does not cover it.
  """
  found: list[Any] = []
  source: Any = dataset.train
  while source is not None:
    found.append(type(source))
    found.append(getattr(source, "convert", None))
    found += getattr(source, "functions", ())
    source = getattr(source, "examples", None)
  return [thing for thing in found if thing is not None]


def _source(name: str, part: Any) -> sources.Source:
  if isinstance(part, Mapping):
    try:
      return arrays.ArraySource(part)
    except ValueError as error:
      raise errors.ArgumentError(f"{name} of a data set: {error}") from error
  missing = [method for method in _METHODS if not hasattr(part, method)]
  if missing:
    raise errors.ArgumentError(
      f"{name} of a data set must be a mapping of arrays by name or a source"
      f" with {', '.join(_METHODS)}, got {_validation.described(part)}"
    )
  source: sources.Source = part
  return source
