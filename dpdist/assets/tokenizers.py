"""Reads tokenizers of pretrained models, from the files that come with them.

The tokens of a text depend on that text alone.
"""

from collections.abc import Callable, Sequence
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from dpdist import errors
from dpdist.assets import fetch
from dpdist.assets import weights


class Tokenizer(NamedTuple):
  """How texts become tokens."""

  # Texts -> int32 arrays, without tokens for beginning or end.
  encode: Callable[[Sequence[str]], list[np.ndarray]]
  begin: tuple[int, ...]  # Tokens before a text; none for language models.
  end: tuple[int, ...]  # Tokens after it.
  padding: int  # Pads shorter sequences; 0 unless the file has another.
  size: int  # How many different tokens there are.


def load(name: str) -> Tokenizer:
  """Loads a tokenizer; the name "" is that of bytes.

  Other names are those of a model that `dpdist.assets.fetch` has fetched, or
  the path of a tokenizer.json or of a .gguf file with a byte-level BPE in it.
  """
  if not name:
    encode = lambda texts: [
      np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts
    ]
    return Tokenizer(encode, (), (), 0, 256)
  path = _path(name)
  try:
    import tokenizers
  except ModuleNotFoundError as error:
    raise errors.missing("data.tokenizer", "tokenizers", "weights") from error
  ends: tuple[int, ...] = ()
  if path.suffix == ".gguf":
    inner = _from_gguf(path, tokenizers)
  else:
    inner = tokenizers.Tokenizer.from_file(os.fspath(path))
    inner.no_padding()
    inner.no_truncation()
    # For an empty text, only these tokens are left.
    ends = tuple(inner.encode("").ids)
  half = len(ends) // 2
  encode = lambda texts: [
    np.array(each.ids, np.int32)
    for each in inner.encode_batch(list(texts), add_special_tokens=False)
  ]
  padding = inner.token_to_id("[PAD]") or 0
  return Tokenizer(
    encode, ends[:half], ends[half:], padding, inner.get_vocab_size()
  )


def padded(
  tokens: Sequence[np.ndarray], length: int, *, fill: int
) -> np.ndarray:
  """Pads sequences with `fill` to int32 (len(tokens), length)."""
  rows = np.full((len(tokens), length), fill, np.int32)
  for row, each in zip(rows, tokens, strict=True):
    row[: len(each)] = each
  return rows


def _path(name: str) -> pathlib.Path:
  if name in fetch.PACKAGES:
    folder = fetch.find(name)
    found = [*folder.glob("tokenizer.json"), *folder.glob("*.gguf")]
    if len(found) == 1:
      return found[0]
  elif pathlib.Path(name).is_file():
    return pathlib.Path(name)
  raise ValueError(
    "data.tokenizer must be empty, a tokenizer.json, a .gguf file or a model"
    f" that was fetched, got {name!r}"
  )


def _from_gguf(path: pathlib.Path, tokenizers: Any) -> Any:
  fields = weights.gguf_reader(path).fields
  contents = {
    key: fields[f"tokenizer.ggml.{key}"].contents()
    for key in ("model", "pre", "tokens", "merges")
    if f"tokenizer.ggml.{key}" in fields
  }
  kind = contents.get("model"), contents.get("pre")
  if kind != ("gpt2", "smollm"):
    raise ValueError(
      f"data.tokenizer must be a .gguf file with a tokenizer of the kind"
      f" ('gpt2', 'smollm'), got {kind} in {path}"
    )
  vocabulary = {token: i for i, token in enumerate(contents["tokens"])}
  merges = [tuple(merge.split(" ")) for merge in contents["merges"]]
  inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
  before = tokenizers.pre_tokenizers
  # Splits into single digits, then words, and then their bytes.
  inner.pre_tokenizer = before.Sequence(
    [
      before.Digits(individual_digits=True),
      before.ByteLevel(add_prefix_space=False),
    ]
  )
  inner.decoder = tokenizers.decoders.ByteLevel()
  return inner
