"""Loads and exports what a loop of one's own, a `dpdist.Session`, has saved.

Nothing here knows the loop's model or its held-out examples. What is loaded are
the arrays of its state, by their paths, and their scores are what the loop
logged. Like `dpdist.export.load_run`, this spends nothing, and refuses a
run whose record is not sound.
"""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from dpdist import errors
from dpdist.export import export
from dpdist.export import load_run
from dpdist.export import model_card
from dpdist.files import places
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.reporting import metrics
from dpdist.tasks import parts as parts_lib
from dpdist.workdir import checkpoints
from dpdist.workdir import fingerprint
from dpdist.workdir import manifest

# Which every session has in its directory, and no other run.
_MARK = "releases.jsonl"
_TEST = "test/"


class Saved(NamedTuple):
  """What a loop had saved after a step.

  Attributes:
    workdir: the run's directory.
    ledger: its ledger, which is sound.
    step: of the loop.
    arrays: of the state, by their paths in it, such as "0.dense.kernel".
  """

  workdir: pathlib.Path
  ledger: ledger_lib.Ledger
  step: int
  arrays: dict[str, np.ndarray]


def is_in(workdir: str | os.PathLike[str]) -> bool:
  """Returns whether a directory has the run of a session."""
  return (places.directory(workdir) / _MARK).exists()


def load(
  workdir: str | os.PathLike[str],
  ledger: ledger_lib.Ledger,
  *,
  step: int | None = None,
) -> Saved:
  """Restores a checkpoint of a session whose record is sound.

  Args:
    workdir: the run's directory.
    ledger: its ledger, which is only read.
    step: of the loop; None: that of the newest checkpoint that is whole.

  Raises:
    UnsoundError: the record is not sound.
    ValueError: there is no such checkpoint, or an earlier release saved it.
  """
  workdir = places.directory(workdir)
  load_run.check_sound(workdir, ledger)
  folder = workdir / "checkpoints"

  def facts(saved: history.CheckpointRef) -> dict[str, Any]:
    return manifest.meta(manifest.location(folder, saved))

  saved = load_run.find(
    workdir, ledger, step, lambda x: facts(x).get("loop_steps", x.step)
  )
  recorded = facts(saved)
  if "arrays" not in recorded:
    raise errors.ArgumentError(
      "workdir must hold a checkpoint that names its arrays, got one of an"
      f" earlier release of dpdist in {str(workdir)!r}: go on with the loop,"
      " which saves another"
    )
  kept = checkpoints.restore_any(folder, saved)
  leaves = [leaf for _, leaf in sorted(kept.get("leaves", {}).items())]
  arrays = dict(zip(recorded["arrays"], leaves, strict=True))
  if len(arrays) < len(leaves):
    raise errors.ArgumentError(
      "state must have arrays whose paths differ when they are joined by dots,"
      f" got {sorted(arrays)} for {len(leaves)} arrays"
    )
  return Saved(workdir, ledger, recorded["loop_steps"], arrays)


def evaluate(saved: Saved) -> dict[str, Any]:
  """Returns what the loop logged at the step, and what the run has spent.

  JSON-able: "step", "test", and the rest as
  `dpdist.export.load_run.evaluate`.
  """
  scores = {
    name.removeprefix(_TEST): value
    for row in metrics.read(saved.workdir)
    if row["step"] == saved.step
    for name, value in row.items()
    if name.startswith(_TEST)
  }
  spent = load_run.spent(saved.ledger)
  return {"step": saved.step, "test": scores, **spent}


def write(
  saved: Saved,
  facts: dict[str, Any],
  output: str | os.PathLike[str],
  *,
  name: str,
  part: str = "",
) -> dict[str, Any]:
  """Writes the export folder of a state, or of a part of it.

  Args:
    saved: from `load`.
    facts: the result of `evaluate` on it.
    output: a directory that is new or empty.
    name: of the model, for its card.
    part: a path in the state: what is under it is written, by paths that begin
      there; "": all.

  Returns:
    The facts, with "params_sha256", "num_parameters" and "output".

  Raises:
    ValueError: output is not empty, or nothing is under the part.
  """
  arrays = saved.arrays
  if part:
    arrays = {
      key.removeprefix(part).removeprefix("."): x
      for key, x in arrays.items()
      if f"{key}.".startswith(f"{part}.")
    }
  if not arrays:
    raise errors.ArgumentError(
      "part must be the beginning of the path of an array in the state, of"
      f" {sorted(saved.arrays)}, got {part!r}",
      hint=errors.Hint(flags=("--part=PATH",)),
    )
  return export.write_folder(
    pathlib.Path(output),
    arrays,
    {"name": parts_lib.GIVEN},
    facts | {"params_sha256": fingerprint.params_sha256(arrays)},
    lambda facts: model_card.of_state(
      saved.ledger, load_run.environment(saved.workdir), facts, name
    ),
  )
