"""What a mechanism says of itself, held against what it does."""

import jax
import jax.numpy as jnp
import optax
import pytest

from dpdist.mechanism import mechanism
from dpdist.privacy import plan as plan_lib


def _mechanism(**changes):
  given = {
    "num_examples": 1_000,
    "expected_batch_size": 50,
    "num_steps": 10,
    "l2_clip_norm": 0.5,
    "target_delta": 1e-5,
    "noise_multiplier": 2.0,
  }
  plan = plan_lib.make_plan(plan_lib.PrivacyConfig(**given | changes))
  return mechanism.make(plan, lambda p, x, rng: (p * x, None))


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"neighboring_relation": "replace_one"},
    {"neighboring_relation": "zero_out", "group_size": 5},
    {"noise_schedule": ((3, 7.0),)},
    {"batch_size_schedule": ((4, 10.0),)},
  ],
  ids=str,
)
@pytest.mark.parametrize("release", [0, 4])
def test_noise_norm_is_the_length_of_the_noise(changes, release):
  found = _mechanism(**changes)
  nothing = {"a": jnp.zeros(40_000), "b": jnp.zeros((200, 50))}
  step = jnp.int32(release)
  state = found.init(nothing)
  noisy, _ = found.draw_noise(nothing, state, jax.random.key(1), step)
  length = float(optax.tree.norm(found.mean(noisy, step)))
  assert length == pytest.approx(found.noise_norm(50_000, release), rel=0.02)
