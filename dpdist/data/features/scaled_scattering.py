"""Scattering coefficients on one scale.

The coefficients of two wavelets are far smaller than those of one, and a linear
model with clipping and noise learns little from small inputs. So each channel
is standardized, with the mean and deviation that it has over public images.
Tramer & Boneh 2021, "Differentially Private Learning Needs Better Features (or
Much More Data)", use those of the training set, with noise, and spend privacy
on them; these cost nothing, and fit a little less well.
"""

import functools

import numpy as np

from dpdist.data.features import public_images
from dpdist.data.features import scattering

# Raise the last digits whenever a feature would change by more than rounding
# while those of `scattering` stay.
VERSION = 100 * scattering.VERSION + 1


def transform(images: np.ndarray) -> np.ndarray:
  """Returns scaled scattering coefficients of images of 1 or 3 channels.

  See `scattering.transform` for shapes and dtypes. Raises ModuleNotFoundError
  without scikit-learn, which carries the public images.
  """
  features = scattering.transform(images)
  mean, deviation = _scale(*images.shape[1:])
  return (features - mean) / deviation


@functools.cache
def _scale(
  height: int, width: int, channels: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and deviation of each channel, over images and places."""
  features = scattering.transform(public_images.like(height, width, channels))
  return features.mean((0, 1, 2)), features.std((0, 1, 2))
