"""Private training of a Flax NNX module.

    python -m dpdist.examples.nnx

Held-out accuracy 0.93 to 0.96 in three runs, at epsilon 2 and delta 1e-4.
"""

import sys

from flax import nnx
import jax
import optax

from dpdist.examples import digits
from dpdist.examples import loop
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
  data, x_test, y_test = digits.load()

  model = MLP(nnx.Rngs(0))
  loss_fn, params = frontend.per_example_loss(
    model,
    lambda model, example: optax.softmax_cross_entropy_with_integer_labels(
      model(example["image"]), example["label"]
    ),
  )

  params = loop.train(loss_fn, params, data, num_steps)
  nnx.update(model, params)
  model.eval()
  logits = nnx.vmap(lambda model, image: model(image), in_axes=(None, 0))(
    model, x_test
  )
  return digits.report(logits, y_test)


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
