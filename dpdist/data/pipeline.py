"""Turns index sets into padded chunks, through Grain.

The sampler decides which examples a step sees. This module reads them and lays
them out in chunks of one fixed shape, so that nothing recompiles when the size
of the draw changes. A draw larger than a chunk makes more chunks. It is never
cut: a cut would break the accounting.

Grain runs the reads ahead of the training loop. Its own state is not saved:
step t is a function of t alone, so a run resumes at any step, on any number of
hosts, from the step number.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.data import sources

# Where rows are read; if their contents depend on the step, a function from a
# step to the source.
Rows = sources.Source | Callable[[int], sources.Source]


class Chunk(NamedTuple):
  """This host's rows of one chunk of a draw.

  PRIVATE: which rows are padding reveals how many examples were drawn, and the
  batch is the data itself. Neither may leave the process unprotected.
  """

  # By name, arrays of shape (num_rows, ...); zeros in padding rows.
  batch: dict[str, np.ndarray]
  # bool (num_rows,), True where a row holds no example.
  is_padding_example: np.ndarray


def padded(indices: np.ndarray, multiple: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads a draw of any size to one of few shapes, so that little is compiled.

  Args:
    indices: [n], drawn; it may be empty, and is never cut.
    multiple: the padded size is a multiple of it.

  Returns:
    Indices [m], m >= n, and is_padding_example [m]: True for what was added.
  """
  _validation.check("multiple", multiple, _validation.COUNT)
  size = max(1, -(-len(indices) // multiple)) * multiple
  rows = np.pad(indices, (0, size - len(indices)))
  return rows, np.arange(size) >= len(indices)


def steps(
  source: Rows,
  sampler: Callable[[int], np.ndarray],
  *,
  start_step: int,
  num_steps: int,
  chunk_size: int,
  rows: np.ndarray,
  num_threads: int = 2,
  prefetch: int = 4,
) -> Iterator[tuple[int, list[Chunk]]]:
  """Yields the chunks of every step from `start_step` on, in order.

  The sampler maps a step to strictly increasing integer indices (k,) below
  len(source), the same on every host. These are cut into consecutive chunks of
  `chunk_size`; position p of a chunk is the same example on every host. A host
  reads only the positions it owns, its `rows`: distinct integers (num_rows,) in
  [0, chunk_size). All hosts yield the same number of chunks for a step,
  ceil(number drawn / chunk_size), even where all the rows of a host are
  padding; an empty draw yields the step with no chunk. `num_steps` is the run's
  length, not a count from `start_step`.

  Which examples are drawn, and how many, is private (see `Chunk`), and so is
  the number of chunks. Errors raised here name the step, never an index or a
  count: a ReadError that the source raised, and ValueError for a draw or a
  source that breaks its contract. Other errors of the source and the sampler
  come through unchanged, at the step that they belong to.

  Source and sampler are called from `num_threads` threads, each of which reads
  a step at a time; `prefetch` steps are held, ready or being read, ahead of the
  one in use. If either is 0, the caller's thread reads. Host memory holds at
  most prefetch + 1 steps of padded rows, about (prefetch + 1) * num_rows *
  bytes of an example for each chunk that a step takes, and what `num_threads`
  reads need meanwhile. Close the iterator (or drop the last reference to it) to
  cancel the reads that have not begun. Reads under way end in the background.

  Guarantees:
    Every drawn example is in exactly one row of one chunk of one host, provided
    that the hosts' `rows` partition range(chunk_size), and nothing else is in
    any row. A draw is never cut: a step that cannot be read raises.
  """
  _check_numbers(start_step, num_steps, chunk_size, num_threads, prefetch)
  rows = _checked_rows(rows, chunk_size)

  def load(step_and_indices: tuple[int, np.ndarray]) -> tuple[int, list[Chunk]]:
    step, indices = step_and_indices
    rows_of = source(step) if callable(source) else source
    _check_draw(step, indices, len(rows_of))
    return step, _read_chunks(step, rows_of, indices, chunk_size, rows)

  dataset = (
    grain.MapDataset.source(_Draws(sampler, num_steps))
    .map(load)[start_step:]
    .to_iter_dataset(
      grain.ReadOptions(
        # More threads than steps to read ahead would have nothing to do.
        num_threads=min(num_threads, prefetch),
        prefetch_buffer_size=prefetch,
      )
    )
  )
  return _iterate(dataset, num_steps - start_step)


def _check_numbers(
  start_step: int,
  num_steps: int,
  chunk_size: int,
  num_threads: int,
  prefetch: int,
) -> None:
  """Raises ValueError for numbers out of their range."""
  _validation.require(
    0 <= start_step <= num_steps,
    "start_step",
    f"in [0, num_steps={num_steps}]",
    start_step,
  )
  _validation.check("chunk_size", chunk_size, _validation.COUNT)
  _validation.check("num_threads", num_threads, _validation.integer(0))
  _validation.check("prefetch", prefetch, _validation.integer(0))


def _checked_rows(rows: np.ndarray, chunk_size: int) -> np.ndarray:
  """Returns a host's rows as an array, checked to be rows of a chunk."""
  rows = np.asarray(rows)
  if (
    rows.ndim != 1
    or rows.dtype.kind not in "iu"
    # A row owned twice would count an example twice, past the sensitivity.
    or len(np.unique(rows)) != len(rows)
    or not np.isin(rows, np.arange(chunk_size)).all()
  ):
    raise ValueError(
      f"rows must be distinct integers in [0, chunk_size={chunk_size}), got"
      f" {rows}"
    )
  return rows


class _Draws:
  """The draws of a run as a Grain source: record t is the draw of step t."""

  def __init__(self, sampler: Callable[[int], np.ndarray], num_steps: int):
    self._sampler = sampler
    self._num_steps = num_steps

  def __len__(self) -> int:
    return self._num_steps

  def __getitem__(self, step: int) -> tuple[int, np.ndarray]:
    step = int(step)
    return step, self._sampler(step)


def _iterate(
  dataset: grain.IterDataset, count: int
) -> Iterator[tuple[int, list[Chunk]]]:
  iterator = iter(dataset)
  try:
    # By count, not until it ends: Grain takes a StopIteration that escapes from
    # a source for the end of the run, but here it becomes a RuntimeError.
    for _ in range(count):
      yield next(iterator)
  finally:
    iterator.close()


def _check_draw(step: int, indices: np.ndarray, num_examples: int) -> None:
  if not (
    isinstance(indices, np.ndarray)
    and indices.ndim == 1
    and indices.dtype.kind in "iu"
    # A repeated index would count an example twice, past the sensitivity.
    and np.all(indices[1:] > indices[:-1])
    and np.all((indices >= 0) & (indices < num_examples))
  ):
    raise ValueError(
      "sampler must return strictly increasing integers in"
      f" [0, len(source)={num_examples}); its draw for step {step} is not"
    )


def _read_chunks(
  step: int,
  source: sources.Source,
  indices: np.ndarray,
  chunk_size: int,
  rows: np.ndarray,
) -> list[Chunk]:
  """Reads this host's rows of all chunks of a draw."""
  try:
    return [
      _read_chunk(source, indices[start : start + chunk_size], rows)
      for start in range(0, len(indices), chunk_size)
    ]
  except errors.ReadError as error:
    raise errors.ReadError(f"step {step}: {error}") from error


def _read_chunk(
  source: sources.Source, indices: np.ndarray, rows: np.ndarray
) -> Chunk:
  """Reads this host's rows of the chunk that `indices` fill from the front."""
  is_padding_example = rows >= len(indices)
  drawn = indices[rows[~is_padding_example]]
  batch = {}
  for name, array in source.read(drawn).items():
    if len(array) != len(drawn):
      raise ValueError(
        f"source must return one row of {name!r} for each index; it did not"
      )
    padded = np.zeros((len(rows), *array.shape[1:]), array.dtype)
    padded[~is_padding_example] = array
    batch[name] = padded
  return Chunk(batch, is_padding_example)
