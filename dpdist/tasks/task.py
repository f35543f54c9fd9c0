"""The interface of what is trained: parameters, a loss and held-out metrics.

    task = dpdist.Task(init=init, loss=loss, metrics=metrics)
    dpdist.train(config, workdir, task=task, dataset=dataset)

Training knows models, losses and metrics only through a task.
`dpdist.tasks.from_config` makes tasks of this project's models.

Guarantees:
  * `init` gets zeros instead of an example, so that the initial parameters
    depend on no example.
  * `check`, `metrics`, `summary` and `problem` get held-out examples, which the
    guarantee does not cover, and the shapes of training examples, never their
    values.
  * What `loss` returns beside the loss is dropped.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.distributed import mesh

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Summary:
  """Held-out metrics that are no means over examples, and the order of all.

  The outputs of all held-out examples are collected in every process. Its
  functions run in Python.

  Attributes:
    names: the metrics that are shown, in this order; other means are not.
    of_means: by name, a mean that `Task.metrics` returns and a function of it.
    outputs: (params, example) -> an array of one held-out example, which is
      collected. None: none is.
    targets: the name of the array that goes with it.
    numbers: by name, (targets, outputs) -> a number, of arrays over all
      held-out examples.
    tables: the same, but lists or dicts of numbers. They are in `result.json`
      as "test_tables" and "test_ema_tables", and in no chart.
  """

  names: tuple[str, ...]
  of_means: Mapping[str, tuple[str, Callable[[float], float]]] = (
    dataclasses.field(default_factory=dict)
  )
  outputs: Callable[[PyTree, PyTree], Any] | None = None
  targets: str = "targets"
  numbers: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = (
    dataclasses.field(default_factory=dict)
  )
  tables: Mapping[str, Callable[[np.ndarray, np.ndarray], Any]] = (
    dataclasses.field(default_factory=dict)
  )


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained: functions of parameters and of one example.

  An example is a mapping from names to arrays without a batch axis, as the data
  set holds it. All functions must be pure and traceable by JAX, except
  `review`, `check`, `problem`, `example` and `pretrained`, which run in Python.

  Attributes:
    init: (key, example) -> parameters, a pytree of float arrays. Only the
      shapes and dtypes of the example matter: it holds zeros.
    loss: (params, example, rng) -> (loss, aux). The loss is a float scalar, and
      aux is dropped; see `dpdist.clipped_grad`.
    metrics: (params, example) -> {name: (value, weight)} of one held-out
      example. A metric is the sum of all values divided by the sum of all
      weights, and NaN where that is 0. Either may be an array, for instance
      over the places of a sequence. Results show each of these metrics as
      "test/NAME", and no other name may be written. None: {"loss": (loss, 1)},
      under one fixed rng.
    summary: metrics that are no means; None: there are none.
    partitioning: how the mesh axis `model` divides parameters; see
      `dpdist.distributed.mesh.Rules`. Empty: not at all.
    predict: (params, example) -> a prediction, such as logits. Its size decides
      how many held-out examples are evaluated at once. None: the size of the
      metrics does.
    review: (example) -> notices on the model, which are shown when a run
      begins. It raises ValueError for a model that must not be trained.
      `example` has the shapes of a training example.
    check: (example, test) -> None. It raises ValueError if data and task do not
      fit. `example` has the shapes of a training example, and `test` has all
      held-out examples, as NumPy arrays by name.
    problem: (scores, test) -> a sentence that says why a model with these
      held-out metrics is of no use, or "". None: a metric that is not finite
      is a problem.
    example: () -> the shapes of one example, if they are known without data.
      None: the first example is read to learn them.
    largest_integers: maps the name of an array to a public upper bound of its
      integers, which made-up examples keep to. For an array that is not named,
      the largest held-out integer is the bound.
    pretrained: () -> parameters that are read from disk: NumPy arrays by path,
      such as "dense/kernel". They replace initial parameters, and count as
      public. None: there are none.
    trainable: a regular expression that is searched for in each parameter's
      path; if it is not found, the parameter is frozen. Frozen parameters must
      be pretrained. "": all are trained.
    inputs: the name of the array that augmentation changes.
  """

  init: Callable[[Any, PyTree], PyTree]
  loss: Callable[[PyTree, PyTree, Any], tuple[Any, PyTree]]
  metrics: Callable[[PyTree, PyTree], Mapping[str, tuple[Any, Any]]] | None = (
    None
  )
  summary: Summary | None = None
  partitioning: mesh.Rules = ()
  predict: Callable[[PyTree, PyTree], PyTree] | None = None
  review: Callable[[Mapping[str, Any]], Sequence[str]] | None = None
  check: (
    Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], None] | None
  ) = None
  problem: (
    Callable[[Mapping[str, float], Mapping[str, np.ndarray]], str] | None
  ) = None
  example: Callable[[], PyTree] | None = None
  largest_integers: Mapping[str, int] = dataclasses.field(default_factory=dict)
  pretrained: Callable[[], Mapping[str, np.ndarray]] | None = None
  trainable: str = ""
  inputs: str = "inputs"

  def __post_init__(self) -> None:
    for name in _FUNCTIONS:
      value = getattr(self, name)
      if not callable(value) and (value is not None or name in _NEEDED):
        raise errors.ArgumentError(
          f"{name} of a task must be a function, got"
          f" {_validation.described(value)}"
        )
    are_rules = isinstance(self.partitioning, tuple | list) and all(
      isinstance(rule, tuple | list)
      and len(rule) == 2
      and isinstance(rule[0], str)
      and isinstance(rule[1], tuple | list)
      for rule in self.partitioning
    )
    for name, is_right, rule in (
      (
        "summary",
        isinstance(self.summary, Summary | None),
        "a Summary or None",
      ),
      ("partitioning", are_rules, "pairs of a pattern and mesh axes"),
      (
        "largest_integers",
        isinstance(self.largest_integers, Mapping)
        and all(_is_count(x) for x in self.largest_integers.values()),
        "a mapping from names of arrays to integers >= 0",
      ),
      ("trainable", isinstance(self.trainable, str), "a regular expression"),
      ("inputs", isinstance(self.inputs, str), "the name of an array"),
    ):
      value = getattr(self, name)
      _validation.require(is_right, f"{name} of a task", rule, value)


def _is_count(value: Any) -> bool:
  is_integer = isinstance(value, numbers.Integral)
  return is_integer and not isinstance(value, bool) and value >= 0


_NEEDED = ("init", "loss")
_FUNCTIONS = (*_NEEDED, "metrics", "predict", "review", "check", "problem") + (
  "example",
  "pretrained",
)


def shapes_of(name: str, function: Callable[..., Any], *given: PyTree) -> Any:
  """Returns the shapes of what a function of a task returns; computes nothing.

  Raises:
    ValueError: the function, which is called `name`, fails.
  """
  try:
    return jax.eval_shape(function, *given)
  except errors.ArgumentError:
    raise
  except Exception as error:
    # A user's function may raise anything.
    example = next((x for x in given[::-1] if isinstance(x, Mapping)), {})
    listed = {k: f"{v.dtype}{[*v.shape]}" for k, v in example.items()}
    raise errors.ArgumentError(
      f"{name} of the task must be a JAX function of one example, of arrays"
      f" {listed}, got one that raises {errors.in_a_line(error)}"
    ) from error


def called(name: str, function: Callable[..., Any], *given: Any) -> Any:
  """Returns what a function of a task returns, which runs in Python.

  Raises:
    ValueError: the function, which is called `name`, fails.
  """
  try:
    return function(*given)
  except (ValueError, errors.Hinted, OSError, MemoryError):
    raise  # These say what is wrong.
  except Exception as error:
    # A user's function may raise anything.
    raise errors.ArgumentError(
      f"{name} of the task must raise ValueError alone, for what cannot be"
      f" right, got {errors.in_a_line(error)}"
    ) from error


def reviewed(task: Task, example: PyTree) -> list[str]:
  """Returns the notices of a task's review; raises ValueError as that does."""
  if task.review is None:
    return []
  notices = called("review", task.review, example)
  is_right = isinstance(notices, Sequence) and not isinstance(notices, str)
  what, rule = "what review of the task returns", "a list of sentences"
  _validation.require(is_right, what, rule, notices)
  return [str(notice) for notice in notices]


def weights(task: Task) -> Mapping[str, np.ndarray]:
  """Returns what a task reads from disk, by a parameter's path."""
  if task.pretrained is None:
    return {}
  found = called("pretrained", task.pretrained)
  is_right = isinstance(found, Mapping) and all(
    hasattr(x, "shape") for x in found.values()
  )
  _validation.require(
    is_right,
    "what pretrained of the task returns",
    "arrays by a parameter's path",
    found,
  )
  return dict(found)


def params_of(init: Callable[..., PyTree], key: Any, example: PyTree) -> PyTree:
  """Returns the shapes of a task's parameters, or raises ValueError."""
  params = shapes_of("init", init, key, example)
  if not jax.tree.leaves(params):
    raise errors.ArgumentError(
      "init of the task must return one array of parameters or more, as in"
      f" {{'w': array}}, got {params!r}: there is nothing to train"
    )
  return params


def check_loss(
  loss: Callable[..., Any], params: PyTree, example: PyTree, key: Any
) -> None:
  """Raises ValueError unless a loss is one floating number for an example."""
  found = shapes_of("loss", loss, params, example, key)
  if not isinstance(found, tuple) or len(found) != 2:
    raise errors.ArgumentError(
      f"loss of a task must return (loss, aux), got {type(found).__name__}"
    )
  value = found[0]
  if not isinstance(value, jax.ShapeDtypeStruct):
    shown = "None" if value is None else f"a {type(value).__name__}"
  elif value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
    shown = f"{value.dtype} {value.shape}"
  else:
    return
  raise errors.ArgumentError(
    f"loss of a task must be one floating number for an example, got {shown}"
  )


def of(thing: Any) -> Task:
  """Returns a task, made of a `Task` or of any object with its attributes.

  Raises:
    ValueError: it has no `init` or no `loss`.
  """
  if isinstance(thing, Task):
    return thing
  missing = [name for name in _NEEDED if not hasattr(thing, name)]
  if missing:
    raise errors.ArgumentError(
      f"task must be a dpdist.Task or have its attributes {', '.join(_NEEDED)},"
      f" got {_validation.described(thing)}"
    )
  names = [field.name for field in dataclasses.fields(Task)]
  return Task(**{x: getattr(thing, x) for x in names if hasattr(thing, x)})
