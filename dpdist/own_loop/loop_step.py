"""A step of a loop of one's own: what it may ask of its session, and once."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dpdist import errors

PyTree = Any


class Step:
  """A step of a session, which is charged.

  Attributes:
    number: of updates that were made before it.
  """

  def __init__(self, session: Any, number: int):
    """Stores the arguments, of a `Session`; nothing of the step has begun."""
    self.number = number
    self._session = session
    self._taken: set[str] = set()
    self._drawn: set[str] = set()

  def gradients(
    self,
    params: PyTree,
    loss: str = "",
    *,
    given: PyTree = None,
    batch: Mapping[str, np.ndarray] | None = None,
  ) -> PyTree:
    """Returns private gradients, which may be released.

    Args:
      params: pytree of floating arrays, the same in all processes.
      loss: the name of the loss, if the session has several. Each draws its own
        examples, and can be asked once in a step.
      given: a pytree of arrays for the loss's fourth argument, of which no
        gradient is taken: frozen parameters, or those of another loss.
      batch: by name, the arrays of exactly the examples that `indices` names,
        in their order; for a session without a dataset.

    Returns:
      A pytree like params, float32 or wider: the noisy clipped sum over the
      expected batch size.

    Raises:
      ValueError: the loss has been asked in this step, or an argument is not as
        described. Nothing of the step has begun then.
      dpdist.errors.ReplayError: this step ran before the process was killed,
        and was computed from other values then; start again.
      dpdist.errors.SensitivityError: clipping does not bound what an example
        can do.
    """
    with self._session._alone():
      charged = self._session._charged_step(self.number, loss)
      if loss in self._taken:
        raise errors.ArgumentError(
          f"loss must be one that step {self.number} has not given gradients"
          f" of, got {loss!r}: each is charged once for each step; name all"
          " losses of a step in dpdist.Session(loss={...})"
        )
      return self._session._releases.gradients(
        *(charged, loss, params, given, batch),
        is_drawn=loss in self._drawn,
        take=lambda: self._taken.add(loss),
      )

  @property
  def indices(self) -> np.ndarray:
    """Returns which examples the step draws, for a loader of one's own.

    They are private, and may leave the process in gradients alone.
    """
    return self.indices_for("")

  def indices_for(self, loss: str) -> np.ndarray:
    """Returns which examples a loss draws, if the session has several."""
    with self._session._alone():
      charged = self._session._charged_step(self.number, loss)
      self._drawn.add(loss)
      return self._session._releases.draw(charged)

  @property
  def has_begun(self) -> bool:
    """Returns whether anything of the step was computed or drawn."""
    return bool(self._taken or self._drawn)
