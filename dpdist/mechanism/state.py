"""Holds what noise and clipper remember from step to step."""

from typing import Any, NamedTuple

import jax

PyTree = Any


class MechanismState(NamedTuple):
  """The state of a mechanism whose clipper learns; all of it is released.

  Attributes:
    noise: of the noise mechanism.
    learned: of the clipper.
  """

  noise: Any
  learned: PyTree

  @property
  def draws(self) -> jax.Array:
    """Returns the number of draws so far."""
    return self.noise.draws
