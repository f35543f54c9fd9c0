"""A private language model of chat, where the unit of privacy is a user.

python -m launch.fetch --name=chitchat
python -m launch.train --config=configs/chitchat_users.py --workdir=/tmp/chat
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "chitchat"
  config.data.sequence_length = 64
  config.data.examples_per_unit = 4
  config.model.name = "decoder"
  config.model.num_outputs = 256
  config.model.width = 32
  config.model.depth = 1
  config.model.num_heads = 2
  config.privacy.unit = "user"
  config.privacy.num_examples = 1068
  config.privacy.expected_batch_size = 256
  config.privacy.num_steps = 400
  config.privacy.l2_clip_norm = 0.5
  config.privacy.target_epsilon = 8.0
  config.privacy.target_delta = 1e-4
  config.optimizer.name = "adam"
  config.optimizer.learning_rate = 1e-2
  config.optimizer.warmup_steps = 10
  config.optimizer.schedule = "cosine"
  return config
