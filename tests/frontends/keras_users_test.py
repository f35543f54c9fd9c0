"""Keras as its users know it: what `fit` takes, and what is handed on."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import dpdist
from dpdist import errors
from dpdist.frontends import keras as private_keras
from dpdist.frontends.keras import examples
from dpdist.frontends.keras import fitting
from dpdist.ledger import ledger as ledger_lib

pytestmark = [
  pytest.mark.usefixtures("quick_compiles"),
  # Keras's own.
  pytest.mark.filterwarnings("ignore:__array__ implementation"),
]

keras = private_keras.keras

_NUM_EXAMPLES = 12
_NO_NOISE = 1e-9


def _config(**changed):
  return dpdist.PrivacyConfig(
    **{
      "num_examples": _NUM_EXAMPLES,
      "expected_batch_size": 6.0,
      "num_steps": 4,
      "l2_clip_norm": 1.0,
      "target_delta": 1e-5,
      "noise_multiplier": 2.0,
      "accountant": "rdp",
    }
    | changed
  )


def _data(num_examples=_NUM_EXAMPLES, size=_NUM_EXAMPLES):
  """One coordinate for each example, so that weights tell who was drawn."""
  return np.eye(num_examples, size, dtype=np.float32), np.ones(
    (num_examples, 1), np.float32
  )


def _held_out():
  x, y = _data()
  return x + 1, y


def _model(optimizer=None, loss="mse", size=_NUM_EXAMPLES):
  dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
  model = keras.Sequential([keras.Input((size,)), dense])
  model.compile(optimizer or keras.optimizers.SGD(1.0), loss, metrics=["mae"])
  return model


def _weights(private):
  return np.asarray(private.model.trainable_variables[-1].value).reshape(-1)


def _private(workdir, model=None, *, seed=7, config=None, **options):
  return private_keras.make_private(
    model or _model(),
    config or _config(),
    workdir=workdir,
    insecure_seed=seed,
    **{"devices": jax.devices()[:1]} | options,
  )


class _Batches(keras.utils.PyDataset):
  """Batches of four; they may be made to change."""

  def __init__(self, *arrays):
    super().__init__()
    self.arrays = arrays
    self.is_random = False

  def __len__(self):
    return -(-len(self.arrays[0]) // 5)

  def __getitem__(self, index):
    rows = slice(5 * index, 5 * index + 5)
    x, *rest = (array[rows] for array in self.arrays)
    if self.is_random:
      x = x + np.random.default_rng().normal()
    return (x, *rest)


class _Items:
  """What has a length and an item for each index."""

  def __init__(self, *arrays):
    self.arrays = arrays

  def __len__(self):
    return len(self.arrays[0])

  def __getitem__(self, index):
    return tuple(array[index] for array in self.arrays)


# What data is taken, and what of it is read.


@pytest.mark.parametrize("kind", [_Batches, _Items])
def test_data_with_an_index_is_read_by_the_numbers_of_rows(kind):
  x, y = _data()
  weight = np.arange(12.0)
  found = examples.of(kind(x, y, weight))
  drawn = np.array([0, 4, 5, 11])
  got = found.join(found.read(drawn))
  for part, whole in zip(got, (x, y, weight), strict=True):
    np.testing.assert_array_equal(part, whole[drawn])
  assert len(found) == 12
  empty = found.join(found.read(np.zeros(0, np.int64)))
  assert [part.shape for part in empty] == [(0, 12), (0, 1), (0,)]


def test_rows_have_one_digest_however_they_are_batched():
  x, y = _data()
  digests = {examples.of(kind(x, y)).content_digest() for kind in KINDS}
  assert len(digests) == 1
  assert examples.of(_Items(x + 1, y)).content_digest() not in digests


KINDS = (_Batches, _Items)


def test_a_data_set_that_changes_is_found_when_it_is_read():
  batches = _Batches(*_data())
  found = examples.of(batches)
  batches.is_random = True
  with pytest.raises(ValueError, match=r"same item .* layers of the model"):
    found.read(np.array([1]))


class _TfDataset:
  """What tells a tf.data.Dataset from others, without TensorFlow."""

  element_spec = ()

  def as_numpy_iterator(self):
    return iter(())

  def __len__(self):
    return 12

  def __iter__(self):
    return iter(())


@pytest.mark.parametrize(
  "pipeline", [_TfDataset(), iter(()), (i for i in range(3))]
)
def test_a_pipeline_without_an_index_is_refused_with_the_way_out(pipeline):
  with pytest.raises(
    ValueError, match=r"x must .* index.*dataset\.batch.*tfds"
  ):
    examples.of(pipeline)


def test_what_does_not_go_together_is_refused():
  x, y = _data()
  for message, given in {
    "y must be None where x has items": (_Batches(x, y), y),
    "sample_weight must be one number": (x, y, np.ones((12, 2))),
    "class_weight must be None where exam": (x, y, np.ones(12), {1: 2.0}),
    "class_weight must be None for a model of": (x, {"a": y, "b": y}, None, {}),
    r"class_weight\[1\] must be": (x, y, None, {1: -1.0}),
    "x must have items of one form": (_Uneven(x, y),),
  }.items():
    with pytest.raises(ValueError, match=message):
      examples.of(*given)


class _Uneven(_Items):
  def __getitem__(self, index):
    return self.arrays[0][index], np.ones(index + 1)


@pytest.mark.parametrize(
  "labels",
  [
    np.array([0, 1, 2, 1]),
    np.array([[0], [1], [2], [1]]),
    np.eye(3)[[0, 1, 2, 1]],
  ],
)
def test_a_class_without_a_weight_counts_once(labels):
  found = examples.of(np.zeros((4, 1)), labels, None, {1: 0.25, 2: 3})
  rows = found.read(np.array([0, 1, 2, 3]))
  np.testing.assert_array_equal(found.join(rows)[2], [1, 0.25, 3, 0.25])
  other = examples.of(np.zeros((4, 1)), labels, None, {1: 0.5})
  assert found.content_digest() == other.content_digest()
  assert found.encoding_digest() != other.encoding_digest()


def test_the_last_rows_are_held_out_and_no_other_number_is_taken():
  x, y = _data()
  train, held_out = examples.split((x, y, None), 0.25, None, 9)
  for given, first, last in zip((x, y), train, held_out, strict=False):
    np.testing.assert_array_equal(first, given[:9])
    np.testing.assert_array_equal(last, given[9:])
  with pytest.raises(ValueError, match=r"0.25 of 12, which leaves 9: make the"):
    examples.split((x, y, None), 0.25, None, 12)
  with pytest.raises(ValueError, match="in arrays"):
    examples.split((_Batches(x, y), None, None), 0.25, None, 9)
  with pytest.raises(ValueError, match=r"validation_split must be in \(0, 1\)"):
    examples.split((x, y, None), 1.5, None, 9)


# One run without noise, in which weights tell what each example did.


@functools.cache
def _held_out_run(folder):
  x, y = _data()
  model = _model(keras.optimizers.SGD(9.0))
  config = _config(
    num_examples=9,
    expected_batch_size=9.0,
    num_steps=3,
    noise_multiplier=_NO_NOISE,
  )
  private = _private(folder, model, config=config)
  weight = np.where(np.arange(12) % 2, 0.25, 1).astype(np.float32)
  history = private.fit(
    *(x, y),
    validation_split=0.25,
    sample_weight=weight,
    epochs=2,
    steps_per_epoch=1,
    verbose=0,
  )
  return private, history.history, weight


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("held_out")


def test_rows_that_are_held_out_are_never_drawn(folder):
  private, history, _ = _held_out_run(folder)
  np.testing.assert_allclose(_weights(private)[9:], 0, atol=1e-6)
  assert np.all(np.abs(_weights(private)[:9]) > 0.1)
  assert set(history) == {"epsilon", "val_loss", "val_mae"}
  # The held-out coordinates stay 0, so that each of their losses is 1.
  np.testing.assert_allclose(history["val_mae"], 1, atol=1e-6)


def test_a_weight_is_clipped_with_its_example(folder):
  private, _, weight = _held_out_run(folder)
  # A loss (1 - w)^2 has a gradient of -2 at 0, and a fourth of it is not
  # clipped. Were it clipped before it is weighted, that would count 0.25.
  first = np.minimum(1, 2 * weight[:9])
  second = np.minimum(1, 2 * weight[:9] * np.abs(1 - first))
  np.testing.assert_allclose(
    _weights(private)[:9], first + second * np.sign(1 - first), atol=1e-5
  )


def test_epsilon_is_in_the_history_epoch_by_epoch(folder):
  private, history, _ = _held_out_run(folder)
  plan = private.plan
  assert history["epsilon"] == [plan.curve([plan.delta], n)[0] for n in (1, 2)]
  assert private.epsilon_spent() == history["epsilon"][-1]


def test_what_is_not_ours_is_the_models(folder, tmp_path):
  private, *_ = _held_out_run(folder)
  x, y = _held_out()
  scores = private.evaluate(x, y, verbose=0, return_dict=True)
  assert set(scores) == {"loss", "mae"}
  np.testing.assert_array_equal(
    private.predict(x, verbose=0), private.model.predict(x, verbose=0)
  )
  np.testing.assert_allclose(private(x), private.predict(x, verbose=0), 1e-5)
  private.save(tmp_path / "model.keras")
  loaded = keras.models.load_model(tmp_path / "model.keras")
  np.testing.assert_array_equal(
    loaded.get_weights()[0][:, 0], _weights(private)
  )
  lines = []
  private.summary(print_fn=lines.append)
  assert "dense" in "".join(lines)
  assert "predict" in dir(private)
  with pytest.raises(AttributeError):
    private.trainable = False  # It would be set on the wrapper alone.
  with pytest.raises(RuntimeError, match="compile before"):
    private.compile("sgd", "mse")
  with pytest.raises(AttributeError, match="no attribute '_secret'"):
    _ = private._secret


def test_metrics_of_training_examples_are_refused(folder):
  private, *_ = _held_out_run(folder)
  x, y = _data()
  trained = private._arrays[0].arrays[0]
  with pytest.raises(ValueError, match=r"held-out examples, .* private"):
    private.evaluate(trained[:3], y[:3])
  data = private._arrays[0]
  assert not data.shares(x)
  assert data.shares([trained[::2]])


@pytest.mark.parametrize(
  ("fit", "message"),
  [
    ({"batch_size": 32}, "batch_size must be None or 9, the mean .*got 32"),
    ({"shuffle": False}, "shuffle must be None"),
    ({"epochs": 0}, "epochs must be None or an integer >= 1"),
    ({"initial_epoch": -1}, "initial_epoch must be"),
    ({"users": np.arange(12)}, "users must be given where users are the unit"),
    ({"validation_data": _held_out()}, "validation_split must be None where"),
    ({"callbacks": [3]}, "keras.callbacks.Callback objects, got int"),
    (
      {"callbacks": keras.callbacks.BackupAndRestore("/tmp/x")},
      "leave out BackupAndRestore",
    ),
    (
      {"callbacks": [keras.callbacks.EarlyStopping("loss")]},
      "monitor of EarlyStopping must be 'epsilon' or a held-out .* got 'loss'",
    ),
  ],
)
def test_refuses_what_cannot_be_private(folder, fit, message):
  private, *_ = _held_out_run(folder)
  x, y = _data()
  given = {"validation_split": 0.25, "sample_weight": np.ones(12), "epochs": 1}
  spent = private._run.spent_steps
  with pytest.raises(ValueError, match=message):
    private.fit(x, y, **given | fit)
  assert private._run.spent_steps == spent


def test_weights_that_a_loss_divides_by_are_refused(tmp_path):
  loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
  private = _private(tmp_path, _model(loss=loss))
  with pytest.raises(ValueError, match="cancel them"):
    private.fit(*_data(), sample_weight=np.ones(12))


# One run whose learning rate, callbacks and interruptions matter.


class _Note(keras.callbacks.Callback):
  """Notes the weights that it can see after each batch and epoch."""

  def __init__(self, change=None):
    super().__init__()
    self.batches, self.epochs, self.logs, self.change = [], [], [], change

  def on_train_batch_end(self, batch, logs=None):
    self.batches.append((batch, self.model.get_weights()[0].ravel()))
    self.logs.append(logs)
    if self.change == batch:
      self.model.optimizer.learning_rate = 7.0

  def on_epoch_end(self, epoch, logs=None):
    self.epochs.append((epoch, sorted(logs)))


@functools.cache
def _scheduled(folder):
  """Two epochs of two updates, the second at another learning rate."""
  private = _private(folder / "scheduled", seed=None)
  note = _Note()
  schedule = keras.callbacks.LearningRateScheduler(
    lambda epoch: 1.0 / (epoch + 1)
  )
  history = private.fit(
    *_data(), epochs=2, verbose=0, callbacks=[note, schedule]
  )
  return private, note, history.history


@pytest.mark.slow
def test_callbacks_see_released_weights_and_no_metric_of_a_batch(folder):
  private, note, _ = _scheduled(folder)
  assert [batch for batch, _ in note.batches] == [0, 1, 0, 1]
  assert note.logs == [{}] * 4
  np.testing.assert_array_equal(note.batches[-1][1], _weights(private))
  assert len({weights.tobytes() for _, weights in note.batches}) == 4
  assert [epoch for epoch, _ in note.epochs] == [0, 1]


def test_a_changed_learning_rate_opens_a_branch(folder):
  private, *_ = _scheduled(folder)
  ledger = ledger_lib.Ledger(folder / "scheduled" / "ledger")
  assert [b.start_step for b in ledger.branches] == [0, 2]
  assert len({b.fingerprint for b in ledger.branches}) == 1
  # The state that a branch begins with is saved before its first step.
  assert [saved.step for saved in ledger.checkpoints] == [0, 2, 2, 4]
  assert ledger.guarantee == "holds"
  assert ledger.spent_steps == private.step == 4


@pytest.mark.slow
def test_a_change_in_the_midst_of_an_epoch_is_refused(tmp_path):
  config = _config(num_steps=6)
  private = _private(tmp_path, config=config)
  with pytest.raises(ValueError, match=r"must not change .* on_epoch_begin"):
    private.fit(*_data(), epochs=1, callbacks=[_Note(0)], verbose=0)
  assert private.step == private._run.spent_steps == 1
  assert float(private.optimizer.learning_rate.numpy()) == 1.0


def _keys(monkeypatch):
  """Notes what each step is computed under, and from."""
  seen, accumulate = [], fitting.Fitting._accumulate

  def noted(self, session, state, t, chunks):
    secret = session.streams.key_data("noise", t).tobytes()
    weights = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))
    seen.append((secret, t, weights))
    return accumulate(self, session, state, t, chunks)

  monkeypatch.setattr(fitting.Fitting, "_accumulate", noted)
  return seen


def test_a_key_meets_one_state_whatever_a_user_does(tmp_path, monkeypatch):
  """An update is lost, and the weights change before it is made again."""
  seen = _keys(monkeypatch)
  private = _private(tmp_path, seed=None, config=_config(num_steps=12))
  data = _data()

  def lost():
    with monkeypatch.context() as patch:
      patch.setattr(fitting.Fitting, "_release_index", _interrupt)
      with pytest.raises(KeyboardInterrupt):
        private.fit(*data, epochs=1, steps_per_epoch=1, verbose=0)

  lost()
  private.fit(*data, epochs=1, steps_per_epoch=1, verbose=0)  # For free.
  assert private._run.spent_steps == 1
  assert len(set(seen)) == 1
  lost()
  private.set_weights([np.ones((12, 1))])
  private.fit(*data, epochs=1, steps_per_epoch=1, verbose=0)
  assert private._run.spent_steps == 3
  lost()
  private.optimizer.learning_rate = 0.5
  private.fit(*data, epochs=1, steps_per_epoch=1, verbose=0)
  private.set_weights([np.ones((12, 1))])  # As they were at an earlier step.
  private.fit(*data, epochs=1, steps_per_epoch=1, verbose=0)
  with monkeypatch.context() as patch:
    waits, wait = [], jax.block_until_ready
    patch.setattr(
      jax,
      "block_until_ready",
      lambda x: _interrupt() if len(waits) else waits.append(wait(x)),
    )
    with pytest.raises(KeyboardInterrupt):  # Of the second, which is made.
      private.fit(*data, epochs=1, steps_per_epoch=3, verbose=0)
  private.fit(*data, epochs=1, steps_per_epoch=1, verbose=0)
  by_key = {}
  for secret, *input_ in seen:
    by_key.setdefault(secret, set()).add(tuple(input_))
  assert all(len(inputs) == 1 for inputs in by_key.values())
  assert len(by_key) == private._run.spent_steps == 9


def _interrupt(*unused):
  raise KeyboardInterrupt


def test_without_a_workdir_nothing_is_kept(tmp_path, monkeypatch):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  with pytest.warns(UserWarning, match="in no record.*add its epsilon") as told:
    private = _private(None, seed=None)
  assert len([w for w in told if "workdir" in str(w.message)]) == 1
  private.fit(*_data(), epochs=1, verbose=0)
  assert private.step == 2
  assert not list(tmp_path.rglob("secret"))
  secret = private._run._secret
  for path in tmp_path.rglob("*"):
    assert not path.is_file() or secret not in path.read_bytes()
  with pytest.raises(ValueError, match="at most 2"):
    private.fit(*_data(), epochs=2)
  del private
  assert not list(tmp_path.iterdir())


# What starts processes, or compiles another program.


_KILLED = """
import sys
from tests.frontends import keras_users_test
sys.exit(keras_users_test.train(*sys.argv[1:]))
"""


def train(workdir, stops_at):
  """What a user's script does: it can be run again as it is."""
  keras.utils.set_random_seed(int(time.time_ns() % 1000))
  schedule = keras.optimizers.schedules.CosineDecay(0.5, 6)
  model = keras.Sequential(
    [keras.Input((12,)), keras.layers.Dropout(0.2), keras.layers.Dense(1)]
  )
  model.compile(keras.optimizers.Adam(schedule), "mse")
  private = private_keras.make_private(
    model, _config(num_steps=6), workdir=workdir
  )
  accumulate = fitting.Fitting._accumulate

  def killed(self, session, state, t, chunks):
    made = accumulate(self, session, state, t, chunks)
    noisy, _ = self.program.bound.apply(
      jax.tree.map(lambda x: x.copy(), state),
      made,
      session.streams.key("noise"),
    )
    weights = b"".join(
      np.asarray(x).tobytes() for x in jax.tree.leaves(noisy.params)
    )
    print(json.dumps([t, weights.hex()]), flush=True)
    if t == int(stops_at):
      os.kill(os.getpid(), signal.SIGKILL)
    return made

  fitting.Fitting._accumulate = killed
  x, y = _data()
  private.fit(x, y, epochs=3, initial_epoch="auto", verbose=0)
  assert private.step == private._run.spent_steps == 6


@pytest.mark.slow
def test_what_a_kill_lost_is_repeated_bit_for_bit_for_free(tmp_path):
  root = pathlib.Path(__file__).parents[2]
  made = {}
  for stops_at in (1, 3, 5, -1):
    run = subprocess.run(
      [sys.executable, "-c", _KILLED, str(tmp_path / "run"), str(stops_at)],
      cwd=root,
      env=os.environ | {"PYTHONPATH": str(root)},
      capture_output=True,
      text=True,
      check=False,
    )
    assert run.returncode == (0 if stops_at < 0 else -signal.SIGKILL), (
      run.stderr
    )
    for line in run.stdout.splitlines():
      t, weights = json.loads(line)
      made.setdefault(t, []).append(weights)
  # Steps of an epoch that was killed were made twice, and are the same.
  assert {t: len(found) for t, found in made.items()} == {
    0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2,
  }  # fmt: skip
  assert all(len(set(found)) == 1 for found in made.values())
  ledger = ledger_lib.Ledger(tmp_path / "run" / "ledger")
  assert ledger.spent_steps == 6
  assert len(ledger.branches) == 1


@pytest.mark.slow
def test_eight_devices_make_the_sums_of_one(tmp_path):
  ends = []
  for count in (1, 8):
    private = _private(
      tmp_path / str(count),
      _model(keras.optimizers.Adam(0.1)),
      devices=jax.devices()[:count],
    )
    private.fit(*_data(), epochs=2, verbose=0, validation_data=_held_out())
    ends.append(_weights(private))
  np.testing.assert_allclose(*ends, rtol=1e-5, atol=1e-6)
  assert np.all(ends[0] != 0)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changed",
  [
    {"noise_schedule": ((2, 4.0),), "batch_size_schedule": ((3, 3.0),)},
    {
      "sampling": "cyclic_poisson",
      "cycle_length": 2,
      "neighboring_relation": "zero_out",
    },
    {"group_size": 3, "neighboring_relation": "zero_out"},
  ],
)
def test_schedules_cycles_and_groups_are_those_of_the_plan(tmp_path, changed):
  private = _private(tmp_path, config=_config(**changed), seed=None)
  private.fit(*_data(), steps_per_epoch=1, verbose=0)
  assert private.step == 4
  assert private.epsilon_spent() == private.plan.epsilon()


@pytest.mark.slow
def test_a_users_examples_are_clipped_as_one(tmp_path):
  config = _config(
    num_examples=4,
    expected_batch_size=4.0,
    num_steps=1,
    noise_multiplier=_NO_NOISE,
    unit="user",
  )
  private = _private(
    tmp_path,
    _model(keras.optimizers.SGD(4.0)),
    config=config,
    examples_per_unit=3,
  )
  x, y = _data()
  private.fit(x, y, users=np.arange(12) % 4, verbose=0)
  norms = np.linalg.norm(_weights(private).reshape(3, 4), axis=0)
  np.testing.assert_allclose(norms, 1, rtol=1e-5)
  with pytest.raises(ValueError, match="examples_per_unit must be given where"):
    _private(tmp_path / "other", config=config)


@pytest.mark.slow
def test_a_py_dataset_is_trained_on_as_its_arrays_are(tmp_path):
  ends = []
  for kind in (tuple, _Batches, _Items):
    data = _data() if kind is tuple else (kind(*_data()),)
    private = _private(tmp_path / kind.__name__)
    private.fit(*data, verbose=0, validation_data=_Batches(*_held_out()))
    ends.append(_weights(private).tobytes())
  assert len(set(ends)) == 1


@pytest.mark.slow
def test_early_stopping_puts_its_best_weights_back_and_they_are_saved(tmp_path):
  stop = keras.callbacks.EarlyStopping(
    patience=0, restore_best_weights=True, start_from_epoch=0
  )
  config = _config(num_steps=8)
  private = _private(tmp_path, config=config, seed=None)
  x, y = _data()
  with pytest.raises(errors.ArgumentError, match="held-out"):
    private.fit(x, y, validation_data=(x, y))
  history = private.fit(
    *_data(), verbose=0, validation_data=_held_out(), callbacks=[stop]
  )
  assert len(history.history["val_loss"]) < 8 or private.step == 8
  weights = _weights(private)
  again = _private(tmp_path, config=config, seed=None)
  np.testing.assert_array_equal(_weights(again), weights)
  assert again.step == private.step


def test_what_was_digested_trains_whatever_jax_traces_later(tmp_path):
  """After a callback cleared JAX's caches and changed what a loss finds."""
  scale, weights = [1.0], []

  class Change(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
      weights.append(np.asarray(self.model.get_weights()[0]))
      if batch == 0:
        scale[0] = 0.0
        jax.clear_caches()

  def loss(y_true, y_pred):
    return scale[0] * keras.losses.mean_squared_error(y_true, y_pred)

  config = _config(expected_batch_size=12.0, noise_multiplier=1e-9)
  private = _private(
    tmp_path, _model(loss=loss), config=config, sentinel_every=0
  )
  private.fit(*_data(), steps_per_epoch=2, epochs=1, callbacks=[Change()])
  # A loss of 0 would not move them.
  assert np.abs(weights[1] - weights[0]).max() > 1e-3
