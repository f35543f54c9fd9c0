"""The scattering transform, against another program and against its formula."""

import numpy as np
import pytest

from dpdist.data.features import public_images
from dpdist.data.features import scaled_scattering
from dpdist.data.features import scattering

_HEIGHT, _WIDTH = 8, 12


def _image():
  down, right = np.mgrid[:_HEIGHT, :_WIDTH]
  return np.sin(1.3 * down + 0.2 * down * right) + (down - right) % 3 / 5


def _coefficients(image):
  """(81, rows, columns) of one plane."""
  return np.moveaxis(scattering.transform(image[None, ..., None])[0], -1, 0)


def test_it_agrees_with_kymatio():
  # kymatio 0.3.0, Scattering2D(J=2, shape=(8, 12)), on _image().
  got = _coefficients(_image())
  assert got.shape == (scattering.CHANNELS, 2, 3)
  channels = [0, 1, 5, 8, 9, 13, 17, 30, 44, 80]
  expected = [
    *(0.199804, 0.024314, 0.224697, 0.008133, 0.011457),
    *(0.019089, 0.002728, 0.013333, 0.0274, 0.001745),
  ]
  np.testing.assert_allclose(got[channels, 1, 2], expected, atol=3e-5)
  expected = [[0.017768, 0.006674, 0.004992], [0.017118, 0.008383, 0.005255]]
  np.testing.assert_allclose(got[40], expected, atol=3e-5)


def _gabor(u, v, sigma, frequency):
  # An envelope twice as long across as along, of sum 1.
  envelope = np.exp(-(u**2 + v**2 / 4) / (2 * sigma**2))
  return envelope * np.exp(1j * frequency * u) / (4 * np.pi * sigma**2)


def _wavelet(scale, orientation, down, right):
  """At points of a torus of 16x20, added up over its turns."""
  angle = (3 - orientation) * np.pi / 8
  turns = [(i * 16, j * 20) for i in range(-2, 3) for j in range(-2, 3)]

  def at(frequency, down, right):
    total = 0
    for i, j in turns:
      x, y = down + i, right + j
      u, v = (
        x * np.cos(angle) + y * np.sin(angle),
        y * np.cos(angle) - x * np.sin(angle),
      )
      total = total + _gabor(u, v, 0.8 * 2**scale, frequency)
    return total

  frequency = 3 * np.pi / 4 / 2**scale
  everywhere = np.mgrid[:16, :20]
  share = at(frequency, *everywhere).sum() / at(0, *everywhere).sum()
  return at(frequency, down, right) - share * at(0, down, right)


def test_one_coefficient_is_the_sum_that_it_stands_for():
  """|x * wavelet|, of scale 0, averaged: sums over pixels, no spectrum."""
  image = _image()
  padded = np.pad(image, 4, mode="reflect")
  down, right = np.mgrid[:16, :20]
  wavelet = _wavelet(0, 2, down, right)
  response = np.zeros((16, 20))
  for i, j in np.ndindex(16, 20):
    weights = wavelet[(i - down) % 16, (j - right) % 20]
    response[i, j] = np.abs((weights * padded).sum())
  coefficients = _coefficients(image)
  for row, column in np.ndindex(2, 3):
    i, j = 4 + 4 * row - down, 4 + 4 * column - right
    weights = sum(
      np.exp(-((i + 16 * a) ** 2 + (j + 20 * b) ** 2) / (2 * 1.6**2))
      for a in (-1, 0, 1)
      for b in (-1, 0, 1)
    ) / (2 * np.pi * 1.6**2)
    expected = (weights * response).sum()
    got = coefficients[1 + 2, row, column]
    assert got == pytest.approx(expected, rel=1e-4)


def test_a_constant_image_has_its_average_alone():
  got = _coefficients(np.full((8, 8), 0.7))
  np.testing.assert_allclose(got[0], 0.7, rtol=1e-3)
  np.testing.assert_allclose(got[1:], 0, atol=1e-6)


def test_planes_do_not_mix():
  """Nor do images: each is as if it were alone, in whatever block it lies."""
  images = np.random.default_rng(0).random((9, 8, 8, 2), np.float32)
  together = scattering.transform(images)
  assert together.shape == (9, 2, 2, 162)
  assert together.dtype == np.float32
  for i in (0, 8):
    for channel in range(2):
      alone = scattering.transform(images[i : i + 1, ..., channel, None])
      here = together[i, ..., 81 * channel : 81 * (channel + 1)]
      np.testing.assert_allclose(here, alone[0], atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 8, 10, 1), (1, 4, 8, 1)])
def test_other_shapes_are_refused(shape):
  with pytest.raises(ValueError, match=r"images must be .* multiples of 4"):
    scattering.transform(np.zeros(shape))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_scaled_ones_are_of_one_scale_for_public_pictures(channels):
  public = public_images.like(8, 12, channels)
  np.testing.assert_array_equal(public, public_images.like(8, 12, channels))
  assert public.shape[1:] == (8, 12, channels)
  assert public.min() >= (0 if channels == 1 else -1)
  assert public.max() <= 1
  assert public.std(0).mean() > 0.1
  plain = scattering.transform(public)
  scaled = scaled_scattering.transform(public)
  np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-3)
  np.testing.assert_allclose(scaled.std((0, 1, 2)), 1, atol=1e-3)
  # Those of one picture are no other because of the pictures beside it.
  np.testing.assert_allclose(
    scaled_scattering.transform(public[3:4]), scaled[3:4], rtol=1e-4, atol=1e-4
  )
  # The same scale everywhere, and of another picture too.
  other = np.random.default_rng(0).random((2, 8, 12, channels), np.float32)
  mean, deviation = plain.mean((0, 1, 2)), plain.std((0, 1, 2))
  np.testing.assert_allclose(
    scaled_scattering.transform(other),
    (scattering.transform(other) - mean) / deviation,
    rtol=1e-4,
    atol=1e-4,
  )


def test_scaled_ones_are_of_digits_or_photographs():
  with pytest.raises(ValueError, match=r"must have 1 or 3 channels .* got 2"):
    scaled_scattering.transform(np.zeros((1, 8, 8, 2), np.float32))
