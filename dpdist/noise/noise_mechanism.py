"""The interface through which a run draws its noise.

A mechanism never sees the sum that it protects: it draws the noise, and
`dpdist.mechanism.mechanism` adds it. So no mechanism can round the sum by
itself, and float and exact sums have the same noise. A mechanism is registered
by name, or settings name it as "package.module:attribute". It is called with
its options. It needs a proof of its own; see `dpdist.accounting.step_events`.
"""

from typing import Any, Literal, Protocol

import jax

PyTree = Any


class NoiseState(Protocol):
  """The state of a mechanism, a NamedTuple that is a pytree.

  It is saved in checkpoints, which are released. So it may hold nothing from
  which noise can be computed.
  """

  @property
  def draws(self) -> jax.Array:
    """Returns the number of draws so far, an int32 scalar."""


class NoiseMechanism(Protocol):
  """Draws Gaussian noise for the sums of a run. It must be hashable.

  Attributes:
    restarts: "from_index" if the state after n draws equals that of `init`,
      except for `draws`; "from_state" if the state must be saved.
  """

  restarts: Literal["from_index", "from_state"]

  def sensitivity_factor(self, num_steps: int) -> float:
    """Returns the factor by which one step's noise is larger than the plan's.

    The plan's standard deviation is noise multiplier times sensitivity. It is
    meant for all steps together, as one mechanism; see the proof.
    """

  def init(self, params: PyTree) -> Any:
    """Returns the `NoiseState` before the first step; traceable.

    Args:
      params: pytree like the sums. Parts of the state that have the structure
        and shapes of params are divided over devices like them.
    """

  def draw(
    self,
    like: PyTree,
    state: Any,
    *,
    key: jax.Array,
    release_index: jax.Array | None,
    stddev: PyTree,
  ) -> tuple[PyTree, Any]:
    """Draws the noise of one step, outside `jax.shard_map`; traceable.

    Args:
      like: pytree of zeros in the shapes of the sum, float32 or wider.
      state: the state before the step.
      key: a typed PRNG key, secret, the same at each step.
      release_index: int32 scalar, the step's place among all that are charged
        under the plan; may be None where the plan has no schedule.
      stddev: prefix pytree of `like`, of numbers or float32 scalars: the
        standard deviation of the noise on each entry. With exact sums, an entry
        of noise far beyond six of them makes that of the sum NaN.

    Returns:
      The noise, a pytree like `like`, and the state after the step.
    """
