"""A project of a user of dpdist: how long patients live, in plain JAX.

A Weibull model of survival times, some of which are cut off.

python -m launch.train --config=survival.py --workdir=...
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpdist
from dpdist import config as config_lib

_TABLE = pathlib.Path(__file__).with_name("patients.csv")


def get_config():
  """Settings; what is given below needs none."""
  config = config_lib.default()
  config.privacy.num_examples = 408  # Public: the patients that are trained on.
  config.privacy.expected_batch_size = 64.0
  config.privacy.num_steps = 24
  config.privacy.noise_multiplier = 1.0
  config.privacy.accountant = "rdp"
  config.checkpoint_every = config.eval_every = 4
  return config


def _init(key, patient):
  hidden = 0.5 * jax.random.normal(key, (patient["inputs"].size, 8))
  return {"hidden": hidden, "out": jnp.zeros(8), "shape": jnp.zeros(())}


def _log_scale(params, patient):
  return jnp.tanh(patient["inputs"] @ params["hidden"]) @ params["out"]


def _loss(params, patient):
  years, has_died = patient["targets"]
  shape = jnp.exp(params["shape"])
  z = shape * (jnp.log(years) - _log_scale(params, patient))
  return jnp.exp(z) - has_died * (params["shape"] + z)


def concordance(targets, log_scales):
  """How often, of two patients, the one who died first was foreseen to."""
  years, has_died = targets.T
  before = (years[:, None] < years) & (has_died[:, None] == 1)
  return np.mean((log_scales[:, None] < log_scales)[before])


def get_task(config):
  """The likelihood; shown by how well patients are put in order."""
  return dpdist.tasks.from_functions(
    _init, _loss, predict=_log_scale, metrics=[concordance]
  )


def get_dataset(config):
  """The table; means and deviations are public numbers."""
  return dpdist.data.from_csv(
    _TABLE,
    inputs=["age", "dose"],
    targets=["years", "died"],
    public_statistics={"age": (60.0, 10.0), "dose": (5.0, 3.0)},
    test_fraction=0.2,
  )


def get_optimizer(config):
  """Adam."""
  return optax.adam(0.05)
