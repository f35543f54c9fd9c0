"""Example sources: random access to examples by index.

A source knows how many examples it has, reads any of them by index, and can
say, by a hash, what its content is. It neither shuffles nor batches: which
examples a step sees is the sampler's choice alone, and `dpdist.data.pipeline`
turns that choice into padded chunks.

An example is one unit of privacy. By convention it is named
`{"inputs": ..., "targets": ...}`, but any names will do.
"""

from collections.abc import Iterator, Sequence
import contextlib
import errno
import os
from typing import Protocol

import numpy as np

from dpdist import errors

Path = str | os.PathLike[str]

# Of content that is hashed, so much is in memory at once.
HASH_BLOCK_BYTES = 1 << 24

# For the record of a run: it names no file.
CHANGED = "files of the training data were changed while the run read them"


class Source(Protocol):
  """What the data pipeline asks of a data set.

  `read` is called from several threads at once and must be thread-safe.

  A source may have three methods more; see `changed_files`, `is_touched` and
  `earlier_digests`, which ask them.
  """

  def __len__(self) -> int:
    """The number of examples."""
    ...

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Reads examples.

    Args:
      indices: int64 of shape (k,), each in [0, len(self)); k may be zero.

    Returns:
      By name, arrays of leading axis k in the order of `indices`. Shapes
      beyond the first axis, and dtypes, are the same at every call.

    Raises:
      ValueError: an index is out of range, or what is there is no example. The
        message does not repeat the index, because which examples are read is
        private.
      OSError: they cannot be had now, but perhaps later.
    """
    ...

  def content_digest(self) -> str:
    """SHA-256 of the content, 64 hex digits; safe to record beside a run.

    Of the examples in their order, and of nothing that can change without them,
    such as the names of files: what a data set may spend is kept under it.
    """
    ...


def changed_files(source: Source) -> list[str]:
  """The files that a source still reads from and that were changed since.

  Once this is empty, all that was read so far is what the manifest is of, but
  for what was changed and changed back in between, and for what a program
  writes through a memory map of its own, which moves no time of the file. A
  source that reads from files after it was made has a method of this name. It
  may take as long as the manifest did; see `is_touched`.

  Raises:
    OSError: they cannot be looked at now, but perhaps later.
  """
  return list(getattr(source, "changed_files", list)())


def is_touched(source: Source) -> bool:
  """Whether `changed_files` has to hash content again; looks at none itself.

  A source whose files can be renamed, or have another mode, and be what they
  were has a method of this name.

  Raises:
    OSError: as in `changed_files`.
  """
  return bool(getattr(source, "is_touched", bool)())


def changed_error(changed: Sequence[str]) -> errors.ChangedError:
  """What to raise where files were changed, of which some may be known here."""
  where = f", here {', '.join(changed)}" if changed else ""
  return errors.ChangedError(
    f"{CHANGED}{where}: the run stops, since it cannot vouch for its data; what"
    " it read since its last checkpoint is neither shown nor saved. Start a new"
    " run on data that stays as it is"
  )


def earlier_digests(source: Source) -> list[str]:
  """What earlier releases called the same content, and may have recorded.

  A source whose manifest was once made otherwise has a method of this name.
  """
  return list(getattr(source, "earlier_digests", list)())


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
  """Makes one ValueError of all that readers of formats raise.

  Of a damaged file NumPy, zipfile and Arrow may raise nearly anything. Errors
  of the operating system come through.
  """
  try:
    yield
  except Exception as error:
    # A place before a file's beginning is what a damaged one asks for.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
      raise
    raise ValueError(
      f"{what} cannot be read, as it is damaged or of another format:"
      f" {type(error).__name__}"
    ) from error


def check_indices(indices: np.ndarray, num_examples: int) -> np.ndarray:
  """Indices as int64. Negative ones are refused: they would wrap around."""
  indices = np.asarray(indices)
  if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
    raise ValueError(
      f"indices must be integers (k,), got {indices.dtype} {indices.shape}"
    )
  if indices.size and not 0 <= indices.min() <= indices.max() < num_examples:
    # No value in the message: which examples are read is private.
    raise ValueError(f"indices must be in [0, {num_examples})")
  return indices.astype(np.int64)


def check_paths(paths: Path | Sequence[Path]) -> list[str]:
  paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
  names = [os.fspath(path) for path in paths]
  missing = [name for name in names if not os.path.isfile(name)]
  if missing or not names:
    raise ValueError(
      f"paths must name files, got {names} of which {missing} are missing"
    )
  return names
