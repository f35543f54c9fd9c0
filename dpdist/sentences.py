"""What MiniLM-L6 makes of a text: 384 numbers, to train a classifier on.

The model was trained on public texts and looks at one text alone (Wang et al.
2020, "MiniLM"; Reimers and Gurevych 2019, "Sentence-BERT").
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpdist.models import bert
from dpdist.models import weights

# To be raised whenever a feature would change by more than rounding.
VERSION = 1

_ROWS = 64


def transform(inputs: np.ndarray) -> np.ndarray:
  """The features of texts; MiniLM must have been fetched.

  Args:
    inputs: integers (n, length), of MiniLM's own tokenizer.

  Returns:
    float32 (n, 384), each row of length 384 ** 0.5.

  Raises:
    ValueError: inputs are no such tokens, or the model was not fetched.
  """
  if inputs.ndim != 2 or inputs.dtype.kind not in "iu":
    raise ValueError(
      "data.features='minilm' is made of tokens (n, length), got"
      f" {inputs.dtype} {inputs.shape}"
    )
  model, params = _pretrained()
  padding = np.zeros((-len(inputs) % _ROWS, inputs.shape[1]), inputs.dtype)
  rows = np.concatenate([inputs, padding])
  found = [
    np.asarray(_apply(model, params, rows[i : i + _ROWS]))
    for i in range(0, len(rows), _ROWS)
  ]
  return np.concatenate([np.zeros((0, model.width), np.float32), *found])[
    : len(inputs)
  ]


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: bert.Bert, params: Any, rows: jax.Array) -> jax.Array:
  apply: Any = functools.partial(model.apply, {"params": params})
  return jax.vmap(apply)(rows)


@functools.cache
def _pretrained() -> tuple[bert.Bert, Any]:
  model = bert.Bert(
    classes=0,
    vocabulary=30_522,
    positions=512,
    width=384,
    depth=6,
    num_heads=12,
    hidden=1536,
    lora_rank=0,
    dtype=jnp.dtype("float32"),
  )
  params: dict[str, Any] = {}
  arrays = weights.read(weights.locate("minilm"))
  for path, array in model.from_disk(arrays).items():
    *folders, name = path.split("/")
    inner = params
    for folder in folders:
      inner = inner.setdefault(folder, {})
    inner[name] = jnp.asarray(array)
  return model, params
