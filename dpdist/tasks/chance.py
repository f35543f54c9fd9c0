"""Checks whether a model predicts held-out examples better than a constant.

A privacy guarantee does not make a model useful: pure noise has one as well.
"""

from collections.abc import Mapping
import math

import numpy as np


def problem(scores: Mapping[str, float], targets: np.ndarray) -> str:
  """Compares held-out metrics with the best guess that uses no input.

  Args:
    scores: held-out metrics; "accuracy" and "loss", means over all targets,
      are compared if both are there.
    targets: integers, the held-out examples' targets; those below 0 are
      padding.

  Returns:
    A sentence that says what is wrong with the model; "" if it beats the guess
    in one of the metrics.
  """
  found = not_finite(scores)
  if found or "accuracy" not in scores or "loss" not in scores:
    return found
  accuracy, loss = scores["accuracy"], scores["loss"]
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


def problem_of_labels(scores: Mapping[str, float], targets: np.ndarray) -> str:
  """Compares metrics of labels, each 0 or 1, with each label's most frequent.

  Args:
    scores: as for `problem`.
    targets: numbers; those outside [0, 1] are missing.

  Returns:
    As `problem`.
  """
  found = not_finite(scores)
  if found or "accuracy" not in scores or "loss" not in scores:
    return found
  columns = np.asarray(targets, np.float64).reshape(len(targets), -1)
  is_known = (columns >= 0) & (columns <= 1)
  counts = is_known.sum(0)
  shares = np.where(is_known, columns, 0).sum(0) / np.maximum(1, counts)
  if not counts.sum():
    return ""
  weights = counts / counts.sum()
  hits = np.where(is_known, columns > 0.5, False).sum(0) / np.maximum(1, counts)
  share = float(np.sum(weights * np.maximum(hits, 1 - hits)))
  logs = lambda x: x * np.log(np.maximum(x, 1e-300))
  entropy = float(np.sum(weights * -(logs(shares) + logs(1 - shares))))
  if scores["accuracy"] > share or scores["loss"] < entropy:
    return ""
  return (
    "the model is no better on held-out examples than a constant guess:"
    f" accuracy {scores['accuracy']:.4f}, where always the most frequent answer"
    f" has {share:.4f}, and loss {scores['loss']:.4f}, where the labels'"
    f" frequencies have {entropy:.4f}"
  )


def problem_of_numbers(scores: Mapping[str, float], targets: np.ndarray) -> str:
  """Compares metrics of numbers with the best constant.

  Args:
    scores: held-out metrics, of which "mse", "mae" and "r2" are compared.
    targets: numbers.

  Returns:
    A sentence that says what is wrong with the model; "" if it beats the
    constant in one of the metrics, or if there are none of these.
  """
  found = not_finite(scores)
  values = np.asarray(targets, np.float64).reshape(len(targets), -1)
  constant = {
    "mse": float(values.var(0).mean()),
    "mae": float(np.abs(values - np.median(values, 0)).mean()),
  }
  beaten = [scores[x] < constant[x] for x in constant if x in scores]
  if "r2" in scores:
    beaten.append(scores["r2"] > 0)
  if found or any(beaten) or not beaten:
    return found
  names = [name for name in ("mse", "mae", "r2") if name in scores]
  listed = ", ".join(
    f"{name} {scores[name]:.4g}, where the best constant has"
    f" {constant.get(name, 0.0):.4g}"
    for name in names
  )
  return (
    "the model is no better on held-out examples than a constant guess:"
    f" {listed}"
  )


def not_finite(scores: Mapping[str, float]) -> str:
  """Returns a sentence on a loss or error that is no finite number, or ""."""
  for name in ("loss", "mse", "mae"):
    value = scores.get(name, 0.0)
    if not math.isfinite(value):
      return f"the held-out {name} is {value}: the model is of no use"
  return ""
