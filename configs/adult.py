"""Private logistic regression on Adult: does a person earn over 50,000 dollars?

  python -m launch.fetch --name=adult
  python -m launch.train --config=configs/adult.py --workdir=/tmp/adult

MEASURED
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "adult"
  config.model.name = "linear"
  config.model.num_outputs = 2
  config.privacy.num_examples = 32_561
  config.privacy.expected_batch_size = 2048
  config.privacy.num_steps = 200
  config.privacy.l2_clip_norm = 1.0
  config.privacy.target_epsilon = 1.0
  config.privacy.target_delta = 1e-5
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 1.0
  config.optimizer.options.momentum = 0.9
  config.optimizer.schedule = "cosine"
  return config
