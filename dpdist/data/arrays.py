"""Examples in arrays, in memory or mapped from a file."""

from collections.abc import Callable, Mapping
import hashlib
import json
import math
import os
from typing import Any, BinaryIO

import numpy as np

from dpdist.data import sources
from dpdist.files import stamps


class ArraySource:
  """Examples held in arrays (num_examples, ...), of no object dtype.

  The arrays are not copied, so those of `np.load(..., mmap_mode="r")` stay on
  disk and a read touches only the rows that it asks for. They must not be
  changed afterwards: the digest is computed once. `convert` is applied to the
  rows that `read` selects, so that compact arrays (uint8 pixels, say) are
  turned into the model's inputs only when they are read. The digest covers the
  arrays, and not `convert`, which a run's fingerprint holds apart. Raises
  ValueError for no arrays, unequal lengths, or an object dtype.
  """

  def __init__(
    self,
    arrays: Mapping[str, np.ndarray],
    *,
    convert: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    | None = None,
  ):
    self._arrays = {name: np.asarray(a) for name, a in arrays.items()}
    self.convert = convert
    self._digest: str | None = None
    mapped = {_mapped_file(array) for array in self._arrays.values()} - {None}
    # A file that was removed by now cannot be changed by anyone.
    self._stamps = stamps.FileStamps(
      path for path in mapped if path and os.path.exists(path)
    )
    shapes = {name: a.shape for name, a in self._arrays.items()}
    if len({shape[:1] for shape in shapes.values()}) != 1 or () in (
      shapes.values()
    ):
      raise ValueError(
        "arrays must be at least one array, all of the same leading length,"
        f" got shapes {shapes}"
      )
    for name, array in self._arrays.items():
      if array.dtype.hasobject:
        raise ValueError(
          f"arrays[{name!r}] must have a plain dtype, got {array.dtype}"
        )

  @classmethod
  def from_npz(cls, path: sources.Path) -> "ArraySource":
    """Reads every array of an .npz file into memory."""
    return cls(load_npz(path))

  def __len__(self) -> int:
    return len(next(iter(self._arrays.values())))

  @property
  def is_in_memory(self) -> bool:
    """Returns whether no read touches a file."""
    return all(_map_of(array) is None for array in self._arrays.values())

  @property
  def files(self) -> list[str]:
    """Returns the files that arrays are mapped from."""
    return self._stamps.paths

  def changed_files(self) -> list[str]:
    """Returns changed files of mapped arrays; see `sources.changed_files`."""
    return self._stamps.changed(self._is_same)

  def is_touched(self) -> bool:
    """See `dpdist.data.sources.is_touched`."""
    return self._stamps.is_touched()

  def _is_same(self) -> bool:
    # Without a digest there is nothing that could have changed.
    return self._digest is None or self._hashed() == self._digest

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """See `dpdist.data.sources.Source.read`."""
    indices = sources.check_indices(indices, len(self))
    batch = {name: array[indices] for name, array in self._arrays.items()}
    return self.convert(batch) if self.convert else batch

  def content_digest(self) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and bytes, by name."""
    if self._digest is None:
      self._digest = self._hashed()
    return self._digest

  def _hashed(self) -> str:
    """Returns the digest of what the arrays hold now."""
    arrays = sorted(self._arrays.items())
    header = [[name, a.dtype.str, a.shape] for name, a in arrays]
    digest = hashlib.sha256(json.dumps(header).encode() + b"\n")
    for _, array in arrays:
      # In blocks of rows, so that an array on disk never enters memory whole.
      row_bytes = max(1, array.dtype.itemsize * math.prod(array.shape[1:]))
      block = max(1, sources.HASH_BLOCK_BYTES // row_bytes)
      for start in range(0, len(array), block):
        digest.update(array[start : start + block].tobytes())
    return digest.hexdigest()


def load_npz(
  file: sources.Path | BinaryIO, what: str = ""
) -> dict[str, np.ndarray]:
  """Reads every array of an .npz archive, a path or the archive itself.

  Raises ValueError, which calls it `what` or by its path, for a file of another
  kind or a damaged one.
  """
  if isinstance(file, str | os.PathLike):
    # Given a path, NumPy leaves a damaged file open.
    with open(file, "rb") as opened:
      return load_npz(opened, os.fspath(file))
  with sources.reading(what), np.load(file, allow_pickle=False) as archive:
    return {name: archive[name] for name in archive.files}


def load_npy(path: sources.Path) -> np.ndarray:
  """Reads an .npy file; raises ValueError if it is none, or damaged."""
  with sources.reading(path):
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
      raise TypeError("an archive")
    return array


def _mapped_file(array: np.ndarray) -> str | None:
  """Returns the file that an array is mapped from, if its name is known."""
  owner = _map_of(array)
  name = None if owner is None else owner.filename
  return None if name is None else os.fspath(name)


def _map_of(array: np.ndarray) -> np.memmap | None:
  owner: Any = array
  while isinstance(owner, np.ndarray):
    if isinstance(owner, np.memmap):
      return owner
    owner = owner.base
  return None
