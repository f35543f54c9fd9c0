"""A private 8B decoder on 512 TPU v5p chips: the step, compiled and not run.

  dpdist bench --config=decoder_8b --topology=v5p:8x8x8

32 layers of width 4,096 with grouped-query attention, a vocabulary of 262,144,
sequences of 1,024 tokens. A chip holds a 64th of parameters, optimizer, noise
and sums; all 512 divide the examples. Data, batch and noise are not those of a
published run: the config is for a forecast of what such a step needs, and
nothing was trained.
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "array_record"
  config.data.sequence_length = 1024
  config.model.name = "stacked_decoder"
  config.model.num_outputs = 262_144
  config.model.width = 4096
  config.model.depth = 32
  config.model.num_heads = 32
  config.model.num_kv_heads = 8
  config.model.head_dim = 128
  config.model.hidden = 14_336
  config.privacy.num_examples = 1_000_000_000
  config.privacy.expected_batch_size = 131_072
  config.privacy.num_steps = 10_000
  config.privacy.l2_clip_norm = 1.0
  config.privacy.target_epsilon = 2.0
  config.privacy.target_delta = 1e-10
  config.privacy.accountant = "rdp"
  config.optimizer.name = "adam"
  config.optimizer.learning_rate = 3e-4
  config.mesh.fsdp = 64
  config.clipping.microbatch_size = 4
  config.chunk_size = 2048
  return config
