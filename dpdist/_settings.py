"""The table of all settings: names, defaults, types and meanings.

`dpdist.config` makes a config from it, `--settings` of a command shows it, and
docs/settings.md is written from it.
"""

from collections.abc import Iterator
import difflib
from typing import Any, NamedTuple


class Free(NamedTuple):
  """The default of a section whose settings others name, or its user."""

  meaning: str


# By path: a section's meaning; `Free`; or a setting's default and meaning. A
# type as the default: None is the default, and other values have that type.
TABLE: dict[str, str | Free | tuple[Any, str]] = {
  "task": (
    "",
    "classification, language_model, or PACKAGE.MODULE:FUNCTION, a function of"
    " the whole config that returns a dpdist.Task; empty: the model's own",
  ),
  "data": "The training and held-out data, and how they are read.",
  "data.name": (
    "digits",
    "digits, text, npz, idx, array_record, parquet, mnist, fashion_mnist,"
    " cifar10, adult, chitchat, sotu, rotten_tomatoes, imdb, or"
    " PACKAGE.MODULE:FUNCTION, a function of this section",
  ),
  "data.path": ("", "Directory or file, where the name needs one."),
  "data.features": (
    "",
    "Features that replace the inputs. Of images: scattering,"
    " scattering_scaled. Of tokens: minilm, or the states after the first 1 to"
    " 5 of its blocks: minilm_1 to minilm_5.",
  ),
  "data.sequence_length": (64, "text: tokens of an example."),
  "data.tokenizer": (
    "",
    "rotten_tomatoes, imdb, sotu, chitchat: a tokenizer's file, or a model that"
    " launch.fetch knows; empty: tokens are bytes.",
  ),
  "data.num_train": (0, "text: pieces to train on."),
  "data.num_test": (0, "text: pieces held out."),
  "data.inputs_column": ("inputs", "parquet: the column of inputs."),
  "data.targets_column": ("targets", "parquet: the column of targets."),
  "data.examples_per_unit": (
    0,
    "Slots of a user, if the unit of privacy is a user (privacy.unit): the most"
    " examples of a user in a step. 0: the unit is an example.",
  ),
  "data.unit_column": ("user", "The array with the user of each example."),
  "data.changed_to": (
    "",
    "At least the first 12 digits of the training set's digest, to declare that"
    " a run's data changed since it began.",
  ),
  "data.num_threads": (4, "Threads that read ahead."),
  "data.prefetch": (4, "Steps read ahead."),
  "data.retry_seconds": (60.0, "Seconds to retry failing reads, then stop."),
  "data.stall_seconds": (
    120.0,
    "A read that takes longer, in seconds, counts as failing; 0: no limit.",
  ),
  "data.options": Free("Options of a data set from outside, which reads them."),
  "model": "The model, its first weights and what of it is trained.",
  "model.name": (
    "random_features",
    "linear, random_features, cnn, wide_resnet, decoder, stacked_decoder, bert;"
    " or PACKAGE.MODULE:FUNCTION, a function of this section.",
  ),
  "model.num_outputs": (10, "Classes, or the vocabulary."),
  "model.width": (0, "Features, channels, or a transformer's dimension."),
  "model.depth": (0, "decoders, bert: blocks; wide_resnet: layers."),
  "model.num_groups": (
    0,
    "linear, wide_resnet: groups of channels, each normalised by itself.",
  ),
  "model.num_heads": (0, "decoders, bert: heads of attention."),
  "model.num_kv_heads": (
    0,
    "stacked_decoder: heads of keys and values; 0: as many as heads.",
  ),
  "model.head_dim": (0, "stacked_decoder: of a head; 0: width over heads."),
  "model.hidden": (
    0,
    "stacked_decoder, bert: units between the dense layers of a block; 0: four"
    " times the width.",
  ),
  "model.vocabulary": (0, "bert: tokens that there are."),
  "model.positions": (512, "bert: the most tokens of an example."),
  "model.first_block": (
    0,
    "bert: blocks before this one were run before: 5 with"
    " data.features=minilm_5.",
  ),
  "model.rope_theta": (10_000.0, "stacked_decoder: base of its rotations."),
  "model.norm_epsilon": (1e-6, "stacked_decoder: added to mean squares."),
  "model.lora_rank": (
    0,
    "bert, stacked_decoder: rank of its adapters; 0: none.",
  ),
  "model.lora_alpha": (16.0, "Adapters are scaled by this over lora_rank."),
  "model.weights": (
    "",
    "bert, stacked_decoder: a .safetensors or .gguf file, or its name for"
    " launch.fetch; empty: the model begins at random. Taken to be public.",
  ),
  "model.trainable": (
    "",
    "A regular expression that is searched for in each parameter's path. If it"
    " is not found, the parameter is frozen. Empty: all are trained.",
  ),
  "model.dtype": ("float32", "Of the computation; sums are float32."),
  "model.options": Free("Options of a model from outside, which reads them."),
  "augmentation": "Random changes of an example's image. The gradients of the"
  " changed copies are averaged before they are clipped as one example's.",
  "augmentation.multiplicity": (0, "Copies; 0: the unchanged image."),
  "augmentation.flip": (False, "Swaps left and right at random."),
  "augmentation.crop": (0, "The most pixels to shift by in each direction."),
  "privacy": "The numbers of the guarantee; see dpdist.privacy.plan.",
  "privacy.num_examples": (0, "Public; must be the training set's length."),
  "privacy.expected_batch_size": (0.0, "Mean number of examples in a step."),
  "privacy.num_steps": (0, "Updates of the whole run."),
  "privacy.epochs": (
    float,
    "In place of num_steps, which must be 0 then: num_steps is epochs times"
    " num_examples over expected_batch_size, rounded up.",
  ),
  "privacy.l2_clip_norm": (1.0, "Bound on a per-example gradient's norm."),
  "privacy.target_delta": (1e-5, "Of the guarantee; well below 1 / examples."),
  "privacy.target_epsilon": (
    float,
    "Of the guarantee: the noise is found for it. Either this or"
    " noise_multiplier must be set.",
  ),
  "privacy.noise_multiplier": (
    float,
    "Standard deviation of the noise on a sum of gradients, in clip norms.",
  ),
  "privacy.accountant": ("pld", "pld or rdp."),
  "privacy.neighboring_relation": (
    "add_or_remove_one",
    "add_or_remove_one, replace_one or zero_out.",
  ),
  "privacy.sampling": (
    "poisson",
    "poisson, truncated_poisson, cyclic_poisson, fixed_size, or"
    " PACKAGE.MODULE:ATTRIBUTE.",
  ),
  "privacy.truncated_batch_size": (
    int,
    "truncated_poisson: the most examples of a step.",
  ),
  "privacy.cycle_length": (1, "Parts of the rows that take turns."),
  "privacy.examples_per_user": (1, "The most rows that one person may have."),
  "privacy.group_size": (1, "Rows averaged and clipped as one."),
  "privacy.noise_schedule": ((), "(step, noise_multiplier): from a step on."),
  "privacy.batch_size_schedule": (
    (),
    "(step, expected_batch_size): from a step on.",
  ),
  "privacy.unit": ("example", "What a row is: example or user."),
  "privacy.noise": (
    "gaussian",
    "What adds noise, or PACKAGE.MODULE:ATTRIBUTE; see docs/mechanisms.md.",
  ),
  "privacy.noise_options": Free("Options of privacy.noise."),
  "privacy.clipping": (
    "fixed",
    "What clips, or PACKAGE.MODULE:ATTRIBUTE; see docs/mechanisms.md.",
  ),
  "privacy.clipping_options": Free("Options of privacy.clipping."),
  "clipping": "How sums are clipped and computed; see dpdist.clipped_grad.",
  "clipping.method": ("auto", "auto, bookkeeping, two_pass or vmap."),
  "clipping.microbatch_size": (0, "Examples; 0: a device's whole chunk."),
  "clipping.exact_sum": (
    False,
    "Makes the bits of sums independent of the number of devices and"
    " processes.",
  ),
  "clipping.exact_group_size": (32, "exact_sum: examples summed in float32."),
  "sentinel": "The search for examples longer than their norms say.",
  "sentinel.every": (
    100,
    "One in so many steps, by a secret choice, and the first one; 0: none.",
  ),
  "optimizer": "The update that follows the noise.",
  "optimizer.name": (
    "sgd",
    "Any optax optimizer, or PACKAGE.MODULE:FUNCTION, called as those are.",
  ),
  "optimizer.learning_rate": (1.0, "At its peak."),
  "optimizer.schedule": ("constant", "constant, cosine or linear."),
  "optimizer.warmup_steps": (0, "Steps in which the learning rate rises."),
  "optimizer.options": Free("Arguments of the optimizer, as momentum=0.9."),
  "ema_decay": (0.0, "Decay of the averaged parameters; 0: no average."),
  "mesh": "The mesh of devices.",
  "mesh.data": (-1, "Divides examples; -1: all remaining devices."),
  "mesh.fsdp": (1, "Divides examples and every parameter."),
  "mesh.model": (1, "Divides what the model has rules for."),
  "chunk_size": (0, "Examples on the mesh at once; 0: automatic."),
  "eval_every": (0, "Steps; 0: twenty times a run."),
  "checkpoint_every": (0, "Steps; 0: ten times a run."),
  "max_checkpoints": (3, "Checkpoints that are kept, at least 2."),
  "checkpoint_copies": (
    "",
    "A directory, gs://... or s3://...: where each checkpoint is copied before"
    " it counts, and fetched from where the run directory lacks it; empty:"
    " nowhere.",
  ),
  "stuck_after": (
    600.0,
    "In a job of several processes: seconds that a part of a step may take, or"
    " that a process may be silent, before all processes end; 0: no limit.",
  ),
  "data_budget": "The budget that all runs on a data set share. The first run"
  " creates it.",
  "data_budget.location": ("", "A directory or a URL; empty: none."),
  "data_budget.epsilon": (float, "For all runs together."),
  "data_budget.delta": (float, "For all runs together."),
  "data_budget.reservation": ("", "Label of a reservation for a new run."),
  "ledger": (
    "",
    'A directory, gs://... or s3://...; empty: "ledger" in the run directory.',
  ),
  "secret_file": (
    "",
    "The file of the run's secret, which is made if it is missing; empty:"
    ' "secret" in the run directory. Keep it as private as the data.',
  ),
  "insecure_seed": (
    int,
    "Fixes every random stream, for tests. The guarantee is void.",
  ),
  "unsafe_metrics": (
    False,
    "Shows private values: training loss, true batch size, clip fraction.",
  ),
  "user": Free(
    "Settings of your own, which the config file defines; get_task, get_dataset"
    " and get_optimizer see them."
  ),
}

# Names in Opacus, jax_privacy, TF Privacy and papers, and what they are here.
_ELSEWHERE = {
  **dict.fromkeys(
    ("max_grad_norm", "clipping_norm", "l2_norm_clip", "clip_norm"),
    "privacy.l2_clip_norm",
  ),
  **dict.fromkeys(
    ("noise_scale", "noise_stddev", "stddev", "sigma"),
    "privacy.noise_multiplier",
  ),
  **dict.fromkeys(
    ("sample_rate", "sampling_prob", "sampling_probability", "batch_size"),
    "privacy.expected_batch_size",
  ),
  **dict.fromkeys(
    ("iterations", "num_updates", "steps", "train_steps"), "privacy.num_steps"
  ),
  **dict.fromkeys(
    ("dataset_size", "num_samples", "train_size"), "privacy.num_examples"
  ),
  **dict.fromkeys(("poisson_sampling", "batch_selection"), "privacy.sampling"),
  **dict.fromkeys(
    ("max_physical_batch_size", "physical_batch_size"), "chunk_size"
  ),
  **dict.fromkeys(
    ("num_microbatches", "microbatches"), "clipping.microbatch_size"
  ),
  "delta": "privacy.target_delta",
  "epsilon": "privacy.target_epsilon",
  "grad_sample_mode": "clipping.method",
  "lr": "optimizer.learning_rate",
  "momentum": "optimizer.options.momentum",
  "num_epochs": "privacy.epochs",
  "seed": "insecure_seed",
}


class Setting(NamedTuple):
  """A setting, or a section of settings.

  Attributes:
    path: its name, as "privacy.target_epsilon".
    type: of its values, as "int" or "None or float"; "": a section.
    default: its default, as Python shows it; "": a section.
    meaning: what it is, in words.
  """

  path: str
  type: str
  default: str
  meaning: str


def settings() -> Iterator[Setting]:
  """Yields settings of no section, then each section and its settings."""
  is_below = lambda path: "." in path or isinstance(TABLE[path], str)
  for path in sorted(TABLE, key=is_below):
    given = TABLE[path]
    if isinstance(given, str):
      yield Setting(path, "", "", given)
    elif isinstance(given, Free):
      yield Setting(path, "section", "{}", given.meaning)
    else:
      kind, default = type(given[0]).__name__, repr(given[0])
      if isinstance(given[0], type):
        kind, default = f"None or {given[0].__name__}", "None"
      yield Setting(path, kind, default, given[1])


def suggest(path: str) -> str:
  """Returns the setting that a wrong name most likely means; "": none."""
  last = path.rpartition(".")[2]
  close = difflib.get_close_matches(path, TABLE, 1, 0.9)
  if close:
    return close[0]
  if last in _ELSEWHERE:
    return _ELSEWHERE[last]
  same = [known for known in TABLE if known.rpartition(".")[2] == last]
  if same:
    return same[0]
  close = difflib.get_close_matches(path, TABLE, 1, 0.8)
  names = {known.rpartition(".")[2]: known for known in reversed(TABLE)}
  close = close or [
    names[name] for name in difflib.get_close_matches(last, names, 1, 0.7)
  ]
  return close[0] if close else ""
