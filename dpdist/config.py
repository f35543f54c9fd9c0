"""The settings of a run, with their units and defaults.

A file in configs/ starts from `default()` and changes some settings; flags of
the form --config.a.b=value change more. Imports no jax, so that `launch.budget`
can read any config anywhere.
"""

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

import ml_collections
from ml_collections import config_dict

from dpdist import errors
from dpdist.files import atomic
from dpdist.privacy import plan as plan_lib

# Sections whose settings are those of what another setting names.
_FREE_SECTIONS = (
  "config.optimizer.options",
  "config.privacy.noise_options",
  "config.privacy.clipping_options",
)
_FILE = "config.json"
"""The file in a run directory that holds the settings of the last start."""


def default() -> ml_collections.ConfigDict:
  """Returns all settings with their defaults; each section has a function."""
  config = ml_collections.ConfigDict()

  # classification, language_model, or PACKAGE.MODULE:FUNCTION, a function of
  # the whole config that returns a dpdist.Task; empty: the model's own.
  config.task = ""
  config.data = data_defaults()
  config.model = model_defaults()
  config.augmentation = augmentation_defaults()
  config.privacy = privacy_defaults()
  config.clipping = clipping_defaults()
  config.sentinel = sentinel_defaults()
  config.optimizer = optimizer_defaults()
  config.ema_decay = 0.0  # decay of the averaged parameters; 0: no average
  config.mesh = mesh_defaults()

  config.chunk_size = 0  # examples on the mesh at once; 0: automatic
  config.eval_every = 0  # steps; 0: twenty times a run
  config.checkpoint_every = 0  # steps; 0: ten times a run
  config.max_checkpoints = 3  # at least 2
  # In a job of several processes: seconds that a part of a step may take, or
  # that a process may be silent, before all processes end; 0: no limit.
  config.stuck_after = 600.0

  config.data_budget = data_budget_defaults()

  # Where the ledger is: a directory, gs://... or s3://...; empty: "ledger" in
  # the run directory.
  config.ledger = ""
  # The file of the run's secret, which is made if it is missing; empty:
  # "secret" in the run directory. Keep it as private as the data.
  config.secret_file = ""
  # Fixes every random stream, for tests. The guarantee is void.
  config.insecure_seed = config_dict.placeholder(int)
  # Shows private values: training loss, true batch size, clip fraction.
  config.unsafe_metrics = False
  return config


def data_defaults() -> ml_collections.ConfigDict:
  """Returns settings of the training and held-out data, and of reading them."""
  data = ml_collections.ConfigDict()
  data.name = "digits"
  # digits, text, npz, idx, array_record, parquet, mnist, fashion_mnist,
  # cifar10, adult, chitchat, sotu, rotten_tomatoes, imdb
  data.path = ""  # directory or file, where the name needs one
  # Features that replace the inputs. Of images: scattering, scattering_scaled.
  # Of tokens: minilm, or the states after the first 1 to 5 of its blocks:
  # minilm_1 to minilm_5
  data.features = ""
  data.sequence_length = 64  # text: tokens of an example
  # rotten_tomatoes, imdb, sotu, chitchat: a tokenizer's file, or a model that
  # launch.fetch knows; empty: tokens are bytes
  data.tokenizer = ""
  data.num_train = 0  # text: pieces to train on
  data.num_test = 0  # text: pieces held out
  data.inputs_column = "inputs"  # parquet
  data.targets_column = "targets"  # parquet
  # Slots of a user, if the unit of privacy is a user (privacy.unit): the most
  # examples of a user in a step. 0: the unit is an example.
  data.examples_per_unit = 0
  data.unit_column = "user"  # the user of each example
  # At least the first 12 digits of the training set's digest, to declare that
  # a run's data changed since it began.
  data.changed_to = ""
  data.num_threads = 4  # threads that read ahead
  data.prefetch = 4  # steps read ahead
  data.retry_seconds = 60.0  # seconds to retry failing reads before stopping
  data.stall_seconds = 120.0  # a longer read counts as failing; 0: no limit
  return data


def model_defaults() -> ml_collections.ConfigDict:
  """Returns settings of the model, its first weights and what is trained."""
  model = ml_collections.ConfigDict()
  model.name = "random_features"
  # linear, random_features, cnn, wide_resnet, decoder, stacked_decoder, bert;
  # or PACKAGE.MODULE:FUNCTION, a function of this section
  model.num_outputs = 10  # classes, or the vocabulary
  model.width = 0  # features, channels, or a transformer's dimension
  model.depth = 0  # decoders, bert: blocks; wide_resnet: layers
  # linear, wide_resnet: groups of channels, each normalised by itself
  model.num_groups = 0
  model.num_heads = 0  # decoders, bert
  model.num_kv_heads = 0  # stacked_decoder; 0: as many as heads
  model.head_dim = 0  # stacked_decoder; 0: width over heads
  model.hidden = 0  # stacked_decoder, bert; 0: four times the width
  model.vocabulary = 0  # bert
  model.positions = 512  # bert: most tokens of an example
  # bert: blocks before this one were run before: 5 with data.features=minilm_5
  model.first_block = 0
  model.rope_theta = 10_000.0  # stacked_decoder
  model.norm_epsilon = 1e-6  # stacked_decoder
  model.lora_rank = 0  # bert, stacked_decoder: adapters; 0: none
  model.lora_alpha = 16.0  # adapters are scaled by this over lora_rank
  # bert, stacked_decoder: a .safetensors or .gguf file, or its name for
  # launch.fetch; empty: the model begins at random. Assumed to be public.
  model.weights = ""
  # A regular expression that is searched for in each parameter's path. If it is
  # not found, the parameter is frozen. Empty: all are trained.
  model.trainable = ""
  model.dtype = "float32"  # of the computation; sums are float32
  return model


def augmentation_defaults() -> ml_collections.ConfigDict:
  """Returns settings of random changes of an example's image.

  The gradients of the changed copies are averaged before they are clipped as
  one example's.
  """
  augmentation = ml_collections.ConfigDict()
  augmentation.multiplicity = 0  # copies; 0: the unchanged image
  augmentation.flip = False  # swaps left and right at random
  augmentation.crop = 0  # most pixels to shift by in each direction
  return augmentation


def privacy_defaults() -> ml_collections.ConfigDict:
  """Returns the numbers of the guarantee; see `dpdist.privacy.plan`."""
  privacy = ml_collections.ConfigDict()
  privacy.num_examples = 0  # public; must be the training set's length
  privacy.expected_batch_size = 0.0  # mean number of examples in a step
  privacy.num_steps = 0  # updates
  privacy.l2_clip_norm = 1.0  # bound on a per-example gradient's norm
  privacy.target_delta = 1e-5
  privacy.target_epsilon = config_dict.placeholder(float)
  privacy.noise_multiplier = config_dict.placeholder(float)
  privacy.accountant = "pld"  # or rdp
  privacy.neighboring_relation = "add_or_remove_one"
  # or replace_one, zero_out
  privacy.sampling = "poisson"
  # or truncated_poisson, cyclic_poisson, fixed_size
  privacy.truncated_batch_size = config_dict.placeholder(int)
  privacy.cycle_length = 1  # parts of the rows that take turns
  privacy.examples_per_user = 1  # most rows that one person may have
  privacy.group_size = 1  # rows averaged and clipped as one
  privacy.noise_schedule = ()  # (step, noise_multiplier): from a step on
  privacy.batch_size_schedule = ()  # (step, expected_batch_size)
  privacy.unit = "example"  # what a row is: example or user
  # What adds noise and what clips, or package.module:attribute; see
  # docs/mechanisms.md.
  privacy.noise = "gaussian"
  privacy.noise_options = ml_collections.ConfigDict()
  privacy.clipping = "fixed"
  privacy.clipping_options = ml_collections.ConfigDict()
  return privacy


def clipping_defaults() -> ml_collections.ConfigDict:
  """Returns settings of clipping and summing; see `dpdist.clipped_grad`."""
  clipping = ml_collections.ConfigDict()
  clipping.method = "auto"
  clipping.microbatch_size = 0  # examples; 0: a device's whole chunk
  # Makes the bits of sums independent of the number of devices and processes.
  clipping.exact_sum = False
  clipping.exact_group_size = 32  # examples summed in float32
  return clipping


def sentinel_defaults() -> ml_collections.ConfigDict:
  """Returns settings of the search for examples longer than their norms say."""
  sentinel = ml_collections.ConfigDict()
  # One in so many steps, by a secret choice, and the first one; 0: none.
  sentinel.every = 100
  return sentinel


def optimizer_defaults() -> ml_collections.ConfigDict:
  """Returns settings of the update that follows the noise."""
  optimizer = ml_collections.ConfigDict()
  # Any optax optimizer, or PACKAGE.MODULE:FUNCTION, called as those are.
  optimizer.name = "sgd"
  optimizer.learning_rate = 1.0  # peak
  optimizer.schedule = "constant"  # constant, cosine, linear
  optimizer.warmup_steps = 0
  optimizer.options = ml_collections.ConfigDict()  # e.g. momentum
  return optimizer


def mesh_defaults() -> ml_collections.ConfigDict:
  """Returns settings of the mesh of devices."""
  mesh = ml_collections.ConfigDict()
  mesh.data = -1  # divides examples; -1: all remaining devices
  mesh.fsdp = 1  # divides examples and every parameter
  mesh.model = 1  # divides what the model has rules for
  return mesh


def data_budget_defaults() -> ml_collections.ConfigDict:
  """Returns settings of the budget that all runs on a data set share.

  The first run creates the budget.
  """
  data_budget = ml_collections.ConfigDict()
  data_budget.location = ""  # a directory or a URL; empty: none
  data_budget.epsilon = config_dict.placeholder(float)  # for all runs
  data_budget.delta = config_dict.placeholder(float)
  data_budget.reservation = ""  # label of a reservation for a new run
  return data_budget


def optional() -> frozenset[str]:
  """Returns paths of settings that may be None, as "privacy.target_epsilon"."""

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
  """Checks the names of a config's settings.

  Raises:
    ValueError: a setting is missing or unknown, or is a section and should not
      be. Without this check an unknown setting would be ignored silently.
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
  if name in _FREE_SECTIONS:
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
  """Returns the part of a config that the plan is made from."""
  return plan_lib.PrivacyConfig(**config.privacy.to_dict())


def privacy_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns that part as a JSON-able dict, as the ledger records it."""
  return privacy_config(config).to_dict()


def save(
  workdir: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> None:
  """Writes a run's settings to its directory, to be read by later commands."""
  text = json.dumps(config.to_dict(), indent=2) + "\n"
  atomic.write(pathlib.Path(workdir) / _FILE, text.encode())


def load(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
  """Reads the settings that `save` wrote; newer settings have their defaults.

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
