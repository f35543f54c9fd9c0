"""A project of a user of dpdist: prices of houses from a CSV file, in NNX.

python -m launch.train --config=house_prices.py --workdir=...
"""

import pathlib

from flax import nnx
import optax

import dpdist
from dpdist import config as config_lib

_TABLE = pathlib.Path(__file__).with_name("houses.csv")
_TOWNS = ("north", "south", "west")


def get_config():
  """Settings; what is given below needs none."""
  config = config_lib.default()
  config.privacy.num_examples = 410  # Public: the rows that are trained on.
  config.privacy.expected_batch_size = 64.0
  config.privacy.num_steps = 24
  config.privacy.noise_multiplier = 1.0
  config.privacy.accountant = "rdp"
  config.checkpoint_every = config.eval_every = 4
  return config


class Network(nnx.Module):
  """Two layers."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(5, 16, rngs=rngs)
    self.norm = nnx.LayerNorm(16, rngs=rngs)
    self.out = nnx.Linear(16, 1, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.tanh(self.norm(self.hidden(x))))


def get_task(config):
  """Regression, shown by its r2 and mean absolute error."""
  return dpdist.tasks.regression(Network, loss="huber", metrics=["r2", "mae"])


def get_dataset(config):
  """The table; means and classes are public numbers."""
  return dpdist.data.from_csv(
    _TABLE,
    inputs=["size", "age", "town"],
    targets="price",
    categories={"town": _TOWNS},
    public_statistics={"size": (100.0, 30.0), "age": (40.0, 20.0)},
    test_fraction=0.2,
  )


def get_optimizer(config):
  """Adam."""
  return optax.adam(0.05)
