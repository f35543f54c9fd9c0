"""Private training of a model that is plain functions.

    python -m dpdist.examples.plain

Held-out accuracy 0.94 to 0.95 in three runs, at epsilon 2 and delta 1e-4;
about 11 seconds of processor time, half a minute on two busy cores.
"""

import secrets
import sys

import jax
import jax.numpy as jnp
import optax

import dpdist
from dpdist.examples import digits


def init(key: jax.Array) -> dict[str, jax.Array]:
  """Makes the parameters of two dense layers."""
  first, second = jax.random.split(key)
  return {
    "w1": jax.random.normal(first, (64, 64)) / 8,
    "b1": jnp.zeros(64),
    "w2": jax.random.normal(second, (64, 10)) / 8,
    "b2": jnp.zeros(10),
  }


def predict(params: dict[str, jax.Array], image: jax.Array) -> jax.Array:
  """Returns logits [10] of one image."""
  h = jnp.tanh(image.reshape(-1) @ params["w1"] + params["b1"])
  return h @ params["w2"] + params["b2"]


def main(num_steps: int = 200) -> float:
  """Trains, prints, and returns the held-out accuracy."""
  x, y, x_test, y_test = digits.load()

  # The loss of one example, without a batch axis.
  def loss_fn(params, example):
    image, label = example
    return optax.softmax_cross_entropy_with_integer_labels(
      predict(params, image), label
    )

  params = init(jax.random.key(0))

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
  optimizer = optax.adam(0.02)
  noise_state, opt_state = gradients.init(params), optimizer.init(params)

  @jax.jit
  def step(params, opt_state, noise_state, batch, is_padding_example):
    got, noise_state = gradients(
      params, batch, noise_state, is_padding_example=is_padding_example
    )
    updates, opt_state = optimizer.update(got.gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, noise_state

  for t in range(plan.num_steps):
    rows, is_padding_example = digits.padded(sampler(t))
    params, opt_state, noise_state = step(
      params,
      opt_state,
      noise_state,
      (x[rows], y[rows]),
      is_padding_example,
    )

  logits = jax.vmap(predict, (None, 0))(params, jnp.asarray(x_test))
  return digits.report(plan, logits, y_test)


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
