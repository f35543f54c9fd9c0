"""Public images that give the scale for features of private ones.

scikit-learn carries them: 1,797 digits that were written for another set
(Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits"), and two
photographs. Their statistics cost no privacy, while those of the training set
would.
"""

import numpy as np

from dpdist import errors

_SQUARES = 1000  # cut from the photographs


def like(height: int, width: int, channels: int) -> np.ndarray:
  """Returns images of a size in pixels; always the same.

  They are float32 (n, height, width, channels). With 1 channel they are digits
  in [0, 1], light on dark, with a margin of a seventh; with 3, squares of the
  photographs in [-1, 1], of 48 to 400 pixels, reduced to the size. Raises
  ValueError for another number, and ModuleNotFoundError without scikit-learn.
  """
  if channels not in (1, 3):
    raise ValueError(
      f"images must have 1 or 3 channels for data.features='scattering_scaled',"
      f" got {channels}"
    )
  try:
    from sklearn import datasets
  except ModuleNotFoundError as error:
    raise errors.missing(
      "data.features='scattering_scaled'", "scikit-learn", "examples"
    ) from error
  if channels == 1:
    return _digits(datasets.load_digits().images, height, width)
  return _squares(datasets.load_sample_images().images, height, width)


def _digits(digits: np.ndarray, height: int, width: int) -> np.ndarray:
  from PIL import Image

  top, left = height // 7, width // 7
  inner = (width - 2 * left, height - 2 * top)
  pictures = np.zeros((len(digits), height, width, 1), np.float32)
  for picture, digit in zip(pictures, digits, strict=True):
    large = Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize(
      inner, Image.Resampling.BICUBIC
    )
    picture[top : height - top, left : width - left, 0] = np.asarray(large)
  return pictures / np.float32(255)


def _squares(
  photographs: list[np.ndarray], height: int, width: int
) -> np.ndarray:
  from PIL import Image

  rng = np.random.default_rng(0)
  pictures = np.empty((_SQUARES, height, width, 3), np.float32)
  for i, picture in enumerate(pictures):
    photograph = photographs[i % len(photographs)]
    side = int(rng.integers(48, 400))
    top, left = (
      int(rng.integers(0, size - side)) for size in photograph.shape[:2]
    )
    square = photograph[top : top + side, left : left + side]
    small = Image.fromarray(square).resize(
      (width, height), Image.Resampling.BOX
    )
    picture[:] = np.asarray(small)
  return pictures / np.float32(127.5) - 1
