"""A private convolutional network on Fashion-MNIST, from scratch.

  dpdist fetch --name=fashion_mnist
  dpdist train --config=fashion_mnist --workdir=/tmp/fm

Epsilon 2.7, delta 1e-5. Papernot et al. 2021, "Tempered Sigmoid Activations for
Deep Learning with Differential Privacy", report 0.861 for networks of this
kind. Batch, learning rate, momentum, clip norm and epochs (40) are those that
Tramer & Boneh 2021 published for it; only the noise differs: PLD accounting
allows 1.957 instead of 2.15. Held-out accuracy 0.8644 (mean of seeds 1 to 3
given as --config.insecure_seed, so that anyone can repeat them; 0.8638 to
0.8648). A run takes 8.4 minutes of one core's time, 12 to 14 if the core had
other work to do. Nothing was searched for here, except that an earlier setting
(1,024 on average, 600 steps) had 0.850 in one run.
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "fashion_mnist"
  config.model.name = "cnn"
  config.model.num_outputs = 10
  config.model.width = 16
  config.privacy.num_examples = 60_000
  config.privacy.expected_batch_size = 2048
  config.privacy.num_steps = 1172
  config.privacy.l2_clip_norm = 0.1
  config.privacy.target_epsilon = 2.7
  config.privacy.target_delta = 1e-5
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 4.0
  config.optimizer.options.momentum = 0.9
  config.ema_decay = 0.99
  config.chunk_size = 512
  return config
