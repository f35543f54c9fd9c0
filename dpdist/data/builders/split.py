"""Makes a data set of a table: what is trained on, what is held out.

A row is held out by a hash of its own content, or of its user's name. So other
rows that come, go or move never change the part that it is in, and a user is
never in both parts.
"""

from collections.abc import Iterable, Sequence
import hashlib
from typing import Any

import numpy as np

from dpdist import errors
from dpdist.data import dataset
from dpdist.data.builders import encoding as encoding_lib
from dpdist.data.builders import options as options_lib
from dpdist.data.builders import table as table_lib
from dpdist.data.builders import table_source
from dpdist.files import stamps

# For ever: another label would hold out people who were trained on, and train
# on people whose metrics were released.
_NAME = b"dpdist.data/name/v1\0"


def build(
  table: table_lib.Table,
  test: table_lib.Table | None,
  options: options_lib.Options,
) -> dataset.Dataset:
  """Returns the data set of a table.

  Without a table of what is held out, it is a part of the first, by
  `test_fraction`. `options.check` has checked the options. Raises ValueError if
  one does not fit the data, and OSError if the data cannot be read.
  """
  roles = options_lib.roles(options, table.columns)
  encoding = encoding_lib.Encoding(roles, options)
  if test is None:
    made = _split(table, encoding)
  else:
    options_lib.roles(options, test.columns)  # Columns that it lacks are named.
    made = _whole(table, test, encoding)
  _check_users(made, options)
  train = len(made.train)
  if made.train_users is not None:
    train = len(np.unique(made.train_users))
  expected = options.get("num_examples")
  if expected is not None and expected != train:
    what = "users to train on" if options.get("users") else "training examples"
    raise errors.ArgumentError(
      f"num_examples must be the number of {what}, {train}, got {expected}"
    )
  return made


def held_out(digests: Sequence[bytes], fraction: float) -> np.ndarray:
  """Returns which rows, or users, are held out; the same for ever.

  The digests are SHA-256 (k,) of each row, or of each row's user, and the
  result is bool (k,).
  """
  numbers = np.frombuffer(b"".join(digests), ">u8").reshape(len(digests), 4)
  return numbers[:, 0] < np.uint64(fraction * 2**64)


def _split(
  table: table_lib.Table, encoding: encoding_lib.Encoding
) -> dataset.Dataset:
  """Reads all rows once, in blocks, and sorts them into the two parts."""
  options = encoding.options
  fraction = options.get("test_fraction") or 0.0
  # Before anything is read, so that no change is missed.
  files = [stamps.FileStamps(table.files) for _ in range(2)]
  digests = [table_lib.RowsDigest() for _ in range(2)]
  rows: list[list[np.ndarray]] = [[], []]
  names: list[list[np.ndarray]] = [[], []]
  users, split_by = options.get("users"), options.get("split_by")
  identity = users or split_by
  columns = [*encoding.columns, *([identity] if identity else [])]
  for start, raw in table_lib.blocks(table, list(dict.fromkeys(columns))):
    hashes = table_lib.row_hashes({x: raw[x] for x in encoding.columns})
    deciding = hashes
    if identity:
      whose = _checked_names(raw[identity], identity)
      deciding = [_name_hash(name) for name in whose]
    is_held_out = held_out(deciding, fraction)
    for part in range(2):
      mine = np.flatnonzero(is_held_out == part)
      digests[part].update([hashes[i] for i in mine])
      rows[part].append(start + mine)
      if users:
        names[part].append(np.array([whose[i] for i in mine]))
  parts = []
  for part in range(2):
    found = np.concatenate([np.zeros(0, np.int64), *rows[part]])
    if not len(found):
      raise errors.ArgumentError(
        "test_fraction must leave a row or more in each part, got"
        f" {fraction:g} of {len(table)} rows"
      )
    parts.append(
      table_source.TableSource(
        table,
        encoding,
        file_stamps=files[part],
        rows=found,
        digest=digests[part].hexdigest(),
      )
    )
  return _dataset(parts, names if users else [])


def _whole(
  table: table_lib.Table,
  test: table_lib.Table,
  encoding: encoding_lib.Encoding,
) -> dataset.Dataset:
  """Makes each table a part."""
  parts: list[table_source.TableSource] = []
  names: list[list[np.ndarray]] = []
  users = encoding.options.get("users")
  for part in (table, test):
    if not len(part):
      raise errors.ArgumentError("both parts must have a row or more, got 0")
    file_stamps = stamps.FileStamps(part.files)
    parts.append(
      table_source.TableSource(part, encoding, file_stamps=file_stamps)
    )
    if users:
      blocks = table_lib.blocks(part, [users])
      whose = [_checked_names(raw[users], users) for _, raw in blocks]
      names.append([np.array(each) for each in whose])
  return _dataset(parts, names)


def _dataset(
  parts: Sequence[table_source.TableSource],
  names: Sequence[Sequence[np.ndarray]],
) -> dataset.Dataset:
  """Returns the two parts; `names` are their users in pieces, or empty."""
  train, test = parts
  if not names:
    return dataset.Dataset(train, test)
  # Without empty arrays, which would make floats of integers.
  train_users, test_users = (
    np.concatenate([piece for piece in pieces if len(piece)])
    for pieces in names
  )
  return dataset.Dataset(train, test, train_users, test_users)


def _checked_names(values: np.ndarray, column: str) -> list[Any]:
  """Returns the identities of a column: integers, or texts."""
  kinds = str if values.dtype.kind in "OU" else (int, np.integer)
  found: list[Any] = values.tolist()
  if values.ndim != 1 or not all(_is_name(name, kinds) for name in found):
    raise ValueError(
      f"column {column!r} must hold an integer or a text for each row, none"
      " empty, that says whose it is"
    )
  return found


def _name_hash(name: Any) -> bytes:
  # As text, so that a number is the same user in a file of texts.
  return hashlib.sha256(_NAME + str(name).encode()).digest()


def _is_name(name: Any, kinds: Any) -> bool:
  is_kind = isinstance(name, kinds) and not isinstance(name, bool)
  return is_kind and name != ""


def _check_users(made: dataset.Dataset, options: options_lib.Options) -> None:
  if made.train_users is None or made.test_users is None:
    return
  shared = _num_shared(made.train_users, made.test_users)
  if shared:
    raise errors.ArgumentError(
      f"users={options.get('users')!r} must hold no user in both parts, or what"
      f" is held out would give away users that training protects, got {shared}"
      " who are"
    )


def _num_shared(train: Iterable[Any], test: Iterable[Any]) -> int:
  return len({str(x) for x in train} & {str(x) for x in test})
