"""From the columns of rows to the arrays of examples, each row by itself.

Guarantees:
  What becomes of a row depends on that row and on the options, on no other row.
"""

from collections.abc import Mapping, Sequence
import copy
import dataclasses
import hashlib
import inspect
import io
import json
from typing import Any

import numpy as np

from dpdist import errors
from dpdist.data import queries
from dpdist.data import sources
from dpdist.data import statistics as statistics_lib
from dpdist.data.builders import options as options_lib
from dpdist.data.builders import table as table_lib

_KEY = b"dpdist.data/map/v1\0"
_INT32 = np.iinfo(np.int32)
_NO_LABEL = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Encoding:
  """How rows become examples."""

  # By name of an example's array its column, or those to be joined.
  roles: Mapping[str, str | tuple[str, ...]]
  options: options_lib.Options  # The caller's, checked.
  # What private statistics said, by column; {}: they are not released yet.
  released: Mapping[str, queries.Released] = dataclasses.field(
    default_factory=dict
  )

  @property
  def columns(self) -> list[str]:
    """Returns the columns that are read, each once."""
    return options_lib.flat(self.roles)

  def digest(self, *, has_images: bool) -> str:
    """Returns the SHA-256 of all declared values, which are in no code.

    Functions are not in it; see `functions`. With has_images a column is
    decoded, by a library whose releases may decode differently.
    """
    declared = {
      name: value
      for name, value in sorted(self.options.items())
      if name not in ("map", "num_examples", "split_by", "test_fraction")
    }
    asked = self.options.get("private_statistics")
    if asked:
      declared["private_statistics"] = {
        column: [query.kind, dataclasses.asdict(query)]
        for column, query in sorted(asked.items())
      }
    declared["tokenizers"] = sorted(self.options.get("tokenizers") or {})
    declared["roles"] = list(self.roles.items())
    if has_images:
      _import_pillow()
      from PIL import features

      declared["decoder"] = [features.version(x) for x in ("pil", "jpg")]
    text = json.dumps(declared, sort_keys=True, default=_jsonable)
    return hashlib.sha256(text.encode()).hexdigest()

  def functions(self) -> list[Any]:
    """Returns the caller's functions, whose code decides what examples are."""
    tokenizers = self.options.get("tokenizers") or {}
    found = [self.options.get("map"), *tokenizers.values()]
    return [function for function in found if function is not None]

  def statistics(
    self, raw: Mapping[str, np.ndarray]
  ) -> statistics_lib.Statistics | None:
    """Returns what is asked of the training data; None: nothing is.

    Args:
      raw: the columns of one row, of which only the shapes and dtypes count.

    Raises:
      ValueError: a column is not of what a query is about.
    """
    asked = self.options.get("private_statistics")
    if not asked:
      return None
    measured, columns = self.measured(raw), []
    for column, query in sorted(asked.items()):
      listed = tuple(self._declared(column))
      # All else that decides what a row's number, or place, is.
      made = {
        "missing": self.options.get("missing"),
        "scale_uint8": bool(self.options.get("scale_uint8")),
        "compared_as_numbers": options_lib.is_numbers(listed),
      }
      shape = measured[column].shape[1:]
      columns.append(statistics_lib.Column(column, query, shape, listed, made))
    return statistics_lib.Statistics(tuple(columns))

  def measured(self, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns what private statistics are of: numbers, or places in a list.

    Raises ValueError if a column is not of what a query is about.
    """
    found = {}
    for column, query in (self.options.get("private_statistics") or {}).items():
      values, name = raw[column], f"private_statistics[{column!r}]"
      listed = self._declared(column)
      if isinstance(query, queries.Counts):
        if not listed or values.ndim != 1:
          raise errors.ArgumentError(
            f"{name} must be of a column with categories, or of targets with"
            " classes, of one value a row, to count them"
          )
        found[column] = _places(values, listed)
        continue
      sequences = self.options.get("sequence_length")
      is_sequence = isinstance(sequences, Mapping) and column in sequences
      if listed or is_sequence or values.dtype.kind not in "biuf":
        raise errors.ArgumentError(
          f"{name} must be of a column of numbers, of which no categories,"
          " classes or sequence_length make something else; Counts() counts"
        )
      found[column] = self._filled(values)
    return found

  def _declared(self, column: str) -> Sequence[Any]:
    """Returns the public list of a column's values, or ()."""
    categories = (self.options.get("categories") or {}).get(column)
    if categories is not None:
      return categories
    targets = self.roles.get("targets", ())
    is_target = column in ([targets] if isinstance(targets, str) else targets)
    return (self.options.get("classes") or ()) if is_target else ()

  def encode(self, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays of examples, from the columns of one row or more.

    Raises ValueError if a column holds what no option makes numbers of.
    """
    batch = {}
    for role, columns in self.roles.items():
      if isinstance(columns, str):
        batch[role] = self._encode_column(columns, raw[columns], role)
      else:
        parts = [self._encode_column(x, raw[x], role) for x in columns]
        batch[role] = _join(parts, columns)
    function = self.options.get("map")
    if function is not None:
      batch = self._mapped(function, raw, batch)
    for name, values in batch.items():
      if values.dtype.kind not in "biuf":
        raise ValueError(
          f"{name!r} must be an array of numbers of one shape; give categories,"
          " classes, tokenizers, sequence_length, or a map that makes it one"
        )
    return {name: _narrow(values, name) for name, values in batch.items()}

  def _encode_column(
    self, column: str, values: np.ndarray, role: str
  ) -> np.ndarray:
    options = self.options
    tokenizer = (options.get("tokenizers") or {}).get(column)
    categories = (options.get("categories") or {}).get(column)
    classes = options.get("classes")
    if tokenizer is not None:
      values = table_lib.objects([tokenizer(_text(value)) for value in values])
    length = self._length(column, is_text=tokenizer is not None)
    if length is not None:
      return self._padded(values, length, role, column)
    if categories is not None:
      places = self._answered(column, _places(values, categories))
      return _one_hot(places, len(categories))
    if role == "targets" and classes is not None:
      places = _places(values, classes)
      return (
        _one_hot(places, len(classes)) if options.get("one_hot") else places
      )
    if values.dtype.kind not in "biuf":
      return self._encode_objects(values, column)
    return self._scaled(column, values)

  def _encode_objects(self, values: np.ndarray, column: str) -> np.ndarray:
    if all(isinstance(value, bytes) for value in values):
      return self._scaled(column, self._decoded(values))
    is_list = all(isinstance(value, np.ndarray | list) for value in values)
    if is_list and len({np.shape(value) for value in values}) == 1:
      return np.stack([np.asarray(value) for value in values])
    return values  # Left to the map.

  def _length(self, column: str, *, is_text: bool) -> int | None:
    """Returns the length of a column's sequences; None: it has none."""
    length = self.options.get("sequence_length")
    if isinstance(length, Mapping):
      return length.get(column)
    return length if is_text else None

  def _scaled(self, column: str, values: np.ndarray) -> np.ndarray:
    """Fills and scales numbers, with what the caller has declared."""
    values = self._filled(values)
    # Given numbers: no mean and no deviation is computed from examples here.
    statistics = self.options.get("public_statistics") or {}
    if column in statistics:
      mean, deviation = (np.asarray(x, np.float64) for x in statistics[column])
      values = ((values - mean) / deviation).astype(np.float32)
    return self._answered(column, values)

  def _filled(self, values: np.ndarray) -> np.ndarray:
    """Returns numbers before any mean or deviation: pixels in [0, 1]."""
    if self.options.get("scale_uint8") and values.dtype == np.uint8:
      values = values / np.float32(255)
    missing = self.options.get("missing")
    if missing is not None and values.dtype.kind == "f":
      values = np.where(np.isnan(values), values.dtype.type(missing), values)
    return values

  def _answered(self, column: str, values: np.ndarray) -> np.ndarray:
    """Applies what private statistics said, or stands for it until then."""
    query = (self.options.get("private_statistics") or {}).get(column)
    if query is None:
      return values
    answers = self.released.get(column)
    if answers is None:
      answers = query.start(values.shape[1:])
    return query.encode(values, answers)

  def _padded(
    self, sequences: np.ndarray, length: int, role: str, column: str
  ) -> np.ndarray:
    """Cuts and pads sequences of integers to one length."""
    padding = self.options.get("padding", 0)
    fill = _NO_LABEL if role == "targets" else padding
    rows = np.full((len(sequences), length), fill, np.int32)
    for row, sequence in zip(rows, sequences, strict=True):
      tokens = np.asarray(sequence)[:length]
      if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(
          f"column {column!r} must be sequences of integers, got"
          f" {tokens.dtype} of {tokens.ndim} axes"
        )
      row[: len(tokens)] = tokens
    return rows

  def _decoded(self, values: np.ndarray) -> np.ndarray:
    """Decodes images to float32 (k, height, width, channels) in [0, 1]."""
    Image = _import_pillow()  # noqa: N806 - a module
    size = self.options.get("image_size")
    pictures = []
    for value in values:
      # No name of a file in a message: which examples are read is private.
      with sources.reading("an image"), Image.open(io.BytesIO(value)) as opened:
        image = opened.convert(self.options.get("image_mode", "RGB"))
        if size is not None:
          height, width = size
          image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
      pictures.append(pixels.reshape(*pixels.shape[:2], -1))
    if len({picture.shape for picture in pictures}) != 1:
      raise ValueError(
        "images must be of one size; image_size=(height, width) makes them so"
      )
    return np.stack(pictures) / np.float32(255)

  def _mapped(
    self,
    function: Any,
    raw: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
  ) -> dict[str, np.ndarray]:
    """Applies the caller's map to each example by itself."""
    is_keyed = "key" in inspect.signature(function).parameters
    keys = table_lib.row_hashes(raw) if is_keyed else []
    made = []
    for row in range(len(next(iter(batch.values())))):
      # Copies, so that a map that writes into its argument changes no cache.
      example = {
        name: copy.deepcopy(values[row]) for name, values in batch.items()
      }
      if is_keyed:
        key = hashlib.sha256(_KEY + keys[row]).digest()
        result = function(example, key=key)
      else:
        result = function(example)
      made.append({name: np.asarray(value) for name, value in result.items()})
    if any({*example} != {*made[0]} for example in made):
      raise ValueError("map must return arrays of the same names for each row")
    return {
      name: table_lib.stack([example[name] for example in made], name)
      for name in made[0]
    }


def _import_pillow() -> Any:
  try:
    from PIL import Image
  except ModuleNotFoundError as error:
    raise errors.missing("Images", "pillow", "images") from error
  return Image


def _join(parts: Sequence[np.ndarray], columns: Sequence[str]) -> np.ndarray:
  for column, part in zip(columns, parts, strict=True):
    if part.dtype.kind not in "biuf":
      raise ValueError(
        f"column {column!r} must hold numbers to be joined with others; give"
        " categories for it, or an array of its own"
      )
  flat = [part.reshape(len(part), -1).astype(np.float32) for part in parts]
  return np.concatenate(flat, axis=1)


def _places(values: np.ndarray, declared: Sequence[Any]) -> np.ndarray:
  """Returns the place of each value in a declared list, -1 for none; int32."""
  places = options_lib.lookup(declared)
  is_numbers = options_lib.is_numbers(declared)
  found = [
    places.get(_compared(value, is_numbers), _NO_LABEL)
    for value in values.reshape(-1)
  ]
  return np.array(found, np.int32).reshape(values.shape)


def _compared(value: Any, is_number: bool) -> Any:
  if not is_number:
    return _text(value).strip()
  try:
    return float(value)
  except (ValueError, TypeError, OverflowError):
    return None


def _text(value: Any) -> str:
  # An error would name a byte of somebody's row.
  is_bytes = isinstance(value, bytes)
  return value.decode(errors="replace") if is_bytes else str(value)


def _one_hot(places: np.ndarray, count: int) -> np.ndarray:
  return (places[..., None] == np.arange(count)).astype(np.float32)


def _narrow(values: np.ndarray, name: str) -> np.ndarray:
  """Returns numbers as JAX takes them: float32, int32 or bool."""
  if values.dtype.kind == "f":
    return values.astype(np.float32)
  if values.dtype.kind == "b":
    return values.astype(np.int32) if name == "targets" else values
  if values.size and not (
    _INT32.min <= values.min() and values.max() <= _INT32.max
  ):
    raise ValueError(f"{name!r} must hold integers of 32 bits, got larger ones")
  return values.astype(np.int32)


def _jsonable(value: Any) -> Any:
  return value.tolist() if hasattr(value, "tolist") else repr(value)
