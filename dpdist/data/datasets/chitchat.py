"""The Chit-chat data set: what 1,315 people wrote to each other.

7,168 conversations of the BYU Chit-Chat Challenge, 258,145 messages, MIT; one
person in two wrote 17 messages or fewer, one wrote 25,272. The unit of privacy
is a person, with all messages that the person wrote: a reply belongs to its
writer alone.
"""

import hashlib
import json

import numpy as np

from dpdist import _validation
from dpdist.assets import tokenizers
from dpdist.data import arrays as arrays_lib
from dpdist.data import sources
from dpdist.data import users

_PARTS = 5


def load(
  path: sources.Path,
  *,
  sequence_length: int,
  examples_per_unit: int,
  tokenizer: str = "",
) -> tuple[users.UserSource, arrays_lib.ArraySource]:
  """Reads dataset.json, with about a fifth of its users held out.

  Messages of a user are joined by line breaks, and cut into pieces of
  sequence_length tokens that do not overlap. If tokens are bytes, a rest
  shorter than a piece is not used, so that a user who wrote little has no
  example, but still counts as a user. With other tokens the rest is a piece
  too, padded with targets of -1, which have no loss (see
  `dpdist.tasks.classification.cross_entropy`). See
  `dpdist.assets.tokenizers.load` for tokenizer.

  Whether a user is held out depends on a hash of their identity alone. Returns
  users to train on, of whom examples_per_unit pieces are used at a step, and
  pieces of those held out, at most so many of each, spread over what they
  wrote. Inputs and targets are int32 (sequence_length,), targets one token
  ahead.
  """
  _validation.require(
    sequence_length >= 1, "data.sequence_length", "at least 1", sequence_length
  )
  texts = _texts(path)
  size = sequence_length + 1  # One token more: the last target.
  encode = tokenizers.load(tokenizer).encode
  written = encode(["\n".join(texts[user]) for user in sorted(texts)])
  owners: list[int] = []
  train: list[np.ndarray] = []
  test: list[np.ndarray] = []
  num_units = 0
  for user, text in zip(sorted(texts), written, strict=True):
    pieces = _pieces(text, size, keep_rest=bool(tokenizer))
    if _is_held_out(user):
      kept = min(len(pieces), examples_per_unit)
      test.append(pieces[np.arange(kept) * len(pieces) // max(1, kept)])
    else:
      owners += [num_units] * len(pieces)
      train.append(pieces)
      num_units += 1
  if not owners or not sum(map(len, test)):
    raise ValueError(
      "data.sequence_length must leave pieces of users in both parts of"
      f" {path}, got {sequence_length}"
    )
  return (
    users.UserSource(
      _source(train), np.array(owners), num_units, examples_per_unit
    ),
    _source(test),
  )


def _pieces(text: np.ndarray, size: int, *, keep_rest: bool) -> np.ndarray:
  rest = len(text) % size
  pieces = text[: len(text) - rest].reshape(-1, size)
  if keep_rest and rest > 1:  # One token gives no target.
    last = tokenizers.padded([text[-rest:]], size, fill=-1)
    pieces = np.concatenate([pieces, last])
  return pieces


def _texts(path: sources.Path) -> dict[str, list[str]]:
  """Returns the messages of each user, in the order of the file."""
  texts: dict[str, list[str]] = {}
  try:
    with open(path, encoding="utf-8") as file:
      for conversation in json.load(file).values():
        for turn in conversation["messages"]:
          for message in turn:
            user, text = message["sender"], message["text"]
            # Half of a surrogate pair is no text.
            user.encode(), text.encode()
            texts.setdefault(user, []).append(text)
  except (
    *(AttributeError, KeyError, TypeError),
    *(ValueError, RecursionError),
  ) as error:
    raise ValueError(
      f"data.path must be Chit-chat's dataset.json, got {str(path)!r}, which"
      f" cannot be read as one: {type(error).__name__}"
    ) from error
  return texts


def _is_held_out(user: str) -> bool:
  digest = hashlib.sha256(user.encode()).digest()
  return int.from_bytes(digest[:8], "big") % _PARTS == _PARTS - 1


def _source(pieces: list[np.ndarray]) -> arrays_lib.ArraySource:
  def convert(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    piece = batch["text"].astype(np.int32)
    inputs = np.maximum(piece[..., :-1], 0)
    return {"inputs": inputs, "targets": piece[..., 1:]}

  text = np.concatenate(pieces)
  # The digest is over these dtypes: bytes stay bytes.
  is_bytes = text.min(initial=0) >= 0 and text.max(initial=0) < 256
  return arrays_lib.ArraySource(
    {"text": text.astype(np.uint8 if is_bytes else np.int32)}, convert=convert
  )
