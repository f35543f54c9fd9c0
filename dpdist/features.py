"""Features in the place of inputs, computed once and kept.

What is kept here is a public function of one example each: nothing of it was
learned from them, and no example has a share in the features of another. So one
example more or less is one row of features more or less, and what is proved of
the rows holds for the examples.
"""

from collections.abc import Callable
import hashlib
import json
import os
import pathlib
import tempfile

import numpy as np

from dpdist import fetch
from dpdist import scattering
from dpdist import sentences
from dpdist import sources

_FILE = "inputs.npy"
_DIGEST = "sha256"
_BLOCK = 1024  # examples

# The function, and a number that changes whenever its values do.
_FEATURES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
  "minilm": (sentences.transform, sentences.VERSION),
  "scattering": (scattering.transform, scattering.VERSION),
}


class FeatureSource(sources.ArraySource):
  """Examples whose inputs are features, on disk.

  The manifest is that of the examples the features were made of: it names whose
  data is protected, so that a budget of a data set is spent by runs on its
  features too. That features were used, and the code that made them, is in a
  run's settings and fingerprint.
  """

  def __init__(self, inputs: np.ndarray, targets: np.ndarray, manifest: str):
    super().__init__({"inputs": inputs, "targets": targets})
    self._manifest = manifest


def of(source: sources.Source, name: str) -> FeatureSource:
  """The features of a source's inputs.

  They are computed at first use, and kept as float16 below
  `dpdist.fetch.cache()`, in a folder named by a hash of the examples' manifest,
  the function and its version. What is found there is held against its SHA-256.

  Args:
    source: of examples {"inputs", "targets"}; inputs are images
      (height, width, channels), or tokens.
    name: "scattering", of images; see `dpdist.scattering`. "minilm", of tokens;
      see `dpdist.sentences`.

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
  manifest = source.manifest()
  made_of = json.dumps([manifest, name, version]).encode()
  folder = fetch.cache() / f"{name}-{hashlib.sha256(made_of).hexdigest()[:24]}"
  targets = _blocks(source, lambda batch: batch["targets"])
  if not folder.is_dir():
    _keep(source, function, folder)
  with open(folder / _FILE, "rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != (folder / _DIGEST).read_text():
    raise ValueError(
      f"{folder / _FILE} is damaged: delete {folder}, and it is made again"
    )
  inputs = np.load(folder / _FILE, mmap_mode="r", allow_pickle=False)
  return FeatureSource(inputs, targets, manifest)


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
    with open(ready / _FILE, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    (ready / _DIGEST).write_text(digest)
    try:
      os.rename(ready, folder)
    except OSError:
      # Where another process was first, its copy holds.
      if not folder.is_dir():
        raise


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
