"""Trains a private classifier of the rows of a CSV file.

All that stands here is public: names, categories, means, the number of rows.
Nothing may be read off the training rows, since no epsilon would count that.
"""

import pathlib

from flax import linen as nn
import jax
import ml_collections

import dpdist


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings; --config.a.b=value changes one."""
  config = dpdist.config.default()
  config.data.path = str(pathlib.Path(__file__).resolve().parent / "people.csv")
  config.privacy.num_examples = 956  # rows to train on
  config.privacy.expected_batch_size = 200.0
  config.privacy.num_steps = 150
  config.privacy.l2_clip_norm = 1.0
  config.privacy.target_epsilon = 3.0
  config.privacy.target_delta = 1e-5  # well below 1 / num_examples
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 1.0
  config.model.width = 16
  return config


def get_dataset(config: ml_collections.ConfigDict) -> dpdist.Dataset:
  """Returns the rows; which are held out depends on each row alone."""
  return dpdist.data.from_csv(
    config.data.path,
    inputs=["age", "hours", "job"],
    targets="earns",
    classes=["less", "more"],
    categories={"job": ["cook", "nurse", "pilot", "teacher"]},
    # Means and deviations that are known from elsewhere.
    public_statistics={"age": (45.0, 15.0), "hours": (38.0, 10.0)},
    test_fraction=0.2,
  )


class Model(nn.Module):
  """Maps one row to the logits of its classes."""

  width: int

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Returns logits [classes]."""
    return nn.Dense(2)(nn.tanh(nn.Dense(self.width)(inputs)))


def get_task(config: ml_collections.ConfigDict) -> dpdist.Task:
  """Returns what is trained: a model, by its cross-entropy."""
  return dpdist.tasks.classification(Model(config.model.width))
