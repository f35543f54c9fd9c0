"""Trains a private language model of the lines of a text file.

A line is an example. All that stands here is public: the number of lines and
their length. Nothing may be read off the training lines, such as a vocabulary,
since no epsilon would count that. So the tokens are bytes.
"""

from collections.abc import Mapping
import pathlib

import jax.numpy as jnp
import ml_collections
import numpy as np

import dpdist
from dpdist.models import decoder

VOCABULARY = 257  # 0 is padding, all others are bytes plus one


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings; --config.a.b=value changes one."""
  config = dpdist.config.default()
  config.data.path = str(pathlib.Path(__file__).resolve().parent / "lines.txt")
  config.data.sequence_length = 40
  config.privacy.num_examples = 1810  # lines to train on
  config.privacy.expected_batch_size = 200.0
  config.privacy.num_steps = 150
  config.privacy.l2_clip_norm = 0.5
  config.privacy.target_epsilon = 4.0
  config.privacy.target_delta = 1e-5  # well below 1 / num_examples
  config.optimizer.name = "adam"
  config.optimizer.learning_rate = 5e-3
  config.model.width = 32
  config.model.depth = 1
  config.model.num_heads = 2
  return config


def tokens(text: str) -> list[int]:
  """Returns a line's bytes, as numbers above 0."""
  return [byte + 1 for byte in text.encode()]


def next_token(example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns a line's tokens and, for each, the next one; -1 is none."""
  line = example["inputs"]
  return {"inputs": line[:-1], "targets": np.where(line[1:], line[1:], -1)}


def get_dataset(config: ml_collections.ConfigDict) -> dpdist.Dataset:
  """Returns the lines; which are held out depends on each line alone."""
  lines = pathlib.Path(config.data.path).read_text("utf-8").splitlines()
  return dpdist.data.from_arrays(
    {"line": lines},
    inputs="line",
    tokenizers={"line": tokens},
    sequence_length=config.data.sequence_length + 1,
    map=next_token,
    test_fraction=0.1,
  )


def get_task(config: ml_collections.ConfigDict) -> dpdist.Task:
  """Returns what is trained: a transformer, by its cross-entropy."""
  model = decoder.Decoder(
    vocabulary=VOCABULARY,
    width=config.model.width,
    depth=config.model.depth,
    num_heads=config.model.num_heads,
    dtype=jnp.float32,
  )
  return dpdist.tasks.language_model(model, vocabulary=VOCABULARY)
