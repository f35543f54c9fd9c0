"""Images and labels in idx files, the format of MNIST and its kin."""

import gzip
import math
import os
import zlib

import ml_collections
import numpy as np

from dpdist import errors
from dpdist import registry
from dpdist.data import arrays as arrays_lib
from dpdist.data import dataset as dataset_lib
from dpdist.data import sources
from dpdist.data.datasets import settings

# The third byte of an idx file names its element type; all are big-endian.
_IDX_DTYPES = {
  0x08: ">u1",
  0x09: ">i1",
  0x0B: ">i2",
  0x0C: ">i4",
  0x0D: ">f4",
  0x0E: ">f8",
}


def read(path: sources.Path) -> np.ndarray:
  """Reads a file of the idx format, that of MNIST, gzipped or not.

  The array has the shape and type that the header names, in native byte order.
  Raises ValueError if it is no such file, or is cut short or too long.
  """
  with open(path, "rb") as file:
    data = file.read()
  if data[:2] == b"\x1f\x8b":
    try:
      data = gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
      raise ValueError(f"{path} must be whole gzip data: {error}") from error
  if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_DTYPES:
    raise ValueError(
      f"{path} must begin with the idx magic 00 00 (08|09|0b|0c|0d|0e) ndim,"
      f" got {data[:4].hex(' ')!r}"
    )
  dtype = np.dtype(_IDX_DTYPES[data[2]])
  offset = 4 + 4 * data[3]
  if len(data) < offset:
    raise ValueError(f"{path} must hold {offset} header bytes, got {len(data)}")
  shape = np.frombuffer(data, ">u4", data[3], 4).tolist()
  size = offset + dtype.itemsize * math.prod(shape)
  if len(data) != size:
    raise ValueError(
      f"{path} must hold {size} bytes for shape {shape}, got {len(data)}"
    )
  array = np.frombuffer(data, dtype, offset=offset).reshape(shape)
  return array.astype(dtype.newbyteorder("="), copy=False)


def load(
  images_path: sources.Path, labels_path: sources.Path
) -> arrays_lib.ArraySource:
  """Reads images and labels from a pair of idx files.

  Examples are {"inputs": float32 (height, width, 1) in [0, 1], "targets": int32
  ()}. Pixels stay uint8 in memory; the manifest is over the decoded arrays, so
  a file and its gzipped copy have the same. Raises ValueError for a bad file,
  images that are not uint8 (n, height, width), and labels that are not n
  integers.
  """
  images, labels = read(images_path), read(labels_path)
  if images.dtype != np.uint8 or images.ndim != 3:
    raise ValueError(
      f"{images_path} must hold uint8 (n, height, width), got"
      f" {images.dtype} {images.shape}"
    )
  if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
    raise ValueError(
      f"{labels_path} must hold {len(images)} integers, got"
      f" {labels.dtype} {labels.shape}"
    )

  def convert(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    pixels = batch["inputs"][..., None].astype(np.float32)
    return {
      "inputs": pixels / np.float32(255),
      "targets": batch["targets"].astype(np.int32),
    }

  return arrays_lib.ArraySource(
    {"inputs": images, "targets": labels}, convert=convert
  )


@registry.register("dataset", "idx", "mnist", "fashion_mnist")
def _idx(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  path = config.path if config.name == "idx" else settings.fetched(config)

  def split(prefix: str) -> arrays_lib.ArraySource:
    return load(
      _file(path, f"{prefix}-images-idx3-ubyte"),
      _file(path, f"{prefix}-labels-idx1-ubyte"),
    )

  return dataset_lib.Dataset(split("train"), split("t10k"))


def _file(directory: str, name: str) -> str:
  for suffix in ("", ".gz"):
    path = os.path.join(directory, name + suffix)
    if os.path.isfile(path):
      return path
  raise errors.ArgumentError(
    f"data.path must be a directory with {name} or {name}.gz, got"
    f" {directory!r}; on Debian and Ubuntu"
    " `apt-get install dataset-fashion-mnist` puts Fashion-MNIST under"
    " /usr/share/datasets/fashion-mnist",
    hint=errors.Hint(text="apt-get install dataset-fashion-mnist"),
  )
