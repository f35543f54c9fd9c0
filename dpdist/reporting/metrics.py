"""Writes a private run's metrics, and refuses those that must stay private.

A private run spends its budget on the noisy gradients. Whatever is computed
from those, from public numbers or from held-out data may be released freely; a
function of the true batch may not, however harmless it looks. The two sets of
names are closed: a name in neither is refused, so every new metric must be
classified here.

Rows go to `metrics.jsonl`, one JSON object a line, and to TensorBoard. JSON has
no notation for numbers that are not finite, so they are written as the strings
`"NaN"`, `"Infinity"` and `"-Infinity"`, and `read` turns them back into floats.
"""

from collections.abc import Iterable, Mapping
import contextlib
import json
import operator
import os
import pathlib
from typing import Any, Self

from dpdist.files import atomic
from dpdist.files import json_fields
from dpdist.reporting import tensorboard

_HELD_OUT = ("accuracy", "loss", "perplexity")

RELEASED: frozenset[str] = frozenset(
  (
    # Public numbers, and numbers computed from the noisy gradient.
    "epsilon",
    "learning_rate",
    "noisy_gradient_norm",
    # The norm of the noise in that gradient, from the plan alone.
    "noise_norm",
    # Metrics of data that was not trained on, under released parameters.
    *(f"test/{name}" for name in _HELD_OUT),
    *(f"test_ema/{name}" for name in _HELD_OUT),
  )
)
"""Names that may leave the run.

No time, and no speed, is among them: a step takes longer when more examples
were drawn, and how many were is private. See `dpdist.reporting.telemetry`.
"""

SENSITIVE: frozenset[str] = frozenset(
  ("train_loss", "batch_size", "clip_fraction", "num_nonfinite")
)
"""Names computed from the true batch, which no noise covers."""

_FILE = "metrics.jsonl"


def check_released(names: Iterable[str]) -> None:
  """Raises ValueError unless every name is in `RELEASED`."""
  for name in names:
    if name in SENSITIVE:
      raise ValueError(
        f"{name!r} is sensitive: it is computed from the private batch"
        " without noise, and epsilon does not cover it. For a run whose data"
        " need no protection, set --config.unsafe_metrics=True and use"
        " write_sensitive"
      )
    if name not in RELEASED:
      raise ValueError(
        f"{name!r} is no known metric; released: {sorted(RELEASED)}"
      )


def check_sensitive(names: Iterable[str]) -> None:
  """Raises ValueError unless every name is in `SENSITIVE`."""
  for name in names:
    if name not in SENSITIVE:
      raise ValueError(
        f"{name!r} is no sensitive metric; sensitive: {sorted(SENSITIVE)}"
      )


class Writer:
  """Writes rows of metrics; a context manager, one for each run.

  In a run of many processes one of them writes. The constructor drops the rows
  of steps after `start_step` from `metrics.jsonl`, and hides them in
  TensorBoard, since a resumed run writes them again. That keeps the curves
  single-valued. It gives no budget back, because what was once written may have
  been seen.

  Guarantees:
    Without `unsafe_metrics`, no name outside `RELEASED` is ever written. A call
    with such a name writes nothing at all.

  Args:
    workdir: a directory on a file system; made if missing.
    unsafe_metrics: whether `write_sensitive` may be used. It voids the
      guarantee of the run.
    start_step: the step resumed from, 0 for a fresh run.

  Raises:
    ValueError: if `start_step` is negative, or `metrics.jsonl` is damaged
      before its last line.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    unsafe_metrics: bool,
    start_step: int = 0,
  ) -> None:
    if start_step < 0:
      raise ValueError(f"start_step must be at least 0, got {start_step}")
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._unsafe_metrics = unsafe_metrics
    self._last_step = start_step
    kept = [row for row in read(workdir) if row["step"] <= start_step]
    # Rewriting also repairs a half-written last line, which an append would
    # bury.
    text = "".join(map(_line, kept))
    atomic.write(workdir / _FILE, text.encode(), is_durable=True)
    with contextlib.ExitStack() as stack:
      self._file = stack.enter_context(
        open(workdir / _FILE, "a", encoding="ascii")
      )
      self._tensorboard = stack.enter_context(
        tensorboard.Events(
          workdir / "tensorboard",
          purge_step=start_step + 1,
          tells_time=False,
        )
      )
      self._open_files = stack.pop_all()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes released metrics.

    Args:
      step: steps made so far; may repeat, but not go back.
      values: name to scalar; names from `RELEASED`.

    Raises:
      ValueError: if a name is sensitive or unknown, or `step` goes back.
    """
    check_released(values)
    self._write(step, values, prefix="")

  def write_sensitive(self, step: int, values: Mapping[str, float]) -> None:
    """Writes metrics that no noise covers, for runs that accept it.

    TensorBoard shows them under `PRIVATE/`.

    Args:
      step: steps made so far; may repeat, but not go back.
      values: name to scalar; names from `SENSITIVE`.

    Raises:
      ValueError: if the run was not started with `unsafe_metrics`, a name is
        not in `SENSITIVE`, or `step` goes back.
    """
    if not self._unsafe_metrics:
      raise ValueError(
        f"{sorted(values)} would void the guarantee: sensitive metrics are"
        " written only with --config.unsafe_metrics=True"
      )
    check_sensitive(values)
    self._write(step, values, prefix="PRIVATE/")

  def _write(
    self, step: int, values: Mapping[str, float], *, prefix: str
  ) -> None:
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
    self._tensorboard.write(
      step, {prefix + name: value for name, value in row.items()}
    )

  def close(self) -> None:
    """Flushes and closes both files; a second call does nothing."""
    self._open_files.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *raised: Any) -> None:
    self._open_files.__exit__(*raised)


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads the rows of a run.

  Consecutive lines of one step are one row. A step that comes up again later
  was replayed after a kill, and its new row replaces the old one.

  Args:
    workdir: the run's directory.

  Returns:
    Rows `{"step": int, name: float, ...}` by increasing step; none if nothing
    was written yet. A last line that a kill cut short is left out.

  Raises:
    ValueError: if any line but the last is not a row.
  """
  path = pathlib.Path(workdir) / _FILE
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
      raise ValueError(f"{path}:{number} is not a row of metrics") from error
    if step != previous:
      rows[step] = {"step": step}
    rows[step].update(row)
    previous = step
  return [rows[step] for step in sorted(rows)]


def _line(row: Mapping[str, Any]) -> str:
  """Returns the line of a row; strict JSON whatever the values."""
  return json.dumps(json_fields.strict(row), allow_nan=False) + "\n"
