"""Separates frozen parameters from those that are trained.

A frozen parameter is a constant of the loss. It has no gradient, and so no part
in norms, sums and noise. In a tree of trainable parameters, in a clipped sum
and in everything with their structure, None is in its place. JAX and Optax
treat None as an empty subtree:

    trainable, rest = clipping.partition(params, frozen)
    opt_state = optimizer.init(trainable)
    ...
    noisy, noise_state = noise.update(fn(params, batch).sum, noise_state)
    updates, opt_state = optimizer.update(noisy, opt_state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    params = clipping.merge(trainable, rest)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from dpdist import errors

PyTree = Any
# A prefix pytree of bools, True where frozen, or (path) -> bool.
Frozen = PyTree | Callable[[str], bool] | None


class Split(NamedTuple):
  """The leaves of params, separated."""

  structure: Any  # The tree structure of params.
  is_frozen: tuple[bool, ...]  # For each leaf of params.
  trainable: list[Any]  # In the order of params, as is `frozen`.
  frozen: list[Any]

  def join(self, trainable: Sequence[Any], frozen: Sequence[Any]) -> PyTree:
    """Returns a tree like params with these leaves."""
    sources = {False: iter(trainable), True: iter(frozen)}
    return self.structure.unflatten([next(sources[f]) for f in self.is_frozen])

  def of_trainable(self, leaves: Sequence[Any]) -> PyTree:
    """Returns a tree like params with None where a parameter is frozen."""
    return self.join(leaves, [None] * len(self.frozen))


def names(params: PyTree) -> list[str]:
  """Returns the paths of the leaves of params, such as "encoder/0/kernel"."""
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
  ]


def split(
  params: PyTree, frozen: Frozen, leaves: Sequence[Any] | None = None
) -> Split:
  """Separates frozen parameters from those that are trained.

  `frozen` is None if no parameter is frozen; a bool for all of them; a prefix
  pytree of params of bools; or a predicate on a leaf's path, as in `names`.
  `leaves` are used in place of those of params.
  """
  flat, structure = jax.tree.flatten(params)
  flags = _flags(params, frozen, structure)
  if flags and all(flags):
    raise errors.ArgumentError(
      f"frozen must leave a parameter to train, got {frozen!r} for the"
      f" parameters {names(params)}"
    )
  by_kind: dict[bool, list[Any]] = {False: [], True: []}
  for flag, leaf in zip(flags, leaves or flat, strict=True):
    by_kind[flag].append(leaf)
  return Split(structure, tuple(flags), by_kind[False], by_kind[True])


def partition(params: PyTree, frozen: Frozen) -> tuple[PyTree, PyTree]:
  """Returns two trees like params: the trained and the frozen parameters.

  Args:
    params: pytree.
    frozen: as in `dpdist.clipped_grad`.

  Returns:
    The trees. Each has None where a parameter is in the other one.

  Raises:
    ValueError: frozen does not fit params, or leaves nothing to train.
  """
  parts = split(params, frozen)
  return (
    parts.of_trainable(parts.trainable),
    parts.join([None] * len(parts.trainable), parts.frozen),
  )


def merge(trainable: PyTree, frozen: PyTree) -> PyTree:
  """Puts the two trees that `partition` returned together again."""
  return jax.tree.map(
    lambda one, other: other if one is None else one,
    trainable,
    frozen,
    is_leaf=lambda x: x is None,
  )


def check(frozen: Frozen) -> None:
  """Checks frozen as far as that is possible without params."""
  if frozen is None or callable(frozen):
    return
  for leaf in jax.tree.leaves(frozen):
    if not isinstance(leaf, bool):
      raise errors.ArgumentError(
        "frozen must hold bools, True where a parameter is frozen, or be a"
        f" predicate on its path, got {leaf!r}"
      )


def _flags(params: PyTree, frozen: Frozen, structure: Any) -> list[bool]:
  if frozen is None:
    return [False] * structure.num_leaves
  if callable(frozen):
    return _told(names(params), frozen)
  flags, of_flags = jax.tree.flatten(frozen)
  # mypy does not accept JAX's class of tree structures as a type.
  prefix: Any = of_flags
  try:
    subtrees = prefix.flatten_up_to(params)
  except ValueError as error:
    raise errors.ArgumentError(
      "frozen must be a bool or a prefix pytree of params, got"
      f" {frozen!r} for the parameters {names(params)}"
    ) from error
  return [
    flag
    for flag, subtree in zip(flags, subtrees, strict=True)
    for _ in jax.tree.leaves(subtree)
  ]


def _told(paths: list[str], frozen: Callable[[str], bool]) -> list[bool]:
  flags = [frozen(path) for path in paths]
  for path, flag in zip(paths, flags, strict=True):
    if not isinstance(flag, bool):
      raise errors.ArgumentError(
        f"frozen must return True or False, got {flag!r} for {path!r}"
      )
  # A misspelt name would train parameters that should stay frozen.
  if paths and not any(flags):
    raise errors.ArgumentError(
      f"frozen must be True of some parameter, got False for all of {paths}:"
      " pass None to train them all"
    )
  return flags
