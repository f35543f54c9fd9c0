"""A project of a user of dpdist: regression with parts of its own, in one file.

python tests/projects/regression.py WORKDIR [SEED]
python -m launch.train --config=tests/projects/regression.py --workdir=...
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpdist
from dpdist import config as config_lib

_ROWS, _HELD_OUT, _FEATURES = 512, 64, 6


def get_config():
  """Settings; what is given below needs none."""
  config = config_lib.default()
  config.privacy.num_examples = _ROWS
  config.privacy.expected_batch_size = 64.0
  config.privacy.num_steps = 24
  config.privacy.noise_multiplier = 1.0
  config.privacy.accountant = "rdp"
  config.ema_decay = 0.5
  config.checkpoint_every = 4
  config.eval_every = 4
  return config


def _init(key, example):
  first, second = jax.random.split(key)
  width = example["features"].shape[0]
  return {
    "hidden": 0.3 * jax.random.normal(first, (width, 8)),
    "out": 0.3 * jax.random.normal(second, (8,)),
  }


def _predict(params, example):
  return jnp.tanh(example["features"] @ params["hidden"]) @ params["out"]


def _loss(params, example, rng):
  del rng
  return (_predict(params, example) - example["price"]) ** 2, "dropped"


def _metrics(params, example):
  error = _predict(params, example) - example["price"]
  # Dear examples count for more.
  weight = 1.0 + example["price"] ** 2
  return {"weighted_mse": (weight * error**2, weight), "mae": (abs(error), 1)}


def get_task(config):
  """Mean squared error, and metrics of its own."""
  del config
  return dpdist.Task(init=_init, loss=_loss, metrics=_metrics)


def get_dataset(config):
  """Arrays under names of its own."""
  rng = np.random.default_rng(0)
  truth = rng.normal(size=_FEATURES)

  def part(rows):
    x = rng.normal(size=(rows, _FEATURES)).astype(np.float32)
    return {"features": x, "price": np.tanh(x @ truth).astype(np.float32)}

  return dpdist.Dataset(part(config.privacy.num_examples), part(_HELD_OUT))


def get_optimizer(config):
  """A chain, with a schedule by the step."""
  rate = optax.cosine_decay_schedule(0.3, config.privacy.num_steps)
  return optax.chain(optax.trace(0.5), optax.scale_by_learning_rate(rate))


if __name__ == "__main__":
  settings = get_config()
  if len(sys.argv) > 2:
    settings.insecure_seed = int(sys.argv[2])
  dpdist.train(
    settings,
    sys.argv[1],
    task=get_task(settings),
    dataset=get_dataset(settings),
    optimizer=get_optimizer(settings),
  )
