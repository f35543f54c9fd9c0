"""Rows of a data set that has an item, or a batch, for each index."""

from collections.abc import Callable
import threading
from typing import Any

import jax
import numpy as np

from dpdist import errors
from dpdist.data import sources
from dpdist.data.builders import table as table_lib
from dpdist.sensitivity import sentinel

PyTree = Any


class Indexed:
  """Rows of a data set that has an item, or a batch, for each index.

  All are read once, for the digest. A row that is not then what it was at first
  raises ValueError: the digest must be of what is trained on.
  """

  def __init__(self, items: Any, count: int, *, is_batched: bool):
    self._items, self._is_batched = items, is_batched
    # Libraries do not promise that several threads may read at once.
    self._lock = threading.Lock()
    first, self.structure = jax.tree_util.tree_flatten_with_path(self._item(0))
    self.names = tuple(jax.tree_util.keystr(path) for path, _ in first)
    self._spec = [(leaf.shape[1:], leaf.dtype) for _, leaf in first]
    self.largest = dict.fromkeys(self.names, 0)
    sizes = []
    digest = table_lib.RowsDigest()
    self._hashes: list[bytes] = []
    for index in range(count):
      batch = self._batch(index)
      for name, leaf in batch.items():
        most = sentinel.largest_integer(leaf)
        self.largest[name] = max(self.largest[name], most)
      hashes = table_lib.row_hashes(batch)
      digest.update(hashes)
      self._hashes += hashes
      sizes.append(len(hashes))
    self._starts = np.concatenate([[0], np.cumsum(sizes)])
    self._digest = digest.hexdigest()

  def __len__(self) -> int:
    return len(self._hashes)

  def content_digest(self) -> str:
    """See `dpdist.data.sources.Source.content_digest`."""
    return self._digest

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """See `dpdist.data.sources.Source.read`."""
    indices = sources.check_indices(indices, len(self))
    if not len(indices):
      return {
        name: np.zeros((0, *shape), dtype)
        for name, (shape, dtype) in zip(self.names, self._spec, strict=True)
      }
    where = np.searchsorted(self._starts, indices, side="right") - 1
    # In the order of the indices, whatever that is.
    pieces, places = [], []
    with self._lock:
      for index in np.unique(where).tolist():
        at = np.flatnonzero(where == index)
        rows = indices[at] - self._starts[index]
        pieces.append({k: v[rows] for k, v in self._batch(index).items()})
        places.append(at)
    order = np.argsort(np.concatenate(places))
    batch = {
      name: np.concatenate([piece[name] for piece in pieces])[order]
      for name in self.names
    }
    if table_lib.row_hashes(batch) != [self._hashes[i] for i in indices]:
      raise errors.ArgumentError(
        "x must give the same item for an index each time, and gave another:"
        " leave random changes to layers of the model, which draw anew for each"
        " example"
      )
    return batch

  def _item(self, index: int) -> PyTree:
    item = self._items[index]
    parts = tuple(item) if isinstance(item, tuple | list) else (item,)
    if not 1 <= len(parts) <= 3:
      raise errors.ArgumentError(
        f"x must have items (x, y) or (x, y, weight), got {len(parts)} parts"
      )
    if len(parts) == 1:
      parts = (*parts, None)
    axis: Callable[[Any], np.ndarray] = np.asarray
    if not self._is_batched:
      axis = lambda leaf: np.asarray(leaf)[None]
    return jax.tree.map(axis, parts)

  def _batch(self, index: int) -> dict[str, np.ndarray]:
    leaves, structure = jax.tree.flatten(self._item(index))
    spec = [(leaf.shape[1:], leaf.dtype) for leaf in leaves]
    lengths = {len(leaf) for leaf in leaves}
    if (structure, spec) != (self.structure, self._spec) or len(lengths) != 1:
      raise errors.ArgumentError(
        "x must have items of one form, as many rows in each of their arrays,"
        f" got shapes and dtypes {spec} beside {self._spec}"
      )
    return dict(zip(self.names, leaves, strict=True))
