"""Holds what noise and clipper remember from step to step."""

from typing import Any, NamedTuple

import jax

PyTree = Any


class MechanismState(NamedTuple):
  """The state of a mechanism whose clipper learns; all of it is released."""

  noise: Any  # Of the noise mechanism.
  learned: PyTree  # Of the clipper.

  @property
  def draws(self) -> jax.Array:
    """Returns the number of draws so far."""
    return self.noise.draws
