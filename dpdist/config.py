"""The settings of a run, with their units and defaults.

A file in configs/ starts from `default()` and changes what it needs to; flags
of the form --config.a.b=value change it once more. Imports no jax, so that
`launch.budget` can read any config anywhere.
"""

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

import ml_collections
from ml_collections import config_dict

from dpdist import errors
from dpdist.privacy import plan as plan_lib

_FILE = "config.json"
"""In a run's directory: the settings of its last start."""


def default() -> ml_collections.ConfigDict:
  """Every setting there is."""
  config = ml_collections.ConfigDict()

  config.data = ml_collections.ConfigDict()
  config.data.name = "digits"
  # digits, text, npz, idx, array_record, parquet, mnist, fashion_mnist,
  # cifar10, adult, chitchat, sotu, rotten_tomatoes, imdb
  config.data.path = ""  # directory or file, where the name needs one
  # In the place of inputs: scattering or scattering_scaled of images;
  # minilm's of tokens, or states of tokens behind the first 1 to 5 of its
  # blocks: minilm_1 to minilm_5
  config.data.features = ""
  config.data.sequence_length = 64  # of texts: tokens of an example
  # rotten_tomatoes, imdb, sotu, chitchat: a file, or a model that launch.fetch
  # knows; empty: bytes
  config.data.tokenizer = ""
  config.data.num_train = 0  # text: pieces to train on
  config.data.num_test = 0  # text: pieces held out
  config.data.inputs_column = "inputs"  # parquet
  config.data.targets_column = "targets"  # parquet
  # Slots of a user, where the unit of privacy is one (privacy.unit): at a step
  # a user's examples are at most as many. 0: the unit is an example.
  config.data.examples_per_unit = 0
  config.data.unit_column = "user"  # says whose each example is
  # The first 12 digits or more of the training set's manifest, to declare that
  # the data of a run changed since it began.
  config.data.changed_to = ""
  config.data.num_threads = 4  # reading ahead
  config.data.prefetch = 4  # steps read ahead
  config.data.retry_seconds = 60.0  # waited for data in trouble, then stopped
  config.data.stall_seconds = 120.0  # a read as long is trouble; 0: none is

  config.model = ml_collections.ConfigDict()
  config.model.name = "random_features"
  # linear, random_features, cnn, wide_resnet, decoder, stacked_decoder, bert
  config.model.num_outputs = 10  # classes, or the vocabulary
  config.model.width = 0  # features, channels, or a transformer's dimension
  config.model.depth = 0  # decoders, bert: blocks; wide_resnet: layers
  # linear, wide_resnet: groups of channels to normalise, each by itself
  config.model.num_groups = 0
  config.model.num_heads = 0  # decoders, bert
  config.model.num_kv_heads = 0  # stacked_decoder; 0: as many as heads
  config.model.head_dim = 0  # stacked_decoder; 0: width over heads
  config.model.hidden = 0  # stacked_decoder, bert; 0: four times the width
  config.model.vocabulary = 0  # bert
  config.model.positions = 512  # bert: tokens of an example at most
  # bert: those before it were run ahead: 5 with data.features=minilm_5
  config.model.first_block = 0
  config.model.rope_theta = 10_000.0  # stacked_decoder
  config.model.norm_epsilon = 1e-6  # stacked_decoder
  config.model.lora_rank = 0  # bert, stacked_decoder: adapters; 0: none
  config.model.lora_alpha = 16.0  # over lora_rank, what adapters are scaled by
  # bert, stacked_decoder: a .safetensors or .gguf file, or what launch.fetch
  # calls it; empty: the model begins at random. Taken for public.
  config.model.weights = ""
  # A regular expression, searched for in each parameter's path; where it is not
  # found, the parameter is frozen. Empty: all are trained.
  config.model.trainable = ""
  config.model.dtype = "float32"  # of the computation; sums are float32

  # Random changes of an example's inputs, an image. The gradients of as many
  # changed copies are averaged before they are clipped, as one example's.
  config.augmentation = ml_collections.ConfigDict()
  config.augmentation.multiplicity = 0  # copies; 0: the image as it is
  config.augmentation.flip = False  # left and right
  config.augmentation.crop = 0  # pixels to shift by, at most, each way

  config.privacy = ml_collections.ConfigDict()
  config.privacy.num_examples = 0  # public; must be the training set's length
  config.privacy.expected_batch_size = 0.0  # examples, on average, a step
  config.privacy.num_steps = 0  # updates
  config.privacy.l2_clip_norm = 1.0  # of a per-example gradient
  config.privacy.target_delta = 1e-5
  config.privacy.target_epsilon = config_dict.placeholder(float)
  config.privacy.noise_multiplier = config_dict.placeholder(float)
  config.privacy.accountant = "pld"  # or rdp
  config.privacy.neighboring_relation = "add_or_remove_one"
  # or replace_one, zero_out
  config.privacy.sampling = "poisson"
  # or truncated_poisson, cyclic_poisson, fixed_size
  config.privacy.truncated_batch_size = config_dict.placeholder(int)
  config.privacy.cycle_length = 1  # parts of the rows that take turns
  config.privacy.examples_per_user = 1  # rows that anyone may have at most
  config.privacy.group_size = 1  # rows averaged and clipped as one
  config.privacy.noise_schedule = ()  # (step, noise_multiplier), later ones
  config.privacy.batch_size_schedule = ()  # (step, expected_batch_size)
  config.privacy.unit = "example"  # what a row is: example or user

  config.clipping = ml_collections.ConfigDict()
  config.clipping.method = "auto"
  config.clipping.microbatch_size = 0  # examples; 0: a device's whole chunk
  # Sums whose bits do not depend on how many devices and processes there are.
  config.clipping.exact_sum = False
  config.clipping.exact_group_size = 32  # examples summed in float32

  # Of so many steps one, by a secret choice, and the first of all look for
  # examples that are longer than their norms say; 0: none does.
  config.sentinel = ml_collections.ConfigDict()
  config.sentinel.every = 100

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = "sgd"  # any optax optimizer
  config.optimizer.learning_rate = 1.0  # its peak
  config.optimizer.schedule = "constant"  # constant, cosine, linear
  config.optimizer.warmup_steps = 0
  config.optimizer.options = ml_collections.ConfigDict()  # e.g. momentum
  config.ema_decay = 0.0  # of the averaged parameters; 0: none

  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1  # divides examples; -1: the devices that remain
  config.mesh.fsdp = 1  # divides examples and every parameter
  config.mesh.model = 1  # divides what the model has rules for

  config.chunk_size = 0  # examples over the mesh at once; 0: chosen
  config.eval_every = 0  # steps; 0: twenty times a run
  config.checkpoint_every = 0  # steps; 0: ten times a run
  config.max_checkpoints = 3  # at least 2
  # Seconds that any part of a step may take in a job of several processes, or
  # one of them be silent, before all end; 0: any time.
  config.stuck_after = 600.0

  # A budget that all runs on a data set share: the first one makes it.
  config.data_budget = ml_collections.ConfigDict()
  config.data_budget.location = ""  # a directory or a URL; empty: none
  config.data_budget.epsilon = config_dict.placeholder(float)  # of all runs
  config.data_budget.delta = config_dict.placeholder(float)
  config.data_budget.reservation = ""  # the label of one, for a new run

  # Where the ledger is: a directory, gs://... or s3://...; empty: "ledger" in
  # the working directory.
  config.ledger = ""
  # A file that holds the run's secret, made if it is missing; empty: "secret"
  # in the working directory. Keep it as private as the data.
  config.secret_file = ""
  # Fixes every random stream, for tests. The guarantee is void.
  config.insecure_seed = config_dict.placeholder(int)
  # Shows what is private: training loss, true batch size, clip fraction.
  config.unsafe_metrics = False
  return config


def optional() -> frozenset[str]:
  """Paths of the settings that may be None, as "privacy.target_epsilon"."""

  def paths(section: ml_collections.ConfigDict, prefix: str) -> list[str]:
    found = []
    for name, value in section.items():
      if isinstance(value, ml_collections.ConfigDict):
        found += paths(value, f"{prefix}{name}.")
      elif value is None:
        found.append(prefix + name)
    return found

  return frozenset(paths(default(), ""))


def check(config: Any) -> None:
  """Holds the names of a config's settings against those that there are.

  Raises:
    ValueError: one is missing, is not known, or is a section and should not be;
      a setting that is not known would be passed over without a word.
  """
  _check_section("config", config, default())


def _check_section(
  name: str, section: Any, right: ml_collections.ConfigDict
) -> None:
  if not isinstance(section, ml_collections.ConfigDict):
    raise ValueError(
      f"{name} must be an ml_collections.ConfigDict, as of"
      f" dpdist.config.default(), got a {type(section).__name__}"
    )
  missing, unknown = {*right} - {*section}, {*section} - {*right}
  if name == "config.optimizer.options":
    return
  if missing or unknown:
    raise ValueError(
      f"{name} must have the settings of dpdist.config.default(), got"
      f" {sorted(missing)} missing and {sorted(unknown)} unknown"
    )
  for key, value in right.items():
    if isinstance(value, ml_collections.ConfigDict):
      _check_section(f"{name}.{key}", section[key], value)
    elif isinstance(section[key], ml_collections.ConfigDict):
      raise ValueError(f"{name}.{key} must be no section, got {section[key]}")


def privacy_config(config: ml_collections.ConfigDict) -> plan_lib.PrivacyConfig:
  """The part of a config that the plan is made from."""
  return plan_lib.PrivacyConfig(**config.privacy.to_dict())


def privacy_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The same, JSON-able, as the ledger records it."""
  return privacy_config(config).to_dict()


def save(
  workdir: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> None:
  """Keeps a run's settings beside it, so that it can be looked at later."""
  path = pathlib.Path(workdir) / _FILE
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
  os.replace(temporary, path)


def load(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
  """Reads what `save` kept; a setting that is newer has its default.

  Raises:
    ValueError: there is no such file.
  """
  path = pathlib.Path(workdir) / _FILE
  if not path.exists():
    raise errors.ArgumentError(
      f"config must be given for a run without {_FILE}, as --config=FILE with"
      f" what was changed by flags; there is none in {str(workdir)!r}",
      hint=errors.Hint(flags=("--config=FILE",)),
    )
  merged: dict[str, Any] = default().to_dict()
  _merge(merged, json.loads(path.read_text()))
  return ml_collections.ConfigDict(merged)


def _merge(into: dict[str, Any], kept: Mapping[str, Any]) -> None:
  for name, value in kept.items():
    if isinstance(value, dict) and isinstance(into.get(name), dict):
      _merge(into[name], value)
    else:
      into[name] = value
