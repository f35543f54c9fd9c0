"""Private training of a Flax NNX module.

    python -m dpdist.examples.nnx

Held-out accuracy 0.93 to 0.96 in two runs, at epsilon 2 and delta 1e-4;
about 14 seconds of processor time, half a minute on two busy cores.
"""

import secrets
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpdist
from dpdist.examples import digits
from dpdist.frontends import nnx as frontend


class MLP(nnx.Module):
  """Computes logits [10] of one image [8, 8, 1]."""

  def __init__(self, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(64, 64, rngs=rngs)
    self.norm = nnx.LayerNorm(64, rngs=rngs)  # Not BatchNorm.
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.out = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, image: jax.Array) -> jax.Array:
    h = nnx.tanh(self.norm(self.hidden(image.reshape(-1))))
    return self.out(self.dropout(h))


def main(num_steps: int = 200) -> float:
  """Trains, prints, and returns the held-out accuracy."""
  x, y, x_test, y_test = digits.load()

  model = MLP(nnx.Rngs(0))
  loss_fn, params = frontend.per_example_loss(
    model,
    lambda model, example: optax.softmax_cross_entropy_with_integer_labels(
      model(example[0]), example[1]
    ),
  )

  # The budget; the noise follows from it.
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=len(x),
      expected_batch_size=256,
      num_steps=num_steps,
      l2_clip_norm=1.0,
      target_delta=1e-4,
      target_epsilon=2.0,
    )
  )
  # Whoever knows these seeds can subtract the noise.
  sampler = dpdist.PoissonSampler(
    num_examples=plan.num_examples,
    sampling_probability=plan.sampling_probability,
    seed=secrets.token_bytes(32),
  )
  gradients = dpdist.private_gradients(
    loss_fn, plan, seed=secrets.token_bytes(32)
  )
  optimizer = optax.adam(0.01)
  noise_state, opt_state = gradients.init(params), optimizer.init(params)

  @jax.jit
  def step(params, opt_state, noise_state, batch, is_padding_example, key):
    got, noise_state = gradients(
      params, batch, noise_state, is_padding_example=is_padding_example, rng=key
    )
    updates, opt_state = optimizer.update(got.gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, noise_state

  # From the operating system, like the seeds: jax.random.key keeps 32 bits.
  words = jnp.asarray(np.frombuffer(secrets.token_bytes(8), np.uint32))
  dropout = jax.random.wrap_key_data(words)
  for t in range(plan.num_steps):
    rows, is_padding_example = digits.padded(sampler(t))
    params, opt_state, noise_state = step(
      params,
      opt_state,
      noise_state,
      (x[rows], y[rows]),
      is_padding_example,
      jax.random.fold_in(dropout, t),
    )

  nnx.update(model, params)
  model.eval()
  logits = nnx.vmap(lambda model, image: model(image), in_axes=(None, 0))(
    model, x_test
  )
  return digits.report(plan, logits, y_test)


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
