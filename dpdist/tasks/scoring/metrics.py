"""The held-out metrics that tasks have by name.

Means are sums over examples, computed where the examples are. All others are
computed by scikit-learn, or by a user's function, from the outputs and targets
of all held-out examples, which are collected for it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib.util
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.tasks.scoring import collected
from dpdist.tasks.scoring import losses

Mean = Callable[[jax.Array, jax.Array], tuple[Any, Any]]
Metric = str | Callable[[np.ndarray, np.ndarray], float]

_TOP_K = re.compile(r"top([1-9]\d*)_accuracy")
_NAME = re.compile(r"[A-Za-z0-9_.@-]+")


@dataclasses.dataclass(frozen=True)
class Chosen:
  """The metrics of a task.

  Attributes:
    names: of those that are numbers, as they are shown.
    means: (outputs, targets) -> (value, weight) of one example, by name.
    of_means: by name, the mean that it is a function of, and the function.
    collected: (targets, outputs) of all held-out examples -> a number.
    tables: (targets, outputs) of all held-out examples -> lists or dicts.
  """

  names: tuple[str, ...]
  means: Mapping[str, Mean]
  of_means: Mapping[str, tuple[str, Callable[[float], float]]]
  collected: Mapping[str, Callable[[np.ndarray, np.ndarray], float]]
  tables: Mapping[str, Callable[[np.ndarray, np.ndarray], Any]]


def choose(
  metrics: Sequence[Metric], kind: str, *, can_collect: bool = True
) -> Chosen:
  """Returns the metrics that a user chose.

  Args:
    metrics: names, or functions (targets, outputs) -> number, whose names are
      theirs.
    kind: what is predicted: "classes", "labels", "binary", "numbers"; "":
      what is not known, where only functions are metrics.
    can_collect: whether outputs of all examples fit in memory.

  Raises:
    ValueError: a name is unknown or used twice, or a function has no name.
    ModuleNotFoundError: scikit-learn is missing.
  """
  if isinstance(metrics, str) or not metrics:
    raise errors.ArgumentError(
      f"metrics must be a list of names and functions, got {metrics!r}"
    )
  means = dict(_MEANS.get(kind, {}))
  of_means = dict(_OF_MEANS) if kind == "classes" else {}
  numbers = dict(collected.NUMBERS.get(kind, {})) if can_collect else {}
  tables = dict(collected.TABLES.get(kind, {})) if can_collect else {}
  names: list[str] = []
  for metric in metrics:
    if not isinstance(metric, str):
      name = _name_of(metric, can_collect)
      numbers[name] = _a_number(name, metric)
    else:
      name = metric
      top = _TOP_K.fullmatch(name)
      if top and kind == "classes":
        means[name] = _top_accuracy(int(top[1]))
      known = {*means, *of_means, *numbers, *tables}
      if name not in known:
        listed = sorted(known) + ["top5_accuracy"] * (kind == "classes")
        raise errors.ArgumentError(
          f"metrics must be functions or some of {listed}, got"
          f" {name!r}{_validation.suggestion(name, listed)}"
        )
      if name in {*numbers, *tables} and name not in collected.BY_HAND:
        _need_scikit_learn(name)
    if name in names:
      raise errors.ArgumentError(f"metrics must differ in name, got 2 {name!r}")
    names.append(name)
  if all(name in tables for name in names):
    raise errors.ArgumentError(
      "metrics must have one that is a number, such as 'accuracy', which is"
      f" shown while the run trains, got {list(metrics)!r}"
    )
  wanted = {of_means[name][0] for name in names if name in of_means}
  chosen = lambda table: {name: table[name] for name in names if name in table}
  return Chosen(
    names=tuple(name for name in names if name not in tables),
    means=chosen(means) | {name: means[name] for name in sorted(wanted)},
    of_means=chosen(of_means),
    collected={
      name: collected.finite_only(function, math.nan)
      for name, function in chosen(numbers).items()
    },
    tables={
      name: collected.finite_only(function, None)
      for name, function in chosen(tables).items()
    },
  )


def check_top(names: Sequence[str], num_classes: int) -> None:
  """Raises ValueError for a top-k accuracy that every model has whole."""
  for name in names:
    top = _TOP_K.fullmatch(name)
    if top and int(top[1]) >= num_classes:
      raise errors.ArgumentError(
        f"metrics must have a top-k accuracy of fewer than the {num_classes}"
        f" classes, got {name!r}, which is always 1"
      )


def _name_of(metric: Any, can_collect: bool) -> str:
  name = getattr(metric, "__name__", "")
  if not callable(metric) or not _NAME.fullmatch(name):
    shown = "a lambda" if name == "<lambda>" else _validation.described(metric)
    raise errors.ArgumentError(
      "metrics must be names, or functions (targets, outputs) -> number with a"
      f" name of letters, digits and any of _.@-, got {shown}"
    )
  if not can_collect:
    raise errors.ArgumentError(
      "metrics must be names for a task whose outputs, one for each token, are"
      f" not collected, got the function {name!r}"
    )
  return str(name)


def _a_number(name: str, metric: Callable[..., Any]) -> Callable[..., float]:
  def number(targets: np.ndarray, outputs: np.ndarray) -> float:
    try:
      value = metric(targets, outputs)
    except Exception as error:
      # A user's function may raise anything.
      raise errors.ArgumentError(
        f"metrics must be functions of targets {targets.shape} and outputs"
        f" {outputs.shape}, got {name!r}, which raises"
        f" {errors.in_a_line(error)}"
      ) from error
    if isinstance(value, str | np.str_ | np.bytes_) or np.shape(value) != ():
      shown = f"an array {np.shape(value)}" if np.shape(value) else repr(value)
    else:
      try:
        return float(value)
      except (TypeError, ValueError):
        shown = repr(value)
    raise errors.ArgumentError(
      f"metrics must return a number, got {shown} of {name!r}"
    )

  return number


def _need_scikit_learn(name: str) -> None:
  if importlib.util.find_spec("sklearn") is None:
    raise errors.missing(f"The metric {name!r}", "scikit-learn", "metrics")


def _accuracy(logits: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
  hits = jnp.argmax(logits, -1) == targets
  counts = _counts(targets)
  return hits & counts, counts


def _loss(logits: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
  loss = losses.negative_log_likelihood(logits, targets)
  counts = _counts(targets)
  return (jnp.where(counts, loss, 0) if loss.ndim else loss), counts


def _counts(targets: jax.Array) -> jax.Array:
  # In a sequence, a target below 0 is padding.
  return targets >= 0 if targets.ndim else jnp.ones((), bool)


def _top_accuracy(k: int) -> Mean:
  def top(logits: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
    own = jnp.take_along_axis(logits, targets[..., None], -1)
    # So that NaN is above all, and no hit.
    above = jnp.sum(~(logits <= own), -1)
    counts = _counts(targets)
    return (above < k) & counts, counts

  return top


def _binary_accuracy(logits: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
  counts = losses.is_probability(targets)
  return ((logits > 0) == (targets > 0.5)) & counts, counts


def _binary_loss(logits: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
  counts = losses.is_probability(targets)
  each = jax.vmap(losses.sigmoid_cross_entropy)
  return each(logits.ravel(), targets.ravel()), counts.ravel()


def _error(kind: str) -> Mean:
  def error(outputs: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
    counts = jnp.isfinite(targets).ravel()
    each = jax.vmap(lambda x, y: losses.mean_error(x, y, kind=kind))
    return each(outputs.ravel(), targets.ravel()), counts

  return error


def _exp(x: float) -> float:
  return math.exp(x) if x < 700 else math.inf


_BINARY = {"accuracy": _binary_accuracy, "loss": _binary_loss}
_MEANS: Mapping[str, Mapping[str, Mean]] = {
  "classes": {"accuracy": _accuracy, "loss": _loss},
  "labels": _BINARY,
  "binary": _BINARY,
  "numbers": {"mse": _error("squared"), "mae": _error("absolute")},
}
_OF_MEANS = {"perplexity": ("loss", _exp)}
