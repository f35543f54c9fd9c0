"""The epochs of a Keras fit, and what is measured after them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dpdist import _validation
from dpdist.workdir import run as run_lib


class Epochs(NamedTuple):
  """The epochs of a fit."""

  first: int  # The number of the first one.
  ends: list[int]  # The step that each ends at.
  is_all: bool  # Whether they go on to the end of the budget.

  def params(self, start: int, verbose: int | str) -> dict[str, int]:
    """Returns what Keras's callbacks are told."""
    return {
      "verbose": 1 if verbose == "auto" else int(verbose),
      "epochs": self.first + len(self.ends),
      "steps": self.ends[0] - start if self.ends else 0,
    }


def plan(
  run: run_lib.Run,
  left: int,
  epochs: int | None,
  initial_epoch: int | str,
  steps_per_epoch: int | None,
) -> Epochs:
  """Returns the steps at which epochs end; the arguments are those of `fit`.

  Raises ValueError unless they are at most the `left` steps of the budget.
  """
  is_auto, first = initial_epoch == "auto", 0
  if not is_auto:
    rule = _validation.integer(0)
    first = _validation.check("initial_epoch", initial_epoch, rule)
  count = _validation.optional(_validation.COUNT)
  _validation.check("epochs", epochs, count)
  _validation.check("steps_per_epoch", steps_per_epoch, count)
  start = run.step
  mean = run.plan.num_examples / run.plan.expected_batch_size
  each = steps_per_epoch or max(1, round(mean))
  if epochs is None:
    last = start + (left or each)
  elif is_auto:
    last = max(start, epochs * each)
  else:
    last = start + max(0, epochs - first) * each
  run.check(last - start, left)
  if epochs is None or is_auto:
    cuts = range((start // each + 1) * each, last, each)
    first = first or start // each
  else:
    cuts = range(start + each, last, each)
  return Epochs(first, [*cuts, last] if last > start else [], epochs is None)


class HeldOut(NamedTuple):
  """What is evaluated after epochs."""

  data: Any
  frequency: int | Sequence[int]
  options: dict[str, Any]

  def evaluate(
    self, model: Any, epoch: int, callback_list: Any
  ) -> dict[str, float]:
    """Returns the metrics after an epoch; none if it is not evaluated."""
    often, data = self.frequency, self.data
    is_due = (
      (epoch + 1) % often == 0 if isinstance(often, int) else epoch + 1 in often
    )
    if data is None or not is_due:
      return {}
    options = dict(self.options)
    parts = data if isinstance(data, tuple | list) else (data,)
    if not isinstance(data, tuple | list):
      del options["batch_size"]  # Such data has one of its own.
    names = ("x", "y", "sample_weight")
    scores = model.evaluate(
      **dict(zip(names, parts, strict=False)),
      **options,
      callbacks=callback_list,
      verbose=0,
      return_dict=True,
    )
    return {f"val_{name}": value for name, value in scores.items()}


class Losses:
  """The mean loss of an epoch's examples, which is private."""

  def __init__(self) -> None:
    self._total, self._count = 0.0, 0

  def add(self, stats: Any) -> None:
    """Takes the statistics of an update."""
    self._total += float(stats.loss)
    self._count += int(stats.num_examples)

  def mean(self) -> float:
    """Returns the mean."""
    return self._total / max(1, self._count)
