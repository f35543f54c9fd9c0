"""A private convolutional network on Fashion-MNIST.

  apt-get install dataset-fashion-mnist
  python -m launch.train --config=configs/fashion_mnist.py --workdir=/tmp/fm

Epsilon 2.7, delta 1e-5: held-out accuracy 0.850 (one run), 16 minutes on 2
cores. The settings follow Papernot et al. 2021, "Tempered Sigmoid Activations
for Deep Learning with Differential Privacy", and were not searched here.
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "idx"
  config.data.path = "/usr/share/datasets/fashion-mnist"
  config.model.name = "cnn"
  config.model.num_outputs = 10
  config.model.width = 16
  config.privacy.num_examples = 60_000
  config.privacy.expected_batch_size = 1024
  config.privacy.num_steps = 600
  config.privacy.l2_clip_norm = 0.1
  config.privacy.target_epsilon = 2.7
  config.privacy.target_delta = 1e-5
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 4.0
  config.optimizer.options.momentum = 0.9
  config.ema_decay = 0.99
  config.chunk_size = 512
  return config
