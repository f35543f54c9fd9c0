"""Holds the private examples of a Keras fit, in memory or mapped."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dpdist.data import arrays as arrays_lib
from dpdist.sensitivity import sentinel

PyTree = Any


class Arrays:
  """The private examples, in memory or mapped."""

  def __init__(self, x: PyTree, y: PyTree, num_examples: int):
    self._tree = jax.tree.map(np.asarray, (x, y))
    for name, part in zip("xy", self._tree, strict=True):
      for leaf in jax.tree.leaves(part):
        if not leaf.ndim or len(leaf) != num_examples:
          raise ValueError(
            f"{name} must hold the plan's num_examples={num_examples} examples"
            f" along its first axis, got shape {leaf.shape}"
          )
    leaves = jax.tree_util.tree_leaves_with_path(self._tree)
    # Made before anything is read, so that it misses no change of a file.
    self.source = arrays_lib.ArraySource(
      {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    )

  def example(self) -> tuple[PyTree, PyTree]:
    """Returns the shapes of one example."""
    return jax.eval_shape(lambda t: jax.tree.map(lambda a: a[0], t), self._tree)

  def largest(self) -> tuple[PyTree, PyTree]:
    """Returns the largest integers of each array."""
    largest: tuple[PyTree, PyTree] = jax.tree.map(
      sentinel.largest_integer, self._tree
    )
    return largest

  def chunks(
    self, indices: np.ndarray, size: int
  ) -> Iterator[tuple[tuple[PyTree, PyTree], np.ndarray]]:
    """Yields padded chunks, at least one, and what is padding in them."""
    for first in range(0, max(1, len(indices)), size):
      rows = indices[first : first + size]
      # Padding holds the first example; it contributes nothing.
      padded = np.pad(rows, (0, size - len(rows)))
      batch = jax.tree.map(lambda a, rows=padded: a[rows], self._tree)
      yield batch, np.arange(size) >= len(rows)
