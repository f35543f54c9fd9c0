"""What is wrong with a data set is said in one sentence, and costs nothing."""

import pathlib

import jax
import numpy as np
import pytest

from configs import digits
import dpdist
from dpdist import models
from dpdist.data import arrays as arrays_lib
from dpdist.data import dataset as dataset_lib
from dpdist.tasks import cross_entropy
from dpdist.tasks import from_config
from dpdist.training import data_checks
from dpdist.training import setup
from tests.support import commands

pytestmark = pytest.mark.usefixtures("quick_compiles")

_NAN, _INF = float("nan"), float("inf")


def _config(**changes):
  config = digits.get_config()
  config.data.name, config.data.path = "npz", "FOLDER"
  config.update_from_flattened_dict({"model.width": 8} | changes)
  return config


def _arrays(count, **changed):
  rng = np.random.default_rng(count)
  arrays = {
    "inputs": rng.random((count, 4), np.float32),
    "targets": np.arange(count, dtype=np.int32) % 10,
  } | changed
  return {name: x for name, x in arrays.items() if x is not None}


def _fit(config, train, test):
  splits = dataset_lib.Dataset(*map(arrays_lib.ArraySource, (train, test)))
  task = from_config.make(config)
  return data_checks.fit(config, splits, task, setup.PUBLIC_KEY_DATA)


def _both(**changed):
  return lambda: (
    _arrays(20, **{k: f(20) for k, f in changed.items()}),
    _arrays(10, **{k: f(10) for k, f in changed.items()}),
  )


def _held_out(**changed):
  return lambda: (_arrays(20), _arrays(10, **changed))


def _with(value):
  inputs = np.zeros((10, 4), np.float32)
  inputs[3, 1] = value
  return inputs


_IMAGES = {"model.name": "cnn"}
_TOKENS = {
  **{"model.name": "decoder", "model.depth": 1, "model.num_heads": 2},
  "model.num_outputs": 10,
}
_SEQUENCE = np.zeros((10, 4), np.int32)

ROWS = {
  "columns x and y": (
    lambda: ({"x": np.zeros((9, 4)), "y": np.zeros(9, int)},) * 2,
    {},
    ("must have columns 'inputs' and 'targets'", "['x', 'y']", "training"),
  ),
  "no targets held out": (
    lambda: (_arrays(20), _arrays(10, targets=None)),
    {},
    ("must have columns 'inputs' and 'targets'", "['inputs']", "held-out"),
  ),
  "float labels": (
    _both(targets=lambda n: np.ones(n)),
    {},
    ("targets", "training", "must be integers", "in [0, 10)", "float64 ()"),
  ),
  "string labels": (
    _both(targets=lambda n: np.full(n, "cat")),
    {},
    ("targets", "training", "must be integers", "in [0, 10)", "<U3 ()"),
  ),
  "bool labels": (
    _both(targets=lambda n: np.ones(n, bool)),
    {},
    ("targets", "must be integers", "bool ()"),
  ),
  "one-hot labels": (
    _both(targets=lambda n: np.eye(10, dtype=np.int32)[np.arange(n) % 10]),
    {},
    ("targets", "must be class numbers of shape ()", "(10,)", "one-hot"),
  ),
  "labels with an axis": (
    _both(targets=lambda n: np.zeros((n, 1), np.int32)),
    {},
    ("targets", "must be class numbers of shape ()", "(1,)"),
  ),
  "text for inputs": (
    _both(inputs=lambda n: np.full((n, 4), "word")),
    {},
    ("inputs", "training", "must be numbers", "<U4 (4,)"),
  ),
  "a label that no class has": (
    _held_out(targets=np.arange(10, dtype=np.int32) + 1),
    {},
    ("held-out targets", "must be in [0, 10)", "num_outputs=10", "1 to 10"),
  ),
  "a label below 0": (
    _held_out(targets=np.arange(10, dtype=np.int32) - 1),
    {},
    ("held-out targets", "must be in [0, 10)", "-1 to 8"),
  ),
  "NaN held out": (
    _held_out(inputs=_with(_NAN)),
    {},
    ("held-out inputs", "must be finite", "1 of 10 examples"),
  ),
  "infinity held out": (
    _held_out(inputs=_with(-_INF)),
    {},
    ("held-out inputs", "must be finite", "1 of 10 examples"),
  ),
  "nothing held out": (
    lambda: (_arrays(20), _arrays(0)),
    {},
    ("must hold out 1 example or more", "got 0"),
  ),
  "parts of other shapes": (
    _held_out(inputs=np.zeros((10, 5), np.float32)),
    {},
    ("must have examples of one shape", "(4,)", "(5,)"),
  ),
  "images with channels first": (
    _both(inputs=lambda n: np.zeros((n, 1, 28, 28), np.float32)),
    _IMAGES,
    ("inputs", "(height, width, channels)", "(1, 28, 28)", "channels come"),
  ),
  "no images for a network of images": (
    _both(),
    _IMAGES,
    ("inputs", "(height, width, channels)", "float32 (4,)", "no image"),
  ),
  "images that are too small": (
    _both(inputs=lambda n: np.zeros((n, 2, 2, 1), np.float32)),
    _IMAGES,
    ("inputs", "(height, width, channels)", "float32 (2, 2, 1)"),
  ),
  "tokens that are no integers": (
    _both(
      inputs=lambda n: np.zeros((n, 4), np.float32),
      targets=lambda n: np.zeros((n, 4), np.int32),
    ),
    _TOKENS,
    ("inputs", "must be integers, tokens", "'decoder'", "float32 (4,)"),
  ),
  "tokens outside the vocabulary": (
    lambda: (
      _arrays(10, inputs=_SEQUENCE, targets=_SEQUENCE),
      _arrays(10, inputs=_SEQUENCE + 10, targets=_SEQUENCE),
    ),
    _TOKENS,
    ("held-out inputs", "tokens in [0, 10)", "10 to 10"),
  ),
}


@pytest.mark.parametrize("what", ROWS)
def test_a_data_set_that_does_not_fit_is_named(what):
  make, changes, parts = ROWS[what]
  with pytest.raises(ValueError, match="data set 'npz' in 'FOLDER'") as error:
    _fit(_config(**changes), *make())
  text = str(error.value)
  for part in parts:
    assert part in text, text


def test_what_fits_is_let_through_and_its_shapes_are_told():
  test, row, start, notices = _fit(_config(), _arrays(20), _arrays(10))
  assert not notices
  assert len(test["targets"]) == 10
  assert {k: (x.shape, x.dtype) for k, x in row.items()} == {
    "inputs": ((4,), np.float32),
    "targets": ((), np.int32),
  }
  assert jax.tree.leaves(start.shapes)
  # A sequence may be padded with targets below 0.
  padded = np.where(np.arange(4) < 3, _SEQUENCE, -1)
  arrays = _arrays(10, inputs=_SEQUENCE, targets=padded)
  _fit(_config(**_TOKENS), arrays, arrays)


def test_no_value_of_the_training_part_decides():
  bad = _arrays(
    20, targets=np.full(20, 99, np.int32), inputs=_with(_NAN)[[3] * 20]
  )
  _fit(_config(), bad, _arrays(10))


@pytest.mark.parametrize(
  "method", ["vmap", pytest.param("auto", marks=pytest.mark.slow)]
)
def test_a_training_label_that_no_class_has_adds_nothing(method):
  model = models.make(_config().model)
  init = jax.jit(model.init)
  params = init(jax.random.key(0), np.zeros(4, np.float32))["params"]
  grads = jax.jit(
    dpdist.clipped_grad(
      cross_entropy.loss_of(model),
      l2_clip_norm=1.0,
      has_aux=True,
      method=method,
    )
  )
  arrays = _arrays(4, targets=np.array([1, -1, 2, 10], np.int32))
  key = jax.random.key(1)
  whole = grads(params, arrays, rng=key)
  np.testing.assert_array_equal(whole.grad_norms[1::2], 0)
  np.testing.assert_array_equal(whole.loss[1::2], 0)
  assert np.all(np.isfinite(jax.tree.leaves(whole.sum)[0]))
  alone = {name: x[::2] for name, x in arrays.items()}
  np.testing.assert_allclose(
    *(
      jax.tree.leaves(x)[0]
      for x in (whole.sum, grads(params, alone, rng=key).sum)
    ),
    rtol=1e-5,
  )


def test_of_a_sequence_labels_that_no_class_has_count_for_nothing():
  class Table:
    def apply(self, variables, inputs, rngs=None):
      return variables["params"][inputs]

  table = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
  loss = cross_entropy.loss_of(Table())
  inputs = np.arange(4)
  of = lambda *targets: loss(
    table, {"inputs": inputs, "targets": np.array(targets)}, None
  )[0]
  assert of(1, 2, -1, 4) == of(1, 2, -1, -1) == of(1, 2, 7, -9)
  assert np.isfinite(of(1, 2, 3, 4))
  assert of(4, -1, 4, -1) == 0


def test_rows_in_both_parts_are_counted():
  train, test = _arrays(5000), _arrays(10)
  assert data_checks.shared_rows(arrays_lib.ArraySource(train), test) == ""
  for name in train:
    train[name][4321] = test[name][3]
    train[name][17] = test[name][5]
    train[name][18] = test[name][5]
  # The same inputs with another target are another example.
  train["inputs"][7], train["targets"][7] = test["inputs"][6], 0
  said = data_checks.shared_rows(arrays_lib.ArraySource(train), test)
  assert "2 of the first 10 held-out" in said
  assert "the first 5,000 that are trained on" in said
  assert "for its owner alone" in said


def test_of_a_large_data_set_a_part_is_compared_and_said(monkeypatch):
  monkeypatch.setattr(data_checks, "_MOST_ROWS", 100)
  arrays = _arrays(500)
  said = data_checks.shared_rows(arrays_lib.ArraySource(arrays), arrays)
  assert "100 of the first 100 held-out" in said
  assert "one of the first 100 that are" in said


def test_a_run_is_refused_in_a_sentence_and_has_spent_nothing(tmp_path):
  for part in ("train", "test"):
    np.savez(tmp_path / f"{part}.npz", **_arrays(20, targets=np.ones(20)))
  root = pathlib.Path(__file__).parents[2]
  workdir = f"--workdir={tmp_path / 'run'}"
  done = commands.run(
    *("train", f"--config={root}/configs/digits.py", workdir),
    *("--config.data.name=npz", f"--config.data.path={tmp_path}"),
    *("--config.privacy.num_examples=20", "--config.privacy.accountant=rdp"),
    "--config.privacy.expected_batch_size=5",
  )
  assert done.code == 2, done.err
  (said,) = done.err.splitlines()
  assert said.startswith("error: data set 'npz'")
  assert "must fit the task: targets in the training part must be" in said
  spent = commands.run("budget", workdir)
  assert spent.code == 2
  assert "workdir must be the directory of a run" in spent.err
  assert not (tmp_path / "run").exists()
