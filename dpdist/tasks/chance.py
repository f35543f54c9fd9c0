"""Whether a model tells more of held-out examples than a constant does.

A guarantee that holds says nothing of use: it holds of noise as well.
"""

from collections.abc import Mapping
import math

import numpy as np


def problem(scores: Mapping[str, float], targets: np.ndarray) -> str:
  """Holds held-out metrics against the best guess that looks at no input.

  Args:
    scores: "accuracy" and "loss", means over all targets.
    targets: integers, those of the held-out examples; below 0 are none.

  Returns:
    What is wrong with the model, a sentence; "" if it beats the guess in one of
    them.
  """
  accuracy, loss = scores["accuracy"], scores["loss"]
  if not math.isfinite(loss):
    return f"the held-out loss is {loss}: the model is of no use"
  _, counts = np.unique(targets[targets >= 0], return_counts=True)
  if not len(counts):
    return ""
  shares = counts / counts.sum()
  share, entropy = float(shares.max()), float(-np.sum(shares * np.log(shares)))
  if accuracy > share or loss < entropy:
    return ""
  return (
    "the model is no better on held-out examples than a constant guess:"
    f" accuracy {accuracy:.4f}, where always the most frequent label has"
    f" {share:.4f}, and loss {loss:.4f}, where the labels' frequencies have"
    f" {entropy:.4f}"
  )
