"""Private training of an Equinox module.

    python -m dpdist.examples.equinox

Held-out accuracy 0.93 in two runs, at epsilon 2 and delta 1e-4;
about 10 seconds of processor time, half a minute on two busy cores.
"""

import secrets
import sys

import equinox as eqx
import jax
import optax

import dpdist
from dpdist.examples import digits
from dpdist.frontends import equinox


def main(num_steps: int = 200) -> float:
  """Trains, prints, and returns the held-out accuracy."""
  x, y, x_test, y_test = digits.load()

  model = eqx.nn.MLP(
    64, 10, 64, 1, activation=jax.nn.tanh, key=jax.random.key(0)
  )
  loss_fn, params = equinox.per_example_loss(
    model,
    lambda model, example: optax.softmax_cross_entropy_with_integer_labels(
      model(example[0].reshape(-1)), example[1]
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

  model = eqx.combine(params, model)
  logits = jax.vmap(model)(x_test.reshape(-1, 64))
  return digits.report(plan, logits, y_test)


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
