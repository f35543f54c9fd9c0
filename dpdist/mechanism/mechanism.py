"""The one page where the plan meets sampler, clipped sum and noise.

The privacy rooms (sampling, clipping, noise, accounting) do not know each
other. Here, and only here, the numbers of one plan are handed to all of them,
so that what runs is what was accounted for:

  sampler      draws as plan.sampling says, with plan.sampling_probability
  clipped sum  has l2 sensitivity S under plan.neighboring_relation
  noise        has standard deviation plan.noise_multiplier * S on that sum
  division     is by plan.expected_batch_size, a public number

One step is then one subsampled Gaussian mechanism, plan.num_steps of which
plan.epsilon() composes. Where a schedule changes the numbers, they are those of
the step's place among all that were charged under the plan, its release: every
release happens once, whatever was charged and lost on the way.
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
from dpdist import sampling
from dpdist.keys import keys
from dpdist.noise import noise
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rounding
from dpdist.privacy import schedule
from dpdist.sums import compensated
from dpdist.sums import fixed_point

PyTree = Any
# `Mechanism` has a method of the module's name.
_NoiseState = noise.GaussianNoiseState

# With exact sums, examples are clipped by this much, a thousandth, earlier.
_ROOM = 2.0**-10
# In standard deviations; a float32 normal ends at 5.42.
_LARGEST_NORMAL = 6
# Of float32, less what scaling to limbs needs.
_LARGEST_FLOAT = 2.0**96
_LARGEST_GROUP = 2**13


@dataclasses.dataclass(frozen=True)
class Mechanism:
  """Everything in a step that the privacy guarantee rests on.

  Attributes:
    plan: the numbers the run is bound to.
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
    self, key: jax.Array, release: jax.Array | None = None
  ) -> optax.GradientTransformation:
    """The noise for sums over all devices.

    Args:
      key: a typed PRNG key.
      release: int32 scalar, of the step; needed where there is a schedule.
    """
    if not self.plan.noise_schedule:
      return noise.gaussian_noise(self.noise_stddev, key)
    stddevs = [
      setting.noise_multiplier * self.sensitivity
      for setting in self.plan.settings
    ]
    return noise.gaussian_noise(self._now(stddevs, release), key)

  def add_noise(
    self,
    total: compensated.Sum,
    state: _NoiseState,
    key: jax.Array,
    release: jax.Array | None = None,
  ) -> tuple[PyTree, _NoiseState]:
    """Adds the noise of a step to its clipped sum.

    Guarantees:
      What is returned is the sum, low included, and the noise, rounded
      together: no part of the sum is rounded by itself, which would move it.

    Args:
      total: over all devices.
      state: of the noise.
      key: as for `noise`.
      release: as for `noise`.

    Returns:
      The noisy sum; and the state after it.
    """
    zeros = jax.tree.map(jnp.zeros_like, total.high)
    drawn, state = self.noise(key, release).update(zeros, state)
    return compensated.add_once(total, drawn).high, state

  def grid(self, params: PyTree, num_devices: int) -> tuple[float, ...]:
    """Units by which the devices' sums are added up; see
    `dpdist.privacy.rounding`."""
    return rounding.grid(
      self.plan, num_devices, sum(x.size for x in jax.tree.leaves(params))
    )

  def noise_norm(self, num_entries: int, release: int) -> float:
    """The length that the noise in the mean has, as a root of mean squares.

    Public: it follows from the plan.

    Args:
      num_entries: of the mean gradient, all parameters together.
      release: the step's place among all that are charged under the plan.
    """
    setting = self.plan.setting(release)
    size = setting.expected_batch_size / self.plan.group_size
    stddev = setting.noise_multiplier * self.sensitivity / size
    return stddev * math.sqrt(num_entries)

  def mean(self, noisy_sum: PyTree, release: jax.Array | None = None) -> PyTree:
    """The noisy sum over the expected, never the drawn, number of units.

    Args:
      noisy_sum: pytree of arrays.
      release: as for `noise`.
    """
    sizes = [
      setting.expected_batch_size / self.plan.group_size
      for setting in self.plan.settings
    ]
    size = sizes[0]
    if self.plan.batch_size_schedule:
      size = self._now(sizes, release)
    return jax.tree.map(lambda x: x / size, noisy_sum)

  def _now(self, values: list[float], release: jax.Array | None) -> Any:
    """What a schedule says at a release: float32 scalar."""
    if release is None:
      raise ValueError("release must be given where the plan has a schedule")
    starts = jnp.array([setting.start for setting in self.plan.settings])
    index = jnp.searchsorted(starts, release, side="right") - 1
    return jnp.array(values, jnp.float32)[index]

  @property
  def largest_in_group(self) -> float:
    """A bound on every entry of a group's sum.

    The room between the clip norms is more than float32 rounds away in groups
    of up to 2**13 examples.
    """
    assert self.exact_group_size is not None
    return self.exact_group_size * self.plan.l2_clip_norm

  @property
  def largest_noise(self) -> float:
    """A bound on every entry of the noise."""
    return _LARGEST_NORMAL * self.noise_stddev

  @property
  def largest_sum(self) -> float:
    """A bound on every entry of the noisy sum."""
    return self._most_groups * self.largest_in_group + self.largest_noise

  @property
  def _most_groups(self) -> int:
    assert self.exact_group_size is not None
    return -(-self.plan.num_examples // self.exact_group_size)

  def sum_format(self, params: PyTree) -> fixed_point.Format:
    """The format of the exact sum of gradients of params."""
    return fixed_point.choose(
      largest=self.largest_sum,
      # A group's sum, and what rounding left out of it.
      num_terms=2 * self._most_groups,
      num_entries=sum(leaf.size for leaf in jax.tree.leaves(params)),
      tolerance=(_ROOM - rounding.ROOM) * self.plan.l2_clip_norm,
    )


def of(
  plan: plan_lib.PrivacyPlan, clipped_grad: clipping.ClippedGrad
) -> Mechanism:
  """Binds a plan to a clipped gradient, whose sensitivity the noise follows.

  That of a group, too: what one example of it can do is in the accounting.
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
    plan: the numbers.
    loss_fn: (params, example, rng) -> (loss, aux), for one example.
    method: how gradients are clipped; see `dpdist.clipped_grad`.
    microbatch_size: how many gradients exist at once on a device.
    exact_group_size: see `Mechanism`; a step with one is
      `dpdist.training.exact_step.ExactStep`.
    platform: what it is compiled for; see `dpdist.clipped_grad`.
    frozen: from a parameter's path to whether it is not trained, and so in no
      gradient, sum or noise; None: all are trained.

  Returns:
    The mechanism.

  Raises:
    ValueError: names the argument, its value and what would be right.
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
    # Noise is for the whole clip norm; examples are clipped a little earlier.
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
  """The random streams of one branch of a run; each depends on its secret
  alone.

  A branch is a continuation that may see other data or other numbers than the
  one before it; its keys are all new.

  Attributes:
    secret: 32 bytes; see `dpdist.keys`.
    branch: the branch's identity; see `dpdist.ledger.history.Branch`.
  """

  secret: bytes
  branch: str

  def sampler(
    self, plan: plan_lib.PrivacyPlan, first_release: int = 0
  ) -> Callable[[int], np.ndarray]:
    """Draws the plan's units: rows, or groups of rows.

    Args:
      plan: the numbers.
      first_release: of step 0; see `dpdist.ledger.history.Branch.release`.
    """
    seed = keys.derive(self.secret, "sampling", branch=self.branch)
    samplers = [
      _sampler(plan, setting, first_release, seed) for setting in plan.settings
    ]
    if len(samplers) == 1:
      return samplers[0]
    starts = [setting.start for setting in plan.settings]

    def scheduled(step: int) -> np.ndarray:
      # One seed for all: they never draw at the same step.
      index = bisect.bisect_right(starts, step + first_release) - 1
      return samplers[index](step)

    return scheduled

  def key(self, stream: str, step: int | None = None) -> jax.Array:
    """A typed PRNG key for a named stream."""
    return noise.as_key(self.words(stream, step))

  def words(self, stream: str, step: int | None = None) -> np.ndarray:
    """The uint32 [2] that the key is made of."""
    key = keys.derive(self.secret, stream, branch=self.branch)
    return keys.prng_words(key, step)


def _sampler(
  plan: plan_lib.PrivacyPlan,
  setting: schedule.Setting,
  first_release: int,
  seed: bytes,
) -> Callable[[int], np.ndarray]:
  """Draws as one setting of a plan says."""
  units, q = plan.num_units, plan.probability(setting)
  if plan.sampling == "fixed_size":
    return sampling.FixedSizeSampler(
      num_examples=units,
      batch_size=int(setting.expected_batch_size),
      seed=seed,
    )
  if plan.sampling == "truncated_poisson":
    assert plan.truncated_batch_size is not None
    return sampling.TruncatedPoissonSampler(
      num_examples=units,
      sampling_probability=q,
      truncated_batch_size=plan.truncated_batch_size,
      seed=seed,
    )
  if plan.sampling == "cyclic_poisson":
    return sampling.CyclicPoissonSampler(
      num_examples=units,
      sampling_probability=q,
      cycle_length=plan.cycle_length,
      # Python's remainder is right for the negative ones of a later branch.
      offset=first_release % plan.cycle_length,
      seed=seed,
    )
  return sampling.PoissonSampler(
    num_examples=units, sampling_probability=q, seed=seed
  )
