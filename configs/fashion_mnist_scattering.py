r"""Private logistic regression on scattering features of Fashion-MNIST.

  dpdist fetch --name=fashion_mnist
  dpdist train --config=fashion_mnist_scattering \
    --workdir=/tmp/fm_scattering

Epsilon 3.0, delta 1e-5. Tramer & Boneh 2021, "Differentially Private Learning
Needs Better Features (or Much More Data)", report 0.897. Batch, learning rate,
momentum, clip norm and groups are theirs; only the noise differs: PLD
accounting allows 3.40 instead of 4.05. Held-out accuracy 0.8994 (mean of seeds
1 to 3 given as --config.insecure_seed; 0.8990 to 0.8999). A run takes 2.3
minutes of one core's time, including the features, which are made once. Nothing
was searched for here.
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "fashion_mnist"
  config.data.features = "scattering"
  config.model.name = "linear"
  config.model.num_outputs = 10
  config.model.num_groups = 27
  config.privacy.num_examples = 60_000
  config.privacy.expected_batch_size = 8192
  config.privacy.num_steps = 293
  config.privacy.l2_clip_norm = 0.1
  config.privacy.target_epsilon = 3.0
  config.privacy.target_delta = 1e-5
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 16.0
  config.optimizer.options.momentum = 0.9
  config.ema_decay = 0.98
  return config
