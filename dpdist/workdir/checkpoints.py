"""Checkpoints: Orbax, with a manifest that is verified before a restore.

Every checkpoint gets a manifest (see `dpdist.workdir.manifest`), written and
synced after Orbax has finished; its digest is recorded in the ledger. A run
goes on from the newest checkpoint that the ledger knows and whose files all
match.

Frozen parameters are not in checkpoints: they are made anew at every start, and
a checkpoint holds the SHA-256 of those it belongs to.

Each process that writes has a folder of its own. If a process was taken for
dead and goes on writing, it writes where no other process reads.

Nothing random is stored: keys are functions of the secret and the step.
"""

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
import pathlib
import shutil
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from dpdist import errors
from dpdist.distributed import collectives
from dpdist.files import atomic
from dpdist.ledger import history
from dpdist.reporting import console
from dpdist.workdir import copies as copies_lib
from dpdist.workdir import manifest

PyTree = Any

_DELETED = ".deleted"


class Checkpoints:
  """The checkpoints of one run directory; a context manager."""

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    writer: int,
    max_to_keep: int = 3,
    frozen_sha256: str = "",
    copies: copies_lib.Copies | None = None,
  ):
    """Opens or creates the folder of a writer, see `history.History.writer`.

    The primary process has the copies, if any are made.
    """
    self._directory = pathlib.Path(directory).absolute()
    self._folder = manifest.folder(self._directory, writer)
    self._max_to_keep = max_to_keep
    self._frozen_sha256 = frozen_sha256
    # What `dpdist.workdir.statistics` released, to be kept with the parameters
    # that were trained with it.
    self.statistics: dict[str, Any] | None = None
    self._copies = copies
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
    )
    for path in (self._directory, self._directory.parent):
      manifest.sync(path)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self._manager.close()

  def save(
    self,
    state: PyTree,
    *,
    step: int,
    ledger_head: str,
    facts: Mapping[str, Any] | None = None,
  ) -> str:
    """Saves a checkpoint durably and returns its digest, for the ledger.

    The ledger up to ledger_head must charge every one of the `step` updates in
    state. Facts are JSON-able, kept beside the state; see `manifest.meta`.
    Raises SaveError if the directory cannot be written to.
    """
    path = self._folder / str(step)
    try:
      is_saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          meta=ocp.args.JsonSave(
            {
              **(facts or {}),
              "step": step,
              "ledger_head": ledger_head,
              "frozen_sha256": self._frozen_sha256,
            }
            | ({"statistics": self.statistics} if self.statistics else {})
          ),
        ),
      )
      self._manager.wait_until_finished()
      if not is_saved:
        raise errors.SaveError(
          f"{path} was not saved: Orbax found a newer checkpoint beside it"
        )
      return str(collectives.run_on_primary(lambda: self._sealed(path)))
    except (OSError, ValueError) as error:  # ValueError: tensorstore's.
      raise errors.SaveError(f"{path} could not be saved: {error}") from error

  def _sealed(self, path: pathlib.Path) -> str:
    _drop_times(path / "_CHECKPOINT_METADATA")
    digest = manifest.write(path)
    if self._copies is not None:
      self._copies.put(path)
    return digest

  def restore(
    self, like: PyTree, saved: history.CheckpointRef
  ) -> tuple[PyTree, str]:
    """Restores a checkpoint whose manifest was verified; see `restore`."""
    return restore(
      self._directory, like, saved, frozen_sha256=self._frozen_sha256
    )

  def delete_old(self, known: Sequence[history.CheckpointRef]) -> None:
    """Deletes all but the newest checkpoints, of all writers so far."""
    keep = {
      manifest.location(self._directory, saved)
      for saved in known[-self._max_to_keep :]
    }
    for path in self._directory.glob("writer_*/*"):
      if path not in keep and path.parent <= self._folder:
        # Renamed first: if the process is killed, what is left is not taken for
        # a damaged checkpoint.
        gone = path.with_suffix(_DELETED)
        with contextlib.suppress(OSError):
          path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    for path in self._directory.glob("writer_*"):
      if path < self._folder:
        with contextlib.suppress(OSError):  # It is not empty.
          path.rmdir()
    if self._copies is not None:
      try:
        self._copies.delete_others([*keep], self._folder)
      except errors.SaveError as error:  # Too many copies lose nothing.
        console.warn(f"old copies are left: {error}")


def restore(
  directory: str | os.PathLike[str],
  like: PyTree,
  saved: history.CheckpointRef,
  *,
  frozen_sha256: str = "",
) -> tuple[PyTree, str]:
  """Restores a checkpoint and changes nothing in the run directory.

  The checkpoint's manifest must have been verified. `like` has the shapes,
  dtypes and shardings to restore to. Returns the pytree that was saved, and the
  head of the ledger at that time. Raises MismatchError if the checkpoint has
  other parameters than like, or was trained with other frozen ones.
  """
  path = manifest.location(pathlib.Path(directory).absolute(), saved)
  meta = manifest.meta(path)
  beside = meta.get("frozen_sha256", "")
  if beside != frozen_sha256:
    raise errors.MismatchError(
      f"the checkpoint {path} was trained beside frozen parameters of SHA-256"
      f" {beside or 'none'}, and those of model.weights and model.trainable"
      f" have {frozen_sha256 or 'none'}: go on with those that the run began"
      " with"
    )
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  try:
    # Without a manager, which would delete what it takes for leftovers of a run
    # that is writing.
    with ocp.StandardCheckpointer() as checkpointer:
      state = checkpointer.restore(path / "state", shapes)
  except (KeyError, TypeError, ValueError) as error:
    # Its bytes are right, so the settings must have changed.
    raise errors.MismatchError(
      f"the checkpoint of step {saved.step} in {path} does not fit the model,"
      " optimizer and ema_decay of these settings; go on with those that the"
      " run began with"
    ) from error
  return state, meta["ledger_head"]


def restore_any(
  directory: str | os.PathLike[str], saved: history.CheckpointRef
) -> PyTree:
  """Returns a checkpoint's pytree of NumPy arrays, of whatever shapes it has.

  Its manifest must have been verified; nothing is changed.
  """
  path = manifest.location(pathlib.Path(directory).absolute(), saved) / "state"
  kept = ocp.StandardCheckpointHandler().metadata(path).tree
  # Arrays of NumPy come back as such, and these take no memory.
  like = jax.tree.map(
    lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), kept
  )
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path, like)


def _drop_times(path: pathlib.Path) -> None:
  """Sets the times in Orbax's record of a checkpoint to 0.

  They would tell how long steps take, and so how many examples were drawn.
  """
  values = json.loads(path.read_text())
  times = [name for name in values if name.endswith("_timestamp_nsecs")]
  atomic.write(path, json.dumps(values | dict.fromkeys(times, 0)).encode())
