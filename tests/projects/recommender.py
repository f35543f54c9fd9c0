"""A project of a user of dpdist: what is bought after what is seen, in NNX.

Two towers over a catalogue of 20,000 items. A person is told nothing of others:
what they did not buy is public, or is another of their own purchases.

python -m launch.train --config=recommender.py --workdir=...
"""

import pathlib

from flax import nnx
import numpy as np
import optax

import dpdist
from dpdist import config as config_lib

_HERE = pathlib.Path(__file__).parent
_ITEMS = 20_000
_POPULAR = np.arange(0, _ITEMS, 1000, np.int32)  # A public list.


def get_config():
  """Settings; what is given below needs none."""
  config = config_lib.default()
  config.privacy.num_examples = 512  # Public: the people in train.parquet.
  config.privacy.expected_batch_size = 128.0
  config.privacy.num_steps = 24
  config.privacy.noise_multiplier = 0.5
  config.privacy.accountant = "rdp"
  config.checkpoint_every = config.eval_every = 4
  return config


class Tower(nnx.Module):
  """An item as a vector."""

  def __init__(self, rngs):
    self.items = nnx.Embed(_ITEMS, 16, rngs=rngs)
    self.out = nnx.Linear(16, 8, rngs=rngs)

  def __call__(self, item):
    return self.out(self.items(item))


def get_task(config):
  """A purchase is told from the person's others and from popular items."""
  return dpdist.tasks.contrastive(
    Tower,
    target_model=Tower,
    is_pair="is_pair",
    negatives="popular",
    largest_integers=dict.fromkeys(
      ("inputs", "targets", "popular"), _ITEMS - 1
    ),
  )


def _pairs(example):
  """A person's pairs; those who have fewer than six have padding."""
  seen, bought = example["inputs"], example["targets"]
  more = {"is_pair": bought >= 0, "popular": _POPULAR}
  return {"inputs": seen, "targets": np.maximum(bought, 0), **more}


def get_dataset(config):
  """Lists of what each person saw, and bought then."""
  return dpdist.data.from_parquet(
    _HERE / "train.parquet",
    test=_HERE / "test.parquet",
    inputs="seen",
    targets="bought",
    sequence_length={"seen": 6, "bought": 6},
    map=_pairs,
  )


def get_optimizer(config):
  """Plain steps: noise moves the rows that nobody saw, too."""
  return optax.sgd(2.0, momentum=0.5)
