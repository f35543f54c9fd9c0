"""A private training loop that takes any loss: copy it, and change it.

Nothing here depends on a framework: parameters are a pytree, and the loss is a
function of one example.
"""

from collections.abc import Callable
import tempfile
from typing import Any

import jax
import numpy as np
import optax

import dpdist

PyTree = Any


def config(num_examples: int, num_steps: int) -> dpdist.PrivacyConfig:
  """Returns the numbers of a run; the noise follows from the budget."""
  return dpdist.PrivacyConfig(
    num_examples=num_examples,
    expected_batch_size=256,
    num_steps=num_steps,
    l2_clip_norm=1.0,
    target_delta=1e-4,
    target_epsilon=2.0,
  )


def train(
  loss: Callable[..., jax.Array],
  params: PyTree,
  data: dict[str, np.ndarray],
  num_steps: int,
  *,
  workdir: str | None = None,
  learning_rate: float = 0.01,
) -> PyTree:
  """Returns trained parameters.

  Args:
    loss: maps parameters, one example (a dict, like data without its first
      axis) and a PRNG key of its own to a number.
    params: the initial parameters.
    data: by name, arrays of leading axis n.
    num_steps: updates.
    workdir: where the run is kept, and goes on if it was stopped; None: a
      temporary directory.
    learning_rate: of Adam.
  """
  optimizer = optax.adam(learning_rate)

  @jax.jit
  def update(params, opt_state, gradients):
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  state = params, optimizer.init(params)
  with dpdist.Session(
    workdir or tempfile.mkdtemp(),
    config(len(next(iter(data.values()))), num_steps),
    loss=loss,
    dataset=data,
    largest_integers={"label": 9},
  ) as session:
    state = session.restore(state)
    for step in session:
      state = update(*state, step.gradients(state[0]))
      session.save(state)
    print(f"epsilon {session.epsilon():.4f} at delta {session.plan.delta:g}")
  return state[0]
