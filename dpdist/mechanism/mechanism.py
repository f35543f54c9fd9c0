"""Binds a plan to its sampler, clipped sum and noise.

The packages sampling, clipping, noise and accounting do not import each other.
Only this module passes the numbers of one plan to all of them, so that what
runs is what was accounted for:

  sampler      draws as plan.sampling says, with plan.sampling_probability
  clipped sum  has l2 sensitivity S under plan.neighboring_relation
  noise        has standard deviation plan.noise_multiplier * S on that sum
  division     is by plan.expected_batch_size, a public number

One step is then one subsampled Gaussian mechanism, and plan.epsilon() composes
plan.num_steps of them. Where a schedule changes the numbers, a step's numbers
are those of its release, that is its place among all steps charged under the
plan. Every release happens once, even if steps were charged and lost.
"""

import bisect
from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpdist import clipping
from dpdist.keys import keys
from dpdist.noise import noise
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rounding
from dpdist.privacy import rules
from dpdist.sampling import sampler
from dpdist.sums import compensated
from dpdist.sums import fixed_point

PyTree = Any
# Inside `Mechanism` the name `noise` is a method.
_NoiseState = noise.GaussianNoiseState

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

  Attributes:
    plan: the plan that the run is bound to.
    clipped_grad: (params, batch, ...) -> dpdist.clipping.ClippedGrads.
    sensitivity: l2 sensitivity of the clipped sum.
    noise_stddev: standard deviation of the noise on an entry of that sum.
    exact_group_size: examples whose clipped gradients are summed in float32;
      the sums of such groups are truncated and summed in integers. None: all is
      summed in float32.

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

  plan: plan_lib.PrivacyPlan
  clipped_grad: clipping.ClippedGrad
  sensitivity: float
  noise_stddev: float
  exact_group_size: int | None = None

  def noise(
    self, key: jax.Array, release_index: jax.Array | None = None
  ) -> optax.GradientTransformation:
    """Returns the noise mechanism for sums over all devices.

    Args:
      key: a typed PRNG key.
      release_index: int32 scalar, the step's release; needed with a schedule.
    """
    if not self.plan.noise_schedule:
      return noise.gaussian_noise(self.noise_stddev, key)
    stddevs = [
      phase.noise_multiplier * self.sensitivity for phase in self.plan.phases
    ]
    return noise.gaussian_noise(self._now(stddevs, release_index), key)

  def add_noise(
    self,
    total: compensated.Sum,
    state: _NoiseState,
    key: jax.Array,
    release_index: jax.Array | None = None,
  ) -> tuple[PyTree, _NoiseState]:
    """Adds the noise of a step to its clipped sum.

    Guarantees:
      The sum, low included, and the noise are rounded together: no part of the
      sum is rounded by itself, which would move it.

    Args:
      total: the sum over all devices.
      state: the state of the noise.
      key: as for `noise`.
      release_index: as for `noise`.

    Returns:
      The noisy sum, and the next state of the noise.
    """
    zeros = jax.tree.map(jnp.zeros_like, total.high)
    drawn, state = self.noise(key, release_index).update(zeros, state)
    return compensated.add_once(total, drawn).high, state

  def grid(self, params: PyTree, num_devices: int) -> tuple[float, ...]:
    """Returns the units of the sum over devices; see `rounding.grid`."""
    return rounding.grid(
      self.plan, num_devices, sum(x.size for x in jax.tree.leaves(params))
    )

  def noise_norm(self, num_entries: int, release_index: int) -> float:
    """Returns the root-mean-square norm of the noise in the mean gradient.

    It is public, since it follows from the plan.

    Args:
      num_entries: entries of the mean gradient, all parameters together.
      release_index: the step's place among all that are charged under the plan.
    """
    phase = self.plan.phase(release_index)
    size = phase.expected_batch_size / self.plan.group_size
    stddev = phase.noise_multiplier * self.sensitivity / size
    return stddev * math.sqrt(num_entries)

  def mean(
    self, noisy_sum: PyTree, release_index: jax.Array | None = None
  ) -> PyTree:
    """Divides the noisy sum by the expected, never the drawn, number of units.

    Args:
      noisy_sum: pytree of arrays.
      release_index: as for `noise`.
    """
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
    return _LARGEST_NORMAL * self.noise_stddev

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
      num_entries=sum(leaf.size for leaf in jax.tree.leaves(params)),
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
  stddev = plan.noise_multiplier * sensitivity
  return Mechanism(plan, clipped_grad, sensitivity, stddev)


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
  """Binds a plan to a loss.

  Args:
    plan: the plan.
    loss_fn: (params, example, rng) -> (loss, aux), for one example.
    method: how gradients are clipped; see `dpdist.clipped_grad`.
    microbatch_size: how many gradients exist at once on a device.
    exact_group_size: see `Mechanism`; it needs the step
      `dpdist.training.exact_step.ExactStep`.
    platform: the platform to compile for; see `dpdist.clipped_grad`.
    frozen: maps a parameter's path to whether it is not trained, and so in no
      gradient, sum or noise; None: all are trained.

  Returns:
    The mechanism.

  Raises:
    ValueError: with the argument's name, its value and what would be right.
  """
  if exact_group_size is not None:
    for name in ("noise_schedule", "batch_size_schedule"):
      if getattr(plan, name):
        raise ValueError(
          f"{name} must be empty with exact sums, got {getattr(plan, name)}"
        )
    if not 1 <= exact_group_size <= _LARGEST_GROUP:
      raise ValueError(
        f"exact_group_size must be in [1, {_LARGEST_GROUP}], got"
        f" {exact_group_size}"
      )
    if microbatch_size is not None and exact_group_size % microbatch_size:
      raise ValueError(
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


@dataclasses.dataclass(frozen=True, repr=False)
class Streams:
  """The random streams of one branch of a run.

  They depend only on the secret and the branch. A branch may have other data or
  other numbers than the one before it, so all of its keys are new.

  Attributes:
    secret: 32 bytes; see `dpdist.keys`.
    branch: the branch's identity; see `dpdist.ledger.history.Branch`.
  """

  secret: bytes
  branch: str

  def sampler(
    self, plan: plan_lib.PrivacyPlan, first_release: int = 0
  ) -> sampler.Sampler:
    """Returns a sampler of the plan's units: rows, or groups of rows.

    Args:
      plan: the plan.
      first_release: step 0's; see `dpdist.ledger.history.Branch.release_index`.
    """
    seed = keys.derive(self.secret, "sampling", branch=self.branch)
    samplers = [
      rules.sampling_of(plan).make(
        plan,
        phase.expected_batch_size,
        seed=seed,
        first_release=first_release,
      )
      for phase in plan.phases
    ]
    if len(samplers) == 1:
      return samplers[0]
    starts = [phase.start for phase in plan.phases]

    def scheduled(step: int) -> np.ndarray:
      # All settings may share a seed: they never draw at the same step.
      index = bisect.bisect_right(starts, step + first_release) - 1
      return samplers[index](step)

    return scheduled

  def key(self, stream: str, step: int | None = None) -> jax.Array:
    """Returns a typed PRNG key for a named stream."""
    return noise.as_key(self.key_data(stream, step))

  def key_data(self, stream: str, step: int | None = None) -> np.ndarray:
    """Returns the uint32 [2] of the key."""
    key = keys.derive(self.secret, stream, branch=self.branch)
    return keys.key_data(key, step)
