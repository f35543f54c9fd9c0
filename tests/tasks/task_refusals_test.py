"""What is said of a wrong task, before anything is computed.

Each message names the argument, gives its value, and says what would be right.
"""

from collections.abc import Callable
import functools
from typing import Any

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpdist
from dpdist import errors
from dpdist import tasks
from dpdist.distributed import mesh as mesh_lib
from dpdist.tasks import held_out
from dpdist.tasks import optimizers
from dpdist.tasks import parts
from dpdist.training import data_checks
from dpdist.training import setup

_ARRAYS: dict[str, Any] = {
  "inputs": np.zeros((6, 4), np.float32),
  "targets": np.arange(6, dtype=np.int32) % 3,
  "two": np.ones((6, 2), np.float32),
}
_PAIRS: dict[str, Any] = {
  "inputs": np.zeros((6, 2, 4), np.float32),
  "targets": np.zeros((6, 2, 4), np.float32),
  "others": np.zeros((6, 3, 4), np.float32),
  "is_pair": np.ones((6, 2), bool),
}
# A model of one matrix.
_MODEL = (
  lambda key, inputs: {"w": jnp.zeros((4, 3))},
  lambda params, inputs: inputs @ params["w"],
)
_WIDE = (
  lambda key, inputs: {"w": jnp.zeros((4, 5))},
  lambda params, inputs: inputs @ params["w"],
)


def _fit(task: Any, arrays: Any = None) -> None:
  """Checks a task as a run does, with arrays for both parts."""
  arrays = arrays or _ARRAYS
  dataset = dpdist.Dataset(train=arrays, test=arrays)
  config = parts.Parts(task, dataset).settings(dpdist.config.default())
  data_checks.fit(config, dataset, parts.of(task).task, setup.PUBLIC_KEY_DATA)


def _pairs(model: Any = _MODEL, *, arrays: Any = None, **options: Any) -> None:
  _fit(tasks.contrastive(model, **options), _PAIRS | (arrays or {}))


def _functions(
  init: Any = lambda key, example: {"w": jnp.zeros(3)},
  loss: Any = lambda params, example: jnp.sum(params["w"]),
  **options: Any,
) -> None:
  _fit(tasks.from_functions(init, loss, **options))


def _raises(*arguments: Any) -> Any:
  raise KeyError("gone")


_COUNTS = (True, 2.5, "3", -1)
ROWS: dict[str, tuple[Callable[[], Any], str]] = {
  **{
    f"{name} {value!r}": (
      functools.partial(make, _MODEL, **{name: value}),
      f"{name} must be .*integer >= [01], got {value!r}",
    )
    for value in _COUNTS
    for name, make in (
      ("num_classes", tasks.classification),
      ("vocabulary", tasks.classification),
      ("vocabulary", tasks.language_model),
      (
        "sequence_length",
        functools.partial(tasks.language_model, vocabulary=3),
      ),
      (
        "vocabulary",
        functools.partial(tasks.masked_language_model, mask_token=0),
      ),
    )
  },
  "no classes": (
    lambda: tasks.classification(_MODEL, num_classes=0),
    "num_classes must be None or an integer >= 1, got 0",
  ),
  "special tokens": (
    lambda: tasks.masked_language_model(
      _MODEL, vocabulary=3, mask_token=0, special_tokens=1
    ),
    "special_tokens must be a list of tokens, got 1",
  ),
  "ragged weights": (
    lambda: tasks.classification(_MODEL, class_weights=[1, [2]]),
    r"class_weights must be finite numbers .*got \[1, \[2\]\]",
  ),
  "all classes are the top": (
    lambda: _fit(tasks.classification(_MODEL, metrics=["top3_accuracy"])),
    "of fewer than the 3 classes, got 'top3_accuracy', which is always 1",
  ),
  "a column that is no name": (
    lambda: tasks.classification(_MODEL, weights=np.ones(2)),
    r"weights must be None or the name of an array, got array",
  ),
  "weights of two": (
    lambda: _fit(tasks.classification(_MODEL, weights="two")),
    r"two in the training part must be one number for each .*shape \(2,\)",
  ),
  # Models.
  "a class of Linen": (
    lambda: tasks.classification(nn.Dense),
    r"got the class Dense, which must be called first, as Dense\(\.\.\.\)",
  ),
  "a class of NNX": (
    lambda: tasks.classification(nnx.Linear),
    r"lambda rngs: Linear\(in_features=\.\.\., out_features=\.\.\., rngs=",
  ),
  "a class of Equinox": (
    lambda: tasks.classification(eqx.nn.MLP),
    r"the class MLP, which needs in_size, .*lambda key: MLP\(in_size=\.\.\.",
  ),
  "an apply alone": (
    lambda: tasks.classification(_MODEL[1]),
    "got a lambda of params, inputs: .*needs an init beside it",
  ),
  "a maker that fails": (
    lambda: tasks.classification(lambda: _raises()),
    "a lambda, which was taken for what makes a module, and raises KeyError",
  ),
  "no model": (lambda: tasks.classification("mlp"), "got str 'mlp'"),
  "lambdas have no name": (
    lambda: _fit(tasks.classification(_MODEL, targets="two")),
    r"of get_dataset or .* must be integers, class numbers, got float32",
  ),
  # Parts.
  "a function of optax": (
    lambda: parts.of(optimizer=optax.sgd),
    r"as optax\.sgd\(0\.1\) returns, got the function sgd, and not what it",
  ),
  "a task's class": (lambda: parts.of(tasks.Task), r"class Task, which must"),
  "a model for a task": (lambda: parts.of(nn.Dense(3)), "init, loss, got De"),
  "a data set's class": (
    lambda: parts.of(dataset=dpdist.Dataset),
    "dataset must be a dpdist.Dataset, .*the class Dataset, which must",
  ),
  "parts that are no arrays": (
    lambda: dpdist.Dataset(train=np.ones(3), test=np.ones(3)),
    "train of a data set must be a mapping of arrays by name .*got ndarray",
  ),
  "arrays of two lengths": (
    lambda: dpdist.Dataset(train=_ARRAYS | {"two": np.ones(5)}, test=_ARRAYS),
    "train of a data set: arrays must be .*same leading length",
  ),
  "rules that are none": (
    lambda: tasks.classification(_MODEL, partitioning="model"),
    "partitioning of a task must be pairs of .*, got 'model'",
  ),
  "bounds that are none": (
    lambda: tasks.classification(_MODEL, largest_integers={"inputs": 1.5}),
    "largest_integers of a task must be .*1.5",
  ),
  # Functions.
  "an init that is none": (
    lambda: _functions(init=3),
    r"init must be a function of \(key, example\), got int 3",
  ),
  "an init of a key": (
    lambda: _functions(init=lambda key: {}),
    r"init must be a function of \(key, example\), got one of \(key\)",
  ),
  "an init of nothing": (
    lambda: _functions(init=lambda key, example: {}),
    r"init of the task must return one array .*, got \{\}: there is nothing",
  ),
  "an init that fails": (
    lambda: _functions(init=_raises),
    "init of the task must be a JAX function .*raises KeyError: 'gone'",
  ),
  "a loss of four": (
    lambda: _functions(loss=lambda a, b, c, d: 0.0),
    r"loss must be a function of .*rng\), got one of \(a, b, c, d\)",
  ),
  "a loss of several": (
    lambda: _functions(loss=lambda params, example: params["w"]),
    r"must be one floating number for an example, got float32 \(3,\)",
  ),
  "a loss of none": (
    lambda: _functions(loss=lambda params, example: None),
    "must be one floating number for an example, got None",
  ),
  "a loss that fails": (
    lambda: _functions(loss=_raises),
    "loss of the task must be .*float32.4.*raises KeyError: 'gone'",
  ),
  "a task's loss of several": (
    lambda: _fit(
      tasks.Task(lambda *_: {"w": jnp.zeros(3)}, lambda p, e, rng: (p["w"], 0))
    ),
    r"must be one floating number for an example, got float32 \(3,\)",
  ),
  "a task's loss alone": (
    lambda: _fit(
      tasks.Task(lambda *_: {"w": jnp.zeros(3)}, lambda p, e, rng: p["w"][0])
    ),
    r"must return \(loss, aux\)",
  ),
  "a wrong option": (
    lambda: _functions(trainabel="w"),
    "options must be some of .*'trainable'.*got 'trainabel'",
  ),
  # Pairs.
  "vectors of two lengths": (
    lambda: _pairs(target_model=_WIDE),
    r"vectors of one length, .*'inputs': \(3,\), 'targets': \(5,\)",
  ),
  "a class as the other model": (
    lambda: _pairs(target_model=nn.Dense),
    "target_model: model must be a module of .*class Dense, which must",
  ),
  "items of two shapes": (
    lambda: _pairs(arrays={"targets": np.zeros((6, 2, 7), np.float32)}),
    r"inputs must have items of the shape of targets, \(7,\), .*got \(4,\)",
  ),
  "negatives of another shape": (
    lambda: _pairs(
      negatives="others", arrays={"others": np.zeros((6, 3, 9), np.float32)}
    ),
    r"others must have items of the shape of targets, \(4,\), .*got \(9,\)",
  ),
  "negatives without an axis": (
    lambda: _pairs(negatives="others", arrays={"others": np.zeros(6, "f4")}),
    r"others must be an axis of items first, got \(\)",
  ),
  "nothing to tell a pair from": (
    lambda: _pairs(arrays={x: _PAIRS[x][:, :1] for x in ("inputs", "targets")}),
    "inputs must have 2 pairs or more .*got 1 and 0 negatives",
  ),
  "pairs of two axes": (
    lambda: _pairs(is_pair="two", arrays={"two": np.ones((6, 2, 2), bool)}),
    r"two must say of each of the 2 pairs .*got shape \(2, 2\)",
  ),
  "items that are no vectors": (
    lambda: _pairs((_MODEL[0], lambda params, inputs: inputs[0])),
    r"must map an item of inputs to one vector, got shape \(\)",
  ),
  "items that a model does not take": (
    lambda: _pairs((_MODEL[0], lambda params, x: x @ params["v"])),
    "inputs must be items that the model .*takes, got float32 .*KeyError: 'v'",
  ),
  "a temperature of nearly nothing": (
    lambda: tasks.contrastive(_MODEL, temperature=1e-30),
    r"temperature must be in \[0.0001, 10000\], got 1e-30",
  ),
  "all candidates are the top": (
    lambda: _pairs(metrics=["accuracy", "top2_accuracy"]),
    "fewer than the 2 classes, got 'top2_accuracy'",
  ),
}


@pytest.mark.parametrize("what", ROWS)
def test_a_wrong_task_is_named(what: str) -> None:
  call, message = ROWS[what]
  with pytest.raises(errors.ArgumentError, match=message) as caught:
    call()
  assert len(str(caught.value).splitlines()) == 1
  assert "<lambda>" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "meant"),
  [("SGD", "sgd"), ("adamm", "adam"), ("apply_updates", ""), ("zzz", "")],
)
def test_an_optimizer_that_is_none_suggests(name: str, meant: str) -> None:
  config = dpdist.config.default().optimizer
  config.name = name
  with pytest.raises(errors.ArgumentError, match="must be an optax") as said:
    optimizers.make(config, 10)
  assert str(said.value).endswith(
    f"{name!r}: did you mean {meant!r}?" if meant else f"got {name!r}"
  )


def _evaluator(
  metric: Callable[..., Any],
  tell: Callable[[str], None] | None = None,
  **options: Any,
) -> held_out.Evaluator:
  task = tasks.classification(_MODEL, metrics=["loss", metric], **options)
  mesh = mesh_lib.make({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
  params = {"w": jnp.zeros((4, 3))}
  return held_out.Evaluator(task, _ARRAYS, mesh, params, tell=tell)


def _row(targets: Any, outputs: Any) -> Any:
  return outputs[0]


def _text(targets: Any, outputs: Any) -> Any:
  return "3"


def _one(targets: Any) -> float:
  return 1.0


@pytest.mark.parametrize(
  ("metric", "message"),
  [
    (_raises, r"targets \(6,\) and outputs \(6, 3\), got '_raises', .*KeyErr"),
    (_one, "got '_one', which raises TypeError"),
    (_row, r"must return a number, got an array \(3,\) of '_row'"),
    (_text, "must return a number, got '3' of '_text'"),
  ],
)
def test_a_metric_that_fails_is_named(metric: Any, message: str) -> None:
  told: list[str] = []
  evaluate = _evaluator(metric, told.append)
  params = {"w": jnp.zeros((4, 3))}
  # When a run tries it out, before any charge, it ends the run.
  with pytest.raises(errors.ArgumentError, match=message):
    evaluate(params, num_passes=1)
  with pytest.raises(errors.ArgumentError, match=message):
    _evaluator(metric)(params)
  assert not told
  # Later it does not, and is told of once.
  for _ in range(2):
    scores = evaluate(params)
    assert np.isnan(scores[metric.__name__])
    assert np.isfinite(scores["loss"])
  assert len(told) == 1
  assert "the metric is NaN" in told[0]


def test_a_metric_of_no_use_is_told_when_it_is_tried_out() -> None:
  def undefined(targets: Any, outputs: Any) -> float:
    return float("nan")

  told: list[str] = []
  evaluate = _evaluator(undefined, told.append)
  evaluate({"w": jnp.zeros((4, 3))}, num_passes=1)
  assert len(told) == 1
  assert "'undefined' is nan" in told[0]
  evaluate({"w": jnp.full((4, 3), jnp.nan)}, num_passes=1)
  assert len(told) == 1  # No metric says more of outputs that are no numbers.


def test_a_metric_is_tried_out_on_all_targets() -> None:
  seen = []

  def sizes(targets: Any, outputs: Any) -> float:
    seen.append((targets.shape, outputs.shape))
    return 0.0

  test = {name: np.repeat(x, 400, axis=0) for name, x in _ARRAYS.items()}
  task = tasks.classification(_MODEL, metrics=["loss", sizes])
  mesh = mesh_lib.make({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
  params = {"w": jnp.zeros((4, 3))}
  held_out.Evaluator(task, test, mesh, params)(params, num_passes=1)
  assert seen == [((2400,), (2400, 3))]
