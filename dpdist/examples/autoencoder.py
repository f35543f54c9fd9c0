"""A private autoencoder and a classifier of its codes, with two optimizers.

    python -m dpdist.examples.autoencoder

Held-out accuracy 0.84 in one run, at epsilon 2 and delta 1e-4; about 24 seconds
of processor time.

Each loss takes a step of the plan in every step of the loop, and draws examples
of its own. The classifier is given the autoencoder as it is at that step.
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
import optax

import dpdist
from dpdist.examples import digits
from dpdist.examples import loop


def init(key: jax.Array, sizes: tuple[int, int]) -> dict[str, jax.Array]:
  """Makes the parameters of a dense layer."""
  kernel = jax.random.normal(key, sizes) / sizes[0] ** 0.5
  return {"w": kernel, "b": jnp.zeros(sizes[1])}


def encode(autoencoder, image):
  """Returns the code [32] of an image."""
  layer = autoencoder["encoder"]
  return jnp.tanh(image.reshape(-1) @ layer["w"] + layer["b"])


def classify(classifier, autoencoder, image):
  """Returns logits [10] of an image."""
  return encode(autoencoder, image) @ classifier["w"] + classifier["b"]


def reconstruction_loss(autoencoder, example, key):
  """Returns how far the decoded code is from the image."""
  del key
  layer = autoencoder["decoder"]
  decoded = encode(autoencoder, example["image"]) @ layer["w"] + layer["b"]
  return jnp.mean((decoded - example["image"].reshape(-1)) ** 2)


def label_loss(classifier, example, key, autoencoder):
  """Returns the cross-entropy of the label, given the autoencoder."""
  del key
  logits = classify(classifier, autoencoder, example["image"])
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, example["label"]
  )


def main(num_steps: int = 200) -> float:
  """Trains, prints, and returns the classifier's held-out accuracy."""
  data, x_test, y_test = digits.load()
  one, two, three = jax.random.split(jax.random.key(0), 3)
  params = {
    "coder": {"encoder": init(one, (64, 32)), "decoder": init(two, (32, 64))},
    "classifier": init(three, (32, 10)),
  }
  optimizers = {"coder": optax.sgd(0.05), "classifier": optax.adam(0.05)}
  opt_states = {name: optimizers[name].init(params[name]) for name in params}

  with dpdist.Session(
    tempfile.mkdtemp(),
    loop.config(len(data["label"]), 2 * num_steps),
    loss={"coder": reconstruction_loss, "classifier": label_loss},
    dataset=data,
    largest_integers={"label": 9},
  ) as session:
    params, opt_states = session.restore((params, opt_states))
    for step in session:
      for name, given in ("coder", None), ("classifier", params["coder"]):
        gradients = step.gradients(params[name], name, given=given)
        updates, opt_states[name] = optimizers[name].update(
          gradients, opt_states[name]
        )
        params[name] = optax.apply_updates(params[name], updates)
      session.save((params, opt_states))
    print(f"epsilon {session.epsilon():.4f} at delta {session.plan.delta:g}")
  logits = jax.vmap(classify, (None, None, 0))(
    params["classifier"], params["coder"], x_test
  )
  return digits.report(logits, y_test)


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
