"""Makes tasks that predict numbers and labels, and tasks of functions."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import inspect
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from dpdist import _validation
from dpdist import errors
from dpdist.frameworks import model as model_lib
from dpdist.frameworks import model_check
from dpdist.tasks import build
from dpdist.tasks import chance
from dpdist.tasks import columns as columns_lib
from dpdist.tasks import task as task_lib
from dpdist.tasks.scoring import losses
from dpdist.tasks.scoring import metrics as metrics_lib

PyTree = Any


def binary(
  model: Any,
  *,
  class_weights: Sequence[float] | None = None,
  label_smoothing: float = 0.0,
  **options: Unpack[build.Options],
) -> task_lib.Task:
  """Returns a task that tells two classes apart by one logit.

  A target is 0 or 1, or a probability. Any other, such as -1, counts as none.

  Metrics: accuracy, loss, auc, average_precision, f1, calibration_error,
  per_class (of class 1) and confusion.

  Args:
    model: maps inputs to a logit, () or [1]; see
      `dpdist.tasks`.
    class_weights: factors of the losses of the classes 0 and 1, public numbers.
    label_smoothing: the share of a target that is moved to 1/2.
    **options: see `dpdist.tasks.Options`.
  """
  weights = build.public_weights(class_weights)
  if weights is not None and len(weights) != 2:
    raise errors.ArgumentError(
      f"class_weights must be 2 numbers, of classes 0 and 1, got {len(weights)}"
    )

  def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    factors = None
    if weights is not None:
      share = jnp.where(losses.is_probability(targets), targets, 0)
      factors = weights[0] + (weights[1] - weights[0]) * share
    return losses.sigmoid_cross_entropy(
      logits, targets, weights=factors, label_smoothing=label_smoothing
    )

  build.check_smoothing(label_smoothing)
  return _of_numbers(model, options, "binary", loss)


def multilabel(
  model: Any,
  *,
  class_weights: Sequence[float] | None = None,
  label_smoothing: float = 0.0,
  **options: Unpack[build.Options],
) -> task_lib.Task:
  """Returns a task that predicts several labels, each by a logit of its own.

  Targets are 0 or 1, or probabilities, for each label. Any other number, such
  as -1, counts as no target. The loss is the mean over an example's targets.

  Metrics: accuracy (the share of right labels), loss, auc, average_precision,
  f1 (means over labels), calibration_error, per_class and confusion (of each
  label).

  Args:
    model: maps inputs to logits [labels]; see
      `dpdist.tasks`.
    class_weights: factors of the losses of the labels, public numbers.
    label_smoothing: the share of a target that is moved to 1/2.
    **options: see `dpdist.tasks.Options`.
  """
  weights = build.public_weights(class_weights)

  def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    factors = None if weights is None else jnp.asarray(weights)
    return losses.sigmoid_cross_entropy(
      logits, targets, weights=factors, label_smoothing=label_smoothing
    )

  build.check_smoothing(label_smoothing)
  return _of_numbers(model, options, "labels", loss, weights)


def regression(
  model: Any,
  *,
  loss: str = "squared",
  delta: float = 1.0,
  **options: Unpack[build.Options],
) -> task_lib.Task:
  """Returns a task that predicts numbers.

  A target that is NaN or infinite counts as none. The loss is the mean over an
  example's targets.

  Metrics: mse, mae and r2.

  Args:
    model: maps inputs to a number, () or [1], or to numbers; see
      `dpdist.tasks`.
    loss: "squared", "absolute" or "huber".
    delta: the error above which Huber's loss is linear.
    **options: see `dpdist.tasks.Options`.
  """
  _validation.check("loss", loss, _validation.one_of([*losses.ERRORS]))
  _validation.check("delta", delta, _validation.real(above=0))

  def error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return losses.mean_error(outputs, targets, kind=loss, delta=delta)

  parts = build.Parts(model, options, "numbers", ("mse", "mae"))
  columns = parts.columns

  def check(task: task_lib.Task, example: Any, test: Any) -> None:
    columns_lib.check_arrays(columns, example, test)
    shape = parts.outputs_shape(task, example)
    columns_lib.check_numbers(columns, example, test, shape)

  return build.make(
    parts,
    error,
    check=check,
    problem=lambda scores, test: chance.problem_of_numbers(
      scores, test[columns.targets]
    ),
    judged=build.matched,
  )


def _of_numbers(
  model: Any,
  options: build.Options,
  kind: str,
  loss: Callable[[Any, Any], jax.Array],
  weights: tuple[float, ...] | None = None,
) -> task_lib.Task:
  """Returns a task whose targets are in [0, 1]."""
  parts = build.Parts(model, options, kind, ("accuracy", "loss"))
  columns = parts.columns

  def check(task: task_lib.Task, example: Any, test: Any) -> None:
    columns_lib.check_arrays(columns, example, test)
    shape = parts.outputs_shape(task, example)
    missing = -1.0 if kind == "labels" else None
    columns_lib.check_numbers(
      columns, example, test, shape, low=0, high=1, missing=missing
    )
    if weights is not None and shape != (len(weights),):
      raise errors.ArgumentError(
        f"class_weights must be a number for each label of {columns.name},"
        f" whose outputs have shape {shape}, got {len(weights)}"
      )

  return build.make(
    parts,
    loss,
    check=check,
    problem=lambda scores, test: chance.problem_of_labels(
      scores, test[columns.targets]
    ),
    judged=build.matched,
  )


def from_functions(
  init: Callable[..., PyTree],
  loss: Callable[..., Any],
  *,
  predict: Callable[..., Any] | None = None,
  metrics: Sequence[Callable[..., float]] = (),
  targets: str = "targets",
  **options: Any,
) -> task_lib.Task:
  """Returns a task of plain functions of one example.

  Args:
    init: (key, example) -> parameters; see `dpdist.Task`.
    loss: (params, example) -> a number, or a number and anything else, which is
      dropped. If it takes a third argument, it gets a key.
    predict: (params, example) -> an array; needed with `metrics`.
    metrics: functions (targets, predictions) -> number, of NumPy arrays over
      all held-out examples, named as they are. Without any: the loss.
    targets: the name of the array that metrics get.
    **options: further attributes of `dpdist.Task`.
  """
  _check_function("init", init, 2)
  _check_function("loss", loss, 3, 2)
  if predict is not None:
    _check_function("predict", predict, 2)
  known = {field.name for field in dataclasses.fields(task_lib.Task)}
  unknown = sorted({*options} - known | {*options} & {"summary", "review"})
  if unknown:
    free = sorted(known - {"init", "loss", "predict", "summary", "review"})
    raise errors.ArgumentError(
      f"options must be some of {free}, got {', '.join(map(repr, unknown))}"
    )
  if metrics and predict is None:
    raise errors.ArgumentError(
      "predict must be given with metrics, which compare predictions, got none"
    )
  takes_rng = len(model_lib.positional(loss)) > 2

  def loss_fn(
    params: PyTree, example: Mapping[str, Any], rng: jax.Array
  ) -> tuple[jax.Array, None]:
    value = loss(params, example, *([rng] if takes_rng else []))
    return (value[0] if isinstance(value, tuple) else value), None

  def review(example: Mapping[str, Any]) -> list[str]:
    shapes = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype)
      for name, x in example.items()
    }
    key = jax.random.key(0)
    params = task_lib.params_of(init, key, shapes)
    task_lib.check_loss(loss_fn, params, shapes, key)
    found = [*model_check.of_params(params)]
    found += [*model_check.of_loss(loss_fn, params, shapes, key, has_aux=True)]
    model_check.refuse_unsafe(x for x in found if x.is_fault)
    return [str(finding) for finding in found]

  summary = None
  if metrics:
    assert predict is not None
    chosen = metrics_lib.choose(metrics, "")
    summary = build.summary(chosen, predict, targets)
  return task_lib.Task(
    init=init,
    loss=loss_fn,
    predict=predict,
    summary=summary,
    review=review,
    **options,
  )


def _check_function(name: str, function: Any, *counts: int) -> None:
  """Raises ValueError unless a function takes one of these many arguments."""
  wanted = {
    "init": "init must be a function of (key, example)",
    "loss": "loss must be a function of (params, example) or, to draw random"
    " numbers, of (params, example, rng)",
    "predict": "predict must be a function of (params, example)",
  }[name]
  if not callable(function):
    raise errors.ArgumentError(
      f"{wanted}, got {_validation.described(function)}"
    )
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):  # As of some builtins.
    return
  for count in counts:
    with contextlib.suppress(TypeError):
      signature.bind(*range(count))
      return
  raise errors.ArgumentError(f"{wanted}, got one of {signature}")
