"""The one page where the plan meets sampler, clipped sum and noise.

The privacy rooms (sampling, clipping, noise, accounting) do not know each
other. Here, and only here, the numbers of one plan are handed to all of them,
so that what runs is what was accounted for:

  sampler      draws each example with plan.sampling_probability
  clipped sum  has l2 sensitivity S under plan.neighboring_relation
  noise        has standard deviation plan.noise_multiplier * S on that sum
  division     is by plan.expected_batch_size, a public number

One step is then one subsampled Gaussian mechanism, plan.num_steps of which
plan.epsilon() composes.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import optax

from dpdist import clipping
from dpdist import keys
from dpdist import noise
from dpdist import plan as plan_lib
from dpdist import sampling

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Mechanism:
  """Everything in a step that the privacy guarantee rests on.

  Attributes:
    plan: the numbers the run is bound to.
    clipped_grad: (params, batch, ...) -> dpdist.clipping.ClippedGrads.
    sensitivity: l2 sensitivity of the clipped sum.
    noise_stddev: standard deviation of the noise on an entry of that sum.
  """

  plan: plan_lib.PrivacyPlan
  clipped_grad: clipping.ClippedGrad
  sensitivity: float
  noise_stddev: float

  def noise(self, key: jax.Array) -> optax.GradientTransformation:
    """The noise for sums over all devices; key is a typed PRNG key."""
    return noise.gaussian_noise(self.noise_stddev, key)

  def mean(self, noisy_sum: PyTree) -> PyTree:
    """The noisy sum over the expected, never the drawn, batch size."""
    return jax.tree.map(lambda x: x / self.plan.expected_batch_size, noisy_sum)


def make(
  plan: plan_lib.PrivacyPlan,
  loss_fn: Callable[..., Any],
  *,
  method: str = "auto",
  microbatch_size: int | None = None,
) -> Mechanism:
  """Binds a plan to a loss.

  Args:
    plan: the numbers.
    loss_fn: (params, example, rng) -> (loss, aux), for one example.
    method: how gradients are clipped; see `dpdist.clipped_grad`.
    microbatch_size: how many gradients exist at once on a device.

  Returns:
    The mechanism.
  """
  clipped_grad = clipping.clipped_grad(
    loss_fn,
    l2_clip_norm=plan.l2_clip_norm,
    has_aux=True,
    method=method,
    microbatch_size=microbatch_size,
  )
  sensitivity = clipped_grad.sensitivity(plan.neighboring_relation)
  return Mechanism(
    plan, clipped_grad, sensitivity, plan.noise_multiplier * sensitivity
  )


@dataclasses.dataclass(frozen=True, repr=False)
class Streams:
  """The random streams of one branch of a run; each depends on its secret
  alone.

  A branch is a continuation that may see other data or other numbers than the
  one before it; its keys are all new.

  Attributes:
    secret: at least 16 bytes; see `dpdist.keys`.
    branch: the branch's identity; see `dpdist.ledger.Branch`.
  """

  secret: bytes
  branch: str

  def sampler(self, plan: plan_lib.PrivacyPlan) -> sampling.PoissonSampler:
    """Draws the plan's examples."""
    return sampling.PoissonSampler(
      num_examples=plan.num_examples,
      sampling_probability=plan.sampling_probability,
      seed=keys.derive(self.secret, "sampling", branch=self.branch),
    )

  def key(self, stream: str, step: int | None = None) -> jax.Array:
    """A typed PRNG key for a named stream."""
    key = keys.derive(self.secret, stream, branch=self.branch)
    return noise.as_key(keys.prng_words(key, step))
