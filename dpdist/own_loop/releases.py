"""Makes the releases of a session: one for each charged step, and once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from dpdist import errors
from dpdist.data import arrays as arrays_lib
from dpdist.data import pipeline
from dpdist.data import sources
from dpdist.data import users
from dpdist.distributed import collectives
from dpdist.distributed import mesh as mesh_lib
from dpdist.distributed import progress as progress_lib
from dpdist.keys import keys
from dpdist.ledger import history
from dpdist.own_loop import life as life_lib
from dpdist.own_loop import release
from dpdist.own_loop import settings
from dpdist.sampling import sampler as sampler_lib
from dpdist.training import setup

PyTree = Any
Batch = Mapping[str, np.ndarray]


class Releases:
  """Makes releases of charged steps; made and used by all processes together.

  Guarantees:
    A step's noise is drawn only after the step is charged, and after
    `dpdist.own_loop.commitments` has on disk what goes into it: parameters,
    examples, program, settings and machine. So no noise meets two sums.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    life: life_lib.Life,
    mesh: Mesh,
    losses: Mapping[str, settings.Loss],
    dataset: Any,
    source: sources.Source | None,
    largest: Mapping[str, int],
    progress: progress_lib.Progress,
  ):
    """Stores the arguments, those of a `dpdist.Session`; reads nothing yet.

    The source is of the data set's training part, None without one.
    """
    self._config, self._life, self._mesh = config, life, mesh
    self._losses, self._dataset, self._source = losses, dataset, source
    self._largest, self._progress = largest, progress
    self._chunk_size = setup.chunk_size(config, life.plan, mesh)
    self._programs: dict[str, release.Program] = {}
    self._samplers: dict[str, sampler_lib.Sampler] = {}
    self._reader: Iterator[tuple[int, list[pipeline.Chunk]]] | None = None
    self._next = 0  # The charged step that the reader reads next.

  @property
  def is_any_made(self) -> bool:
    """Returns whether a release was made, so that programs are known."""
    return bool(self._programs)

  def close(self) -> None:
    """Stops reading ahead."""
    self._reader = None

  def draw(self, charged: int) -> np.ndarray:
    """Returns the examples of a charged step, which has begun then."""
    self._life.present.begin(charged)
    return self._sample(charged)

  def check_data(self) -> None:
    """Raises ChangedError if files of the data were changed meanwhile."""
    source = self._source
    if source is not None:
      self._life.present.check_data(lambda: sources.changed_files(source))

  def rounding(self) -> dict[str, Any]:
    """Returns what float rounding can add to the sensitivity, at most."""
    of = max(self._programs.values(), key=lambda x: x.num_entries)
    return of.rounding().to_dict()

  def gradients(
    self,
    charged: int,
    loss: str,
    params: PyTree,
    given: PyTree,
    batch: Batch | None,
    *,
    is_drawn: bool,
    take: Callable[[], None],
  ) -> PyTree:
    """Makes the release of a charged step; see `dpdist.Session`.

    `take` is called when it begins, after all that can be wrong with the
    arguments. If the step's indices were drawn for a loader, `is_drawn`.
    """
    if (batch is None) == (self._source is None):
      raise errors.ArgumentError(
        "batch must be given if the session has no dataset, and not otherwise,"
        f" got {'none' if batch is None else 'one'}"
      )
    params, given = release.replicated((params, given), self._mesh)
    if batch is not None:
      batch = self._checked(batch, charged)
    program = self._program(loss, params, given, batch)
    self._progress.enter(charged, "computing")
    take()
    self._life.present.begin(charged)
    chunks = self._chunks(charged, batch)
    digest = lambda: self._digest(program, loss, (params, given), chunks)
    if not self._life.commit(charged, digest()):
      # Under its keys a release was made of other values: it needs new keys.
      self._branch_off(charged, is_drawn=is_drawn)
      chunks = self._chunks(charged, batch)
      if not self._life.commit(charged, digest()):
        raise errors.LedgerError("a new branch has been used already")
    position = self._life.present.position
    gradient, found = program.gradients(
      *(params, given, chunks, self._life.streams(charged)),
      number=charged,
      release_index=position.first_release + charged,
      sentinel_every=self._config.sentinel.every,
      first=position.first_step,
    )
    self.check_data()
    if found:
      self._life.present.notice(history.TOO_LONG)
      raise errors.SensitivityError(program.fault(params, given, found))
    self._progress.enter(charged, "evaluating")
    return gradient

  def _branch_off(self, charged: int, *, is_drawn: bool) -> None:
    """Goes on with new keys from a charged step on."""
    self.close()
    self._samplers.clear()
    self._life.branch_off(charged)
    if is_drawn:
      raise errors.ReplayError(
        "a step that was made before the run was stopped would now be made of"
        " other values: start again, and it is made anew from the last"
        " checkpoint, with other examples and noise"
      )
    # To the end of the loop's step, so that none of its losses is refused when
    # another was paid.
    count = len(self._losses)
    self._life.charge(charged - charged % count + count)
    self._life.present.begin(charged)

  def _sample(self, charged: int) -> np.ndarray:
    """Draws the examples of a charged step."""
    streams = self._life.streams(charged)
    if streams.branch not in self._samplers:
      self._samplers[streams.branch] = streams.sampler(
        self._life.plan, self._life.present.position.first_release
      )
    return self._samplers[streams.branch](charged)

  def _digest(
    self,
    program: release.Program,
    loss: str,
    values: PyTree,
    chunks: Sequence[pipeline.Chunk],
  ) -> str:
    """Returns the digest of all that goes into a release but its keys."""
    key = self._life.digest_key
    mine = release.digest(key, [], values)
    # Otherwise no process could tell what a step was made of.
    collectives.assert_equal(params=mine)
    facts = [self._life.fingerprint, program.sha256, loss, mine]
    facts += [str(self._chunk_size)]
    return release.digest(key, facts, [tuple(chunk) for chunk in chunks])

  def _program(
    self, loss: str, params: PyTree, given: PyTree, batch: Batch | None
  ) -> release.Program:
    """Returns the program of a loss, which is checked when it is made."""
    if loss not in self._programs:
      row = batch
      if self._source is not None:
        row = self._source.read(np.zeros(1, np.int64))
      shapes = {
        name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        for name, x in (row or {}).items()
      }
      is_watched = self._config.sentinel.every > 0
      program = collectives.run_on_all(
        lambda: release.Program(
          *(self._losses[loss], self._life.plan, self._mesh),
          *(params, given, shapes),
          chunk_size=self._chunk_size,
          method=self._config.clipping.method,
          microbatch_size=self._config.clipping.microbatch_size or None,
          is_watched=is_watched,
          is_of_units=isinstance(self._source, users.UserSource),
        )
      )
      collectives.assert_equal(lowered_step=program.sha256)
      largest = settings.largest_of(self._dataset, self._largest)
      program.check(
        *(params, given, {name: largest.get(name, 1) for name in shapes}),
        is_watched=is_watched,
      )
      self._programs[loss] = program
    program = self._programs[loss]
    release.check_shapes(program, params, given)
    return program

  def _checked(self, batch: Batch, charged: int) -> dict[str, np.ndarray]:
    """Returns the rows of one's own loader, if they are as many as drawn."""
    rows = {name: np.asarray(x) for name, x in batch.items()}
    count = len(self._sample(charged))
    if not rows or any(x.ndim < 1 or len(x) != count for x in rows.values()):
      raise errors.ArgumentError(
        "batch must have a row for each of the step's indices in each array,"
        f" got shapes { ({k: x.shape for k, x in rows.items()}) }"
      )
    return rows

  def _chunks(self, charged: int, batch: Batch | None) -> list[pipeline.Chunk]:
    """Returns this process's chunks of the examples of a charged step."""
    if batch is not None:
      rows = arrays_lib.ArraySource(batch)
      all_rows = lambda step: np.arange(len(rows))
      ((_, chunks),) = self._steps(rows, all_rows, 0, 1, num_threads=0)
      return chunks
    if self._reader is None or charged < self._next:
      assert self._source is not None
      self._reader = self._steps(
        *(self._rows(self._source), self._sample, charged),
        self._life.present.position.last_step,
        num_threads=self._config.data.num_threads,
      )
    for number, chunks in self._reader:
      self._next = number + 1
      if number == charged:
        return chunks
    raise AssertionError("a step past the last was charged")

  def _rows(self, source: sources.Source) -> pipeline.Rows:
    """Returns what steps read: examples, or units with those of each step."""
    if not isinstance(source, users.UserSource):
      return source

    def of_step(charged: int) -> sources.Source:
      # Of the step's own keys: another process may have made it.
      streams = self._life.streams(charged)
      key = keys.derive(streams.secret, "unit_examples", branch=streams.branch)
      return source.drawing(key)(charged)

    return of_step

  def _steps(
    self,
    source: pipeline.Rows,
    sampler: Callable[[int], np.ndarray],
    start: int,
    stop: int,
    *,
    num_threads: int,
  ) -> Iterator[tuple[int, list[pipeline.Chunk]]]:
    return pipeline.steps(
      source,
      sampler,
      start_step=start,
      num_steps=stop,
      chunk_size=self._chunk_size,
      rows=mesh_lib.local_rows(self._mesh, self._chunk_size),
      num_threads=num_threads,
      prefetch=self._config.data.prefetch,
    )
