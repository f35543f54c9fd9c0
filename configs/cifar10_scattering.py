r"""Private logistic regression on scattering features of CIFAR-10.

  python -m launch.fetch --name=cifar10
  python -m launch.train --config=configs/cifar10_scattering.py \
    --workdir=/tmp/cifar_scattering

Epsilon 3.0, delta 1e-5. Tramer & Boneh 2021, "Differentially Private Learning
Needs Better Features (or Much More Data)", report 0.670 for a linear model, and
0.693 for a small network on the same features. Batch, learning rate, momentum,
clip norm and epochs are theirs for the linear one; they spend a part of
epsilon on private means and deviations of the features, where groups of
channels are normalised here, which costs none. Nothing was searched for here.
One run (--config.insecure_seed=1) had 0.650 of the held-out images right, 0.651
with averaged parameters; 8 minutes of one core's time.
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "cifar10"
  config.data.features = "scattering"
  config.model.name = "linear"
  config.model.num_outputs = 10
  config.model.num_groups = 27
  config.privacy.num_examples = 50_000
  config.privacy.expected_batch_size = 8192
  config.privacy.num_steps = 366
  config.privacy.l2_clip_norm = 0.1
  config.privacy.target_epsilon = 3.0
  config.privacy.target_delta = 1e-5
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 4.0
  config.optimizer.options.momentum = 0.9
  config.ema_decay = 0.98
  config.chunk_size = 512
  return config
