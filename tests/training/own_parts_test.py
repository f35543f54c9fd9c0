"""A task, a data set and an optimizer from outside of this project."""

import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpdist
from dpdist import config as config_lib
from dpdist import errors
from dpdist.data import arrays as arrays_lib
from dpdist.export import load_run
from dpdist.ledger import ledger as ledger_lib
from dpdist.reporting import metrics
from dpdist.tasks import held_out
from dpdist.tasks import parts
from dpdist.training import abstract_step
from dpdist.training import parameters
from dpdist.training import setup
from dpdist.workdir import fingerprint
from tests.support import commands
from tests.support import turns

pytestmark = pytest.mark.usefixtures("quick_compiles")

_FACTOR = 1.0

# Code that is in no file, as of a notebook.
_NOTEBOOK = """
import jax
import jax.numpy as jnp
import numpy as np
import optax
import dpdist

SCALE = 1.0
OFFSET = np.array([0.0, 1.0], np.float32)


def init(key, example):
  width = example["x"].shape[0]
  kernel = 0.1 * jax.random.normal(key, (width, 2))
  return {"kernel": kernel, "bias": jnp.zeros(2)}


def predict(params, example):
  return example["x"] @ params["kernel"] + params["bias"]


def loss(params, example, rng):
  error = predict(params, example) - example["y"] - OFFSET
  kept = jax.random.bernoulli(rng, 0.9, error.shape)
  return SCALE * jnp.mean((kept * error) ** 2), None


def metrics(params, example):
  error = predict(params, example) - example["y"]
  return {"mse": (jnp.mean(error**2), 1.0)}


task = dpdist.Task(init=init, loss=loss, metrics=metrics)
optimizer = optax.sgd(0.1, momentum=0.9)
"""

# What is edited, and whether it alters what a run releases.
_EDITS = {
  "nothing": ("", "", False),
  "a comment": ("SCALE = 1.0", "SCALE = 1.0  # Or 2.", False),
  "a metric": ("jnp.mean(error**2), 1.0", "jnp.max(error**2), 1.0", False),
  "the name of a metric": ('{"mse":', '{"error":', False),
  "the name of a variable": ("kept", "remaining", False),
  "a factor of the loss": ("SCALE = 1.0", "SCALE = 1.5", True),
  "an entry of a constant array": ("[0.0, 1.0]", "[0.0, 1.25]", True),
  "the dropout": ("0.9, error", "0.8, error", True),
  "the power of the error": ("error) ** 2", "error) ** 4", True),
  "the initial scale": ("0.1 * jax", "0.2 * jax", True),
  "the initial bias": ("jnp.zeros(2)", "jnp.ones(2)", True),
  "the optimizer's rate": ("sgd(0.1", "sgd(0.2", True),
  "the optimizer's momentum": ("momentum=0.9", "momentum=0.8", True),
  "the optimizer": ("momentum=0.9", "momentum=0.9, nesterov=True", True),
}


def _arrays(rows: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(rows)
  x = rng.normal(size=(rows, 4)).astype(np.float32)
  return {"x": x, "y": x[:, :2].copy()}


def _dataset() -> dpdist.Dataset:
  return dpdist.Dataset(_arrays(32), _arrays(8))


def _config(**changes: Any) -> Any:
  config = config_lib.default()
  config.update_from_flattened_dict(
    {
      "privacy.num_examples": 32,
      "privacy.expected_batch_size": 8.0,
      "privacy.num_steps": 4,
      "privacy.noise_multiplier": 2.0,
      "privacy.accountant": "rdp",
      "checkpoint_every": 2,
      "insecure_seed": 1,
      **changes,
    }
  )
  return config


def _parts(old: str = "", new: str = "") -> dict[str, Any]:
  assert old in _NOTEBOOK
  names: dict[str, Any] = {"__name__": "a_notebook"}
  exec(_NOTEBOOK.replace(old, new) if old else _NOTEBOOK, names)
  return {name: names[name] for name in ("task", "optimizer")}


@pytest.fixture(name="begun", scope="module")
def fixture_begun(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The directory of a run that is done."""
  workdir = tmp_path_factory.mktemp("begun") / "run"
  dpdist.train(_config(), workdir, dataset=_dataset(), **_parts())
  return workdir


@pytest.mark.parametrize(
  "edit",
  turns.cells(
    _EDITS,
    always=(
      *("nothing", "a metric", "a factor of the loss", "the initial scale"),
      *("an entry of a constant array", "the optimizer's rate"),
    ),
  ),
)
def test_what_alters_a_release_gets_other_keys(
  begun: pathlib.Path, tmp_path: pathlib.Path, edit: str
) -> None:
  old, new, is_altered = _EDITS[edit]
  before, after = _branches(begun, tmp_path, _config(), _parts(old, new))
  assert len(after) == len(before) + is_altered
  assert (after[-1].identity != before[-1].identity) == is_altered


def _branches(
  begun: pathlib.Path, tmp_path: pathlib.Path, config: Any, given: Any
) -> tuple[list[Any], list[Any]]:
  """Branches of a run before and after it goes on with other parts."""
  workdir = tmp_path / "run"
  shutil.copytree(begun, workdir)
  before = ledger_lib.Ledger(workdir / "ledger").branches
  (workdir / "result.json").unlink()
  dpdist.train(config, workdir, dataset=_dataset(), **given)
  return before, ledger_lib.Ledger(workdir / "ledger").branches


def _digest(task: dpdist.Task, *, exact: bool = False, **more: Any) -> str:
  config = _config(**{"clipping.exact_sum": exact, "privacy.num_steps": 2})
  optimizer = more.get("optimizer", optax.sgd(0.1))
  given = parts.of(task, _dataset(), optimizer)
  experiment = setup.build(config, parts=given)
  example = {name: x[0] for name, x in _arrays(8).items()}
  programs = abstract_step.programs(
    experiment.step,
    parameters.of(task, setup.PUBLIC_KEY_DATA, example).initializer(
      experiment.step
    ),
    row=abstract_step.unit(config, abstract_step.example(experiment)),
    chunk_size=experiment.chunk_size,
    frozen=None,
    has_schedule=False,
    is_watched=True,
  )
  return abstract_step.lowered_sha256(programs)


@pytest.mark.parametrize(
  "edit",
  turns.cells(_EDITS, always=("nothing", "a metric", "a factor of the loss")),
)
def test_programs_of_exact_sums_hold_it_too(edit: str) -> None:
  old, new, is_altered = _EDITS[edit]
  before, after = (
    _digest(x["task"], exact=True, optimizer=x["optimizer"])
    for x in (_parts(), _parts(old, new))
  )
  assert (before != after) == is_altered


def _edited_while_it_starts(part: str, reads: int) -> dict[str, Any]:
  """Returns parts of which one reads 1.0 so often, and 2.0 from then on."""
  values = {name: iter(()) for name in ("init", "loss", "update")}
  values[part] = iter([1.0] * reads)
  read = lambda name: next(values[name], 2.0)
  sgd = optax.sgd(0.1)

  def update(*args: Any) -> Any:
    updates, state = sgd.update(*args)
    return jax.tree.map(lambda x: read("update") * x, updates), state

  task = dpdist.Task(
    init=lambda key, example: {"w": jnp.full(4, read("init"))},
    loss=lambda params, example, rng: (
      read("loss") * jnp.mean(params["w"] * example["x"]),
      None,
    ),
    metrics=lambda params, example: {"sum": (jnp.sum(params["w"]), 1.0)},
  )
  return {
    "task": task,
    "optimizer": optax.GradientTransformation(sgd.init, update),
  }


@pytest.mark.parametrize(
  # Python runs so often before it runs for the program that the run will use.
  ("part", "reads", "exact"),
  turns.cells(
    [
      (part, reads, exact)
      for part, reads in (("init", 3), ("loss", 2), ("update", 2))
      for exact in (False, True)
    ],
    always=[
      ("init", 3, False),
      ("loss", 2, False),
      ("loss", 2, True),
      ("update", 2, False),
    ],
  ),
)
def test_what_is_in_the_digest_is_what_runs(
  tmp_path: pathlib.Path, part: str, reads: int, exact: bool
) -> None:
  config = _config(**{"clipping.exact_sum": exact, "privacy.num_steps": 2})
  begun = tmp_path / "begun"
  given = _edited_while_it_starts(part, reads)
  dpdist.train(config, begun, dataset=_dataset(), **given)
  given = _edited_while_it_starts(part, 0)
  before, after = _branches(begun, tmp_path, config, given)
  assert len(after) == len(before) + 1


def test_large_constants_are_in_the_digest_wholly() -> None:
  def task(last: float) -> dpdist.Task:
    table = np.zeros(100_000, np.float32)
    table[54_321] = last
    return dpdist.Task(
      init=lambda key, example: {"w": jnp.zeros(4)},
      loss=lambda params, example, rng: (
        jnp.sum(params["w"] * example["x"]) * jnp.sum(jnp.sin(table)),
        None,
      ),
    )

  assert _digest(task(1.0)) == _digest(task(1.0)) != _digest(task(2.0))


@pytest.mark.parametrize("call", ["print", "pure", "io"])
def test_a_loss_that_calls_back_into_python_is_refused(
  tmp_path: pathlib.Path, call: str
) -> None:
  def loss(params: Any, example: Any, rng: Any) -> Any:
    value = jnp.sum(params["w"] * example["x"])
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    if call == "print":
      jax.debug.print("{}", value)
    elif call == "pure":
      value = value + jax.lax.stop_gradient(
        jax.pure_callback(
          np.sin, shape, jax.lax.stop_gradient(value), vmap_method="sequential"
        )
      )
    else:
      jax.experimental.io_callback(
        lambda x: np.float32(0), shape, jax.lax.stop_gradient(value)
      )
    return value, None

  task = dpdist.Task(init=lambda key, example: {"w": jnp.ones(4)}, loss=loss)
  with pytest.raises(errors.SettingsError, match="must be JAX alone"):
    dpdist.train(
      _config(**{"clipping.method": "vmap"}),
      tmp_path / "run",
      task=task,
      dataset=_dataset(),
    )
  assert not (tmp_path / "run" / "ledger").exists()


def test_constants_that_are_left_out_of_the_text_are_refused() -> None:
  name = "jax_use_simplified_jaxpr_constants"
  before = jax.config.values[name]
  jax.config.update(name, True)
  try:
    with pytest.raises(errors.ArgumentError, match=f"{name} must be False"):
      _digest(_parts()["task"])
  finally:
    jax.config.update(name, before)


def test_a_call_of_python_on_a_tpu_is_refused() -> None:
  # What JAX 0.10.2 lowers `jax.debug.print` to there.
  class Program:
    def as_text(self) -> str:
      return '"stablehlo.send"(%0, %1) <{is_host_transfer = true}>'

  with pytest.raises(errors.ArgumentError, match="must be JAX alone"):
    abstract_step.lowered_sha256([("chunk", Program())])  # type: ignore


# What a data set's code holds.


def _scaled(batch: Any, *, scale: Any = None) -> Any:
  return {name: (scale or {"all": 1.0})["all"] * x for name, x in batch.items()}


def _in_closure(scale: Any) -> Any:
  return lambda batch: _scaled(batch, scale=scale)


class _Scaler:
  def __init__(self, scale: Any):
    self.scale = scale

  def __call__(self, batch: Any) -> Any:
    return _scaled(batch, scale=self.scale)

  def method(self, batch: Any) -> Any:
    return self(batch)


_FORMS = {
  "closure": _in_closure,
  "partial": lambda scale: functools.partial(_scaled, scale=scale),
  "instance": _Scaler,
  "method": lambda scale: _Scaler(scale).method,
  "function in a partial": lambda scale: functools.partial(
    lambda convert, batch: convert(batch), _in_closure(scale)
  ),
}


def _code_of_data(convert: Any) -> dict[str, str]:
  source = arrays_lib.ArraySource(_arrays(32), convert=convert)
  given = parts.of(_parts()["task"], dpdist.Dataset(source, _arrays(8)))
  return given.code_sha256(_config())


@pytest.mark.parametrize("form", _FORMS)
def test_what_a_data_sets_code_holds_is_in_the_digest(form: str) -> None:
  make = _FORMS[form]
  one, same, two, array, other_array = (
    _code_of_data(make({"all": scale}))["dataset_code_sha256"]
    for scale in (1.0, 1.0, 2.0, np.ones(4), np.array([1.0, 1.0, 1.0, 2.0]))
  )
  assert one == same
  assert len({one, two, array, other_array}) == 4


def test_a_module_variable_of_a_data_sets_code_is_in_the_digest(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  convert = lambda batch: {name: _FACTOR * x for name, x in batch.items()}
  before = _code_of_data(convert)
  monkeypatch.setitem(globals(), "_FACTOR", 2.0)
  assert _code_of_data(convert) != before


def test_code_of_data_that_holds_what_cannot_be_told_apart_is_refused() -> None:
  random = iter(range(3))
  with pytest.raises(errors.ArgumentError, match="range_iterator"):
    _code_of_data(lambda batch: _scaled(batch, scale={"all": next(random)}))


def test_no_value_of_an_example_is_in_the_initial_parameters(
  tmp_path: pathlib.Path,
) -> None:
  given = _parts()
  task = dpdist.Task(
    init=lambda key, example: {
      "kernel": jnp.tile(example["x"][:, None], 2),
      "bias": example["y"],
    },
    loss=given["task"].loss,
  )
  result = dpdist.train(
    _config(**{"privacy.noise_multiplier": 1e-9, "optimizer.name": "set_zero"}),
    tmp_path,
    task=task,
    dataset=_dataset(),
    optimizer=optax.set_to_zero(),
  )
  zeros = {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}
  assert result["params_sha256"] == fingerprint.params_sha256(zeros)


def test_what_a_loss_returns_besides_is_dropped() -> None:
  seen = []
  task = dpdist.Task(
    init=lambda key, example: {"w": jnp.zeros(4)},
    loss=lambda params, example, rng: (
      jnp.sum(params["w"] * example["x"]),
      {"private": example["x"]},
    ),
  )
  loss = setup.loss_fn(_config(), task)
  example = {name: x[0] for name, x in _arrays(8).items()}
  seen = loss({"w": np.ones(4)}, example, jax.random.key(0))
  assert seen[1] is None


# Held-out metrics.


def _evaluated(metrics_of: Any, rows: int = 11) -> dict[str, float]:
  task = dpdist.Task(
    init=lambda key, example: {"w": jnp.zeros(())},
    loss=lambda params, example, rng: (jnp.sum(example["x"]), None),
    metrics=metrics_of,
  )
  mesh = setup.build(
    _config(), parts=parts.of(task, _dataset(), optax.sgd(0.1))
  ).mesh
  test = _arrays(rows)
  return held_out.Evaluator(task, test, mesh, {"w": np.zeros(())})(
    {"w": np.zeros(())}
  )


def test_a_metric_is_its_values_over_its_weights() -> None:
  def found(params: Any, example: Any) -> Any:
    x = example["x"]
    return {
      "sum": (x[0] * abs(x[1]), abs(x[1])),
      "places": (jnp.where(x > 0, x, 0), x > 0),
      "share": (x[0] > 0, 1),
    }

  x = _arrays(11)["x"].astype(np.float64)
  got = _evaluated(found)
  assert list(got) == ["sum", "places", "share"]
  weight = np.abs(x[:, 1])
  np.testing.assert_allclose(
    [*got.values()],
    [
      np.sum(x[:, 0] * weight) / weight.sum(),
      x[x > 0].sum() / (x > 0).sum(),
      np.mean(x[:, 0] > 0),
    ],
    rtol=1e-5,
  )


def test_a_metric_without_weight_is_no_number() -> None:
  got = _evaluated(
    lambda params, example: {"none": (0.0, 0.0), "all": (1.0, 1.0)}
  )
  assert np.isnan(got["none"])
  assert got["all"] == 1.0
  task = _parts()["task"]
  assert "held-out none is nan" in held_out.problem(task, got, _arrays(11))


def test_a_task_without_metrics_has_its_loss() -> None:
  got = _evaluated(None)
  assert list(got) == ["loss"]
  np.testing.assert_allclose(
    got["loss"], _arrays(11)["x"].sum(1).mean(), rtol=1e-4
  )


@pytest.mark.parametrize(
  ("found", "message"),
  [
    ({}, "must return"),
    ([1.0], "must return"),
    ({"a/b": (1.0, 1.0)}, "names of letters"),
    ({"": (1.0, 1.0)}, "names of letters"),
    ({"a": 1.0}, "'a'"),
    ({"a": (1.0, 1.0, 1.0)}, "'a'"),
  ],
)
def test_metrics_of_another_form_are_refused(found: Any, message: str) -> None:
  with pytest.raises(errors.ArgumentError, match=message):
    _evaluated(lambda params, example: found)


def test_only_declared_metrics_are_written(tmp_path: pathlib.Path) -> None:
  with metrics.Writer(
    tmp_path, unsafe_metrics=False, held_out=["mse", "train_loss"]
  ) as writer:
    writer.write(1, {"test/mse": 1.0, "test_ema/mse": 2.0})
    for name in ("mse", "test/accuracy", "train/mse", "train_loss"):
      with pytest.raises(ValueError, match=f"'{name}' is"):
        writer.write(2, {name: 1.0})
  assert [row["step"] for row in metrics.read(tmp_path)] == [1]


# Wrong parts.


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"task": object()}, "attributes init, loss, got object"),
    ({"dataset": object()}, "parts train and test"),
    ({"optimizer": 0.1}, "must be an optax.GradientTransformation"),
  ],
)
def test_what_is_no_part_is_named(
  tmp_path: pathlib.Path, given: Any, message: str
) -> None:
  with pytest.raises(errors.SettingsError, match=message):
    dpdist.train(_config(), tmp_path, **given)


@pytest.mark.parametrize("value", [1.0, (1.0, None, None)])
def test_a_loss_of_another_form_is_refused(
  tmp_path: pathlib.Path, value: Any
) -> None:
  task = dpdist.Task(
    init=lambda key, example: {"w": jnp.zeros(4)},
    loss=lambda params, example, rng: value,
    metrics=lambda params, example: {"one": (1.0, 1.0)},
  )
  with pytest.raises(errors.SettingsError, match=r"must return \(loss, aux\)"):
    dpdist.train(_config(), tmp_path, task=task, dataset=_dataset())


def test_a_check_of_the_task_gets_no_training_value(
  tmp_path: pathlib.Path,
) -> None:
  seen = []

  def check(example: Any, test: Any) -> None:
    seen.append((example, test))
    raise ValueError("too small")

  given = _parts()
  task = dpdist.Task(
    init=given["task"].init, loss=given["task"].loss, check=check
  )
  with pytest.raises(errors.SettingsError, match="fit the task: too small"):
    dpdist.train(_config(), tmp_path, task=task, dataset=_dataset())
  ((example, test),) = seen
  assert not any(x.any() for x in example.values())
  np.testing.assert_array_equal(test["x"], _arrays(8)["x"])


def test_a_part_that_was_given_must_be_given_again(begun: pathlib.Path) -> None:
  done = commands.run("eval", f"--workdir={begun}")
  assert done.code == 2
  assert "task must be given as it was to the run" in done.err
  kept = json.loads((begun / "config.json").read_text())
  assert {kept["task"], kept["model"]["name"], kept["data"]["name"]} == {
    parts.GIVEN
  }


def test_another_task_is_not_evaluated_instead(
  begun: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Neither a named one in place of a given one, nor the other way round."""
  ledger = ledger_lib.Ledger(begun / "ledger")
  given = parts.of(**_parts(), dataset=_dataset())
  load_run.load(begun, ledger, config=_config(), parts=given)
  for name in ("task", "optimizer", "dataset"):
    fewer = dataclasses.replace(given, **{name: None})
    with pytest.raises(ValueError, match="must be that of the run, 'given as"):
      load_run.load(begun, ledger, config=_config(), parts=fewer)
  workdir = tmp_path / "run"
  shutil.copytree(begun, workdir)
  config_lib.save(workdir, _config())
  with pytest.raises(ValueError, match="must be that of the run, ''"):
    load_run.load(workdir, ledger, config=_config(), parts=given)
