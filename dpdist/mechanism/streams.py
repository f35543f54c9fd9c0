"""Makes the random streams of a run: its samplers and its keys."""

import bisect
import dataclasses

import jax
import numpy as np

from dpdist.keys import keys
from dpdist.noise import noise
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rules
from dpdist.sampling import sampler


@dataclasses.dataclass(frozen=True, repr=False)
class Streams:
  """The random streams of one branch of a run.

  They depend only on the secret and the branch. A branch may have other data or
  other numbers than the one before it, so all of its keys are new.
  """

  secret: bytes  # 32 bytes; see `dpdist.keys`.
  branch: str  # The branch's identity; see `dpdist.ledger.history.Branch`.

  def sampler(
    self, plan: plan_lib.PrivacyPlan, first_release: int = 0
  ) -> sampler.Sampler:
    """Returns a sampler of the plan's units: rows, or groups of rows.

    first_release is step 0's `dpdist.ledger.history.Branch.release_index`.
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
