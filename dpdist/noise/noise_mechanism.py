"""The seam through which a run draws its noise.

A mechanism never sees the sum that it protects: it draws the noise, and
`dpdist.mechanism.mechanism` adds it. So no mechanism can round the sum by
itself, and float and exact sums have the same noise. It is registered by name,
or named in settings as "package.module:attribute", is called with its options,
and needs a proof of its own; see `dpdist.accounting.step_events`.
"""

from typing import Any, Literal, Protocol

import jax

PyTree = Any


class NoiseState(Protocol):
  """The state of a mechanism, a NamedTuple that is a pytree.

  It is saved in checkpoints, which are released: nothing that noise can be
  computed from may be in it.
  """

  @property
  def draws(self) -> jax.Array:
    """Returns the number of draws so far, an int32 scalar."""


class NoiseMechanism(Protocol):
  """Draws Gaussian noise for the sums of a run. It must be hashable.

  Attributes:
    restarts: "from_index" if the state after n draws is that of `init` but for
      `draws`; "from_state" if it must be kept.
  """

  restarts: Literal["from_index", "from_state"]

  def sensitivity_factor(self, num_steps: int) -> float:
    """Returns by how much the noise of one step is larger than the plan's.

    The standard deviation of the plan, noise multiplier times sensitivity, is
    of all steps as one mechanism; see the proof.
    """

  def init(self, params: PyTree) -> Any:
    """Returns the `NoiseState` before the first step; traceable.

    Args:
      params: pytree like the sums. What is in the state like params, of the
        same shapes, is divided over devices like them.
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
      like: pytree of zeros, float32 or wider: the shapes of the sum.
      state: of the step.
      key: a typed PRNG key, secret, the same at each step.
      release_index: int32 scalar, the step's place among all that are charged
        under the plan; may be None where the plan has no schedule.
      stddev: prefix pytree of `like`: standard deviations of the noise on an
        entry, numbers or float32 scalars. With exact sums, an entry of noise
        far beyond six of them makes that of the sum NaN.

    Returns:
      The noise, a pytree like `like`, and the state after the step.
    """
