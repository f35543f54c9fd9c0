"""Builds tasks of a model, a loss of its outputs, and metrics by name.

Guarantees:
  * A loss is of one example alone. Clipping then bounds what the example can
    do, whatever its targets, weights and inputs are.
  * A target that cannot be right, as a NaN or a label of 7 where 0 and 1 are
    meant, has no part in the loss; see `dpdist.tasks.scoring.losses`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.distributed import mesh
from dpdist.frameworks import model as model_lib
from dpdist.frameworks import model_check
from dpdist.tasks import columns as columns_lib
from dpdist.tasks import task as task_lib
from dpdist.tasks.scoring import losses
from dpdist.tasks.scoring import metrics as metrics_lib

PyTree = Any
Prepare = Callable[[Mapping[str, Any], jax.Array | None], tuple[Any, Any]]


class Options(TypedDict, total=False):
  """Options that all tasks of a model have in common.

  Attributes:
    name: the model's name in messages; "": the name of its class.
    inputs: the name of the array that the model takes.
    targets: the name of the array that it is to predict.
    weights: the name of an array with a number for each example, which its loss
      is multiplied by. A weight need not be bounded, since clipping bounds what
      an example does, whatever its loss is. A weight below 0 or NaN counts as
      0. Held-out metrics do not use it.
    metrics: held-out metrics: names, which each task lists, and functions
      (targets, outputs) -> number, of NumPy arrays over all held-out examples
      and named as they are. The first is the one that is shown first.
    fix: whether batch norm is replaced by group norm; see `dpdist.check_model`.
    has_batch_axis: whether the model expects a batch axis. It then gets a batch
      of one example.
    partitioning: as in `dpdist.Task`; by default the model's own.
    example: as in `dpdist.Task`.
    pretrained: as in `dpdist.Task`.
    trainable: as in `dpdist.Task`.
    largest_integers: as in `dpdist.Task`.
  """

  name: str
  inputs: str
  targets: str
  weights: str | None
  metrics: Sequence[metrics_lib.Metric]
  fix: bool
  has_batch_axis: bool
  partitioning: mesh.Rules
  example: Callable[[], PyTree] | None
  pretrained: Callable[[], Mapping[str, np.ndarray]] | None
  trainable: str
  largest_integers: Mapping[str, int]


# Options that name an array, and whether they may be None.
_NAMES = {"inputs": False, "targets": False, "weights": True}


class Parts:
  """A model, its columns and its metrics, read from the options of a task."""

  def __init__(
    self,
    model: Any,
    options: Options,
    kind: str,
    metrics: Sequence[metrics_lib.Metric],
    *,
    can_collect: bool = True,
  ):
    """Reads the options; `metrics` are those that are used by default."""
    for name in options:
      if name not in Options.__annotations__:
        raise errors.ArgumentError(
          f"there is no option {name!r} of a task, only"
          f" {sorted(Options.__annotations__)}"
        )
    given: dict[str, Any] = dict(options)
    take = given.pop
    fix, has_batch_axis = take("fix", False), take("has_batch_axis", False)
    _validation.check("fix", fix, _validation.FLAG)
    _validation.check("has_batch_axis", has_batch_axis, _validation.FLAG)
    if isinstance(model, model_lib.Model):
      self.model = model
    else:
      self.model = model_lib.of(model, fix=fix, has_batch_axis=has_batch_axis)
    self.fix = fix
    for name, is_optional in _NAMES.items():
      value = options.get(name, None if is_optional else "inputs")
      _validation.require(
        isinstance(value, str) or (is_optional and value is None),
        name,
        "None or " * is_optional + "the name of an array",
        value,
      )
    self.columns = columns_lib.Columns(
      inputs=take("inputs", "inputs"),
      targets=take("targets", "targets"),
      weights=take("weights", None),
      name=take("name", "") or f"the model {self.model.name}",
    )
    chosen: Any = take("metrics", metrics)
    self.metrics = metrics_lib.choose(chosen, kind, can_collect=can_collect)
    self.can_collect = can_collect
    self.rest: dict[str, Any] = given

  def outputs_shape(self, task: task_lib.Task, example: Any) -> tuple[int, ...]:
    """Returns the shape of an example's outputs, or raises ValueError."""
    return columns_lib.shape_of_outputs(
      self.columns,
      task.init,
      lambda params, example: self.model.apply(
        params, example[self.columns.inputs], None
      ),
      example,
      takes_images=self.model.takes_images,
    )


def make(
  parts: Parts,
  loss: Callable[[Any, Any], jax.Array],
  *,
  check: Callable[[task_lib.Task, Any, Any], None],
  problem: Callable[[Mapping[str, float], Mapping[str, np.ndarray]], str]
  | None = None,
  prepare: Prepare | None = None,
  judged: Callable[[Any, Any], tuple[Any, Any]] = lambda outputs, y: (
    outputs,
    y,
  ),
) -> task_lib.Task:
  """Returns a task.

  Args:
    parts: the model, the columns and the metrics.
    loss: of judged outputs and targets.
    check: (task, example, test) -> None; see `dpdist.Task`.
    problem: see `dpdist.Task`.
    prepare: (example, rng) -> what the model takes, and the targets. None: the
      columns. Held-out examples have the rng None.
    judged: (outputs, targets) -> those that losses and metrics take.
  """
  model, columns, chosen = parts.model, parts.columns, parts.metrics
  # A preparation that draws must not share its key with the model.
  draws = prepare is not None
  if prepare is None:
    prepare = lambda example, rng: (
      example[columns.inputs],
      example.get(columns.targets),  # To predict, there need be none.
    )

  def init(key: jax.Array, example: Mapping[str, Any]) -> PyTree:
    return model.init(key, prepare(example, None)[0])

  def predict(params: PyTree, example: Mapping[str, Any]) -> Any:
    inputs, targets = prepare(example, None)
    return judged(model.apply(params, inputs, None), targets)[0]

  def loss_fn(
    params: PyTree, example: Mapping[str, Any], rng: jax.Array
  ) -> tuple[jax.Array, None]:
    own, rest = jax.random.split(rng) if draws else (rng, rng)
    inputs, targets = prepare(example, own)
    outputs = model.apply(params, inputs, rest)
    value = loss(*judged(outputs, targets))
    if columns.weights is not None:
      value = losses.weighted(value, example[columns.weights])
    return value, None

  def metrics(params: PyTree, example: Mapping[str, Any]) -> PyTree:
    inputs, targets = prepare(example, None)
    found = judged(model.apply(params, inputs, None), targets)
    return {name: mean(*found) for name, mean in chosen.means.items()}

  rest = dict(parts.rest)
  rest.setdefault("partitioning", model.partitioning)
  task = task_lib.Task(
    init=init,
    loss=loss_fn,
    metrics=metrics if chosen.means else None,
    summary=summary(chosen, predict, columns.targets),
    predict=predict,
    review=lambda example: review(parts, init, loss_fn, prepare, example),
    check=lambda example, test: check(task, example, test),
    problem=problem,
    inputs=columns.inputs,
    **rest,
  )
  return task


def summary(
  chosen: metrics_lib.Chosen, predict: Callable[..., Any], targets: str
) -> task_lib.Summary | None:
  """Returns the metrics that are no means; None if all are."""
  if chosen.names == tuple(chosen.means) and not chosen.tables:
    return None
  return task_lib.Summary(
    names=chosen.names,
    of_means=chosen.of_means,
    outputs=predict if chosen.collected or chosen.tables else None,
    targets=targets,
    numbers=chosen.collected,
    tables=chosen.tables,
  )


def review(
  parts: Parts,
  init: Callable[..., PyTree],
  loss_fn: Callable[..., Any],
  prepare: Prepare,
  example: Mapping[str, Any],
) -> list[str]:
  """Returns notices on a model and its loss, or raises ValueError for faults.

  See `dpdist.check_model`.
  """
  shapes = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in example.items()
  }
  found: list[model_check.Finding] = []
  key = jax.random.key(0)
  try:
    inputs = jax.eval_shape(lambda example: prepare(example, None)[0], shapes)
    found += parts.model.findings(inputs)
    if not any(finding.is_fault for finding in found):
      params = jax.eval_shape(init, key, shapes)
      found += model_check.of_params(params)
      found += model_check.of_loss(loss_fn, params, shapes, key, has_aux=True)
  except Exception:
    # A model that does not take the data, of which `check` says more.
    if not found:
      return [*parts.model.changes]
  faults = [finding for finding in found if finding.is_fault]
  is_norm = any("BatchNorm" in finding.what for finding in faults)
  if faults and parts.fix and is_norm:
    raise errors.ArgumentError(
      f"fix could not replace all batch norms of {parts.columns.name}, which"
      " must be replaced by hand: " + "; ".join(map(str, faults))
    )
  if faults:
    hint = ", or fix=True of the task, which replaces batch norm by group norm"
    raise errors.ArgumentError(
      f"{parts.columns.name} must be safe to train privately, got "
      + "; ".join(map(str, faults))
      + hint * is_norm
    )
  return [*parts.model.changes, *map(str, dict.fromkeys(found))]


def matched(outputs: jax.Array, targets: Any) -> tuple[Any, Any]:
  """Returns outputs of the targets' shape, without a last axis of 1."""
  if targets is not None and outputs.shape == (*targets.shape, 1):
    outputs = outputs[..., 0]
  return outputs, targets


def check_smoothing(label_smoothing: float) -> None:
  """Raises ValueError unless it is a share below 1."""
  rule = _validation.real(at_least=0, below=1)
  _validation.check("label_smoothing", label_smoothing, rule)


def public_weights(
  weights: Sequence[float] | None,
) -> tuple[float, ...] | None:
  """Returns public weights as a tuple of numbers; raises ValueError if not."""
  if weights is None:
    return None
  try:
    found = np.asarray(weights)
  except ValueError:  # Of rows of different lengths.
    found = np.zeros(0)
  is_right = (
    found.ndim == 1
    and len(found) > 0
    and np.issubdtype(found.dtype, np.number)
    and bool(np.all(np.isfinite(found) & (found >= 0)))
  )
  if not is_right:
    raise errors.ArgumentError(
      "class_weights must be finite numbers of at least 0, one for each class,"
      f" got {weights!r}"
    )
  return tuple(map(float, found))


def with_params(
  model: Any,
  params: PyTree,
  *,
  fix: bool = False,
  has_batch_axis: bool = False,
) -> Any:
  """Returns a model with trained parameters, such as `dpdist.export.load` has.

  Args:
    model: what a task was made of.
    params: its parameters, nested dicts of arrays.
    fix: as for the task.
    has_batch_axis: as for the task.

  Returns:
    The NNX or Equinox module; a Linen module that is bound to its parameters;
    the parameters themselves for (init, apply).
  """
  return model_lib.of(model, fix=fix, has_batch_axis=has_batch_axis).merge(
    params
  )
