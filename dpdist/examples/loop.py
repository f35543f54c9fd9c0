"""A private training loop that takes any loss: copy it, and change it.

Nothing here depends on a framework: parameters are a pytree, and the loss is a
function of one example.
"""

from collections.abc import Callable
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpdist
from dpdist.examples import digits

PyTree = Any


def make_plan(num_examples: int, num_steps: int) -> dpdist.PrivacyPlan:
  """Returns the numbers of a run; the noise follows from the budget."""
  return dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=num_examples,
      expected_batch_size=256,
      num_steps=num_steps,
      l2_clip_norm=1.0,
      target_delta=1e-4,
      target_epsilon=2.0,
    )
  )


def train(
  loss_fn: Callable[..., jax.Array],
  params: PyTree,
  plan: dpdist.PrivacyPlan,
  x: np.ndarray,
  y: np.ndarray,
  *,
  learning_rate: float = 0.01,
) -> PyTree:
  """Returns trained parameters.

  Args:
    loss_fn: maps parameters, one example (x[i], y[i]) and a PRNG key of its own
      to a number.
    params: the initial parameters.
    plan: the numbers that training is bound to.
    x: [n, ...], inputs.
    y: [n, ...], targets.
    learning_rate: of Adam.
  """
  # Whoever knows these seeds can subtract the noise.
  sampler = dpdist.PoissonSampler(
    num_examples=plan.num_examples,
    sampling_probability=plan.sampling_probability,
    seed=secrets.token_bytes(32),
  )
  gradients = dpdist.private_gradients(
    loss_fn, plan, seed=secrets.token_bytes(32)
  )
  optimizer = optax.adam(learning_rate)
  noise_state, opt_state = gradients.init(params), optimizer.init(params)

  @jax.jit
  def step(params, opt_state, noise_state, batch, is_padding_example, key):
    got, noise_state = gradients(
      params, batch, noise_state, is_padding_example=is_padding_example, rng=key
    )
    updates, opt_state = optimizer.update(got.gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, noise_state

  # From the operating system, like the seeds: jax.random.key keeps 32 bits.
  key_data = jnp.asarray(np.frombuffer(secrets.token_bytes(8), np.uint32))
  key = jax.random.wrap_key_data(key_data)
  for t in range(plan.num_steps):
    rows, is_padding_example = digits.padded(sampler(t))
    params, opt_state, noise_state = step(
      params,
      opt_state,
      noise_state,
      (x[rows], y[rows]),
      is_padding_example,
      jax.random.fold_in(key, t),
    )
  return params
