"""MiniLM-L6's features of a text, to train a classifier or further blocks on.

The model was trained on public texts and processes each text alone (Wang et al.
2020, "MiniLM"; Reimers and Gurevych 2019, "Sentence-BERT").
"""

import functools
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dpdist.assets import weights
from dpdist.models import bert

# Raise it whenever a feature would change by more than rounding.
VERSION = 1

# The number of its blocks.
DEPTH = 6

_ROWS = 64


def transform(inputs: np.ndarray) -> np.ndarray:
  """Returns features float32 (n, 384) of texts, of length 384 ** 0.5 each.

  Inputs are integers (n, length), of MiniLM's own tokenizer. Raises ValueError
  if they are not its tokens, or the model was not fetched.
  """
  return _of_rows(inputs, DEPTH)


def states(inputs: np.ndarray, *, blocks: int) -> np.ndarray:
  """Returns token states after the first blocks, as input of a `bert.Bert`.

  They are float32 (n, length, 384), 0 where padding is, after `blocks` in [1,
  6). See `transform` for inputs and errors.
  """
  return _of_rows(inputs, blocks)


def _of_rows(inputs: np.ndarray, blocks: int) -> np.ndarray:
  if inputs.ndim != 2 or inputs.dtype.kind not in "iu":
    raise ValueError(
      "data.features of minilm are made of tokens (n, length), got"
      f" {inputs.dtype} {inputs.shape}"
    )
  model, params = _pretrained(weights.locate("minilm"), blocks)
  num_rows = max(1, -(-len(inputs) // _ROWS)) * _ROWS
  padding = np.zeros((num_rows - len(inputs), *inputs.shape[1:]), inputs.dtype)
  rows = np.concatenate([inputs, padding])
  found = [
    np.asarray(_apply(model, params, rows[i : i + _ROWS]))
    for i in range(0, num_rows, _ROWS)
  ]
  return np.concatenate(found)[: len(inputs)]


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: bert.Bert, params: Any, rows: jax.Array) -> jax.Array:
  apply: Any = functools.partial(model.apply, {"params": params})
  return jax.vmap(apply)(rows)


@functools.cache
def _pretrained(path: pathlib.Path, blocks: int) -> tuple[bert.Bert, Any]:
  model = bert.Bert(
    classes=0,
    vocabulary=30_522,
    positions=512,
    width=384,
    depth=blocks,
    num_heads=12,
    hidden=1536,
    lora_rank=0,
    dtype=jnp.dtype("float32"),
    returns_states=blocks < DEPTH,
  )
  named = model.from_disk(weights.read(path))
  params = traverse_util.unflatten_dict(named, sep="/")
  return model, jax.tree.map(jnp.asarray, params)
