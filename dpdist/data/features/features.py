"""Features in the place of inputs, computed once and kept.

What is kept here is a public function of one example each: nothing of it was
learned from them, and no example has a share in the features of another. So one
example more or less is one row of features more or less, and what is proved of
the rows holds for the examples.
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

# The function, and a number that changes whenever its values do.
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
  """How many of a model's blocks features stand for, if it is to go on."""
  match = re.fullmatch(r"minilm_(\d)", name)
  return int(match[1]) if match else 0


class FeatureSource(arrays_lib.ArraySource):
  """Examples whose inputs are features, on disk.

  The manifest is that of the examples the features were made of: it names whose
  data is protected, so that a budget of a data set is spent by runs on its
  features too.

  Attributes:
    sha256: of the features as they are kept, hex. Made anew, on another machine
      or by another release of a library, they may differ in a bit; a step that
      is run again on them is another step, so this belongs to what a run's
      steps are told apart by (see `dpdist.workdir.fingerprint.fingerprint`).
  """

  def __init__(
    self,
    inputs: np.ndarray,
    targets: np.ndarray,
    source: sources.Source,
    sha256: str,
    stamps: stamps_lib.FileStamps,
  ):
    """Makes it.

    Args:
      inputs: the features.
      targets: of the examples.
      source: the examples.
      sha256: of the features as they are kept, hex.
      stamps: of the file that they are kept in, from before it was hashed.
    """
    super().__init__({"inputs": inputs, "targets": targets})
    self._manifest = source.content_digest()
    self._source = source
    self._stamps = stamps
    self.sha256 = sha256

  def earlier_digests(self) -> list[str]:
    """Those of the examples; see `dpdist.data.sources.earlier_digests`."""
    return sources.earlier_digests(self._source)

  def changed_files(self) -> list[str]:
    """Also of the examples; see `dpdist.data.sources.changed_files`."""
    own = self._stamps.changed(self._is_same)
    return own + sources.changed_files(self._source)

  def is_touched(self) -> bool:
    """Also of the examples; see `dpdist.data.sources.is_touched`."""
    return self._stamps.is_touched() or sources.is_touched(self._source)

  def _is_same(self) -> bool:
    return [_digest(path) for path in self._stamps.paths] == [self.sha256]


def of(source: sources.Source, name: str) -> FeatureSource:
  """The features of a source's inputs.

  They are computed at first use, and kept as float16 below
  `dpdist.assets.fetch.cache()`, in a folder named by a hash of the examples'
  manifest, the function and its version. What is found there is held against
  its SHA-256.

  Args:
    source: of examples {"inputs", "targets"}; inputs are images
      (height, width, channels), or tokens.
    name: "scattering" and "scattering_scaled", of images; see
      `dpdist.data.features.scattering` and
      `dpdist.data.features.scaled_scattering`. "minilm", and "minilm_1" to
      "minilm_5", of tokens; see `dpdist.data.features.minilm`.

  Returns:
    A source of {"inputs": float16, "targets": as they were}.

  Raises:
    ValueError: an unknown name, inputs that the function does not take, or kept
      features that are not as they were.
  """
  if name not in _FEATURES:
    raise ValueError(
      f"data.features must be '' or one of {sorted(_FEATURES)}, got {name!r}"
    )
  function, version = _FEATURES[name]
  manifest = source.content_digest()
  made_of = json.dumps([manifest, name, version]).encode()
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
  """Computes all features; the folder appears whole or not at all."""
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
      # Where another process was first, its copy holds.
      if not folder.is_dir():
        raise


def _digest(path: str | os.PathLike[str]) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(
  source: sources.Source, take: Callable[[dict[str, np.ndarray]], np.ndarray]
) -> np.ndarray:
  """Something of every example, read in blocks."""
  starts = range(0, len(source), _BLOCK)
  return np.concatenate(
    [
      take(source.read(np.arange(i, min(i + _BLOCK, len(source)))))
      for i in starts
    ]
  )
