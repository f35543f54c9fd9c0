"""The parts that the examples share: data, and the last line.

The digits of scikit-learn are 1,438 images to train on and 359 held out.
"""

from typing import Any

import numpy as np
from sklearn import datasets

_NUM_TRAIN = 1438


def load() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
  """Returns examples to train on, and held-out images and labels.

  The examples are an "image" [n, 8, 8, 1] in [0, 1] and a "label" [n].
  """
  images, labels = datasets.load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
  order = np.random.default_rng(0).permutation(len(labels))
  train, test = order[:_NUM_TRAIN], order[_NUM_TRAIN:]
  return (
    {"image": images[train], "label": labels[train]},
    images[test],
    labels[test],
  )


def report(logits: Any, labels: np.ndarray) -> float:
  """Prints the held-out accuracy, and returns it."""
  accuracy = float(np.mean(np.argmax(np.asarray(logits), axis=-1) == labels))
  print(f"held-out accuracy {accuracy:.3f}")
  return accuracy
