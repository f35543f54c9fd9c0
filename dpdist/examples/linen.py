"""Private training of a Flax Linen module.

    python -m dpdist.examples.linen

Held-out accuracy 0.91 to 0.92 in three runs, at epsilon 2 and delta 1e-4;
about 27 seconds of processor time.
"""

import sys

from flax import linen as nn
import jax
import optax

from dpdist.examples import digits
from dpdist.examples import loop
from dpdist.frontends import linen


class CNN(nn.Module):
  """Computes logits [10] of one image [8, 8, 1]."""

  @nn.compact
  def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
    h = nn.Conv(16, (3, 3), strides=(2, 2))(image[None])
    h = nn.tanh(nn.GroupNorm(4)(h))  # Not BatchNorm, which mixes examples.
    h = nn.Dropout(0.1, deterministic=not train)(h.reshape(-1))
    return nn.Dense(10)(h)


def main(num_steps: int = 200) -> float:
  """Trains, prints, and returns the held-out accuracy."""
  data, x_test, y_test = digits.load()

  model = CNN()
  loss_fn = linen.per_example_loss(
    model,
    lambda logits, example: optax.softmax_cross_entropy_with_integer_labels(
      logits, example["label"]
    ),
    inputs=lambda example: example["image"],
    train=True,
  )
  params = model.init(jax.random.key(0), data["image"][0])["params"]

  params = loop.train(loss_fn, params, data, num_steps)
  logits = jax.vmap(model.apply, (None, 0))({"params": params}, x_test)
  return digits.report(logits, y_test)


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
