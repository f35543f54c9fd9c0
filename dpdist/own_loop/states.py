"""Puts the state of a loop into a checkpoint, whatever its pytree is."""

import hashlib
from typing import Any

import jax
import numpy as np

from dpdist import errors

PyTree = Any


def pack(state: PyTree) -> dict[str, Any]:
  """Returns a dict of the state's arrays, and the digest of their names."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  names = "\0".join(jax.tree_util.keystr(path) for path, _ in leaves)
  digest = hashlib.sha256(names.encode()).digest()
  return {
    "names_sha256": np.frombuffer(digest, np.uint8).copy(),
    "leaves": {f"{i:06d}": leaf for i, (_, leaf) in enumerate(leaves)},
  }


def names(state: PyTree) -> list[str]:
  """Returns the paths of the state's arrays, in their order, as "0.weight"."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return [
    jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves
  ]


def unpack(packed: dict[str, Any], like: PyTree) -> PyTree:
  """Returns the state; raises MismatchError if its arrays are named otherwise.

  `like` has its structure.
  """
  same = pack(like)["names_sha256"]
  if not np.array_equal(np.asarray(packed["names_sha256"]), same):
    raise errors.MismatchError(
      "state must have the structure of what the checkpoint holds, got another:"
      " go on with the state that the run began with"
    )
  leaves = [leaf for _, leaf in sorted(packed["leaves"].items())]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)
