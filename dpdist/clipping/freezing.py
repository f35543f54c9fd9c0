"""Parameters that are not trained: which they are, and the others without them.

A frozen parameter is a constant of the loss. It has no gradient, and so no part
in norms, sums and noise. In a tree of trainable parameters, in a clipped sum
and in everything that is made like them, None stands in its place, which JAX
and Optax take for nothing at all:

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

PyTree = Any
# A prefix pytree of bools, True where frozen, or (path) -> bool.
Frozen = PyTree | Callable[[str], bool] | None


class Split(NamedTuple):
  """The leaves of params, told apart.

  Attributes:
    structure: of params.
    is_frozen: for each leaf of params.
    trainable: those that are trained, in order.
    frozen: the others, in order.
  """

  structure: Any
  is_frozen: tuple[bool, ...]
  trainable: list[Any]
  frozen: list[Any]

  def join(self, trainable: Sequence[Any], frozen: Sequence[Any]) -> PyTree:
    """A tree like params with these leaves."""
    sources = {False: iter(trainable), True: iter(frozen)}
    return self.structure.unflatten([next(sources[f]) for f in self.is_frozen])

  def of_trainable(self, leaves: Sequence[Any]) -> PyTree:
    """A tree like params with None where a parameter is frozen."""
    return self.join(leaves, [None] * len(self.frozen))


def names(params: PyTree) -> list[str]:
  """The paths of the leaves of params, as "encoder/0/kernel"."""
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
  ]


def split(
  params: PyTree, frozen: Frozen, leaves: Sequence[Any] | None = None
) -> Split:
  """Tells frozen parameters from those that are trained.

  Args:
    params: pytree.
    frozen: None: none is. A bool for all of them, or a prefix pytree of params
      of bools; or a predicate on a leaf's path, as in `names`.
    leaves: what to take in place of the leaves of params.

  Raises:
    ValueError: frozen does not fit params, or leaves nothing to train.
  """
  flat, structure = jax.tree.flatten(params)
  flags = _flags(params, frozen, structure)
  if flags and all(flags):
    raise ValueError(
      "frozen must leave a parameter to train, got all of them frozen:"
      f" {names(params)}"
    )
  by_kind: dict[bool, list[Any]] = {False: [], True: []}
  for flag, leaf in zip(flags, leaves or flat, strict=True):
    by_kind[flag].append(leaf)
  return Split(structure, tuple(flags), by_kind[False], by_kind[True])


def partition(params: PyTree, frozen: Frozen) -> tuple[PyTree, PyTree]:
  """Two trees like params: the trained ones, and the frozen ones.

  Args:
    params: pytree.
    frozen: as in `dpdist.clipped_grad`.

  Returns:
    The trees; None stands where a parameter is in the other one.

  Raises:
    ValueError: frozen does not fit params, or leaves nothing to train.
  """
  parts = split(params, frozen)
  return (
    parts.of_trainable(parts.trainable),
    parts.join([None] * len(parts.trainable), parts.frozen),
  )


def merge(trainable: PyTree, frozen: PyTree) -> PyTree:
  """Params again, from what `partition` returned."""
  return jax.tree.map(
    lambda mine, other: other if mine is None else mine,
    trainable,
    frozen,
    is_leaf=lambda x: x is None,
  )


def check(frozen: Frozen) -> None:
  """What can be said of frozen before there are params."""
  if frozen is None or callable(frozen):
    return
  for leaf in jax.tree.leaves(frozen):
    if not isinstance(leaf, bool):
      raise ValueError(
        "frozen must hold bools, True where a parameter is frozen, or be a"
        f" predicate on its path, got {leaf!r}"
      )


def _flags(params: PyTree, frozen: Frozen, structure: Any) -> list[bool]:
  if frozen is None:
    return [False] * structure.num_leaves
  if callable(frozen):
    return _told(names(params), frozen)
  flags, of_flags = jax.tree.flatten(frozen)
  # mypy takes JAX's own class of tree structures for a mere name.
  prefix: Any = of_flags
  try:
    subtrees = prefix.flatten_up_to(params)
  except ValueError as error:
    raise ValueError(
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
      raise ValueError(
        f"frozen must return True or False, got {flag!r} for {path!r}"
      )
  # A misspelt name would train what should stay as it is.
  if paths and not any(flags):
    raise ValueError(
      f"frozen must be True of some parameter, got False for all of {paths}:"
      " pass None to train them all"
    )
  return flags
