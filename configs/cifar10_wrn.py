"""A private WRN-16-4 on CIFAR-10, from scratch: the recipe for a GPU or more.

  python -m launch.fetch --name=cifar10
  python -m launch.train --config=configs/cifar10_wrn.py --workdir=/tmp/wrn

MEASURED
"""

import ml_collections

from dpdist import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings."""
  config = config_lib.default()
  config.data.name = "cifar10"
  config.augmentation.multiplicity = 16
  config.augmentation.flip = True
  config.augmentation.crop = 4
  config.model.name = "wide_resnet"
  config.model.num_outputs = 10
  config.model.depth = 16
  config.model.width = 4
  config.model.num_groups = 16
  config.privacy.num_examples = 50_000
  config.privacy.expected_batch_size = 4096
  config.privacy.num_steps = 875
  config.privacy.l2_clip_norm = 1.0
  config.privacy.noise_multiplier = 10.0
  config.privacy.target_delta = 1e-5
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 2.0
  config.ema_decay = 0.9999
  # With 16 copies of each; eight devices take as many each.
  config.clipping.microbatch_size = 64
  config.chunk_size = 512
  return config
