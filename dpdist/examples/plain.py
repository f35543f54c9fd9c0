"""Private training of a model that is plain functions.

    python -m dpdist.examples.plain

Held-out accuracy 0.94 to 0.95 in four runs, at epsilon 2 and delta 1e-4;
about 18 seconds of processor time.
"""

import sys

import jax
import jax.numpy as jnp
import optax

from dpdist.examples import digits
from dpdist.examples import loop


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
  data, x_test, y_test = digits.load()

  # The loss of one example, without a batch axis; it needs no randomness.
  def loss(params, example, key):
    del key
    return optax.softmax_cross_entropy_with_integer_labels(
      predict(params, example["image"]), example["label"]
    )

  params = init(jax.random.key(0))
  params = loop.train(loss, params, data, num_steps, learning_rate=0.02)
  logits = jax.vmap(predict, (None, 0))(params, jnp.asarray(x_test))
  return digits.report(logits, y_test)


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
