"""Private `fit` for Keras 3 models, on the JAX backend.

    from dpdist.frontends import keras as private_keras   # before keras
    import keras

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    private = private_keras.make_private(
      model,
      dpdist.PrivacyConfig(
        num_examples=1438, expected_batch_size=128, num_steps=300,
        l2_clip_norm=1.0, target_delta=1e-5, target_epsilon=3.0),
      workdir="/tmp/digits")
    history = private.fit(x, y, validation_data=(x_test, y_test))
    print(private.epsilon(), private.plan.delta)

This `fit` differs from Keras's: the plan's sampler draws batches from the
arrays, and nothing is shuffled; steps count noisy updates and not parts of a
batch; and no update is made that the plan does not cover.
"""

from collections.abc import Sequence
import functools
import itertools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.frontends import dp_config
from dpdist.frontends import keras_data
from dpdist.frontends import keras_loss
from dpdist.frontends import keras_model
from dpdist.frontends import keras_sentinel
from dpdist.frontends import keras_step
from dpdist.ledger import history
from dpdist.privacy import plan as plan_lib
from dpdist.sensitivity import sentinel as sentinel_lib
from dpdist.sums import compensated
from dpdist.workdir import run as run_lib
from dpdist.workdir import session as session_lib

PyTree = Any
keras = keras_loss.keras


def make_private(
  model: Any,
  config: (plan_lib.PrivacyConfig | plan_lib.PrivacyPlan | dp_config.DPConfig),
  *,
  workdir: str | os.PathLike[str],
  chunk_size: int | None = None,
  microbatch_size: int | None = None,
  rescale_to_unit_norm: bool = False,
  method: str = "auto",
  unsafe_metrics: bool = False,
  sentinel_every: int = 100,
  insecure_seed: int | None = None,
) -> "PrivateModel":
  """Binds a Keras model to a privacy budget.

  From then on the model's own `fit` and `train_on_batch` refuse to run. If
  workdir holds the run already, the model and its optimizer get the state of
  its newest checkpoint.

  Args:
    model: a built and compiled keras.Model, on one device. The compiled metrics
      are computed on validation data alone.
    config: the budget; must equal the one that the run in workdir began with. A
      DPConfig also sets microbatch_size, rescale_to_unit_norm and the seed.
    workdir: a local directory for secret, ledger and checkpoints. It is a part
      of the guarantee: do not delete it to begin again on the same data.
    chunk_size: examples on the device at once; a larger draw is computed in
      several chunks, with one update at the end. None: a size that most draws
      fit in.
    microbatch_size: see `dpdist.clipped_grad`; divides chunk_size.
    rescale_to_unit_norm: whether to divide gradients by the clip norm, noise
      included.
    method: see `dpdist.clipped_grad`.
    unsafe_metrics: whether to show also the training loss, which is private. It
      voids the guarantee, and the ledger says so.
    sentinel_every: one update in so many, by a secret choice, and the first of
      each fit check for examples whose gradients are longer than their computed
      norms; 0: none does. See `dpdist.sensitivity.sentinel`.
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
  if isinstance(config, dp_config.DPConfig):
    microbatch_size = microbatch_size or config.microbatch_size
    rescale_to_unit_norm |= config.rescale_to_unit_norm
    insecure_seed = config.seed if insecure_seed is None else insecure_seed
    config = config.to_privacy_config()
  void = ("unsafe_metrics shows the training loss, which no noise covers",)
  notices = void if unsafe_metrics else ()
  run = run_lib.Run(
    workdir, config, insecure_seed=insecure_seed, notices=notices
  )
  plan = run.plan
  chunk_size = _chunk_size(plan, chunk_size, microbatch_size)
  _validation.check("sentinel_every", sentinel_every, _validation.integer(0))
  options = {
    "l2_clip_norm": plan.l2_clip_norm,
    "microbatch_size": microbatch_size,
    "rescale_to_unit_norm": rescale_to_unit_norm,
    "method": method,
  }
  private = PrivateModel(
    model, run, chunk_size, options, unsafe_metrics, sentinel_every
  )
  private._restore()
  for name in ("fit", "train_on_batch"):
    setattr(model, name, functools.partial(keras_model.refuse, name))
  return private


def _chunk_size(
  plan: plan_lib.PrivacyPlan,
  chunk_size: int | None,
  microbatch_size: int | None,
) -> int:
  """Returns the examples on the device at once, as given or chosen."""
  if chunk_size is None:
    batch = plan.expected_batch_size
    chunk_size = min(math.ceil(batch + 3 * math.sqrt(batch)), plan.num_examples)
    chunk_size += -chunk_size % (microbatch_size or 1)
  _validation.check("chunk_size", chunk_size, _validation.COUNT)
  if microbatch_size is not None:
    _validation.require(
      microbatch_size >= 1 and not chunk_size % microbatch_size,
      "microbatch_size",
      f"a divisor of chunk_size={chunk_size}",
      microbatch_size,
    )
  return chunk_size


class PrivateModel:
  """A Keras model with a privacy budget, made by `make_private`.

  Attributes:
    model: the Keras model: evaluate, predict and save it as usual.
    plan: the numbers that training is bound to.
  """

  def __init__(
    self,
    model: Any,
    run: run_lib.Run,
    chunk_size: int,
    options: dict[str, Any],
    unsafe_metrics: bool,
    sentinel_every: int,
  ):
    self.model = model
    self.plan = run.plan
    self._run = run
    self._chunk_size = chunk_size
    self._unsafe_metrics = unsafe_metrics
    self._sentinel_every = sentinel_every
    self._is_checked = False
    self._clipped_grad, self._accumulate, self._update = keras_step.of(
      model, self.plan, options
    )

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

  def fit(
    self,
    x: PyTree,
    y: PyTree,
    *,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    validation_data: tuple[Any, ...] | None = None,
    callbacks: Sequence[Any] | None = None,
    verbose: int = 0,
  ) -> Any:
    """Trains further, under the budget.

    The state is saved after every epoch, and when an error or Ctrl-C ends it. A
    killed process loses the steps since then, and has spent them as well as
    those that were charged ahead, up to a hundredth of the plan; an error or
    Ctrl-C gives the latter back, except the step that it interrupted.

    Arrays that stay on disk (`numpy.load(..., mmap_mode="r")`) must not be
    changed meanwhile. If they are, the steps since the last epoch are neither
    saved nor kept in the model, and the record is void.

    Args:
      x: all private examples: an array, or a pytree of arrays, of leading axis
        plan.num_examples. It must be the same in every call.
      y: their targets, in the same form.
      epochs: how many epochs. None: until the budget is spent.
      steps_per_epoch: updates in each epoch. None: as many as draw num_examples
        examples on average.
      validation_data: (x, y) of public or held-out examples, evaluated after
        each epoch. Its metrics are released without noise.
      callbacks: Keras callbacks, called at the begin and end of training and
        epochs. They get the held-out metrics; no training metric may be shown.
      verbose: 1 prints a line for each epoch.

    Returns:
      keras.callbacks.History of the held-out metrics ("val_...").

    Raises:
      ValueError: epochs * steps_per_epoch is more than the budget has left, or
        x or y does not fit the plan. Nothing is spent then.
      dpdist.errors.LedgerError: another process trains, or has trained further.
      dpdist.errors.ChangedError: files of x or y were changed meanwhile.
      dpdist.errors.SensitivityError: clipping does not bound what an example
        can do; raised before an update is charged, or after one that is saved.
    """
    data = keras_data.Arrays(x, y, self.plan.num_examples)
    ends = self._ends(epochs, steps_per_epoch)
    keras_model.refuse_changing_state(self.model, data.example())
    zeros = self._zeros()
    self._rehearse(data, zeros)
    self._check_sensitivity(data, zeros)
    callback_list = keras.callbacks.CallbackList(
      list(callbacks or ()),
      add_history=True,
      add_progbar=bool(verbose),
      verbose=verbose,
      epochs=len(ends),
      steps=ends[0] - self.step if ends else 0,
      model=self.model,
    )
    self.model.stop_training = False
    callback_list.on_train_begin()
    with self._run.session(data.source.content_digest()) as session:
      for epoch, stop in enumerate(ends):
        callback_list.on_epoch_begin(epoch)
        loss = self._steps(session, data, zeros, stop)
        logs = {"loss": loss} if self._unsafe_metrics else {}
        if validation_data is not None:
          scores = self.model.evaluate(
            *validation_data, verbose=0, return_dict=True
          )
          logs |= {f"val_{name}": value for name, value in scores.items()}
        callback_list.on_epoch_end(epoch, logs)
        if self.model.stop_training:
          break
    callback_list.on_train_end()
    return self.model.history

  def _zeros(self) -> compensated.Sum:
    """Returns an empty sum of gradients."""
    return compensated.zeros_like(
      [
        jax.ShapeDtypeStruct(v.shape, jnp.promote_types(v.dtype, jnp.float32))
        for v in self.model.trainable_variables
      ]
    )

  def _check_sensitivity(
    self, data: keras_data.Arrays, zeros: compensated.Sum
  ) -> None:
    """Checks what an example can do, once for all fits."""
    if self._is_checked:
      return
    keras_sentinel.check(
      *(self.model, self._clipped_grad, self._accumulate),
      *(self._state(), zeros, data),
      chunk_size=self._chunk_size,
      most=self.plan.num_examples,
      is_watched=self._sentinel_every > 0,
    )
    self._is_checked = True

  def _rehearse(self, data: keras_data.Arrays, zeros: compensated.Sum) -> None:
    """Makes a step of zeros, so that failures come before a charge."""
    chunk, padding = next(data.chunks(np.zeros(0, np.int64), self._chunk_size))
    chunk = jax.tree.map(np.zeros_like, chunk)
    state, key = self._state(), jax.random.key(0)
    total: compensated.Sum = zeros
    for row in range(2):  # A second call runs other programs than the first.
      total, *_ = self._accumulate(
        *(state["trainable"], state["non_trainable"], total),
        *(chunk, padding, key, jnp.int32(row)),
      )
    jax.block_until_ready(
      self._update(
        *(state["trainable"], state["optimizer"], total, key, jnp.int32(0))
      )
    )

  def _ends(self, epochs: int | None, steps_per_epoch: int | None) -> list[int]:
    """Returns the step at which each epoch ends."""
    for name, value in (
      ("epochs", epochs),
      ("steps_per_epoch", steps_per_epoch),
    ):
      if value is not None:
        _validation.check(name, value, _validation.COUNT)
    each = steps_per_epoch or max(1, round(1 / self.plan.sampling_probability))
    left = self.plan.num_steps - self._run.spent_steps
    if epochs is None and left:
      epochs, total = -(-left // each), left
    else:
      epochs, total = epochs or 1, (epochs or 1) * each
    self._run.check(total)
    start = self.step
    return [start + min(total, (i + 1) * each) for i in range(epochs)]

  def _steps(
    self,
    session: session_lib.Session,
    data: keras_data.Arrays,
    zeros: compensated.Sum,
    stop: int,
  ) -> float:
    """Makes the updates before stop; returns the mean loss, still private."""
    sampler = session.streams.sampler(self.plan)
    noise_key = session.streams.key("noise")
    # Few durable records, and little lost if the process is killed.
    block = max(1, self.plan.num_steps // 100)
    state = self._state()
    trainable, optimizer = state["trainable"], state["optimizer"]
    step = charged = self.step
    losses, num_drawn = 0.0, 0
    try:
      while step < stop:
        if step == charged:
          charged = min(stop, step + block)
          session.charge(charged)
        total, rows = zeros, itertools.count(0, self._chunk_size)
        indices = sampler(step)
        key = session.streams.key("model_rng", step)
        session.begin(step)
        direction, found = [], np.zeros(len(trainable), np.int32)
        every, first = self._sentinel_every, session.position.first_step
        if sentinel_lib.is_watched(
          session.streams, step, every=every, first_step=first
        ):
          secret = session.streams.key("sentinel_direction", step)
          direction.append(keras_sentinel.normal(trainable, secret))
        for (batch, padding), row in zip(
          data.chunks(indices, self._chunk_size), rows, strict=False
        ):
          total, loss, seen = self._accumulate(
            *(trainable, state["non_trainable"], total),
            *(batch, padding, key, jnp.int32(row), *direction),
          )
          if seen is not None:
            found = found + np.asarray(seen.found[0])
          if self._unsafe_metrics:
            losses += float(loss)
        num_drawn += len(indices)
        trainable, optimizer = self._update(
          trainable, optimizer, total, noise_key, jnp.int32(step)
        )
        jax.block_until_ready(trainable)
        step += 1
        if np.any(found):
          session.notice(history.TOO_LONG)
          raise errors.SensitivityError(
            keras_sentinel.fault(
              self.model, self._clipped_grad, self._state(), data, found
            )
          )
    finally:
      # Also after an error or Ctrl-C: what was computed is charged.
      session.check_data(data.source.changed_files)
      self._assign(trainable, optimizer)
      if step > self.step:
        session.save(self._saved_state(), step)
    return losses / max(1, num_drawn)

  def _state(self) -> dict[str, list[jax.Array]]:
    model = self.model
    return {
      "trainable": [v.value for v in model.trainable_variables],
      "non_trainable": [v.value for v in model.non_trainable_variables],
      "optimizer": [v.value for v in model.optimizer.variables],
    }

  def _saved_state(self) -> dict[str, list[jax.Array]]:
    # An empty list would be no part of a checkpoint's tree.
    return {name: values for name, values in self._state().items() if values}

  def _assign(
    self, trainable: list[jax.Array], optimizer: list[jax.Array]
  ) -> None:
    for variables, values in (
      (self.model.trainable_variables, trainable),
      (self.model.optimizer.variables, optimizer),
    ):
      for variable, value in zip(variables, values, strict=True):
        variable.assign(value)

  def _restore(self) -> None:
    state = self._run.restore(self._saved_state())
    self._assign(state["trainable"], state["optimizer"])
    for variable, value in zip(
      self.model.non_trainable_variables,
      state.get("non_trainable", ()),
      strict=True,
    ):
      variable.assign(value)
