"""Features that replace inputs, computed once and stored.

Each row of features is a public function of one example: nothing of it was
learned from the examples, and no example influences the features of another. So
one example more or less is one row of features more or less, and what is proved
of the rows holds for the examples.
"""

from collections.abc import Callable
import functools
import hashlib
import json
import os
import pathlib
import re
import tempfile

import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.assets import fetch
from dpdist.data import arrays as arrays_lib
from dpdist.data import sources
from dpdist.data.features import minilm
from dpdist.data.features import scaled_scattering
from dpdist.data.features import scattering
from dpdist.files import stamps as stamps_lib

_FILE = "inputs.npy"
_DIGEST = "sha256"
_BLOCK = 1024  # examples

# The function, and a version that changes whenever its values do.
_FEATURES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
  "minilm": (minilm.transform, minilm.VERSION),
  **{
    f"minilm_{blocks}": (
      functools.partial(minilm.states, blocks=blocks),
      minilm.VERSION,
    )
    for blocks in range(1, minilm.DEPTH)
  },
  "scattering": (scattering.transform, scattering.VERSION),
  "scattering_scaled": (
    scaled_scattering.transform,
    scaled_scattering.VERSION,
  ),
}


def blocks_ahead(name: str) -> int:
  """Returns how many of a model's first blocks the features replace."""
  match = re.fullmatch(r"minilm_(\d)", name)
  return int(match[1]) if match else 0


class FeatureSource(arrays_lib.ArraySource):
  """Examples whose inputs are features, on disk.

  The digest is that of the examples that the features were made from: it
  identifies whose data is protected, so that runs on features spend the data
  set's budget too. `sha256` is of the features as they are stored, hex. Made
  anew, on another machine or by another release of a library, they may differ
  in a bit. A step that is run again on them is another step, so this is part of
  a run's fingerprint (see `dpdist.workdir.fingerprint.fingerprint`).
  """

  def __init__(
    self,
    inputs: np.ndarray,
    targets: np.ndarray,
    source: sources.Source,
    sha256: str,
    stamps: stamps_lib.FileStamps,
  ):
    """Makes a source of stored features, stamped before they were hashed."""
    super().__init__({"inputs": inputs, "targets": targets})
    self._digest = source.content_digest()
    self._source = source
    self._stamps = stamps
    self.sha256 = sha256

  def earlier_digests(self) -> list[str]:
    """See `sources.earlier_digests`; returns those of the examples."""
    return sources.earlier_digests(self._source)

  def changed_files(self) -> list[str]:
    """See `sources.changed_files`; includes the examples' files."""
    own = self._stamps.changed(self._is_same)
    return own + sources.changed_files(self._source)

  def is_touched(self) -> bool:
    """See `sources.is_touched`; includes the examples' files."""
    return self._stamps.is_touched() or sources.is_touched(self._source)

  def _is_same(self) -> bool:
    return [_digest(path) for path in self._stamps.paths] == [self.sha256]


def of(source: sources.Source, name: str) -> FeatureSource:
  """Returns a source of {"inputs": float16 features, "targets": unchanged}.

  They are computed at first use, and stored as float16 below
  `dpdist.assets.fetch.cache()`, in a folder named by a hash of the examples'
  digest, the function and its version. Stored features are checked against
  their SHA-256. "scattering" and "scattering_scaled" are features of images
  (height, width, channels); see `dpdist.data.features.scattering` and
  `dpdist.data.features.scaled_scattering`. "minilm", and "minilm_1" to
  "minilm_5", are of tokens; see `dpdist.data.features.minilm`. Raises
  ValueError if the name is unknown, the function does not take the inputs, or
  stored features have changed.
  """
  if name not in _FEATURES:
    raise errors.ArgumentError(
      f"data.features must be '' or one of {sorted(_FEATURES)}, got"
      f" {name!r}{_validation.suggestion(name, _FEATURES)}"
    )
  function, version = _FEATURES[name]
  digest = source.content_digest()
  made_of = json.dumps([digest, name, version]).encode()
  folder = fetch.cache() / f"{name}-{hashlib.sha256(made_of).hexdigest()[:24]}"
  targets = _blocks(source, lambda batch: batch["targets"])
  if not folder.is_dir():
    _keep(source, function, folder)
  try:
    stamps = stamps_lib.FileStamps([folder / _FILE])
    found = _digest(folder / _FILE)
    is_sound = found == (folder / _DIGEST).read_text()
  except FileNotFoundError:
    is_sound = False
  if not is_sound:
    raise ValueError(
      f"{folder / _FILE} is damaged: delete {folder}, and it is made again"
    )
  inputs = np.load(folder / _FILE, mmap_mode="r", allow_pickle=False)
  return FeatureSource(inputs, targets, source, found, stamps)


def _keep(
  source: sources.Source,
  function: Callable[[np.ndarray], np.ndarray],
  folder: pathlib.Path,
) -> None:
  """Computes and stores all features; the folder appears whole or never."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    dir=folder.parent, prefix=".features-"
  ) as aside:
    ready = pathlib.Path(aside) / "ready"
    ready.mkdir()
    shape = function(source.read(np.zeros(1, np.int64))["inputs"]).shape[1:]
    kept = np.lib.format.open_memmap(
      ready / _FILE, "w+", np.float16, (len(source), *shape)
    )
    for start in range(0, len(source), _BLOCK):
      rows = np.arange(start, min(start + _BLOCK, len(source)))
      kept[rows] = function(source.read(rows)["inputs"])
    kept.flush()
    del kept
    if changed := sources.changed_files(source):
      raise errors.ChangedError(
        f"{', '.join(changed)} changed while its features were computed: none"
        " are kept; start again"
      )
    (ready / _DIGEST).write_text(_digest(ready / _FILE))
    try:
      os.rename(ready, folder)
    except OSError:
      # If another process was first, its copy is kept.
      if not folder.is_dir():
        raise


def _digest(path: str | os.PathLike[str]) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(
  source: sources.Source, take: Callable[[dict[str, np.ndarray]], np.ndarray]
) -> np.ndarray:
  """Reads the source in blocks, and returns what `take` makes of them."""
  starts = range(0, len(source), _BLOCK)
  return np.concatenate(
    [
      take(source.read(np.arange(i, min(i + _BLOCK, len(source)))))
      for i in starts
    ]
  )
