"""The parts that the examples share: data, padding, the last line.

The digits of scikit-learn are 1,438 images to train on and 359 held out.
"""

from typing import Any

import numpy as np
from sklearn import datasets

from dpdist.privacy import plan as plan_lib

_NUM_TRAIN = 1438
_CHUNK = 128


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Returns images [n, 8, 8, 1] in [0, 1] and labels [n]: train, held out."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
  order = np.random.default_rng(0).permutation(len(labels))
  train, test = order[:_NUM_TRAIN], order[_NUM_TRAIN:]
  return images[train], labels[train], images[test], labels[test]


def padded(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Pads a draw of any size to one of few shapes, so that little is compiled.

  Args:
    indices: [n], drawn; it may be empty, and is never cut.

  Returns:
    Indices [m], m >= n, and is_padding_example [m]: True for what was added.
  """
  size = max(1, -(-len(indices) // _CHUNK)) * _CHUNK
  rows = np.pad(indices, (0, size - len(indices)))
  return rows, np.arange(size) >= len(indices)


def report(
  plan: plan_lib.PrivacyPlan, logits: Any, labels: np.ndarray
) -> float:
  """Prints held-out accuracy and what was spent; returns the accuracy."""
  accuracy = float(np.mean(np.argmax(np.asarray(logits), axis=-1) == labels))
  print(
    f"held-out accuracy {accuracy:.3f}, epsilon {plan.epsilon():.4f} at delta"
    f" {plan.delta:g}"
  )
  return accuracy
