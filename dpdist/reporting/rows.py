"""Writes rows of numbers to a file of JSON lines, and to TensorBoard.

JSON has no notation for numbers that are not finite, so they are written as the
strings `"NaN"`, `"Infinity"` and `"-Infinity"`, and `read` turns them back into
floats.
"""

from collections.abc import Mapping
import contextlib
import json
import operator
import pathlib
from typing import Any, Self

from dpdist import _validation
from dpdist.files import atomic
from dpdist.files import json_fields
from dpdist.reporting import tensorboard


class Log:
  """The rows of a run, by step; a context manager.

  The constructor drops the rows of steps after `start_step` from the file, and
  hides them in TensorBoard, since a resumed run writes them again. What may be
  written, subclasses say.
  """

  def __init__(
    self,
    path: pathlib.Path,
    board: pathlib.Path,
    *,
    start_step: int,
    has_times: bool,
  ):
    """Opens both; raises ValueError if the file is damaged.

    The board is a log directory for TensorBoard; see `tensorboard.Events` for
    has_times. Writing goes on from start_step, which is 0 for a fresh run.
    """
    _validation.check("start_step", start_step, _validation.integer(0))
    self._last_step = start_step
    kept = [row for row in read(path) if row["step"] <= start_step]
    # Rewriting also repairs a half-written last line, which an append would
    # bury.
    text = "".join(map(_line, kept))
    atomic.write(path, text.encode(), is_durable=True)
    with contextlib.ExitStack() as stack:
      self._file = stack.enter_context(open(path, "a", encoding="ascii"))
      self._board = stack.enter_context(
        tensorboard.Events(
          board, purge_step=start_step + 1, has_times=has_times
        )
      )
      self._stack = stack.pop_all()

  def _write(
    self, step: int, values: Mapping[str, float], *, prefix: str = ""
  ) -> None:
    """Writes a row; in TensorBoard, its names begin with the prefix."""
    step = operator.index(step)
    if step < self._last_step:
      raise ValueError(
        f"step must be at least {self._last_step}, the last one written or"
        f" resumed from, got {step}"
      )
    row = {name: float(value) for name, value in values.items()}
    self._last_step = step
    self._file.write(_line({"step": step, **row}))
    self._file.flush()
    self._board.write(
      step, {prefix + name: value for name, value in row.items()}
    )

  def close(self) -> None:
    """Flushes and closes both files; a second call does nothing."""
    self._stack.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *raised: Any) -> None:
    self._stack.__exit__(*raised)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the rows `{"step": int, name: float, ...}` of a file, by step.

  Consecutive lines of one step are one row. A step that comes up again later
  was replayed after a kill, and its new row replaces the old one. A last line
  that a kill cut short is left out; any other that is no row raises ValueError.
  A missing file has no rows.
  """
  try:
    lines = path.read_bytes().splitlines()
  except FileNotFoundError:
    return []
  rows: dict[int, dict[str, Any]] = {}
  previous = None
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      step = operator.index(row.pop("step"))
      row = {name: float(value) for name, value in row.items()}
    except (
      *(ValueError, TypeError, KeyError, AttributeError),
      *(OverflowError, RecursionError),
    ) as error:
      if number == len(lines):
        break
      raise ValueError(f"{path}:{number} is not a row of numbers") from error
    if step != previous:
      rows[step] = {"step": step}
    rows[step].update(row)
    previous = step
  return [rows[step] for step in sorted(rows)]


def _line(row: Mapping[str, Any]) -> str:
  return json.dumps(json_fields.strict(row), allow_nan=False) + "\n"
