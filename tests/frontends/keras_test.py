"""Keras 3: a fit that is private, by real Keras on its JAX backend."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist import errors
from dpdist.clipping.engines import bookkeeping
from dpdist.data import sources
from dpdist.frontends import keras as private_keras
from dpdist.frontends import keras_loss
from dpdist.frontends.keras import fitting
from dpdist.frontends.keras import program as program_lib
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.sensitivity import made_up_examples
from dpdist.sensitivity import trials
from dpdist.training import abstract_step

pytestmark = pytest.mark.usefixtures("quick_compiles")

# After the frontend, which chooses the backend.
keras = private_keras.keras
layers = keras.layers

_NUM_EXAMPLES = 12
_NO_NOISE = 1e-9


def _first(plan, num_steps):
  """Epsilon of the first steps of a plan."""
  return plan.curve([plan.delta], num_steps)[0]


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


def _data():
  """One coordinate for each example, so that weights tell who was drawn."""
  return np.eye(_NUM_EXAMPLES, dtype=np.float32), np.ones((_NUM_EXAMPLES, 1))


def _model(*more, optimizer=None, size=_NUM_EXAMPLES, loss="mse"):
  model = keras.Sequential(
    [
      keras.Input((size,)),
      *more,
      layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
    ]
  )
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


@pytest.mark.slow
@pytest.mark.parametrize(
  ("clip_norm", "rescales", "gradient"),
  [
    (1e3, False, (-10.0, -20.0)),
    (1.0, False, (-0.44721362, -0.89442724)),
    (100.0, True, (-0.1, -0.2)),
  ],
)
def test_gradients_are_those_of_dp_keras_config(
  tmp_path, clip_norm, rescales, gradient
):
  """SEEDS: (a.x - 4)^2 for a = (3, -2), x = (1, 2), through `fit` itself."""
  model = _model(size=2)
  model.set_weights([np.array([[3.0], [-2.0]])])
  config = _config(
    num_examples=1,
    expected_batch_size=1.0,
    num_steps=1,
    l2_clip_norm=clip_norm,
    noise_multiplier=_NO_NOISE,
  )
  private = _private(
    tmp_path, model, config=config, rescale_to_unit_norm=rescales
  )
  private.fit(np.array([[1.0, 2.0]]), np.array([[4.0]]))
  np.testing.assert_allclose(
    np.array([3.0, -2.0]) - _weights(private), gradient, rtol=1e-5
  )


@pytest.mark.slow
def test_updates_are_counted_and_not_chunks(tmp_path):
  """Chunks change neither draw, noise, dropout nor count."""
  x, y = _data()
  ends = []
  for chunk_size in (_NUM_EXAMPLES, 2):
    model = _model(layers.Dropout(0.5), optimizer=keras.optimizers.Adam(0.1))
    private = _private(tmp_path / str(chunk_size), model, chunk_size=chunk_size)
    private.fit(x, y, epochs=1, steps_per_epoch=3)
    ends.append(_weights(private))
    assert private.step == 3
    assert int(model.optimizer.iterations) == 3
    assert private.epsilon_spent() == _first(private.plan, 3)
  np.testing.assert_allclose(ends[0], ends[1], rtol=1e-4, atol=1e-5)
  assert np.all(ends[0] != 0)


@pytest.mark.slow
def test_noise_has_the_plans_size(tmp_path):
  """In units of the clip norm, over the expected batch, anew each update."""
  size = 20_000
  config = _config(
    num_examples=4,
    expected_batch_size=2.0,
    num_steps=2,
    l2_clip_norm=0.5,
    noise_multiplier=3.0,
  )
  model = _model(size=size)
  private = _private(tmp_path, model, config=config, chunk_size=1)
  private.fit(np.zeros((4, size), np.float32), np.zeros((4, 1)), epochs=1)
  assert private.step == 2
  expected = 3.0 * 0.5 / 2.0 * np.sqrt(2)
  assert np.std(_weights(private)) == pytest.approx(expected, rel=0.03)


@pytest.mark.slow
def test_no_step_beyond_the_plan(tmp_path):
  x, y = _data()
  private = _private(tmp_path)
  with pytest.raises(ValueError, match=r"at most 4, the updates .* got 5"):
    private.fit(x, y, epochs=1, steps_per_epoch=5)
  assert private.step == 0
  assert private.epsilon() == 0
  assert not (tmp_path / "ledger").exists()
  private.fit(x, y, epochs=1, steps_per_epoch=3)
  before = _weights(private)
  with pytest.raises(ValueError, match=r"at most 1, .* \(3 of .* 4 .* got 2"):
    private.fit(x, y, epochs=2, steps_per_epoch=1)
  np.testing.assert_array_equal(_weights(private), before)
  private.fit(x, y)  # What is left.
  assert private.epsilon_spent() == private.plan.epsilon()
  with pytest.raises(ValueError, match="at most 0"):
    private.fit(x, y)


class _Weights(keras.callbacks.Callback):
  """Notes the weights after each epoch."""

  def __init__(self):
    super().__init__()
    self.seen = []

  def on_epoch_end(self, epoch, logs=None):
    self.seen.append(
      np.asarray(self.model.trainable_variables[-1].value).ravel()
    )


@pytest.mark.slow
def test_a_fixed_seed_does_not_repeat_batches(tmp_path):
  """Neither in an epoch, nor in a call, nor after opening anew."""
  x, y = _data()

  def drawn(workdir):
    config = _config(noise_multiplier=_NO_NOISE)
    private, note = _private(workdir, config=config), _Weights()
    before = _weights(private)
    for epochs in (2, 1, 1):
      if private.step == 3:
        private = _private(workdir, config=config)
      private.fit(x, y, epochs=epochs, steps_per_epoch=1, callbacks=[note])
    moves = np.diff([before, *note.seen], axis=0)
    return [tuple(row) for row in np.abs(moves) > 1e-6]

  first = drawn(tmp_path / "a")
  assert len(set(first)) == 4
  assert drawn(tmp_path / "b") == first


# The core, which runs with the ordinary tests: one model, compiled once.


class _Spy:
  """Notes what a fit computes, and what was charged by then."""

  def __init__(self, private, patch):
    self.rehearsed, self.updated, self._private = [], [], private
    self.random, self.row = [], None
    rehearse = program_lib.Program.rehearse
    bound = abstract_step.bound

    def rehearsing(program, *args):
      self.row = program.row
      return rehearse(program, *args)

    def watched(*args):
      step = bound(*args)
      for name, see in (("accumulate", self._chunk), ("apply", self._update)):
        vars(step)[name] = _seen(getattr(step, name), see)
      return step

    patch.setattr(program_lib.Program, "rehearse", rehearsing)
    patch.setattr(abstract_step, "bound", watched)

  def _chunk(self, params, accumulator, batch, padding, key, row, *more):
    if not self._private._run.spent_steps:
      self.rehearsed.append(jax.tree.map(np.asarray, batch))
    else:
      self.random.append((*jax.random.key_data(key).tolist(), int(row)))

  def _update(self, state, *args):
    # The first is of the rehearsal.
    self.updated.append((int(state.step), self._private._run.spent_steps))


def _seen(function, see):
  """A compiled function whose arguments are seen."""

  def call(*args):
    see(*args)
    return function(*args)

  return call


def _two_outputs():
  """Two kinds of loss, weighted: Keras makes metrics while it is traced."""
  given = keras.Input((_NUM_EXAMPLES,))
  one = layers.Dense(1, use_bias=False, name="one")(given)
  many = layers.Dense(3, use_bias=False, name="many")(given)
  model = keras.Model(given, {"one": one, "many": many})
  model.compile(
    keras.optimizers.SGD(1.0),
    loss={
      "one": "mse",
      "many": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    },
    loss_weights={"one": 1.0, "many": 0.5},
    metrics={"one": ["mae"], "many": ["accuracy"]},
  )
  return model


def _without_gradient():
  """Inputs of zeros, so that weights move by the noise alone."""
  x = np.zeros((_NUM_EXAMPLES, _NUM_EXAMPLES), np.float32)
  return x, {"one": np.ones((_NUM_EXAMPLES, 1)), "many": np.arange(12) % 3}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("core") / "run"


@functools.cache
def _core(workdir):
  """No fixture: what fails of it is a failed test."""
  private = _private(workdir, _two_outputs(), chunk_size=4)
  before, note = _weights(private), _Weights()
  data = _without_gradient()
  with pytest.MonkeyPatch.context() as patch:
    spy = _Spy(private, patch)
    history = private.fit(
      *data,
      epochs=3,
      steps_per_epoch=1,
      validation_data=_without_gradient(),
      callbacks=[note],
    )
  moves = np.diff([before, *note.seen], axis=0)
  return private, spy, history.history, moves


def test_a_fit_trains_two_outputs_and_counts_updates(workdir):
  private, _, history, moves = _core(workdir)
  assert private.step == 3
  assert private.epsilon_spent() == _first(private.plan, 3)
  assert np.all(moves != 0)
  assert {"val_loss", "val_one_mae", "val_many_accuracy"} < set(history)
  shown = {name for name in history if not name.startswith("val_")}
  assert shown == {"epsilon"}
  assert history["epsilon"] == [_first(private.plan, n) for n in (1, 2, 3)]


def test_epochs_of_one_fit_draw_their_own_noise(workdir):
  *_, moves = _core(workdir)
  assert len(np.unique(np.round(moves, 5))) == moves.size


def test_every_update_is_charged_before_it_is_computed(workdir):
  _, spy, *_ = _core(workdir)
  rehearsal, *steps = spy.updated
  assert rehearsal == (0, 0)
  assert [step for step, _ in steps] == [0, 1, 2]
  assert all(spent > step for step, spent in steps)


def test_what_is_computed_before_a_charge_is_of_zeros(workdir):
  """Or made up, of public random numbers, for the sentinel's check."""
  _, spy, *_ = _core(workdir)
  zeros, made = spy.rehearsed[:2], spy.rehearsed[2:]
  for leaf in jax.tree.leaves(zeros):  # A second call may run another program.
    np.testing.assert_array_equal(leaf, 0)
  # In the dtypes that JAX gives them: as float64, most sizes would be lost.
  shapes = spy.row
  largest = {"[0]": 0, "[1]['many']": 2, "[1]['one']": 0}
  cases = [c.example for c in made_up_examples.cases(shapes, largest)]
  public = [
    jax.tree.map(np.ndarray.tobytes, c)
    for c in [made_up_examples.padding(shapes), *cases]
  ]
  assert len(made) > len(cases)
  for batch in made:
    for row in range(4):
      one = jax.tree.map(lambda a, row=row: a[row].tobytes(), batch)
      assert one in public


def test_no_two_chunks_of_a_fit_share_their_randomness(workdir):
  _, spy, *_ = _core(workdir)
  assert len({first_row for *_, first_row in spy.random}) > 1
  assert len({tuple(key) for *key, _ in spy.random}) == 3  # One a step.
  assert len(set(spy.random)) == len(spy.random)


@pytest.mark.slow
def test_randomness_goes_by_the_place_in_the_step_and_not_in_the_chunk(
  tmp_path,
):
  private = _private(tmp_path, _model(layers.Dropout(0.5)), chunk_size=4)
  program = _program(private, *_data())
  params = program.state(0).params
  x, y = (np.ones((4, size), np.float32) for size in (_NUM_EXAMPLES, 1))
  batch = {"[0]": x, "[1]": y}

  def of(first_row, row):
    made = program.step.accumulate(
      *(params, program.step.zeros(params), batch),
      *(np.arange(4) != row, jax.random.key(0), first_row),
    )
    return np.asarray(jax.tree.leaves(made.clipped_sum)[0]).tobytes()

  assert of(0, 1) == of(1, 0)
  assert len({of(0, 0), of(0, 1), of(4, 0), of(4, 1)}) == 4


def _program(private, x, y):
  data, source = private._source((x, y, None), None, None)
  return private._program(data, source)[0]


def test_a_fit_beyond_the_plan_or_of_other_data_is_refused(workdir):
  private, *_ = _core(workdir)
  x, y = _without_gradient()
  with pytest.raises(ValueError, match=r"at most 1, .* \(3 of .* 4 .* got 2"):
    private.fit(x, y, epochs=2, steps_per_epoch=1)
  with pytest.raises(ValueError, match="training data: digest"):
    private.fit(x + 1, y, epochs=1, steps_per_epoch=1)
  with pytest.raises(ValueError, match=r"x must .*=12 .* \(3, 12\)"):
    private.fit(x[:3], y)
  with pytest.raises(RuntimeError, match="without privacy"):
    private.model.fit(x, y)
  assert private.epsilon_spent() == _first(private.plan, 3)


@functools.cache
def _long(folder):
  """A run that charges four steps at a time, of arrays that are on disk."""
  arrays = []
  for name, array in zip("xy", _data(), strict=True):
    np.save(folder / f"{name}.npy", array)
    arrays.append(np.load(folder / f"{name}.npy", mmap_mode="r"))
  private = _private(
    folder / "run", config=_config(num_steps=400, noise_multiplier=9.0)
  )
  return private, arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("long")


def _before_step(monkeypatch, number, do):
  """Does something before an update is applied."""
  accumulate, calls = fitting.Fitting._accumulate, []

  def replaced(*args):
    made = accumulate(*args)
    calls.append(True)
    if len(calls) == number + 1:
      do()
    return made

  monkeypatch.setattr(fitting.Fitting, "_accumulate", replaced)


def _interrupt():
  raise KeyboardInterrupt


def test_an_interrupted_fit_gives_back_what_it_never_began(folder, monkeypatch):
  private, (x, y) = _long(folder)
  with monkeypatch.context() as patch:
    _before_step(patch, 1, _interrupt)
    with pytest.raises(KeyboardInterrupt):
      private.fit(x, y, epochs=1, steps_per_epoch=4)
  # The second was begun, and is not in the weights.
  assert private.step == 1
  assert private._run.spent_steps == 2
  ledger = ledger_lib.Ledger(folder / "run" / "ledger")
  assert [r["stop_step"] for r in ledger.records if "stop_step" in r] == [4, 2]
  # The same object goes on, and repeats the second for free.
  private.fit(x, y, epochs=1, steps_per_epoch=2)
  assert private.step == 3
  assert private._run.spent_steps == 3


def test_files_that_are_changed_end_a_fit_and_void_its_record(
  folder, monkeypatch
):
  private, (x, y) = _long(folder)
  private.fit(x, y, epochs=1, steps_per_epoch=1)
  before, step = _weights(private), private.step
  path = folder / "x.npy"
  _before_step(monkeypatch, 1, lambda: os.utime(path, ns=(0, 0)))
  with pytest.raises(errors.ChangedError, match="cannot vouch") as stopped:
    private.fit(x, y, epochs=2, steps_per_epoch=2)
  assert str(path) in str(stopped.value)
  np.testing.assert_array_equal(_weights(private), before)
  ledger = ledger_lib.Ledger(folder / "run" / "ledger")
  assert private.step == step == ledger.checkpoints[-1].step
  assert ledger.unsound == [sources.CHANGED]
  assert "/" not in ledger.guarantee


def test_a_step_that_fails_on_zeros_is_not_charged(tmp_path):
  def loss(y, got):
    return jnp.mean((y - got) ** 2) + jax.pure_callback(
      _fail, jax.ShapeDtypeStruct((), np.float32), vmap_method="expand_dims"
    )

  private = _private(tmp_path, _model(loss=loss))
  with pytest.raises(Exception, match="out of memory"):
    private.fit(*_data())
  assert private.epsilon() == 0
  assert not (tmp_path / "ledger").exists()


def _fail():
  raise RuntimeError("out of memory")


def _norms_of_a_hundredth(monkeypatch):
  norm = bookkeeping.norm

  def wrong(*args):
    size, formed = norm(*args)
    return size / 100, formed

  monkeypatch.setattr(bookkeeping, "norm", wrong)


def test_a_wrong_rule_stops_a_fit_before_anything_is_charged(
  tmp_path, monkeypatch
):
  _norms_of_a_hundredth(monkeypatch)
  private = _private(tmp_path)
  with pytest.raises(errors.SensitivityError, match=r"dense.*kernel .*dot_gen"):
    private.fit(*_data())
  assert private.epsilon() == 0
  assert not (tmp_path / "ledger").exists()


def test_a_wrong_rule_stops_a_fit_while_it_runs(tmp_path, monkeypatch):
  _norms_of_a_hundredth(monkeypatch)
  monkeypatch.setattr(trials, "search", lambda program: None)
  config = _config(l2_clip_norm=1e-3, expected_batch_size=11.0)
  private = _private(tmp_path, seed=None, config=config, sentinel_every=1)
  with pytest.raises(errors.SensitivityError, match=r"dense.*kernel .*dot_gen"):
    private.fit(*_data())
  with ledger_lib.Ledger(tmp_path / "ledger") as ledger:
    assert ledger.guarantee == f"void: {history.TOO_LONG}"
    assert ledger.checkpoints[-1].step == ledger.spent_steps == private.step


def test_metrics_in_the_place_of_keras_2_are_taken_for_metrics(tmp_path):
  model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
  model.compile("sgd", "mse", ["mae"])
  with pytest.warns(UserWarning, match=r"loss_weights=\['mae'\], .* metrics"):
    _private(tmp_path, model)
  scores = model.evaluate(
    np.zeros((2, 3)), np.ones((2, 1)), verbose=0, return_dict=True
  )
  assert set(scores) == {"loss", "mae"}
  both = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
  both.compile("sgd", "mse", ["mae"], ["mse"])
  with pytest.raises(ValueError, match=r"numbers for loss_weights, got \['ma"):
    _private(tmp_path, both)


_TRAIN = """
import json, sys
from tests.frontends import keras_test
sys.exit(keras_test.train_two(sys.argv[1]))
"""


def train_two(workdir):
  """What another process does: two updates, and then it says where it is."""
  x, y = _data()
  model = _model(optimizer=keras.optimizers.Adam(0.1))
  private = _private(workdir, model, seed=None)
  private.fit(x, y, epochs=1, steps_per_epoch=2)
  told = {"w": _weights(private).tolist(), "at": private.epsilon_spent()}
  print(json.dumps(told))


@pytest.mark.slow
def test_another_process_goes_on_with_the_budget(tmp_path):
  root = pathlib.Path(__file__).parents[2]
  told = subprocess.run(
    [sys.executable, "-c", _TRAIN, str(tmp_path)],
    cwd=root,
    env=os.environ | {"PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    check=True,
  )
  told = json.loads(told.stdout.splitlines()[-1])
  model = _model(optimizer=keras.optimizers.Adam(0.1))
  private = _private(tmp_path, model, seed=None)
  np.testing.assert_array_equal(_weights(private), np.float32(told["w"]))
  assert private.step == 2
  assert int(model.optimizer.iterations) == 2
  assert private.epsilon_spent() == told["at"] == _first(private.plan, 2)
  x, y = _data()
  with pytest.raises(ValueError, match="at most 2"):
    private.fit(x, y, epochs=1, steps_per_epoch=3)
  with pytest.raises(ValueError, match="training data: digest"):
    private.fit(x + 1, y)
  same = _model(optimizer=keras.optimizers.Adam(0.1))
  with pytest.raises(ValueError, match="secret: hash"):
    _private(tmp_path, same).fit(x, y)
  private.fit(x, y)
  assert private.epsilon_spent() == _first(private.plan, 4)
  with ledger_lib.Ledger(tmp_path / "ledger") as ledger:
    assert ledger.guarantee == "holds"
    assert len({branch.identity for branch in ledger.branches}) == 2
  with pytest.raises(ValueError, match=r"noise_multiplier: 2\.0 -> 1\.0"):
    _private(tmp_path, config=_config(noise_multiplier=1.0), seed=None)
  with pytest.raises(errors.MismatchError):
    _private(tmp_path, _model(size=3), seed=None)


@pytest.mark.slow
def test_steps_of_a_killed_process_are_spent(tmp_path):
  """A checkpoint that is gone stands for one that was never written."""
  x, y = _data()
  private = _private(tmp_path)
  private.fit(x, y, epochs=2, steps_per_epoch=1)
  (newest,) = tmp_path.glob("checkpoints/*/2")
  newest.rename(tmp_path / "gone")
  with pytest.warns(UserWarning, match="step 2 passed over: it has no mani"):
    private = _private(tmp_path)
  assert private.step == 1
  assert private.epsilon_spent() == _first(private.plan, 2)
  with pytest.raises(ValueError, match="at most 2"):
    private.fit(x, y, epochs=1, steps_per_epoch=3)


@pytest.mark.slow
def test_one_writer(tmp_path):
  x, y = _data()
  one, two = _private(tmp_path), _private(tmp_path)
  one.fit(x, y, epochs=1, steps_per_epoch=1)
  with pytest.raises(errors.LedgerError, match="gone on since"):
    two.fit(x, y, epochs=1, steps_per_epoch=1)
  assert one.epsilon_spent() == _first(one.plan, 1)


class _Stop(keras.callbacks.Callback):
  """Interrupts, as Ctrl-C does, or stops early, after an epoch."""

  def __init__(self, epoch, interrupts):
    super().__init__()
    self._at = epoch, interrupts

  def on_epoch_end(self, epoch, logs=None):
    if (epoch, False) == self._at:
      self.model.stop_training = True
    if (epoch, True) == self._at:
      raise KeyboardInterrupt


@pytest.mark.slow
def test_a_stopped_fit_can_go_on(tmp_path):
  x, y = _data()
  private = _private(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    private.fit(x, y, steps_per_epoch=1, callbacks=[_Stop(0, True)])
  private.fit(x, y, steps_per_epoch=1, callbacks=[_Stop(2, False)])
  assert private.step == 3
  assert private.epsilon_spent() == _first(private.plan, 3)


@pytest.mark.slow
def test_only_held_out_metrics_are_shown(tmp_path, capsys):
  x, y = _data()
  private = _private(tmp_path / "safe")
  history = private.fit(x, y, validation_data=(x + 1, y), verbose=1)
  assert sorted(history.history) == ["epsilon", "val_loss", "val_mae"]
  # Two epochs of two steps cover the data once each, on average.
  assert len(history.history["val_mae"]) == 2
  assert " loss" not in capsys.readouterr().out
  private = _private(tmp_path / "unsafe", unsafe_metrics=True)
  assert sorted(private.fit(x, y).history) == ["epsilon", "loss"]
  with ledger_lib.Ledger(tmp_path / "unsafe" / "ledger") as ledger:
    assert "unsafe_metrics" in ledger.guarantee


@pytest.mark.slow
def test_keras_own_fit_refuses(tmp_path):
  private = _private(tmp_path)
  x, y = _data()
  with pytest.raises(RuntimeError, match="without privacy"):
    private.model.fit(x, y)
  with pytest.raises(RuntimeError, match="without privacy"):
    private.model.train_on_batch(x, y)


def _convolutional():
  return keras.Sequential(
    [
      keras.Input((4, 4, 1)),
      layers.Conv2D(4, 3, activation="relu", activity_regularizer="l2"),
      layers.GroupNormalization(2),
      layers.Flatten(),
      layers.Dense(3),
    ]
  )


@pytest.mark.slow
def test_the_sum_is_that_of_the_reference():
  """Against gradients of Keras's plain forward pass, one by one."""
  model = _convolutional()
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  model.compile("sgd", loss)
  model.optimizer.build(model.trainable_variables)
  rng = np.random.default_rng(0)
  batch = rng.normal(size=(5, 4, 4, 1)).astype(np.float32), np.arange(5) % 3
  params = [v.value for v in model.trainable_variables]
  state = [v.value for v in model.non_trainable_variables]

  def alone(params, x, y):
    logits, _, losses = model.stateless_call(
      params, state, x[None], training=True, return_losses=True
    )
    return sum(losses) - jax.nn.log_softmax(logits[0])[y]

  gradients = jax.jit(jax.vmap(jax.grad(alone), (None, 0, 0)))(params, *batch)
  norms = jnp.sqrt(sum(jnp.sum(g.reshape(5, -1) ** 2, 1) for g in gradients))
  clip_norm = float(jnp.median(norms))
  scale = jnp.minimum(1, clip_norm / norms)
  fn = dpdist.clipped_grad(
    keras_loss.per_example_loss(model, state), l2_clip_norm=clip_norm
  )
  got = jax.jit(fn)(params, batch, rng=jax.random.key(0))
  for found, gradient in zip(got.sum, gradients, strict=True):
    expected = jnp.tensordot(scale, gradient, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_dropout_is_each_examples_own():
  model = _model(layers.Dropout(0.5), layers.Dropout(0.5), size=64)
  model.set_weights([np.ones((64, 1))])
  model.optimizer.build(model.trainable_variables)
  state = [v.value for v in model.non_trainable_variables]
  loss_fn = keras_loss.per_example_loss(model, state)
  fn = jax.jit(jax.vmap(loss_fn, (None, 0, 0)))
  params = [v.value for v in model.trainable_variables]
  row = np.random.default_rng(0).uniform(0.5, 1.5, 64).astype(np.float32)
  batch = np.tile(row, (8, 1)), np.zeros((8, 1))
  one, again, other = (
    fn(params, batch, jax.random.split(jax.random.key(i), 8)) for i in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, again)
  assert len({*np.asarray(one).tolist(), *np.asarray(other).tolist()}) == 16
  # Two layers: an entry is kept with probability 1/4, and then counts 4.
  assert np.sqrt(np.mean(one)) == pytest.approx(64, rel=0.25)


class _Counter(layers.Layer):
  def build(self, shape):
    self.seen = self.add_weight(
      shape=shape[1:], initializer="zeros", trainable=False
    )

  def call(self, x):
    self.seen.assign_add(x[0])
    return x


class _OwnStep(keras.Model):
  def call(self, x):
    return x

  def train_step(self, state, data):
    return super().train_step(state, data)


def _adapted():
  layer = layers.Normalization()
  layer.adapt(_data()[0])
  return layer


def _uncompiled():
  return keras.Sequential([keras.Input((3,)), layers.Dense(1)])


def _unbuilt():
  model = keras.Sequential([layers.Dense(1)])
  model.compile("sgd", "mse")
  return model


def _own_step():
  model = _OwnStep()
  model.compile("sgd", "mse")
  model(np.zeros((1, 3)))
  return model


def _not_finite():
  model = _model()
  model.set_weights([np.full((_NUM_EXAMPLES, 1), np.nan)])
  return model


_BAD_MODELS = {
  "batch norm": (lambda: _model(layers.BatchNormalization()), "GroupNormaliz"),
  "adapted": (lambda: _model(_adapted()), "with public numbers"),
  "not finite": (_not_finite, "not finite"),
  "uncompiled": (_uncompiled, "must be compiled"),
  "unbuilt": (_unbuilt, "keras.Input"),
  "own step": (_own_step, "compute_loss"),
  "scaled": (
    lambda: _model(
      optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    ),
    "bfloat16",
  ),
  "scaled by a number": (
    lambda: _model(optimizer=keras.optimizers.SGD(loss_scale_factor=8.0)),
    "bfloat16",
  ),
  "not reduced": (
    lambda: _model(loss=keras.losses.MeanSquaredError(reduction=None)),
    "model.loss must be one number .* got reduction=None in 'mean_squared_e",
  ),
  "no model": (lambda: 3, "must be a keras.Model, got 3"),
}


@pytest.mark.parametrize("name", _BAD_MODELS)
def test_refuses_the_model(tmp_path, name):
  make, message = _BAD_MODELS[name]
  with pytest.raises(ValueError, match=message):
    _private(tmp_path, make())
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
  ("fit", "message"),
  [
    ({"x": np.zeros((3, _NUM_EXAMPLES))}, r"x must .*=12 .* \(3, 12\)"),
    ({"y": np.zeros(11)}, "y must .*num_examples=12"),
    ({"epochs": 0}, "epochs must be"),
    ({"steps_per_epoch": 1.5}, "steps_per_epoch must be .* got 1.5"),
  ],
)
def test_refuses_the_fit(tmp_path, fit, message):
  x, y = _data()
  private = _private(tmp_path)
  with pytest.raises(ValueError, match=message):
    private.fit(**{"x": x, "y": y} | fit)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"chunk_size": 0}, "chunk_size must be an integer >= 1"),
    (
      {"chunk_size": 4, "microbatch_size": 3},
      "a divisor of chunk_size=4, got 3",
    ),
    ({"config": {"num_steps": 3}}, "dpdist.PrivacyConfig"),
  ],
)
def test_refuses_the_options(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    _private(tmp_path, **options)


@pytest.mark.slow
def test_state_that_changes_is_refused_and_frozen_state_is_not(tmp_path):
  x, y = _data()
  private = _private(tmp_path / "counter", _model(_Counter()))
  with pytest.raises(ValueError, match=r"counter/.*GroupNormalization"):
    private.fit(x, y)
  assert private.epsilon() == 0
  frozen = layers.BatchNormalization(trainable=False)
  private = _private(tmp_path / "frozen", _model(frozen))
  before = [np.asarray(v.value) for v in frozen.variables]
  private.fit(x, y, epochs=1, steps_per_epoch=1)
  for variable, value in zip(frozen.variables, before, strict=True):
    np.testing.assert_array_equal(variable.value, value)
  assert np.any(_weights(private))


_OTHER_BACKEND = """
def attempt():
  try:
    import dpdist.frontends.keras
  except ImportError as error:
    print(error)
attempt()
import keras
attempt()
"""


@pytest.mark.slow
def test_another_backend_is_an_error():
  told = subprocess.run(
    [sys.executable, "-c", _OTHER_BACKEND],
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ | {"KERAS_BACKEND": "numpy"},
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()
  assert ["KERAS_BACKEND=jax" in line for line in told] == [True, True]
  assert told[0].endswith("got KERAS_BACKEND=numpy")
  assert told[1].endswith("got the backend 'numpy'")


@pytest.mark.slow
@pytest.mark.parametrize("is_poisson", [True, False])
def test_a_dp_config_is_a_budget(tmp_path, is_poisson):
  config = dpdist.DPConfig(
    epsilon=4.0,
    delta=1e-5,
    clipping_norm=1.0,
    batch_size=3,
    gradient_accumulation_steps=2,
    train_steps=4,
    train_size=_NUM_EXAMPLES,
    poisson_sampling_in_fit=is_poisson,
    seed=7,
  )
  private = private_keras.make_private(_model(), config, workdir=tmp_path)
  assert private.plan == config.make_plan()
  private.fit(*_data())
  assert private.step == 4
  assert private.epsilon() == pytest.approx(4.0, rel=1e-3)
  with pytest.raises(ValueError, match="4"):
    private.fit(*_data(), epochs=1)
