r"""Private LoRA fine-tuning of SmolLM2-135M on chat, a user at a time.

  dpdist fetch --name=smollm2
  dpdist fetch --name=chitchat
  dpdist train --config=smollm2_chitchat \
    --workdir=/tmp/smol

Epsilon 8.0, delta 1e-4, of a user. It needs a GPU, and none was available: no
run of it has been finished. On one core of a CPU, five steps of eight users on
average,

  --config.privacy.expected_batch_size=8 --config.privacy.num_steps=5 \
  --config.optimizer.warmup_steps=1 --config.eval_every=5 --config.chunk_size=4

took 12 minutes (insecure_seed 1), 70 seconds a step and 5 minutes to measure
736 held-out pieces: 0.278 of next tokens right, loss 4.13 nats a token,
perplexity 62.2, at the same epsilon. So few steps show that it runs, and not
how well it learns.
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "chitchat"
  config.data.tokenizer = "smollm2"
  config.data.sequence_length = 64
  config.data.examples_per_unit = 4
  config.model.name = "stacked_decoder"
  config.model.num_outputs = 49_152
  config.model.width = 576
  config.model.depth = 30
  config.model.num_heads = 9
  config.model.num_kv_heads = 3
  config.model.hidden = 1536
  config.model.rope_theta = 100_000.0
  config.model.norm_epsilon = 1e-5
  config.model.weights = "smollm2"
  config.model.lora_rank = 4
  config.model.trainable = "lora"
  config.privacy.unit = "user"
  config.privacy.num_examples = 1068
  config.privacy.expected_batch_size = 256
  config.privacy.num_steps = 200
  config.privacy.l2_clip_norm = 0.1
  config.privacy.target_epsilon = 8.0
  config.privacy.target_delta = 1e-4
  config.optimizer.name = "adam"
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 10
  config.optimizer.schedule = "cosine"
  config.eval_every = 200
  config.chunk_size = 16
  return config
