"""Held-out metrics by name, against scikit-learn and formulas of their own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from dpdist import errors
from dpdist import tasks
from dpdist.distributed import mesh as mesh_lib
from dpdist.tasks import chance
from dpdist.tasks import held_out
from dpdist.tasks.scoring import collected
from dpdist.tasks.scoring import metrics as metrics_lib

pytestmark = pytest.mark.usefixtures("quick_compiles")

_SIZE = 37
# A model that returns its inputs.
_SAME = (lambda key, inputs: jnp.zeros(()), lambda params, inputs: inputs)
_rng = np.random.default_rng(0)


def _evaluated(task: Any, **test: np.ndarray) -> tuple[Any, Any]:
  mesh = mesh_lib.make({"data": 2, "fsdp": 1, "model": 1}, jax.devices()[:2])
  run = held_out.Evaluator(task, test, mesh, jnp.zeros(()))
  found = run(jnp.zeros(()))
  assert tuple(found) == run.names
  return found, run.tables(jnp.zeros(()))


def _softmax(x: np.ndarray) -> Any:
  return np.asarray(jax.nn.softmax(x))


def test_metrics_of_classes() -> None:
  logits = _rng.normal(size=(_SIZE, 4)).astype(np.float32)
  targets = _rng.integers(0, 4, _SIZE).astype(np.int32)
  logits[np.arange(_SIZE), targets] += 1
  names = ["f1", "auc", "perplexity", "top2_accuracy", "average_precision"]
  more = ["calibration_error", "per_class", "confusion"]
  task = tasks.classification(_SAME, metrics=[*names, *more])
  found, tables = _evaluated(task, inputs=logits, targets=targets)
  assert list(found) == [*names, "calibration_error"]
  shares, guesses = _softmax(logits), logits.argmax(1)
  one_hot = np.eye(4)[targets]
  want = {
    "f1": sk.f1_score(targets, guesses, average="macro"),
    "auc": sk.roc_auc_score(targets, shares, multi_class="ovr"),
    "perplexity": np.exp(sk.log_loss(targets, shares)),
    "top2_accuracy": sk.top_k_accuracy_score(targets, shares, k=2),
    "average_precision": sk.average_precision_score(one_hot, shares),
  }
  for name, value in want.items():
    assert found[name] == pytest.approx(value, rel=1e-5), name
  assert tables["confusion"] == sk.confusion_matrix(targets, guesses).tolist()
  report = sk.classification_report(targets, guesses, output_dict=True)
  for k, row in enumerate(tables["per_class"]):
    assert row["f1"] == pytest.approx(report[str(k)]["f1-score"])
    assert row["recall"] == pytest.approx(report[str(k)]["recall"])
    assert row["support"] == report[str(k)]["support"]


def test_calibration_error_is_that_of_its_definition() -> None:
  sure = _rng.uniform(size=500)
  hits = (_rng.uniform(size=500) < sure**2).astype(float)
  want = 0.0
  for low in np.arange(15) / 15:
    mine = (sure >= low) & (sure < low + 1 / 15)
    if mine.any():
      want += mine.mean() * abs(hits[mine].mean() - sure[mine].mean())
  assert collected.calibration_error(sure, hits) == pytest.approx(want)


def test_metrics_of_labels_leave_out_those_that_are_missing() -> None:
  logits = _rng.normal(size=(_SIZE, 3)).astype(np.float32)
  targets = _rng.integers(0, 2, (_SIZE, 3)).astype(np.int32)
  targets[:5, 0] = -1
  names = ["auc", "average_precision", "f1", "accuracy", "confusion"]
  task = tasks.multilabel(_SAME, metrics=names)
  found, tables = _evaluated(task, inputs=logits, targets=targets)
  parts = [
    (targets[5:, 0], logits[5:, 0]),
    *((targets[:, k], logits[:, k]) for k in (1, 2)),
  ]
  mean = lambda f: np.mean([f(y, x) for y, x in parts])
  assert found["auc"] == pytest.approx(mean(sk.roc_auc_score))
  assert found["average_precision"] == pytest.approx(
    mean(sk.average_precision_score)
  )
  assert found["f1"] == pytest.approx(mean(lambda y, x: sk.f1_score(y, x > 0)))
  y, x = (np.concatenate(z) for z in zip(*parts, strict=True))
  assert found["accuracy"] == pytest.approx(np.mean((x > 0) == y))
  assert (
    tables["confusion"][1]
    == sk.confusion_matrix(targets[:, 1], logits[:, 1] > 0).tolist()
  )


def test_metrics_of_one_logit_and_of_two_classes_agree() -> None:
  logit = _rng.normal(size=(_SIZE, 1)).astype(np.float32)
  targets = _rng.integers(0, 2, _SIZE).astype(np.int32)
  names = ["auc", "average_precision", "calibration_error", "loss", "accuracy"]
  one, tables = _evaluated(
    tasks.binary(_SAME, metrics=[*names, "f1", "confusion", "per_class"]),
    inputs=logit,
    targets=targets,
  )
  two, _ = _evaluated(
    tasks.classification(_SAME, metrics=names),
    inputs=np.concatenate([np.zeros_like(logit), logit], 1),
    targets=targets,
  )
  for name in names:
    assert one[name] == pytest.approx(two[name], rel=1e-5), name
  guesses = logit[:, 0] > 0
  assert one["f1"] == pytest.approx(sk.f1_score(targets, guesses))
  assert tables["confusion"] == sk.confusion_matrix(targets, guesses).tolist()
  assert tables["per_class"]["support"] == targets.sum()


def test_metrics_of_numbers_and_a_function_of_ones_own() -> None:
  outputs = _rng.normal(size=(_SIZE, 1)).astype(np.float32)
  targets = (outputs[:, 0] + _rng.normal(size=_SIZE)).astype(np.float32)
  task = tasks.regression(
    _SAME, metrics=[sk.median_absolute_error, "r2", "mae", "mse"]
  )
  found, tables = _evaluated(task, inputs=outputs, targets=targets)
  assert tables == {}
  np.testing.assert_allclose(
    [*found.values()],
    [
      sk.median_absolute_error(targets, outputs),
      sk.r2_score(targets, outputs),
      sk.mean_absolute_error(targets, outputs),
      sk.mean_squared_error(targets, outputs),
    ],
    rtol=1e-5,
  )


def test_functions_are_a_task() -> None:
  task = tasks.from_functions(
    lambda key, example: jnp.zeros(()),
    lambda params, example: (params - example["y"]) ** 2,
    predict=lambda params, example: example["x"],
    metrics=[sk.max_error],
    targets="y",
  )
  arrays = {name: _rng.normal(size=_SIZE).astype("f4") for name in ("x", "y")}
  found, _ = _evaluated(task, **arrays)
  want = sk.max_error(arrays["y"], arrays["x"])
  assert found == {"max_error": pytest.approx(want)}
  example = {name: x[0] for name, x in arrays.items()}
  loss, _ = task.loss(jnp.ones(()), example, jax.random.key(0))
  assert loss == pytest.approx((1 - arrays["y"][0]) ** 2)
  assert task.review(example) == []


def test_what_is_undefined_is_no_number() -> None:
  ones = np.ones(_SIZE, np.int32)
  logits = np.zeros((_SIZE, 2), np.float32)
  task = tasks.classification(_SAME, metrics=["auc", "accuracy"])
  found, _ = _evaluated(task, inputs=logits, targets=ones)
  assert np.isnan(found["auc"])
  assert found["accuracy"] == 0


def test_a_run_that_diverged_is_told_and_does_not_stop() -> None:
  logits = np.full((_SIZE, 2), np.nan, np.float32)
  names = ["f1", "confusion", "top1_accuracy", "loss"]
  task = tasks.classification(_SAME, metrics=names)
  targets = np.arange(_SIZE, dtype=np.int32) % 2
  found, tables = _evaluated(task, inputs=logits, targets=targets)
  assert np.isnan(found["f1"])
  assert tables == {"confusion": None}
  assert found["top1_accuracy"] == 0
  assert "of no use" in task.problem(found, {"targets": targets})


@pytest.mark.parametrize(
  ("metrics", "message"),
  [
    (["acuracy"], "got 'acuracy'"),
    (["top0_accuracy"], "top5_accuracy"),
    (["loss", "loss"], "differ in name"),
    (["confusion", "per_class"], "one that is a number"),
    ([lambda y, x: 0.0], "with a name"),
    ("accuracy", "a list"),
    ([], "a list"),
  ],
)
def test_wrong_metrics_are_named(metrics: Any, message: str) -> None:
  with pytest.raises(errors.ArgumentError, match=message):
    tasks.classification(_SAME, metrics=metrics)


def test_a_function_that_returns_no_number_is_named() -> None:
  def both(targets: Any, outputs: Any) -> Any:
    return [1, 2]

  chosen = metrics_lib.choose([both], "numbers")
  with pytest.raises(errors.ArgumentError, match="'both'"):
    chosen.collected["both"](np.zeros(2), np.zeros(2))


def test_scikit_learn_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
  missing = lambda name: None
  monkeypatch.setattr(metrics_lib.importlib.util, "find_spec", missing)
  tasks.classification(_SAME, metrics=["accuracy", "calibration_error"])
  with pytest.raises(errors.MissingPackageError, match=r"dpdist\[metrics\]"):
    tasks.classification(_SAME, metrics=["auc"])


def test_a_constant_guess_is_no_use() -> None:
  y = np.array([0.0, 1, 2, 7])
  best = {"mse": y.var(), "mae": np.abs(y - np.median(y)).mean(), "r2": 0.0}
  assert "best constant" in chance.problem_of_numbers(best, y)
  assert chance.problem_of_numbers(best | {"mse": 1.0}, y) == ""
  assert chance.problem_of_numbers({"other": 1.0}, y) == ""
  assert "nan" in chance.problem_of_numbers({"mse": np.nan}, y)
  labels = np.array([[0, 1], [0, 1], [1, 1], [0, -1]])
  share = (3 + 3) / 7
  entropy = sk.log_loss([0, 0, 1, 0], np.full(4, 0.25)) * 4 / 7
  scores = {"accuracy": share, "loss": entropy}
  assert "constant guess" in chance.problem_of_labels(scores, labels)
  better = scores | {"loss": entropy - 1e-3}
  assert chance.problem_of_labels(better, labels) == ""
