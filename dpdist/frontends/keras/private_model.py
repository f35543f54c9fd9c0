"""A Keras model with a privacy budget."""

from collections.abc import Mapping, Sequence
import functools
import json
import os
import secrets
import shutil
import tempfile
from typing import Any
import warnings
import weakref

import jax

from dpdist import _validation
from dpdist import errors
from dpdist.data import sources
from dpdist.frontends import dp_config
from dpdist.frontends import keras_model
from dpdist.frontends.keras import callbacks as callbacks_lib
from dpdist.frontends.keras import epochs as epochs_lib
from dpdist.frontends.keras import examples
from dpdist.frontends.keras import fitting
from dpdist.frontends.keras import program as program_lib
from dpdist.frontends.keras import settings as settings_lib
from dpdist.keys import keys
from dpdist.privacy import plan as plan_lib
from dpdist.workdir import run as run_lib

PyTree = Any

_REFUSED = ("fit", "train_on_batch", "compile")
_NOT_RECORDED = (
  "workdir was not given, so that this run is in no record: its secret is in"
  " this process's memory alone, a process that ends loses what it trained and"
  " leaves nothing for launch.budget or launch.verify, and nothing is repeated"
  " for free. What it releases counts all the same: add its epsilon to"
  " that of any other run on these examples"
)


def make_private(
  model: Any,
  config: (plan_lib.PrivacyConfig | plan_lib.PrivacyPlan | dp_config.DPConfig),
  *,
  workdir: str | os.PathLike[str] | None = None,
  chunk_size: int | None = None,
  microbatch_size: int | None = None,
  rescale_to_unit_norm: bool = False,
  method: str = "auto",
  examples_per_unit: int | None = None,
  devices: Sequence[jax.Device] | None = None,
  unsafe_metrics: bool = False,
  sentinel_every: int = 100,
  insecure_seed: int | None = None,
) -> "PrivateModel":
  """Binds a Keras model to a privacy budget.

  From then on the model's own `fit`, `train_on_batch` and `compile` refuse to
  run. If workdir holds the run already, the model and its optimizer get the
  state of its newest checkpoint.

  Args:
    model: a built and compiled keras.Model. Its metrics are of held-out
      examples alone.
    config: the budget; must equal the one that the run in workdir began with. A
      DPConfig also sets microbatch_size, rescale_to_unit_norm and the seed.
    workdir: a local directory for secret, ledger and checkpoints. It is a part
      of the guarantee: do not delete it to begin again on the same data. None:
      the run is not recorded, and a warning says what is lost.
    chunk_size: examples on the devices at once; a larger draw is computed in
      several chunks, with one update at the end. None: a size that most draws
      fit in.
    microbatch_size: see `dpdist.clipped_grad`; divides a device's part of
      chunk_size.
    rescale_to_unit_norm: whether to divide gradients by the clip norm, noise
      included.
    method: see `dpdist.clipped_grad`.
    examples_per_unit: where the config says unit="user", at most how many
      examples of a user are used in one update; `fit` is given the users. None:
      examples are the unit.
    devices: those that compute; each takes a part of chunk_size. None: all of
      this process.
    unsafe_metrics: whether to show also the training loss, which is private. It
      voids the guarantee, and the ledger says so.
    sentinel_every: one update in so many, by a secret choice, and the first of
      each branch check for examples whose gradients are longer than their
      computed norms; 0: none does. See `dpdist.sensitivity.sentinel`.
    insecure_seed: fixes every random stream, for tests. It voids the guarantee,
      and the ledger says so.

  Returns:
    A PrivateModel.

  Raises:
    ValueError: the model, the config or another argument cannot be used; the
      message says why, and what to use instead.
    dpdist.errors.LedgerError: the ledger in workdir is damaged.
    dpdist.errors.MismatchError: the run in workdir is of another
      model.
  """
  keras_model.check(model)
  config, given = settings_lib.of_dp_config(
    config,
    settings_lib.Given(
      chunk_size=chunk_size,
      microbatch_size=microbatch_size,
      rescale_to_unit_norm=rescale_to_unit_norm,
      method=method,
      examples_per_unit=examples_per_unit,
      devices=devices,
      unsafe_metrics=unsafe_metrics,
      sentinel_every=sentinel_every,
      insecure_seed=insecure_seed,
    ),
  )
  if workdir is None:
    warnings.warn(_NOT_RECORDED, stacklevel=2)
  return _bound(model, config, workdir, given)


def _bound(
  model: Any,
  config: plan_lib.PrivacyConfig | plan_lib.PrivacyPlan,
  workdir: str | os.PathLike[str] | None,
  given: settings_lib.Given,
) -> "PrivateModel":
  folder, secret = workdir, None
  if folder is None:
    folder = tempfile.mkdtemp(prefix="dpdist_")
    if given.insecure_seed is None:
      secret = secrets.token_bytes(keys.SECRET_BYTES)
  void = ("unsafe_metrics shows the training loss, which no noise covers",)
  run = run_lib.Run(
    folder,
    config,
    insecure_seed=given.insecure_seed,
    secret=secret,
    notices=void if given.unsafe_metrics else (),
  )
  settings = settings_lib.of(run.plan, given)
  program_lib.restore(model, run.restore(program_lib.values(model)))
  for name in _REFUSED:
    setattr(model, name, functools.partial(keras_model.refuse, name))
  private = PrivateModel(model, run, settings)
  if workdir is None:
    weakref.finalize(private, shutil.rmtree, folder, ignore_errors=True)
  return private


class PrivateModel:
  """A Keras model with a privacy budget, made by `make_private`.

  What is not here is the model's: predict, save, summary, get_weights and the
  rest. Set attributes on `model`.

  Promises of `fit`:
    * The state is saved after every epoch, and when an error or Ctrl-C ends it.
      A process that is killed loses the steps since then. They are charged, and
      the next process that fits the same repeats them, bit for bit, for free;
      where it does not (other code, devices or weights), they are spent.
    * An error or Ctrl-C gives back what was charged ahead and never begun.
    * Arrays that stay on disk (`numpy.load(..., mmap_mode="r")`) must not be
      changed meanwhile. If they are, the steps since the last epoch are neither
      saved nor kept in the model, and the record is void.
    * A SensitivityError comes before an update is charged, or after one that is
      saved. All else that is refused costs nothing.

  Attributes:
    model: the Keras model.
    plan: the numbers that training is bound to.
  """

  # fmt: off
  __slots__ = (
    "__weakref__", "_arrays", "_kept", "_programs", "_run", "_settings",
    "model", "plan",
  )
  # fmt: on

  def __init__(
    self, model: Any, run: run_lib.Run, settings: settings_lib.Settings
  ):
    self.model = model
    self.plan = run.plan
    self._run, self._settings = run, settings
    self._kept = program_lib.Kept(model)
    # By what they depend on besides; and digests of what they compute.
    self._programs: dict[Any, tuple[program_lib.Program, str]] = {}
    self._arrays: list[examples.Examples] = []  # That were trained on.

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_") or name == "model":
      raise AttributeError(f"a PrivateModel has no attribute {name!r}")
    return getattr(self.model, name)

  def __dir__(self) -> list[str]:
    return sorted({*object.__dir__(self), *dir(self.model)})

  def __repr__(self) -> str:
    return f"PrivateModel({self.model!r}, {self.plan!r})"

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Returns the model's outputs."""
    return self.model(*args, **kwargs)

  @property
  def step(self) -> int:
    """Returns the updates made in the model, over all calls of `fit`."""
    return self._run.step

  def epsilon(self) -> float:
    """Returns the guarantee's epsilon at plan.delta; 0 before training begins.

    It holds wherever training stops: whoever stops early may have looked at
    results, and has the whole plan's epsilon.
    """
    return self._run.epsilon()

  def epsilon_spent(self) -> float:
    """Returns the cost of the steps so far, had their number been fixed."""
    return self._run.epsilon_spent()

  def evaluate(self, x: PyTree = None, *args: Any, **kwargs: Any) -> Any:
    """Evaluates held-out examples, as `keras.Model.evaluate`.

    Raises ValueError for arrays that were trained on: their loss is private.
    """
    self._refuse_private("x", (x,))
    return self.model.evaluate(x, *args, **kwargs)

  def fit(
    self,
    x: PyTree,
    y: PyTree = None,
    batch_size: float | None = None,
    epochs: int | None = None,
    verbose: int | str = "auto",
    callbacks: Sequence[Any] | None = None,
    validation_split: float | None = None,
    validation_data: Any = None,
    shuffle: bool | None = None,
    class_weight: Mapping[int, float] | None = None,
    sample_weight: Any = None,
    initial_epoch: int | str = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: int | Sequence[int] = 1,
    *,
    users: Any = None,
  ) -> Any:
    """Trains further, under the budget; see the class for the promises.

    Args:
      x: all private examples: arrays of leading axis plan.num_examples; a
        keras.utils.PyDataset; or what has a length and an item (x, y) or (x, y,
        weight) for each index. They must be the same in every call.
      y: their targets, in the same form; None where x has them.
      batch_size: None, or the budget's expected batch size.
      epochs: as in Keras. None: until the budget is spent.
      verbose: as in Keras, like what is not named here.
      callbacks: see what is released: weights, epsilon, held-out metrics. They
        may change the model between epochs.
      validation_split: the part of the arrays, their last rows, that is held
        out: neither trained on nor protected nor among plan.num_examples.
      validation_data: public or held-out examples, as `evaluate` takes them.
      shuffle: None: the plan's sampler draws.
      class_weight: by class, what the loss of its examples is multiplied by
        before their gradients are clipped.
      sample_weight: the same for each example; a part of the private data.
      initial_epoch: "auto": epochs are counted from the run's first update, so
        that a script that was killed can be run again as it is.
      steps_per_epoch: updates in each epoch. None: as many as draw num_examples
        examples on average.
      users: the user of each example, where users are the unit.

    Returns:
      keras.callbacks.History: by epoch, what was spent so far ("epsilon"; see
      `epsilon_spent`), and held-out metrics ("val_...").

    Raises:
      ValueError: the budget has fewer updates left, or an argument is wrong.
      dpdist.errors.LedgerError: another process trains, or has trained further.
      dpdist.errors.ChangedError: files of x or y were changed meanwhile.
      dpdist.errors.SensitivityError: clipping does not bound an example.
    """
    self._check_fixed(batch_size, shuffle)
    given, validation_data = examples.split(
      (x, y, sample_weight),
      validation_split or None,
      validation_data,
      self.plan.num_examples,
    )
    data, source = self._source(given, class_weight, users)
    self._arrays = [data]
    self._refuse_private("validation_data", validation_data)
    fit = self._fitting(data, source)
    left = self._run.left(fit.fingerprint, fit.changed_state())
    plan = epochs_lib.plan(
      self._run, left, epochs, initial_epoch, steps_per_epoch
    )
    size = validation_batch_size or round(self.plan.expected_batch_size)
    options = {"steps": validation_steps, "batch_size": max(1, size)}
    held_out = epochs_lib.HeldOut(validation_data, validation_freq, options)
    params = plan.params(self.step, verbose)
    callback_list = callbacks_lib.of(
      callbacks, self.model, params, shows_loss=self._settings.unsafe_metrics
    )
    self._run_epochs(fit, plan, held_out, callback_list)
    return self.model.history

  def _fitting(
    self, data: examples.Examples, source: sources.Source
  ) -> fitting.Fitting:
    program, digest = self._program(data, source)
    return fitting.Fitting(
      self._run,
      program,
      source,
      self._kept,
      sentinel_every=self._settings.sentinel_every,
      fingerprint=program.fingerprint(
        source,
        digest,
        {
          "examples_per_unit": self._settings.examples_per_unit,
          "options": self._settings.options,
          "sentinel_every": self._settings.sentinel_every,
        },
      ),
      prefetch=0 if data.is_in_memory else 2,
    )

  def _run_epochs(
    self,
    fit: fitting.Fitting,
    plan: epochs_lib.Epochs,
    held_out: epochs_lib.HeldOut,
    callback_list: Any,
  ) -> None:
    hooks = callbacks_lib.Hooks(callback_list, fit.program)
    model = self.model
    model.stop_training = False
    try:
      with fit:
        callback_list.on_train_begin()
        for epoch, stop in enumerate(plan.ends, plan.first):
          callback_list.on_epoch_begin(epoch)
          session = fit.session()
          if plan.is_all:  # A changed model repeats nothing for free.
            stop = min(stop, session.position.last_step)
          losses = epochs_lib.Losses()
          unsafe = self._settings.unsafe_metrics
          fit.steps(stop, hooks, losses.add if unsafe else None)
          logs = {"loss": losses.mean()} if unsafe else {}
          logs["epsilon"] = session.epsilon(self.step)
          logs |= held_out.evaluate(model, epoch, callback_list)
          callback_list.on_epoch_end(epoch, logs)
          if model.stop_training:
            break
        if plan.ends:
          # As Keras does at the end: it is the average with use_ema.
          model.optimizer.finalize_variable_values(model.trainable_variables)
        callback_list.on_train_end()
        if plan.ends and fit.changed_state():
          fit.session()  # Saves it.
    finally:
      self._kept = fit.kept

  def _check_fixed(
    self, batch_size: float | None, shuffle: bool | None
  ) -> None:
    right = self._settings.batch_sizes
    _validation.require(
      batch_size in right,
      "batch_size",
      f"None or {right[-1]:g}, the mean draw that the budget was made for"
      " (make_private's chunk_size says how many are computed at once)",
      batch_size,
    )
    if shuffle is not None and not shuffle:
      raise errors.ArgumentError(
        "shuffle must be None, got False: each update draws its examples at"
        " random, which is what is accounted for"
      )

  def _source(
    self,
    given: tuple[PyTree, PyTree, Any],
    class_weight: Mapping[int, float] | None,
    users: Any,
  ) -> tuple[examples.Examples, sources.Source]:
    """Returns the examples, and the rows that are drawn."""
    plan = self.plan
    data = examples.of(
      *given,
      class_weight,
      num_examples=plan.num_examples if plan.unit == "example" else None,
    )
    keras_model.refuse_changing_state(self.model, data.join(data.row()))
    if data.is_weighted:
      keras_model.refuse_normalised_weights(self.model)
    return data, examples.drawn(
      data, plan, users, self._settings.examples_per_unit
    )

  def _refuse_private(self, name: str, given: Any) -> None:
    inputs = given[0] if isinstance(given, tuple | list) else given
    if any(data.shares(inputs) for data in self._arrays):
      raise errors.ArgumentError(
        f"{name} must be held-out examples, got arrays that are trained on:"
        " their loss and metrics are private, and no noise covers them"
      )

  def _program(
    self, data: examples.Examples, source: sources.Source
  ) -> tuple[program_lib.Program, str]:
    """Returns the functions of a fit, tried on zeros and made-up examples."""
    settings = self._settings
    shapes = {name: (x.shape, str(x.dtype)) for name, x in data.row().items()}
    trained = tuple(v.path for v in self.model.trainable_variables)
    key = json.dumps([shapes, trained], sort_keys=True), data.structure
    if key not in self._programs:
      program = program_lib.Program(
        self.model,
        self.plan,
        source,
        data.join,
        mesh=settings.mesh,
        chunk_size=settings.chunk_size,
        options=settings.options,
      )
      is_watched = settings.sentinel_every > 0
      digest = program.rehearse(is_watched)
      program.check_sensitivity(data.largest, is_watched=is_watched)
      self._programs[key] = program, digest
    return self._programs[key]
