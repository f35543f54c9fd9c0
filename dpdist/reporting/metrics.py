"""Writes a private run's metrics, and refuses those that must stay private.

A private run spends its budget on the noisy gradients. Whatever is computed
from those, from public numbers or from held-out data may be released freely; a
function of the true batch may not, however harmless it looks. The sets of names
are closed: `RELEASED`, `SENSITIVE`, and the names that a run's task declares,
whose metrics are computed from held-out examples alone (see
`dpdist.tasks.held_out`) and are written as test/NAME and test_ema/NAME. Any
other name is refused, so every new metric must be classified here.

Rows go to `metrics.jsonl` and to TensorBoard; see `dpdist.reporting.rows`.
"""

from collections.abc import Iterable, Mapping
import os
import pathlib
from typing import Any

from dpdist.reporting import rows

RELEASED: frozenset[str] = frozenset(
  (
    # Public numbers, and numbers computed from the noisy gradient.
    "epsilon",
    "learning_rate",
    "noisy_gradient_norm",
    # The norm of the noise in that gradient, from the plan alone.
    "noise_norm",
  )
)
"""Names that may leave any run.

No time, and no speed, is among them: a step takes longer when more examples
were drawn, and how many were is private. See `dpdist.reporting.telemetry`.
"""

SENSITIVE: frozenset[str] = frozenset(
  ("train_loss", "batch_size", "clip_fraction", "num_nonfinite")
)
"""Names computed from the true batch, which no noise covers."""

_FILE = "metrics.jsonl"


HELD_OUT = ("accuracy", "loss")
"""The metrics that this project's own tasks declare."""

_GROUPS = ("test", "test_ema")


def check_released(
  names: Iterable[str], held_out: Iterable[str] = HELD_OUT
) -> None:
  """Raises ValueError unless names are in `RELEASED` or of the task."""
  released = {
    *RELEASED,
    *(f"{group}/{name}" for group in _GROUPS for name in held_out),
  }
  for name in names:
    if name in SENSITIVE:
      raise ValueError(
        f"{name!r} is sensitive: it is computed from the private batch"
        " without noise, and epsilon does not cover it. For a run whose data"
        " need no protection, set --config.unsafe_metrics=True and use"
        " write_sensitive"
      )
    if name not in released:
      raise ValueError(
        f"{name!r} is no known metric; released: {sorted(released)}"
      )


def check_sensitive(names: Iterable[str]) -> None:
  """Raises ValueError unless every name is in `SENSITIVE`."""
  for name in names:
    if name not in SENSITIVE:
      raise ValueError(
        f"{name!r} is no sensitive metric; sensitive: {sorted(SENSITIVE)}"
      )


class Writer(rows.Log):
  """Writes rows of metrics; a context manager, one for each run.

  In a run of many processes one of them writes. The constructor drops the rows
  of steps after `start_step`, 0 for a fresh run, from `metrics.jsonl`, and
  hides them in TensorBoard, since a resumed run writes them again. That keeps
  the curves single-valued. It gives no budget back, because what was once
  written may have been seen. The task declares the names `held_out`.
  `unsafe_metrics` allows `write_sensitive`, and voids the guarantee of the run.

  Guarantees:
    Without `unsafe_metrics`, no name is ever written that is neither in
    `RELEASED` nor declared. A call with such a name writes nothing at all.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    unsafe_metrics: bool,
    start_step: int = 0,
    held_out: Iterable[str] = HELD_OUT,
  ) -> None:
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._unsafe_metrics = unsafe_metrics
    self._held_out = tuple(held_out)
    super().__init__(
      workdir / _FILE,
      workdir / "tensorboard",
      start_step=start_step,
      has_times=False,
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes released metrics of a step, which may repeat, but not go back."""
    check_released(values, self._held_out)
    self._write(step, values)

  def write_sensitive(self, step: int, values: Mapping[str, float]) -> None:
    """Writes metrics that no noise covers, for runs that accept it.

    TensorBoard shows them under `PRIVATE/`.
    """
    if not self._unsafe_metrics:
      raise ValueError(
        f"{sorted(values)} would void the guarantee: sensitive metrics are"
        " written only with --config.unsafe_metrics=True"
      )
    check_sensitive(values)
    self._write(step, values, prefix="PRIVATE/")


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the rows of a run's directory; see `dpdist.reporting.rows.read`."""
  return rows.read(pathlib.Path(workdir) / _FILE)
