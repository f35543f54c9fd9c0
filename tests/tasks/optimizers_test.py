"""Schedules reach their ends, and bad settings are named."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpdist import config as config_lib
from dpdist.tasks import optimizers


def _config(**changes):
  config = config_lib.default().optimizer
  config.update(changes)
  return config


def test_constant_is_the_default():
  _, rate = optimizers.make(_config(learning_rate=0.5), 10)
  assert [float(rate(t)) for t in (0, 5, 10)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_warmup_rises_to_the_peak_and_falls_to_zero(schedule):
  config = _config(learning_rate=1.0, schedule=schedule, warmup_steps=4)
  _, rate = optimizers.make(config, 20)
  rates = np.array([rate(t) for t in range(21)])
  np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
  assert np.all(np.diff(rates[4:]) < 0)
  np.testing.assert_allclose(rates[20], 0, atol=1e-6)


def test_options_are_the_optimizers_own():
  config = _config(name="sgd", learning_rate=1.0)
  config.options.momentum = 0.5
  optimizer, _ = optimizers.make(config, 10)
  params = jnp.zeros(())
  state = optimizer.init(params)
  for expected in (-1.0, -1.5):
    updates, state = optimizer.update(jnp.ones(()), state, params)
    assert float(updates) == expected
  adam, _ = optimizers.make(_config(name="adam", learning_rate=1e-3), 10)
  assert isinstance(adam, optax.GradientTransformation)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "none"}, r"optimizer\.name .* 'none'"),
    ({"name": "__doc__"}, r"optimizer\.name .* '__doc__'"),
    ({"schedule": "none"}, r"optimizer\.schedule .* 'none'"),
    ({"learning_rate": 0.0}, r"learning_rate .* 0\.0"),
    ({"learning_rate": float("nan")}, r"learning_rate .* nan"),
    ({"warmup_steps": -1}, r"warmup_steps .* -1"),
    ({"warmup_steps": 10}, r"warmup_steps .* 10"),
    ({"options": {"momentun": 0.9}}, r"optimizer\.options .*momentun"),
  ],
)
def test_bad_settings_are_named(changes, message):
  options = changes.pop("options", {})
  config = _config(**changes)
  with config.options.unlocked():
    config.options.update(options)
  with pytest.raises(ValueError, match=message):
    optimizers.make(config, 10)
