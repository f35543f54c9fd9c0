"""Binds a plan to its sampler, clipped sum and noise.

The packages sampling, clipping, noise and accounting do not import each other.
Only this module passes the numbers of one plan to all of them, so that what
runs is what was accounted for:

  sampler      draws as plan.sampling says, with plan.sampling_probability
  clipped sum  has l2 sensitivity S under plan.neighboring_relation
  noise        has standard deviation plan.noise_multiplier * S on that sum
  division     is by plan.expected_batch_size, a public number

One step is then one subsampled Gaussian mechanism, and plan.epsilon() composes
plan.num_steps of them. Where a schedule changes the numbers, a step uses those
of its release index: its place among all steps charged under the plan. Every
index is used for one release, even if charged steps were lost.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpdist import _validation
from dpdist import clipping
from dpdist import errors
from dpdist import registry
from dpdist.clipping import clipper as clipper_lib
from dpdist.mechanism import state as state_lib
from dpdist.mechanism import streams
from dpdist.noise import noise_mechanism
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rounding
from dpdist.sums import compensated
from dpdist.sums import fixed_point

PyTree = Any
Streams = streams.Streams
# With exact sums, the clip norm in use is smaller by this part, a thousandth.
_ROOM = 2.0**-10
# In standard deviations; a float32 normal is at most 5.42.
_LARGEST_NORMAL = 6
# The largest float32, with room for scaling to limbs.
_LARGEST_FLOAT = 2.0**96
_LARGEST_GROUP = 2**13


@dataclasses.dataclass(frozen=True)
class Mechanism:
  """Everything in a step that the privacy guarantee depends on.

  Guarantees with exact_group_size:
    Truncation is inside the sensitivity. N examples make at most M = ceil(N /
    exact_group_size) groups, and removing one may shift all that follow it. A
    group's sum is truncated, and so is what rounding left out of it, so that
    two clipped sums of d entries differ by at most the clip norm in use plus
    4 M sqrt(d) units of the last limb. The clip norm in use is (1 - 2**-10) C,
    and `sum_format` takes limbs until that is at most 2**-11 C. The other
    2**-11 C are for the float32 rounding inside groups; what that may take
    beyond them is `dpdist.privacy.rounding.Bound.inside`. Noise is added in
    integers as well, rounded down to their unit, so that all rounding is of a
    noisy value.
  """

  plan: plan_lib.PrivacyPlan  # The plan that the run is bound to.
  # (params, batch, ...) -> dpdist.clipping.ClippedGrads.
  clipped_grad: clipping.ClippedGrad
  sensitivity: float  # The l2 sensitivity of the clipped sum.
  # Standard deviation of the noise on an entry of that sum.
  noise_stddev: float
  # The number of examples in a group. The clipped gradients of a group are
  # summed in float32; the sums of groups are truncated and added as integers.
  # None: all is summed in float32.
  exact_group_size: int | None = None

  @functools.cached_property
  def clipper(self) -> clipping.Clipper:
    """Returns the plan's clipper, of `clipped_grad`."""
    make = registry.resolve("clipper", self.plan.clipping, setting="clipping")
    return make(self.clipped_grad, **dict(self.plan.clipping_options))

  @functools.cached_property
  def noise(self) -> noise_mechanism.NoiseMechanism:
    """Returns the plan's noise mechanism."""
    make = registry.resolve("noise", self.plan.noise, setting="noise")
    return make(**dict(self.plan.noise_options))

  def init(self, params: PyTree) -> Any:
    """Returns the state before step 0: the noise's, and what is learned."""
    like = self.with_extra(params, jnp.zeros)
    learned, state = self.clipper.init(), self.noise.init(like)
    if not jax.tree.leaves(learned):
      return state
    return state_lib.MechanismState(state, learned)

  def learned(self, state: Any) -> PyTree:
    """Returns what the clipper has learned, from the state."""
    return getattr(state, "learned", ())

  def state_at(self, params: PyTree, num_draws: jax.Array) -> Any:
    """Returns the state after so many draws, if their number decides it."""
    state = self.init(params)
    if self.noise.restarts != "from_index" or isinstance(
      state, state_lib.MechanismState
    ):
      raise errors.ArgumentError(
        "noise and clipping must be such that their state after a step follows"
        f" from its number, got {self.plan.noise!r} and {self.plan.clipping!r}"
      )
    return state._replace(draws=num_draws)

  def with_extra(
    self, gradient: PyTree, leaf: Callable[[tuple[int, ...]], Any]
  ) -> PyTree:
    """Returns a tree like the sum: gradient, and leaf(shape) of each extra."""
    extra = {
      name: leaf(part.shape) for name, part in self.clipper.extra.items()
    }
    return clipping.Clipped(gradient, extra) if extra else gradient

  def gradient_of(self, total: PyTree) -> PyTree:
    """Returns the part of a tree like the sum that is like params."""
    return total.gradient if self.clipper.extra else total

  def clipped_sum(
    self,
    params: PyTree,
    batch: PyTree,
    learned: PyTree = (),
    *,
    is_padding_example: jax.Array,
    **arguments: Any,
  ) -> clipping.ClippedGrads:
    """Returns the clipped sum of a batch, with the clipper's extra leaves.

    `learned` is what the clipper has learned; for the rest see
    `dpdist.clipping.ClippedGrad`.
    """
    grads = self.clipper.clip(
      params,
      batch,
      learned,
      is_padding_example=is_padding_example,
      **arguments,
    )
    if not self.clipper.extra:
      return grads
    values = self.clipper.observe(grads, learned)
    add_up = lambda x: clipper_lib.add_up(x, is_padding_example, self._bound)
    sums = {name: add_up(values[name]) for name in self.clipper.extra}
    low = grads.low
    if low is not None:
      low = clipping.Clipped(low, jax.tree.map(jnp.zeros_like, sums))
    return grads._replace(sum=clipping.Clipped(grads.sum, sums), low=low)

  def draw_noise(
    self,
    like: PyTree,
    state: Any,
    key: jax.Array,
    release_index: jax.Array | None = None,
  ) -> tuple[PyTree, Any]:
    """Draws the noise of a step, like zeros of the sum over all devices.

    All leaves together are one Gaussian mechanism with the plan's noise
    multiplier. A leaf with a share s of what a step spends has 1 / sqrt(s)
    times the noise that it would have alone. The shares add up to 1. A schedule
    needs the release_index, see the module. Returns the noise, and the state
    after the step.
    """
    of_gradient: Any = self.noise_stddev
    if self.plan.noise_schedule:
      scale = self.noise_stddev_over(1.0)
      of_gradient = self._now(
        [phase.noise_multiplier * scale for phase in self.plan.phases],
        release_index,
      )
    stddev = of_gradient
    if self.clipper.extra:
      extra = {
        name: of_gradient * math.sqrt(self._gradient_share / part.share)
        for name, part in self.clipper.extra.items()
      }
      stddev = clipping.Clipped(of_gradient, extra)
    is_learned = isinstance(state, state_lib.MechanismState)
    drawn, after = self.noise.draw(
      like,
      state.noise if is_learned else state,
      key=key,
      release_index=release_index,
      stddev=stddev,
    )
    return drawn, state._replace(noise=after) if is_learned else after

  @property
  def _bound(self) -> float:
    """Returns the most that an example counts in the sum of an extra leaf."""
    return clipper_lib.bound(self.clipped_grad.sensitivity())

  @property
  def _gradient_share(self) -> float:
    """Returns the part of what a step spends that the gradient has."""
    return 1.0 - math.fsum(part.share for part in self.clipper.extra.values())

  def noise_stddev_over(self, noise_multiplier: float) -> float:
    """Returns the standard deviation on an entry of the gradient's sum."""
    factor = self.noise.sensitivity_factor(self.plan.num_steps)
    factor /= math.sqrt(self._gradient_share)
    return noise_multiplier * self.sensitivity * factor

  def add_noise(
    self,
    total: compensated.Sum,
    state: Any,
    key: jax.Array,
    release_index: jax.Array | None = None,
  ) -> tuple[PyTree, Any]:
    """Adds the noise of a step to its clipped sum, as `draw_noise` draws it.

    The sum, low included, and the noise are rounded together: no part of the
    sum is rounded by itself, which would move it.
    """
    zeros = jax.tree.map(jnp.zeros_like, total.high)
    drawn, state = self.draw_noise(zeros, state, key, release_index)
    return compensated.add_once(total, drawn).high, state

  def finish(
    self, noisy_sum: PyTree, state: Any, release_index: jax.Array | None = None
  ) -> tuple[PyTree, Any]:
    """Returns the gradient for the optimizer, of what `add_noise` returned."""
    mean, extra = self.mean(noisy_sum, release_index), {}
    if self.clipper.extra:
      extra = {name: x / self._bound for name, x in mean.extra.items()}
    mean, learned = self.clipper.finish(
      self.gradient_of(mean), extra, self.learned(state)
    )
    if isinstance(state, state_lib.MechanismState):
      state = state._replace(learned=learned)
    return mean, state

  def grid(self, params: PyTree, num_devices: int) -> tuple[float, ...]:
    """Returns the units of the sum over devices; see `rounding.grid`."""
    return rounding.grid(self.plan, num_devices, self._num_entries(params))

  def _num_entries(self, params: PyTree) -> int:
    leaves = jax.tree.leaves(self.with_extra(params, np.zeros))
    return sum(leaf.size for leaf in leaves)

  def noise_norm(self, num_entries: int, release_index: int) -> float:
    """Returns the root-mean-square norm of the noise in the mean gradient.

    It is public, since it follows from the plan.
    """
    phase = self.plan.phase(release_index)
    size = phase.expected_batch_size / self.plan.group_size
    stddev = self.noise_stddev_over(phase.noise_multiplier) / size
    return stddev * math.sqrt(num_entries)

  def mean(
    self, noisy_sum: PyTree, release_index: jax.Array | None = None
  ) -> PyTree:
    """Divides the noisy sum by the expected, not the drawn, number of units."""
    sizes = [
      phase.expected_batch_size / self.plan.group_size
      for phase in self.plan.phases
    ]
    size = sizes[0]
    if self.plan.batch_size_schedule:
      size = self._now(sizes, release_index)
    return jax.tree.map(lambda x: x / size, noisy_sum)

  def _now(self, values: list[float], release_index: jax.Array | None) -> Any:
    """Returns a schedule's value at a release, a float32 scalar."""
    if release_index is None:
      raise ValueError(
        "release_index must be given where the plan has a schedule"
      )
    starts = jnp.array([phase.start for phase in self.plan.phases])
    index = jnp.searchsorted(starts, release_index, side="right") - 1
    return jnp.array(values, jnp.float32)[index]

  @property
  def largest_in_group(self) -> float:
    """Returns a bound on every entry of a group's sum.

    The room between the clip norms is more than float32 loses by rounding in
    groups of up to 2**13 examples.
    """
    assert self.exact_group_size is not None
    return self.exact_group_size * self.plan.l2_clip_norm

  @property
  def largest_noise(self) -> float:
    """Returns a bound on every entry of the noise."""
    share = self._gradient_share
    least = min([share, *(x.share for x in self.clipper.extra.values())])
    return _LARGEST_NORMAL * self.noise_stddev * math.sqrt(share / least)

  @property
  def largest_sum(self) -> float:
    """Returns a bound on every entry of the noisy sum."""
    return self._most_groups * self.largest_in_group + self.largest_noise

  @property
  def _most_groups(self) -> int:
    assert self.exact_group_size is not None
    return -(-self.plan.num_examples // self.exact_group_size)

  def sum_format(self, params: PyTree) -> fixed_point.Format:
    """Returns the format of the exact sum of gradients of params."""
    return fixed_point.choose(
      largest=self.largest_sum,
      # Each group adds two terms: its sum, and what rounding left out of it.
      num_terms=2 * self._most_groups,
      num_entries=self._num_entries(params),
      tolerance=(_ROOM - rounding.ROOM) * self.plan.l2_clip_norm,
    )


def of(
  plan: plan_lib.PrivacyPlan, clipped_grad: clipping.ClippedGrad
) -> Mechanism:
  """Binds a plan to a clipped gradient, whose sensitivity scales the noise.

  With groups it is a group's sensitivity; the accounting covers what one
  example of a group can do.
  """
  sensitivity = clipped_grad.sensitivity(plan.neighboring_relation)
  made = Mechanism(plan, clipped_grad, sensitivity, 0.0)
  shares = [part.share for part in made.clipper.extra.values()]
  # Written so that it refuses NaN.
  if not (made._gradient_share > 0 and all(share > 0 for share in shares)):
    raise errors.ArgumentError(
      "shares of extra leaves must be above 0 and leave some for the gradient,"
      f" got {dict(made.clipper.extra)}"
    )
  stddev = made.noise_stddev_over(plan.noise_multiplier)
  return dataclasses.replace(made, noise_stddev=stddev)


def make(
  plan: plan_lib.PrivacyPlan,
  loss_fn: Callable[..., Any],
  *,
  method: str = "auto",
  microbatch_size: int | None = None,
  exact_group_size: int | None = None,
  platform: str | None = None,
  frozen: Callable[[str], bool] | None = None,
) -> Mechanism:
  """Binds a plan to a loss (params, example, rng) -> (loss, aux).

  For method and platform see `dpdist.clipped_grad`; exact groups need the step
  `dpdist.training.exact_step.ExactStep`. `frozen` maps a parameter's path to
  whether it is not trained, and so in no gradient, sum or noise.
  """
  if exact_group_size is not None:
    for name in ("noise_schedule", "batch_size_schedule"):
      value = getattr(plan, name)
      _validation.require(not value, name, "empty with exact sums", value)
    rule = _validation.integer(1, _LARGEST_GROUP)
    _validation.check("exact_group_size", exact_group_size, rule)
    if microbatch_size is not None and exact_group_size % microbatch_size:
      raise errors.ArgumentError(
        f"microbatch_size must divide the exact_group_size of"
        f" {exact_group_size}, got {microbatch_size}"
      )
  clipped_grad = clipping.clipped_grad(
    loss_fn,
    l2_clip_norm=plan.l2_clip_norm,
    has_aux=True,
    method=method,
    microbatch_size=microbatch_size,
    platform=platform,
    frozen=frozen,
  )
  made = of(plan, clipped_grad)
  if exact_group_size is not None:
    # Noise is for the full clip norm; examples are clipped to a smaller one.
    made = dataclasses.replace(
      made,
      clipped_grad=dataclasses.replace(
        clipped_grad, l2_clip_norm=(1 - _ROOM) * plan.l2_clip_norm
      ),
      exact_group_size=exact_group_size,
    )
  if exact_group_size is not None and not made.largest_sum < _LARGEST_FLOAT:
    raise ValueError(
      "l2_clip_norm and noise_multiplier must keep a sum of all examples below"
      f" {_LARGEST_FLOAT:g} with exact sums, got {plan.l2_clip_norm} and"
      f" {plan.noise_multiplier}"
    )
  return made
