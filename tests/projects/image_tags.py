"""A project of a user of dpdist: tags of images in a folder, in Equinox.

python -m launch.train --config=image_tags.py --workdir=...
"""

import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import dpdist
from dpdist import config as config_lib

_FOLDER = pathlib.Path(__file__).with_name("images")


def get_config():
  """Settings; what is given below needs none."""
  config = config_lib.default()
  config.privacy.num_examples = 240  # Public: the images in train.csv.
  config.privacy.expected_batch_size = 64.0
  config.privacy.num_steps = 24
  config.privacy.noise_multiplier = 1.0
  config.privacy.accountant = "rdp"
  config.ema_decay = 0.5
  config.checkpoint_every = config.eval_every = 4
  return config


class Network(eqx.Module):
  """A convolution, batch norm and a layer of three logits."""

  layers: list

  def __init__(self, key):
    first, second = jax.random.split(key)
    self.layers = [
      lambda x: jnp.moveaxis(x, -1, 0),
      eqx.nn.Conv2d(1, 8, 3, stride=2, key=first),
      eqx.nn.BatchNorm(8, "batch", mode="batch"),
      jax.nn.relu,
      jnp.ravel,
      eqx.nn.Linear(8 * 3 * 3, 3, key=second),
    ]

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return x


def get_task(config):
  """Three tags of an image; batch norm is replaced by group norm."""
  names = ["average_precision", "auc", "f1", "loss", "per_class"]
  return dpdist.tasks.multilabel(Network, metrics=names, fix=True)


def get_dataset(config):
  """Images, and their tags, which a manifest lists."""
  tags = {"targets": ["top", "left", "bright"], "image_mode": "L"}
  train, test = _FOLDER / "train.csv", _FOLDER / "test.csv"
  return dpdist.data.from_images(train, test=test, **tags)


def get_optimizer(config):
  """Adam."""
  return optax.adam(0.03)
