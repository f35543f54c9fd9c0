"""Private logistic regression on scikit-learn's 8x8 digits.

  python -m launch.train --config=configs/digits.py --workdir=/tmp/digits
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "digits"
  config.model.name = "random_features"
  config.model.num_outputs = 10
  config.model.width = 1024
  config.privacy.num_examples = 1438
  config.privacy.expected_batch_size = 256
  config.privacy.num_steps = 400
  config.privacy.l2_clip_norm = 0.1
  config.privacy.target_epsilon = 2.0
  config.privacy.target_delta = 1e-4
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 30.0
  return config
