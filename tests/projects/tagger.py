"""A project of a user of dpdist: names in people's messages, in Linen.

A public tagger gets adapters; a person, with all messages, is protected.
"""

import pathlib

from flax import linen as nn
import jax.numpy as jnp
import numpy as np
import optax

import dpdist
from dpdist import config as config_lib

_HERE = pathlib.Path(__file__).parent
_WORDS = (_HERE / "words.txt").read_text().split()  # A public list.
_PLACES = {word: place for place, word in enumerate(_WORDS, 1)}
_TAGS = ["other", "person", "town"]


def get_config():
  config = config_lib.default()
  config.privacy.unit = "user"
  config.privacy.num_examples = 128  # Public: the people in train.csv.
  config.privacy.expected_batch_size = 64.0
  config.privacy.num_steps = 24
  config.privacy.noise_multiplier = config.privacy.l2_clip_norm = 0.5
  config.privacy.accountant = "rdp"
  config.data.examples_per_unit = 3
  config.checkpoint_every = config.eval_every = 4
  return config


class Adapted(nn.Module):
  size: int

  @nn.compact
  def __call__(self, x):
    down = nn.Dense(4, use_bias=False, name="lora_down")(x)
    init = nn.initializers.zeros
    up = nn.Dense(self.size, use_bias=False, kernel_init=init, name="lora_up")
    return nn.Dense(self.size, name="base")(x) + 4 * up(down)


class Tagger(nn.Module):
  @nn.compact
  def __call__(self, words):
    x = nn.Embed(len(_WORDS) + 1, 16, name="embed")(words)
    before = jnp.pad(x, ((1, 0), (0, 0)))[:-1]
    x = Adapted(32, name="hidden")(jnp.concatenate([before, x], -1))
    return Adapted(len(_TAGS), name="tags")(nn.tanh(x))


def get_task(config):
  base = lambda: dict(np.load(_HERE / "base.npz"))
  return dpdist.tasks.classification(
    Tagger(), pretrained=base, trainable="lora"
  )


def get_dataset(config):
  words = lambda text: [_PLACES.get(word, 0) for word in text.split()]
  tags = lambda text: [_TAGS.index(tag) for tag in text.split()]
  columns = {"inputs": "words", "targets": "tags", "users": "person"}
  return dpdist.data.from_csv(
    _HERE / "train.csv",
    test=_HERE / "test.csv",
    tokenizers={"words": words, "tags": tags},
    sequence_length=8,
    **columns,
  )


def get_optimizer(config):
  return optax.adam(0.03)
