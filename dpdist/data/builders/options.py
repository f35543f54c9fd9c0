"""The options that all functions `dpdist.data.from_*` have in common."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import difflib
import functools
import math
from typing import Any, TypedDict

import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.data import queries

# A column, or several that are joined to one vector.
Columns = str | Sequence[str]


class Options(TypedDict, total=False):
  """Options of every `dpdist.data.from_*`; all but the split can be left out.

  Nothing here is computed from examples, except `private_statistics`, which
  have noise and are charged: a list of classes, a mean or a vocabulary that was
  read off the training data would give it away, with no noise and no charge.
  What is declared has to be public, or paid for elsewhere.

  Attributes:
    inputs: the column of the example's array "inputs". Several columns are
      joined to one float32 vector, in the order given. A mapping makes an array
      of each of its names: {"query": "text", "age": "age"}. Given neither
      inputs nor targets, every column is an array of its own name.
    targets: the column, or columns, of the array "targets".
    users: the column of integers or texts that says whose an example is. A user
      is never in both parts.
    test_fraction: of the rows, or of the users, that are held out, above 0 and
      below 1. Where a row belongs is a hash of what it holds, or of its user's
      name, and of nothing else: it stays where it is in any order of the file,
      whatever is added or removed, for ever. What is held out is not protected.
      Give this, or the held-out data as `test`.
    split_by: the column of integers or texts, such as a row's number, that is
      hashed instead of the whole row; with it, other inputs make no other
      split.
    num_examples: how many training examples there are; with `users`, how many
      users. Giving it confirms that the number is public, as a privacy plan
      makes it. It is compared with the data.
    classes: the public list of what the targets may be, texts or numbers. A
      target becomes its place in it, int32; any other becomes -1, which counts
      as no label.
    one_hot: targets become float32 rows with a 1 at the place of the class.
    categories: by column, the public list of its values; the column becomes a
      float32 row with a 1 at the place of the value, or without any for another
      value.
    missing: the number that stands for an empty cell, a null or a NaN in a
      column of numbers. Without it, empty cells and nulls are errors.
    public_statistics: by column, (mean, standard deviation), numbers or arrays
      that fit an example: the column is centred and scaled with them. They have
      to be known from elsewhere than the training data.
    private_statistics: by column, `dpdist.data.Standardized(low, high)`,
      `dpdist.data.Quantiles(low, high)` or `dpdist.data.Counts()`. They are
      computed from the training data, with noise that
      `privacy.statistics_noise_multiplier` sets and the run's epsilon covers.
      Until a run releases them, their bounds scale the columns.
      `dpdist.train` alone does that.
    scale_uint8: columns of uint8 become float32 in [0, 1], divided by 255.
      Images that are decoded always do.
    image_size: (height, width) to which images are resized.
    image_mode: "RGB" or "L" (grey).
    tokenizers: by column of texts, a function from a text to its tokens.
    sequence_length: how many tokens an example has; longer ones are cut,
      shorter ones padded. A mapping says it of each column, and of columns that
      hold lists of integers already.
    padding: the token that pads; targets are padded with -1, which counts as no
      label.
    map: a function from the arrays of one example, by name, to others. It must
      return the same for the same example. If it has an argument `key`, it gets
      32 bytes to choose by, a hash of the example's contents that is no secret.
      It has to turn texts and lists that no other option does into arrays.
  """

  inputs: Columns | Mapping[str, Columns] | None
  targets: Columns | None
  users: str | None
  test_fraction: float | None
  split_by: str | None
  num_examples: int | None
  classes: Sequence[Any] | None
  one_hot: bool
  categories: Mapping[str, Sequence[Any]]
  missing: float | None
  public_statistics: Mapping[str, tuple[Any, Any]]
  private_statistics: Mapping[str, queries.Query]
  scale_uint8: bool
  image_size: tuple[int, int] | None
  image_mode: str
  tokenizers: Mapping[str, Callable[[str], Sequence[int]]]
  sequence_length: int | Mapping[str, int] | None
  padding: int
  map: Callable[..., Mapping[str, Any]] | None


_RULES = {
  "test_fraction": _validation.real(above=0, below=1),
  "num_examples": _validation.COUNT,
  "one_hot": _validation.FLAG,
  "missing": _validation.real(),
  "scale_uint8": _validation.FLAG,
  "image_mode": _validation.one_of(("RGB", "L")),
  "padding": _validation.integer(-(2**31), 2**31 - 1),
}


def check(options: Options, test: object) -> None:
  """Raises for options that cannot be right, whatever the data holds.

  Without held-out data in `test`, a part of the data is to be held out.
  """
  given: Mapping[str, Any] = options
  known = list(Options.__annotations__)
  for name, value in given.items():
    if name not in known:
      close = difflib.get_close_matches(name, known, 1)
      raise errors.ArgumentError(
        f"there is no option {name!r}"
        + (f"; did you mean {close[0]!r}?" if close else f", only {known}")
      )
    if name in _RULES and value is not None:
      _validation.check(name, value, _RULES[name])
  if (test is None) == (given.get("test_fraction") is None):
    raise errors.ArgumentError(
      "test or test_fraction must say what is held out, one of the two: it is"
      " released without noise, and exactly the rest is protected"
    )
  if given.get("split_by") and (given.get("users") or test is not None):
    raise errors.ArgumentError(
      "split_by must not be given with users, who are split by their name, or"
      f" with test, got {given['split_by']!r}"
    )
  if given.get("one_hot") and not given.get("classes"):
    raise errors.ArgumentError(
      "classes must list the public classes where one_hot=True; they are not"
      " read off the training data, which would give away which there are"
    )
  _check_lengths(given)
  size = given.get("image_size")
  if size is not None and not (
    np.shape(size) == (2,) and all(isinstance(x, int) and x > 0 for x in size)
  ):
    raise errors.ArgumentError(
      f"image_size must be (height, width) in pixels, got {size!r}"
    )
  _check_lists(given)
  _check_statistics(given.get("public_statistics") or {})
  _check_queries(given)
  _check_functions(given)


def _check_lists(given: Mapping[str, Any]) -> None:
  lists = {"classes": given.get("classes")}
  for column, values in (given.get("categories") or {}).items():
    lists[f"categories[{column!r}]"] = values
  for name, values in lists.items():
    if values is None:
      continue
    is_list = isinstance(values, Iterable) and not isinstance(values, str)
    listed = list(values) if is_list else []
    if not listed or len({str(value) for value in listed}) != len(listed):
      raise errors.ArgumentError(
        f"{name} must list values, each once, got {values!r}"
      )


def _check_lengths(given: Mapping[str, Any]) -> None:
  length = given.get("sequence_length")
  if isinstance(length, Mapping):
    for column, each in length.items():
      name = f"sequence_length[{column!r}]"
      _validation.check(name, each, _validation.COUNT)
  elif length is not None:
    _validation.check("sequence_length", length, _validation.COUNT)
  for column in given.get("tokenizers") or {}:
    if length is None or (isinstance(length, Mapping) and column not in length):
      raise errors.ArgumentError(
        f"sequence_length must say how many tokens {column!r} has, got"
        f" {length!r}"
      )


def _check_statistics(statistics: Mapping[str, Any]) -> None:
  for column, pair in statistics.items():
    try:
      mean, deviation = (np.asarray(x, np.float64) for x in pair)
    except (TypeError, ValueError):
      mean, deviation = np.full(1, math.nan), np.zeros(1)
    if not (
      np.isfinite(mean).all()
      and np.isfinite(deviation).all()
      and (deviation > 0).all()
    ):
      raise errors.ArgumentError(
        f"public_statistics[{column!r}] must be (mean, standard deviation),"
        f" finite and the latter above 0, got {pair!r}"
      )


def _check_queries(given: Mapping[str, Any]) -> None:
  for column, query in (given.get("private_statistics") or {}).items():
    name = f"private_statistics[{column!r}]"
    # No class of the caller's, whose code could say anything of a row.
    if type(query) not in queries.KINDS:
      raise errors.ArgumentError(
        f"{name} must be a dpdist.data.Standardized, Quantiles or Counts, got"
        f" {query!r}"
      )
    if column in (given.get("public_statistics") or {}):
      raise errors.ArgumentError(
        f"{name} must not be given where public_statistics[{column!r}] is"
      )


def _check_functions(given: Mapping[str, Any]) -> None:
  functions = {"map": given.get("map")}
  for column, function in (given.get("tokenizers") or {}).items():
    functions[f"tokenizers[{column!r}]"] = function
  for name, function in functions.items():
    if function is not None and not callable(function):
      raise errors.ArgumentError(f"{name} must be a function, got {function!r}")


def roles(
  options: Options, available: Sequence[str]
) -> dict[str, str | tuple[str, ...]]:
  """Returns by name of an example's array its column, or those to be joined.

  The options are checked. Raises ValueError if one names a column that is not
  available.
  """
  inputs, targets = options.get("inputs"), options.get("targets")
  others = {options.get("users"), options.get("split_by")}
  wanted: dict[str, Columns] = {}
  if isinstance(inputs, Mapping):
    wanted = dict(inputs)
  elif inputs is not None:
    wanted = {"inputs": inputs}
  elif targets is not None:
    raise errors.ArgumentError(
      "inputs must name the columns of the inputs where targets are given, one"
      f" or more of {list(available)}, got None"
    )
  else:
    wanted = {name: name for name in available if name not in others}
  if targets is not None:
    wanted["targets"] = targets
  found: dict[str, str | tuple[str, ...]] = {
    name: columns if isinstance(columns, str) else tuple(columns)
    for name, columns in wanted.items()
  }
  for name, columns in found.items():
    option = name if name in ("inputs", "targets") else f"inputs[{name!r}]"
    _check_columns(option, columns, available)
  for option in ("users", "split_by"):
    column = options.get(option)
    if column is not None:
      _check_columns(option, str(column), available)
  used = flat(found)
  given: Mapping[str, Any] = options
  by_column = ["categories", "public_statistics", "private_statistics"]
  by_column.append("tokenizers")
  if isinstance(given.get("sequence_length"), Mapping):
    by_column.append("sequence_length")
  for option in by_column:
    columns = tuple(given.get(option) or ())
    if not {*columns} <= {*used}:
      raise errors.ArgumentError(
        f"{option} must be of columns that are inputs or targets, {used}, got"
        f" {list(columns)}"
      )
  return found


def flat(found: Mapping[str, str | tuple[str, ...]]) -> list[str]:
  """Returns all columns that `roles` found, each once."""
  names = [
    name
    for columns in found.values()
    for name in ([columns] if isinstance(columns, str) else columns)
  ]
  return list(dict.fromkeys(names))


def _check_columns(
  option: str, columns: str | tuple[str, ...], available: Sequence[str]
) -> None:
  listed = [columns] if isinstance(columns, str) else list(columns)
  if not listed or not {*listed} <= {*available}:
    raise errors.ArgumentError(
      f"{option} must name columns of the data, {list(available)}, got"
      f" {columns!r}"
    )


is_numbers = queries.is_numbers


def lookup(values: Sequence[Any]) -> dict[Any, int]:
  """Returns the place of each declared value, by what it is compared as."""
  return _lookup(queries.compared(values))


@functools.cache
def _lookup(compared: tuple[Any, ...]) -> dict[Any, int]:
  return {value: place for place, value in enumerate(compared)}
