"""Makes tasks whose loss is the cross-entropy, of classes or of tokens."""

from collections.abc import Callable, Collection, Mapping, Sequence
import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from dpdist import _validation
from dpdist import errors
from dpdist.frameworks import model as model_lib
from dpdist.tasks import build
from dpdist.tasks import chance
from dpdist.tasks import columns as columns_lib
from dpdist.tasks import task as task_lib
from dpdist.tasks.scoring import losses
from dpdist.tasks.scoring import metrics as metrics_lib

PyTree = Any

_METRICS = ("accuracy", "loss")
_OPTIONAL_COUNT = _validation.optional(_validation.COUNT)


def classification(
  model: Any,
  *,
  num_classes: int | None = None,
  vocabulary: int = 0,
  class_weights: Sequence[float] | None = None,
  label_smoothing: float = 0.0,
  **options: Unpack[build.Options],
) -> task_lib.Task:
  """Returns a task that trains a classifier by its cross-entropy.

  A target is a class number. A sequence has a target for each place, and a
  target below 0 marks padding. The loss is the mean over an example's targets.

  Metrics: accuracy, loss, top5_accuracy (or another number), perplexity, auc,
  average_precision and f1 (means over classes, each against the rest),
  calibration_error, per_class and confusion.

  Args:
    model: maps inputs to logits [..., classes]; see `dpdist.tasks`. Dropout of
      a Linen module takes the rng "dropout".
    num_classes: the number of classes; None: the length of the logits' last
      axis.
    vocabulary: if above 0, inputs must be integers below it.
    class_weights: factors of the losses of the classes, public numbers.
    label_smoothing: the share of a target that is spread over all classes.
    **options: see `dpdist.tasks.Options`.
  """
  num_classes = _validation.check("num_classes", num_classes, _OPTIONAL_COUNT)
  vocabulary = _validation.check(
    "vocabulary", vocabulary, _validation.integer(0)
  )
  parts = build.Parts(model, options, "classes", _METRICS)
  return _classification(
    parts, num_classes, vocabulary, class_weights, label_smoothing
  )


def language_model(
  model: Any,
  *,
  vocabulary: int,
  sequence_length: int | None = None,
  label_smoothing: float = 0.0,
  **options: Unpack[build.Options],
) -> task_lib.Task:
  """Returns a task that trains a model to predict next tokens.

  An example has inputs and targets, both int32 [sequence_length]. A target is
  the next token, or -1 where there is none.

  Metrics: accuracy, loss, perplexity and top5_accuracy (or another number).

  Args:
    model: maps tokens [length] to logits [length, vocabulary].
    vocabulary: how many tokens there are.
    sequence_length: the length of an example; None: as in the data. If it is
      given, the shapes of an example are known without data.
    label_smoothing: see `classification`.
    **options: see `dpdist.tasks.Options`.
  """
  vocabulary = _validation.check("vocabulary", vocabulary, _validation.COUNT)
  sequence_length = _validation.check(
    "sequence_length", sequence_length, _OPTIONAL_COUNT
  )
  parts = build.Parts(model, options, "classes", _METRICS, can_collect=False)
  columns = parts.columns
  if sequence_length is not None:
    tokens = jax.ShapeDtypeStruct((sequence_length,), jnp.int32)
    parts.rest["example"] = lambda: {
      columns.inputs: tokens,
      columns.targets: tokens,
    }
  return _classification(parts, vocabulary, vocabulary, None, label_smoothing)


def _classification(
  parts: build.Parts,
  num_classes: int | None,
  vocabulary: int,
  class_weights: Sequence[float] | None,
  label_smoothing: float,
) -> task_lib.Task:
  weights = build.public_weights(class_weights)
  build.check_smoothing(label_smoothing)
  columns = parts.columns

  def check(task: task_lib.Task, example: Any, test: Any) -> None:
    below = f" in [0, {num_classes}) for {columns.name}" if num_classes else ""
    columns_lib.check_arrays(
      columns,
      example,
      test,
      classes=f"class numbers{below}",
      vocabulary=vocabulary,
    )
    shape = parts.outputs_shape(task, example)
    columns_lib.check_classes(
      columns, example, test, shape, num_classes=num_classes
    )
    metrics_lib.check_top(parts.metrics.names, shape[-1])
    if weights is not None and len(weights) != shape[-1]:
      raise errors.ArgumentError(
        f"class_weights must be a number for each of the {shape[-1]} classes of"
        f" {columns.name}, got {len(weights)}"
      )
    if vocabulary:
      columns_lib.check_tokens(columns, test, vocabulary)

  largest = {}
  if num_classes:
    largest[columns.targets] = num_classes - 1
    largest[columns.inputs] = max(num_classes, vocabulary) - 1
  elif vocabulary:
    largest[columns.inputs] = vocabulary - 1
  parts.rest.setdefault("largest_integers", largest)
  return build.make(
    parts,
    functools.partial(
      losses.cross_entropy,
      class_weights=weights,
      label_smoothing=label_smoothing,
    ),
    check=check,
    problem=lambda scores, test: chance.problem(scores, test[columns.targets]),
  )


def loss_of(model: Any) -> Callable[..., tuple[jax.Array, None]]:
  """Returns the mean cross-entropy of a model's logits for one example.

  Targets outside [0, classes) do not count; see `losses.cross_entropy`. The
  loss of a sequence is the mean over the targets that count, so a sequence may
  be padded with -1. If no target counts, loss and gradient are 0.

  Args:
    model: maps example["inputs"] to logits [..., classes].

  Returns:
    loss_fn(params, example, rng) -> (loss, None); rng feeds the model's
    dropout, if it has any.
  """
  found = model_lib.of(model)

  def loss_fn(
    params: PyTree, example: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[jax.Array, None]:
    logits = found.apply(params, example["inputs"], rng)
    return losses.cross_entropy(logits, example["targets"]), None

  return loss_fn


def masked_language_model(
  model: Any,
  *,
  vocabulary: int,
  mask_token: int,
  mask_rate: float = 0.15,
  special_tokens: Sequence[int] = (),
  label_smoothing: float = 0.0,
  **options: Unpack[build.Options],
) -> task_lib.Task:
  """Returns a task that trains a model to fill in masked tokens.

  As in BERT (Devlin et al. 2019): of the tokens that are chosen at random, 80 %
  become the mask token, 10 % a random one, and 10 % stay. The loss is the mean
  over those that were chosen. The choice comes from the key of the example at
  its step; that of a held-out example is always the same.

  Metrics: accuracy, loss, perplexity and top5_accuracy (or another number).

  Args:
    model: maps tokens [length] to logits [length, vocabulary].
    vocabulary: how many tokens there are.
    mask_token: the token that stands for a masked one.
    mask_rate: the chance of a token to be chosen.
    special_tokens: those that are never chosen, such as padding.
    label_smoothing: see `classification`.
    **options: see `dpdist.tasks.Options`. `targets` are the inputs by default.
  """
  vocabulary = _validation.check("vocabulary", vocabulary, _validation.COUNT)
  token = _validation.integer(0, vocabulary - 1)
  _validation.require(
    isinstance(special_tokens, Collection)
    and not isinstance(special_tokens, str),
    "special_tokens",
    "a list of tokens",
    special_tokens,
  )
  for name, given in [("mask_token", mask_token)] + [
    ("special_tokens", x) for x in special_tokens
  ]:
    _validation.check(name, given, token)
  rule = _validation.real(above=0, below=1)
  _validation.check("mask_rate", mask_rate, rule)
  build.check_smoothing(label_smoothing)
  options.setdefault("targets", options.get("inputs", "inputs"))
  parts = build.Parts(model, options, "classes", _METRICS, can_collect=False)
  columns = parts.columns

  def prepare(
    example: Mapping[str, Any], rng: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    tokens = jnp.asarray(example[columns.inputs])
    targets = jnp.asarray(example[columns.targets])
    if rng is None:  # A number of the tokens, so that examples differ.
      places = jnp.arange(1, len(tokens) + 1, dtype=jnp.uint32)
      number = jnp.sum(tokens.astype(jnp.uint32) * places)
      rng = jax.random.fold_in(jax.random.key(0), number)
    return _masked(
      tokens, targets, rng, vocabulary, mask_token, mask_rate, special_tokens
    )

  def check(task: task_lib.Task, example: Any, test: Any) -> None:
    columns_lib.check_arrays(
      columns, example, test, classes="tokens", vocabulary=vocabulary
    )
    shape = parts.outputs_shape(task, example)
    columns_lib.check_classes(
      columns, example, test, shape, num_classes=vocabulary
    )
    metrics_lib.check_top(parts.metrics.names, shape[-1])
    columns_lib.check_tokens(columns, test, vocabulary)

  parts.rest.setdefault("largest_integers", {columns.inputs: vocabulary - 1})
  return build.make(
    parts,
    functools.partial(losses.cross_entropy, label_smoothing=label_smoothing),
    check=check,
    prepare=prepare,
  )


def _masked(
  tokens: jax.Array,
  targets: jax.Array,
  rng: jax.Array,
  vocabulary: int,
  mask_token: int,
  mask_rate: float,
  special_tokens: Sequence[int],
) -> tuple[jax.Array, jax.Array]:
  """Returns tokens of which some are masked, and their targets, else -1."""
  choose, change, draw = jax.random.split(rng, 3)
  is_special = jnp.isin(tokens, jnp.asarray([*special_tokens], tokens.dtype))
  is_chosen = jax.random.bernoulli(choose, mask_rate, tokens.shape)
  is_chosen &= ~is_special & (tokens >= 0) & (tokens < vocabulary)
  share = jax.random.uniform(change, tokens.shape)
  other = jax.random.randint(draw, tokens.shape, 0, vocabulary, tokens.dtype)
  new = jnp.where(share < 0.9, other, tokens)
  new = jnp.where(share < 0.8, jnp.asarray(mask_token, tokens.dtype), new)
  return jnp.where(is_chosen, new, tokens), jnp.where(is_chosen, targets, -1)
