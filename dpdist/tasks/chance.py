"""Checks whether a model predicts held-out examples better than a constant.

A privacy guarantee does not make a model useful: pure noise has one as well.
"""

from collections.abc import Mapping
import math

import numpy as np


def problem(scores: Mapping[str, float], targets: np.ndarray) -> str:
  """Compares held-out metrics with the best guess that uses no input.

  Args:
    scores: "accuracy" and "loss", means over all targets.
    targets: integers, the held-out examples' targets; those below 0 are
      padding.

  Returns:
    A sentence that says what is wrong with the model; "" if it beats the guess
    in one of the metrics.
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
