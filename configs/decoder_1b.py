"""A private 1B decoder on 2,048 TPU v6e chips: the step, compiled and not run.

  dpdist bench --config=decoder_1b --topology=v6e:16x16 \
    --num_slices=8

The shapes, batch, steps, noise and delta of VaultGemma 1B, the largest private
model published so far (Google 2025, "VaultGemma: A Differentially Private Gemma
Model"): 26 layers of width 1,152, sequences of 1,024 tokens, about 518,000 of
them a step, 100,000 steps with noise multiplier 0.614, of 13 trillion tokens.
The unit of privacy is one sequence. Its learning rate is not known here, and
nothing was trained: this config is for a forecast of what such a step needs,
which is in docs/profiling.md under "Compile before you pay".

To train, give --config.data.path=DIR with array_record files of tokens.
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
  config.model.width = 1152
  config.model.depth = 26
  config.model.num_heads = 4
  config.model.num_kv_heads = 1
  config.model.head_dim = 256
  config.model.hidden = 6912
  config.privacy.num_examples = 12_695_312_500  # 13e12 tokens
  config.privacy.expected_batch_size = 517_989
  config.privacy.num_steps = 100_000
  config.privacy.l2_clip_norm = 1.0
  config.privacy.noise_multiplier = 0.614
  config.privacy.target_delta = 1.1e-10
  config.optimizer.name = "adam"
  config.optimizer.learning_rate = 1e-3
  # Sixteen neighbors divide the parameters; four sequences a chip at once.
  config.mesh.fsdp = 16
  config.clipping.microbatch_size = 4
  config.chunk_size = 8192
  return config
