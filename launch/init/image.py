"""Trains a private classifier of images, in a folder for each class.

All that stands here is public: the classes, the number of images. Nothing may
be read off the training images, since no epsilon would count that.
"""

import pathlib

from flax import linen as nn
import jax
import ml_collections

import dpdist

CLASSES = ("cross", "disc", "square")


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings; --config.a.b=value changes one."""
  config = dpdist.config.default()
  config.data.path = str(pathlib.Path(__file__).resolve().parent / "images")
  config.privacy.num_examples = 720  # images to train on
  config.privacy.expected_batch_size = 150.0
  config.privacy.num_steps = 150
  config.privacy.l2_clip_norm = 1.0
  config.privacy.target_epsilon = 4.0
  config.privacy.target_delta = 1e-5  # well below 1 / num_examples
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 1.0
  config.model.width = 16
  return config


def get_dataset(config: ml_collections.ConfigDict) -> dpdist.Dataset:
  """Returns the images; those in test/ are held out."""
  folder = pathlib.Path(config.data.path)
  return dpdist.data.from_images(
    folder / "train",
    test=folder / "test",
    targets="label",
    classes=CLASSES,
    image_mode="L",
    image_size=(16, 16),
  )


class Model(nn.Module):
  """Maps one image to the logits of its classes."""

  width: int

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Returns logits [classes]."""
    x = nn.tanh(nn.Conv(self.width, (5, 5), (2, 2))(inputs))
    x = nn.tanh(nn.Conv(self.width, (3, 3), (2, 2))(x))
    return nn.Dense(len(CLASSES))(x.reshape(-1))


def get_task(config: ml_collections.ConfigDict) -> dpdist.Task:
  """Returns what is trained: a model, by its cross-entropy."""
  return dpdist.tasks.classification(Model(config.model.width))
