"""Groups of parameters that are clipped together, each with a clip norm."""

from collections.abc import Sequence
from typing import Any

import jax

from dpdist import errors

PyTree = Any


def groups(
  params: PyTree, l2_clip_norm: PyTree, is_frozen: Sequence[bool]
) -> list[int]:
  """Returns for each trained parameter the number of its clip norm.

  Args:
    params: pytree.
    l2_clip_norm: a number, or a prefix pytree of params with a number for each
      group and None for a group that is wholly frozen.
    is_frozen: for each leaf of params.

  Raises:
    ValueError: l2_clip_norm is no prefix; a group with a trained parameter has
      no norm; or a wholly frozen one has a norm, which would count in the
      sensitivity.
  """
  norms, of_norms = jax.tree.flatten(l2_clip_norm, is_leaf=lambda x: x is None)
  # mypy does not accept JAX's class of tree structures as a type.
  prefix: Any = of_norms
  try:
    subtrees = prefix.flatten_up_to(params)
  except ValueError as error:
    raise errors.ArgumentError(
      "l2_clip_norm must be a number or a prefix pytree of params, got"
      f" {l2_clip_norm!r} for params {jax.tree.structure(params)}"
    ) from error
  numbers = []
  frozen = iter(is_frozen)
  number = 0
  for norm, subtree in zip(norms, subtrees, strict=True):
    flags = [next(frozen) for _ in jax.tree.leaves(subtree)]
    if norm is None and not all(flags):
      raise errors.ArgumentError(
        "l2_clip_norm must hold a norm for each group that is trained, got"
        f" None for one in {l2_clip_norm!r}"
      )
    if norm is not None and flags and all(flags):
      raise errors.ArgumentError(
        "l2_clip_norm must hold None for a group that is wholly frozen, or it"
        f" would count in the sensitivity, got {norm!r} for one in"
        f" {l2_clip_norm!r}"
      )
    numbers += [number for flag in flags if not flag]
    number += norm is not None
  return numbers
