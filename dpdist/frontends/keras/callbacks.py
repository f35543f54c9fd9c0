"""What the callbacks of a private fit are called with.

They see what is released anyway, and nothing else: weights after each update,
epsilon, and metrics of held-out examples. At the end of a batch `logs` is
empty: the loss and the metrics of a batch are private.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dpdist import errors
from dpdist.frontends import keras_loss
from dpdist.frontends.keras import program as program_lib
from dpdist.training import step as step_lib

_HOOKS = (
  "on_batch_begin",
  "on_batch_end",
  "on_train_batch_begin",
  "on_train_batch_end",
)


def of(
  given: Any,
  model: Any,
  params: Mapping[str, int],
  *,
  shows_loss: bool,
) -> Any:
  """Returns a keras.callbacks.CallbackList, or raises ValueError.

  With shows_loss the private loss is shown, and may be asked for.
  """
  keras = keras_loss.keras
  shown = ("epsilon", "loss") if shows_loss else ("epsilon",)
  if isinstance(given, keras.callbacks.CallbackList):
    given = given.callbacks
  elif given is not None and not isinstance(given, list | tuple):
    given = [given]
  for callback in given or ():
    if not isinstance(callback, keras.callbacks.Callback):
      raise errors.ArgumentError(
        "callbacks must be keras.callbacks.Callback objects, got"
        f" {type(callback).__name__}"
      )
    if isinstance(callback, keras.callbacks.BackupAndRestore):
      raise errors.ArgumentError(
        "callbacks must leave out BackupAndRestore, which would put back"
        " weights of another step than the budget's: make_private(workdir=...)"
        " keeps and restores the whole run"
      )
    monitor = getattr(callback, "monitor", "val_loss")
    is_keras = type(callback).__module__.split(".")[0] == "keras"
    if is_keras and not (monitor in shown or monitor.startswith("val_")):
      raise errors.ArgumentError(
        f"monitor of {type(callback).__name__} must be 'epsilon' or a held-out"
        f" metric such as 'val_loss', got {monitor!r}: metrics of training"
        " examples are private, and are not computed"
      )
  return keras.callbacks.CallbackList(
    list(given or ()),
    add_history=True,
    add_progbar=params["verbose"] != 0,
    model=model,
    **params,
  )


class Hooks:
  """Calls the callbacks' methods for a batch, which is an update here."""

  def __init__(self, callback_list: Any, program: program_lib.Program):
    self._list, self._program = callback_list, program
    callbacks: Sequence[Any] = callback_list.callbacks
    keras = keras_loss.keras
    ours = (keras.callbacks.History, keras.callbacks.ProgbarLogger)
    self._is_seen = any(
      getattr(type(callback), name)
      is not getattr(keras.callbacks.Callback, name)
      for callback in callbacks
      if not isinstance(callback, ours)
      for name in _HOOKS
    )

  def before(self, number: int, state: step_lib.TrainState) -> None:
    """Is called before an update."""
    self._call("on_train_batch_begin", number, state)

  def after(self, number: int, state: step_lib.TrainState) -> None:
    """Is called after an update, with its released state."""
    self._call("on_train_batch_end", number, state)

  def _call(self, name: str, number: int, state: step_lib.TrainState) -> None:
    if not self._is_seen:
      getattr(self._list, name)(number, {})
      return
    self._program.assign(state)
    given = program_lib.Kept(self._program.model)
    getattr(self._list, name)(number, {})
    if given.change():
      raise errors.ArgumentError(
        f"callbacks must not change the model or its optimizer in {name}, since"
        " the keys of an epoch's updates belong to what it began with: do it in"
        " on_epoch_begin, or with a keras.optimizers.schedules object"
      )
