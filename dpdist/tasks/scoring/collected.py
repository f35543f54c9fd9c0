"""Metrics that are no means, from all held-out outputs, by scikit-learn.

Each is a function (targets, outputs) of NumPy arrays: outputs are logits,
except those of regression. If a metric is undefined, as the area under a curve
is for a label that all examples have, it is left out of an average, and NaN if
nothing is left. scikit-learn is imported when a metric is computed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_BINS = 15


def finite_only(
  function: Callable[[np.ndarray, np.ndarray], Any], otherwise: Any
) -> Callable[[np.ndarray, np.ndarray], Any]:
  """Returns the function, with another value for outputs that are not finite.

  scikit-learn raises for them, and a run that has diverged is to end by itself.
  """

  def found(targets: np.ndarray, outputs: np.ndarray) -> Any:
    if not np.isfinite(outputs).all():
      return otherwise
    return function(targets, outputs)

  return found


def _rows(
  targets: np.ndarray, logits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns classes [n] and logits [n, classes], without padding."""
  targets, logits = targets.ravel(), logits.reshape(-1, logits.shape[-1])
  return targets[targets >= 0], logits[targets >= 0]


def _probabilities(logits: np.ndarray) -> np.ndarray:
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return np.asarray(powers / powers.sum(-1, keepdims=True))


def _columns(
  targets: np.ndarray, outputs: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns each label's targets, 0 or 1, and outputs, where it is known."""
  targets = targets.reshape(len(targets), -1)
  outputs = outputs.reshape(len(outputs), -1)
  pairs = zip(targets.T, outputs.T, strict=True)
  known = [(y, x, (y >= 0) & (y <= 1)) for y, x in pairs]
  return [((y[k] > 0.5).astype(int), x[k]) for y, x, k in known]


def _one_against_rest(
  targets: np.ndarray, logits: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
  targets, logits = _rows(targets, logits)
  shares = _probabilities(logits)
  if shares.shape[1] == 2:  # The second class is the positive one.
    return [((targets == 1).astype(int), shares[:, 1])]
  return [
    ((targets == k).astype(int), shares[:, k]) for k in range(shares.shape[1])
  ]


_Columns = Callable[
  [np.ndarray, np.ndarray], list[tuple[np.ndarray, np.ndarray]]
]


def _mean_of(
  name: str, columns: _Columns
) -> Callable[[np.ndarray, np.ndarray], float]:
  """Returns the mean over labels of a function in `sklearn.metrics`."""

  def mean(targets: np.ndarray, outputs: np.ndarray) -> float:
    from sklearn import metrics

    function = getattr(metrics, name)
    found = [
      float(function(y, x))
      for y, x in columns(targets, outputs)
      if len(np.unique(y)) == 2
    ]
    return float(np.mean(found)) if found else np.nan

  return mean


def _f1_of_classes(targets: np.ndarray, logits: np.ndarray) -> float:
  from sklearn import metrics

  targets, logits = _rows(targets, logits)
  found = metrics.f1_score(
    targets, logits.argmax(-1), average="macro", zero_division=0
  )
  return float(found)


def _f1_of_labels(targets: np.ndarray, outputs: np.ndarray) -> float:
  from sklearn import metrics

  found = [
    float(metrics.f1_score(y, x > 0, zero_division=0))
    for y, x in _columns(targets, outputs)
    if y.any()
  ]
  return float(np.mean(found)) if found else np.nan


def _r2(targets: np.ndarray, outputs: np.ndarray) -> float:
  from sklearn import metrics

  if len(targets) < 2:
    return np.nan
  flat = lambda x: x.reshape(len(x), -1).astype(np.float64)
  return float(metrics.r2_score(flat(targets), flat(outputs)))


def calibration_error(confidences: np.ndarray, hits: np.ndarray) -> float:
  """Returns the expected calibration error, of 15 bins of equal width.

  Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
  """
  bins = np.minimum((confidences * _BINS).astype(int), _BINS - 1)
  gaps = [
    abs(float(np.sum(hits[bins == b] - confidences[bins == b])))
    for b in range(_BINS)
  ]
  return sum(gaps) / len(hits) if len(hits) else np.nan


def _calibration_of_classes(targets: np.ndarray, logits: np.ndarray) -> float:
  targets, logits = _rows(targets, logits)
  shares = _probabilities(logits.astype(np.float64))
  hits = (shares.argmax(-1) == targets).astype(float)
  return calibration_error(shares.max(-1), hits)


def _calibration_of_labels(targets: np.ndarray, outputs: np.ndarray) -> float:
  columns = _columns(targets, outputs.astype(np.float64))
  y, x = (np.concatenate(parts) for parts in zip(*columns, strict=True))
  sure = 1 / (1 + np.exp(-np.abs(x)))  # Of what is predicted, 0 or 1.
  return calibration_error(sure, ((x > 0) == y).astype(float))


def _per_class(targets: np.ndarray, logits: np.ndarray) -> Any:
  targets, logits = _rows(targets, logits)
  labels = np.arange(logits.shape[-1])
  return _summaries(targets, logits.argmax(-1), labels)


def _per_label(targets: np.ndarray, outputs: np.ndarray) -> Any:
  ones = np.ones(1, int)
  return [
    _summaries(y, (x > 0).astype(int), ones)[0]
    for y, x in _columns(targets, outputs)
  ]


def _summaries(
  targets: np.ndarray, guesses: np.ndarray, labels: np.ndarray
) -> list[dict[str, float]]:
  from sklearn import metrics

  precision, recall, f1, support = metrics.precision_recall_fscore_support(
    targets, guesses, labels=labels, zero_division=0
  )
  return [
    {
      "precision": float(precision[i]),
      "recall": float(recall[i]),
      "f1": float(f1[i]),
      "support": int(support[i]),
    }
    for i in range(len(labels))
  ]


def _confusion(targets: np.ndarray, logits: np.ndarray) -> Any:
  from sklearn import metrics

  targets, logits = _rows(targets, logits)
  labels = np.arange(logits.shape[-1])
  guesses = logits.argmax(-1)
  return metrics.confusion_matrix(targets, guesses, labels=labels).tolist()


def _confusion_of_labels(targets: np.ndarray, outputs: np.ndarray) -> Any:
  from sklearn import metrics

  found = [
    metrics.confusion_matrix(y, (x > 0).astype(int), labels=[0, 1]).tolist()
    for y, x in _columns(targets, outputs)
  ]
  return found


def _only(function: Callable[..., list[Any]]) -> Callable[..., Any]:
  return lambda targets, outputs: function(targets, outputs)[0]


_Functions = Mapping[str, Callable[[np.ndarray, np.ndarray], Any]]
_OF_LABELS: _Functions = {
  "auc": _mean_of("roc_auc_score", _columns),
  "average_precision": _mean_of("average_precision_score", _columns),
  "f1": _f1_of_labels,
  "calibration_error": _calibration_of_labels,
}
NUMBERS: Mapping[str, _Functions] = {
  "classes": {
    "auc": _mean_of("roc_auc_score", _one_against_rest),
    "average_precision": _mean_of("average_precision_score", _one_against_rest),
    "f1": _f1_of_classes,
    "calibration_error": _calibration_of_classes,
  },
  "labels": _OF_LABELS,
  "binary": _OF_LABELS,
  "numbers": {"r2": _r2},
}
"""Metrics that are numbers, by what is predicted and by name."""

TABLES: Mapping[str, _Functions] = {
  "classes": {"per_class": _per_class, "confusion": _confusion},
  "labels": {"per_class": _per_label, "confusion": _confusion_of_labels},
  "binary": {
    "per_class": _only(_per_label),
    "confusion": _only(_confusion_of_labels),
  },
}
"""Metrics that are lists or dicts, by what is predicted and by name."""

BY_HAND = ("calibration_error",)
"""Metrics that need no scikit-learn."""
