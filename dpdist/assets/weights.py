"""Reads arrays from the files of pretrained models.

Each format is read by its own package. The package for .gguf (pip install
'dpdist[weights]') is imported only when there is such a file to read. Neither
format can hold code.
"""

from collections.abc import Mapping
import hashlib
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy as safetensors_numpy

from dpdist import errors
from dpdist.assets import fetch

Path = str | os.PathLike[str]

_SUFFIXES = (".safetensors", ".gguf")


def locate(name: str) -> pathlib.Path:
  """Returns the path of a model's file, which may be one that was fetched."""
  if name in fetch.PACKAGES:
    files = [p for p in fetch.find(name).iterdir() if p.suffix in _SUFFIXES]
    if len(files) != 1:
      raise ValueError(f"model.weights must name a model, got {name!r}")
    return files[0]
  path = pathlib.Path(name)
  if not path.is_file():
    raise ValueError(
      "model.weights must be a .safetensors or .gguf file, or one of"
      f" {sorted(fetch.PACKAGES)} that was fetched, got {name!r}"
    )
  return path


def read(path: Path) -> dict[str, np.ndarray]:
  """Reads all arrays of a .safetensors or .gguf file, by their names there.

  Quantized arrays of .gguf are expanded, and all of its arrays are float32.
  """
  path = pathlib.Path(path)
  if path.suffix == ".safetensors":
    return _safetensors(path)
  if path.suffix == ".gguf":
    reader = gguf_reader(path)
    from gguf import quants

    return {
      tensor.name: quants.dequantize(tensor.data, tensor.tensor_type)
      for tensor in reader.tensors
    }
  raise ValueError(
    f"model.weights must be a .safetensors or .gguf file, got {str(path)!r}"
  )


def gguf_reader(path: Path) -> Any:
  """Opens a .gguf file as a `gguf.GGUFReader`."""
  try:
    import gguf
  except ModuleNotFoundError as error:
    raise errors.missing("model.weights", "gguf", "weights") from error
  try:
    return gguf.GGUFReader(path)
  except (IndexError, OSError, ValueError) as error:
    raise ValueError(f"{path} must be a sound .gguf file: {error}") from error


def sha256(arrays: Mapping[str, np.ndarray]) -> str:
  """Returns the SHA-256 of names, dtypes, shapes and bytes, hex; "" if none."""
  if not arrays:
    return ""
  digest = hashlib.sha256()
  for name, array in sorted(arrays.items()):
    digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def _safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return safetensors_numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(
      f"{path} must be a sound .safetensors file: {error}"
    ) from error
