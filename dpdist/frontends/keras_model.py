"""Checks which Keras 3 models can be trained privately, and says why not."""

from collections.abc import Iterator
from typing import Any
import warnings

import jax

from dpdist import errors
from dpdist.frameworks import model_check
from dpdist.frontends import keras_loss

PyTree = Any
keras = keras_loss.keras

_NORM = (
  "keras.layers.GroupNormalization or LayerNormalization, or freeze the layer"
  " (trainable=False)"
)


def check(model: Any) -> None:
  """Refuses a model that cannot be trained privately, and builds the others.

  The ValueError says what is wrong, and what to use instead.
  """
  if not isinstance(model, keras.Model):
    raise errors.ArgumentError(f"model must be a keras.Model, got {model!r}")
  if not model.compiled or model.optimizer is None:
    raise errors.ArgumentError(
      "model must be compiled with an optimizer and a loss: call"
      " model.compile(...) first"
    )
  if not model.built:
    raise errors.ArgumentError(
      "model must be built: give it a keras.Input, or call it once"
    )
  _take_metrics_from_loss_weights(model)
  for loss in jax.tree.leaves(model.loss):
    if getattr(loss, "reduction", "") in (None, "none"):
      raise errors.ArgumentError(
        "model.loss must be one number for each example, got reduction="
        f"{loss.reduction!r} in {loss.name!r}: leave it at its default"
      )
  if jax.process_count() > 1 or keras.distribution.distribution() is not None:
    raise errors.ArgumentError(
      "model must be in one process, and without a keras.distribution, since"
      " fit divides the examples over all of its devices itself: for several"
      " processes, see dpdist.train"
    )
  if type(model).train_step is not keras.Model.train_step:
    raise errors.ArgumentError(
      "model must not have a train_step of its own, which would not be private:"
      " put what it computes into compute_loss"
    )
  if (
    isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    or model.optimizer.loss_scale_factor is not None
  ):
    raise errors.ArgumentError(
      "model.optimizer must not scale the loss, or gradients would be clipped"
      " at another norm: compile with auto_scale_loss=False, and use bfloat16"
      " rather than float16"
    )
  model_check.refuse_unsafe(findings(model))
  model.optimizer.build(model.trainable_variables)


def refuse_changing_state(model: Any, example: tuple[PyTree, ...]) -> None:
  """Refuses a checked model whose training calls change its state.

  `example` holds shapes of one example (x, y), with its weight if it has one,
  without the batch axis.
  """
  changed = keras_loss.changed_state(model, example)
  if changed:
    named = ", ".join(path for path, _ in changed)
    raise errors.ArgumentError(
      "model must not change state while it trains, since what it keeps of the"
      f" examples is not noised, but it changes {named}: use"
      " keras.layers.GroupNormalization or LayerNormalization in place of"
      " BatchNormalization, or freeze the layer (trainable=False)"
    )


def refuse_normalised_weights(model: Any) -> None:
  """Refuses a loss that divides by weights, whose weights would do nothing."""
  for loss in jax.tree.leaves(model.loss):
    if getattr(loss, "reduction", "") == "mean_with_sample_weight":
      raise errors.ArgumentError(
        "model.loss must not be divided by the weights, which would cancel them"
        " for each example, got reduction='mean_with_sample_weight' in"
        f" {loss.name!r}: leave it at its default"
      )


def refuse(name: str, *unused: Any, **also_unused: Any) -> None:
  """Replaces a method that would train without privacy."""
  raise RuntimeError(
    f"model.{name} would train without privacy: use fit of what"
    " dpdist.frontends.keras.make_private returned, and compile before it"
  )


def _take_metrics_from_loss_weights(model: Any) -> None:
  """Recompiles a model that got metrics in their Keras 2 place."""
  # model.get_compile_config() would write all of it out as text.
  settings = getattr(getattr(model, "_compile_config", None), "config", {})
  names = jax.tree.leaves(settings.get("loss_weights"))
  if not any(isinstance(name, str) for name in names):
    return
  if settings.get("metrics") or settings.get("weighted_metrics"):
    raise errors.ArgumentError(
      f"model must be compiled with numbers for loss_weights, got {names}"
    )
  warnings.warn(
    f"model was compiled with loss_weights={names}, which are taken for"
    f" metrics: the third argument of Keras 2's compile is metrics={names} now",
    stacklevel=4,
  )
  model.compile(
    model.optimizer,
    model.loss,
    metrics=names,
    run_eagerly=model.run_eagerly,
    steps_per_execution=model.steps_per_execution,
    jit_compile=model.jit_compile,
  )


def findings(
  model: Any, inputs: tuple[Any, ...] = (), *, is_alone: bool = True
) -> Iterator[model_check.Finding]:
  """Yields what is unsafe in a layer or model; see `dpdist.check_model`."""
  del inputs, is_alone
  for layer in model._flatten_layers():
    where, layers = layer.path or layer.name, keras.layers
    if isinstance(layer, layers.BatchNormalization) and layer.trainable:
      yield model_check.batch_norm("BatchNormalization", where, _NORM)
    elif isinstance(layer, layers.SpectralNormalization) and layer.trainable:
      yield model_check.Finding(
        "SpectralNormalization",
        where,
        "it changes state at each call",
        "a kernel constraint such as keras.constraints.UnitNorm",
      )
    elif isinstance(layer, layers.Normalization) and layer.input_mean is None:
      yield model_check.Finding(
        "Normalization by adapt()",
        where,
        "mean and variance that were computed from private examples would be"
        " released without noise",
        "Normalization(mean=..., variance=...) with public numbers, or"
        " keras.layers.Rescaling",
      )
  yield from model_check.of_params(
    {v.path: v.value for v in model.trainable_variables}
  )
