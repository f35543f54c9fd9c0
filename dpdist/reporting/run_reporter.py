"""Shows a run in the primary process while it trains."""

from collections.abc import Iterator, Sequence
import contextlib
import pathlib
import time
from typing import Any, NamedTuple, Self

import ml_collections

from dpdist.reporting import console
from dpdist.reporting import metrics
from dpdist.reporting import telemetry


class Row(NamedTuple):
  """What was measured after a step."""

  done: int  # Steps that were made.
  values: dict[str, float]  # Released, and "examples_per_second".
  scores: dict[str, float]  # Held-out metrics.
  # Private; shown only where the guarantee is void.
  sensitive: dict[str, float]
  machines: list[str]  # Of each process, from `telemetry.measure`; private.


class RunReporter:
  """Shows metrics and progress in the primary process; a context manager."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    start: int,
    last: int,
    epsilon_planned: float,
    *,
    held_out: Sequence[str],
  ):
    """Opens the files and the screen, for the steps from `start` to `last`."""
    with contextlib.ExitStack() as stack:
      self._writer = stack.enter_context(
        metrics.Writer(
          workdir,
          unsafe_metrics=config.unsafe_metrics,
          start_step=start,
          held_out=held_out,
        )
      )
      self._operations = stack.enter_context(
        telemetry.Writer(workdir, start_step=start)
      )
      self._progress = stack.enter_context(
        console.Progress(last, start, epsilon_planned, held_out=held_out)
      )
      self._stack = stack.pop_all()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *raised: Any) -> None:
    self._stack.__exit__(*raised)

  def on_step(self, done: int) -> None:
    """Shows that a step was made."""
    self._progress.update(done)

  def on_row(self, row: Row) -> None:
    """Writes and shows a row of metrics; shows speed on a terminal only."""
    done, values, scores, sensitive, machines = row
    values = dict(values)
    speed = values.pop("examples_per_second")
    self._operations.write(done, machines, {"examples_per_second": speed})
    self._writer.write(done, values | scores)
    if sensitive:
      self._writer.write_sensitive(done, sensitive)
    self._progress.update(
      done,
      epsilon=values["epsilon"],
      examples_per_second=speed,
      metrics=scores,
    )


class Clock:
  """Measures speed between reports, in expected examples: drawn are private."""

  def __init__(self, expected_batch_size: float):
    self._expected_batch_size = expected_batch_size
    self._steps = 0
    self._seconds = 0.0
    self._since: float | None = None

  def tick(self) -> None:
    """Counts a step; the first one compiles, and only starts the clock."""
    if self._since is None:
      self._since = time.monotonic()
    else:
      self._steps += 1

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out the time of its block."""
    now = time.monotonic()
    self._seconds += now - (now if self._since is None else self._since)
    yield
    self._since = time.monotonic()

  def examples_per_second(self) -> float:
    """Returns the speed since the last call; to be called while paused."""
    speed = self._steps * self._expected_batch_size / (self._seconds or 1.0)
    self._steps, self._seconds = 0, 0.0
    return speed
