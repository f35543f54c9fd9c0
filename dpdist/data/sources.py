"""Example sources: random access to examples by index.

A source knows how many examples it has, reads any of them by index, and can
identify its content by a hash. It neither shuffles nor batches: the sampler
alone decides which examples a step sees, and `dpdist.data.pipeline` turns its
decision into padded chunks.

An example is one unit of privacy. By convention its arrays are named
`{"inputs": ..., "targets": ...}`, but any names will do.
"""

from collections.abc import Iterator, Sequence
import contextlib
import errno
import os
from typing import Protocol

import numpy as np

from dpdist import errors
from dpdist.files import places

Path = str | os.PathLike[str]

# How many bytes of the content are in memory at once while it is hashed.
HASH_BLOCK_BYTES = 1 << 24

# For the ledger of a run: it names no file.
CHANGED = "files of the training data were changed while the run read them"


class Source(Protocol):
  """The interface of a data set for the data pipeline.

  `read` is called from several threads at once and must be thread-safe.

  A source may have four more methods; see `changed_files`, `is_touched`,
  `earlier_digests` and `encoding_digest`, which call them.
  """

  def __len__(self) -> int:
    """Returns the number of examples."""
    ...

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Reads examples.

    Args:
      indices: int64 of shape (k,), each in [0, len(self)); k may be zero.

    Returns:
      By name, arrays of leading axis k in the order of `indices`. Shapes
      beyond the first axis, and dtypes, are the same at every call.

    Raises:
      ValueError: an index is out of range, or the data there is no example. The
        message does not repeat the index, because which examples are read is
        private.
      OSError: they cannot be read now, but perhaps later.
    """
    ...

  def content_digest(self) -> str:
    """Returns the SHA-256 of the content, 64 hex digits; safe to record.

    It depends on the examples in their order, and on nothing that can change
    without them, such as the names of files: the data set's budget is kept
    under it.
    """
    ...


def changed_files(source: Source) -> list[str]:
  """Returns the files that a source reads from and that have changed since.

  If this is empty, all that was read so far is what the digest was computed on.
  Two exceptions: what was changed and changed back in between, and what a
  program writes through a memory map of its own, which changes no time of the
  file. A source that reads from files after it was made has a method of this
  name. It may take as long as the digest did; see `is_touched`. Raises OSError
  if the files cannot be checked now, but perhaps later.
  """
  return list(getattr(source, "changed_files", list)())


def is_touched(source: Source) -> bool:
  """Returns whether `changed_files` must hash content again; reads none itself.

  A source whose files can be renamed, or get another mode, and still have the
  same content has a method of this name. See `changed_files` for OSError.
  """
  return bool(getattr(source, "is_touched", bool)())


def changed_error(changed: Sequence[str]) -> errors.ChangedError:
  """Returns the error to raise if files changed; names those known here."""
  where = f", here {', '.join(changed)}" if changed else ""
  return errors.ChangedError(
    f"{CHANGED}{where}: the run stops, since it cannot vouch for its data; what"
    " it read since its last checkpoint is neither shown nor saved. Start a new"
    " run on data that stays as it is"
  )


def earlier_digests(source: Source) -> list[str]:
  """Returns digests that earlier releases may have recorded instead.

  A source whose digest was once computed differently has a method of this
  name.
  """
  return list(getattr(source, "earlier_digests", list)())


def encoding_digest(source: Source) -> str:
  """Returns the SHA-256 of how examples are made of the content; "" if by code.

  Two sources of one content and one code may still return other examples, if
  they were given other numbers or lists to make them with. A run that changes
  from one to the other must not meet the same keys again. A source that is
  given such things has a method of this name.
  """
  return str(getattr(source, "encoding_digest", str)())


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
  """Turns all that readers of file formats raise into one ValueError.

  For a damaged file NumPy, zipfile and Arrow may raise nearly anything. Errors
  of the operating system come through.
  """
  try:
    yield
  except Exception as error:
    # A damaged file may ask for a position before its beginning.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
      raise
    raise ValueError(
      f"{what} cannot be read, as it is damaged or of another format:"
      f" {type(error).__name__}"
    ) from error


def check_indices(indices: np.ndarray, num_examples: int) -> np.ndarray:
  """Returns indices as int64; refuses negative ones, that would wrap around."""
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
  missing = [name for name in names if not _is_file(name)]
  if missing or not names:
    raise ValueError(
      f"paths must name files, got {names} of which {missing} are missing"
    )
  return names


def _is_file(path: str) -> bool:
  try:
    return places.is_file(path)
  except OSError as error:
    reason = error.strerror or type(error).__name__
    raise errors.ReadError(f"{path} cannot be read ({reason})") from error
