"""The scattering transform of images: features without learning.

An image is convolved with oriented wavelets and its modulus is taken; both are
repeated once; each result is averaged over small squares (Bruna & Mallat 2013,
"Invariant Scattering Convolution Networks"; with Morlet wavelets of 2 scales
and 8 orientations as in Oyallon & Mallat 2015, "Deep Roto-Translation
Scattering for Object Classification"). Private linear models on them did better
than private networks on pixels (Tramer & Boneh 2021, "Differentially Private
Learning Needs Better Features (or Much More Data)").

The filters are constants, and features of an image depend on no other image. So
they cost no privacy, and may be computed once.
"""

import functools

import numpy as np

# Raised whenever features change by more than rounding: stored ones are then
# computed anew.
VERSION = 1

_SCALES = 2  # J: squares of 2**J pixels
_ORIENTATIONS = 8  # L
_STEP = 2**_SCALES
CHANNELS = (
  1 + _SCALES * _ORIENTATIONS + _ORIENTATIONS**2 * _SCALES * (_SCALES - 1) // 2
)

_BLOCK = 16  # planes at once, so that intermediate results stay in caches

# The finest wavelet, in pixels: the envelope's width and the frequency; and the
# ratio of the envelope's length to its width. Scale j has 2**j of the width and
# 2**-j of the frequency.
_WIDTH = 0.8
_FREQUENCY = 3 * np.pi / 4
_SLANT = 4 / _ORIENTATIONS


def transform(images: np.ndarray) -> np.ndarray:
  """Returns scattering coefficients of images.

  Images are floats (n, height, width, channels); height and width are multiples
  of 4, at least 8. The coefficients are float32 (n, height / 4, width / 4,
  channels * 81): for each channel the average, then 16 of one wavelet, the
  finer ones first, then 64 of two. Raises ValueError for another shape.
  """
  if images.ndim != 4 or any(
    size % _STEP or size < 2 * _STEP for size in images.shape[1:3]
  ):
    raise ValueError(
      f"images must be (n, height, width, channels), height and width multiples"
      f" of {_STEP} and at least {2 * _STEP}, got {images.shape}"
    )
  n, height, width, channels = images.shape
  planes = np.moveaxis(images, -1, 1).astype(np.float32)
  planes = planes.reshape(-1, height, width)
  # (n * channels, 81, height / 4, width / 4)
  features = np.empty(
    (len(planes), CHANNELS, height // _STEP, width // _STEP), np.float32
  )
  for start in range(0, len(planes), _BLOCK):
    features[start : start + _BLOCK] = _planes(planes[start : start + _BLOCK])
  features = features.reshape(n, channels * CHANNELS, *features.shape[2:])
  return np.ascontiguousarray(np.moveaxis(features, 1, -1))


def _planes(x: np.ndarray) -> np.ndarray:
  """Maps float32 (m, height, width) to (m, 81, height / 4, width / 4)."""
  # The padding keeps the square at an edge from other edges.
  edges = [(_STEP, _STEP + -size % _STEP) for size in x.shape[1:]]
  x = np.pad(x, [(0, 0), *edges], mode="reflect")
  wavelets = _wavelets(*x.shape[1:])
  averaged = [_average(x[:, None], 0)]
  twice: list[np.ndarray] = []
  spectrum = np.fft.fft2(x)
  for scale in range(_SCALES):
    # (m, L, height / 2**scale, width / 2**scale)
    once = _modulus(spectrum[:, None] * wavelets[0][scale], 2**scale)
    averaged.append(_average(once, scale))
    if scale + 1 == _SCALES:
      break
    for orientation in range(_ORIENTATIONS):
      inner = np.fft.fft2(once[:, orientation])[:, None]
      for coarser in range(scale + 1, _SCALES):
        again = _modulus(
          inner * wavelets[scale][coarser], 2 ** (coarser - scale)
        )
        twice.append(_average(again, coarser))
  return np.concatenate(averaged + twice, axis=1)


def _modulus(spectrum: np.ndarray, factor: int) -> np.ndarray:
  """Returns |y| at every factor-th place along both axes, from y's spectrum."""
  height, width = (size // factor for size in spectrum.shape[-2:])
  # Leaving out samples of a signal folds its spectrum.
  folded = np.zeros((*spectrum.shape[:-2], height, width), spectrum.dtype)
  for i, j in np.ndindex(factor, factor):
    rows = slice(i * height, (i + 1) * height)
    folded += spectrum[..., rows, j * width : (j + 1) * width]
  return np.abs(np.fft.ifft2(folded / factor**2))


def _average(x: np.ndarray, level: int) -> np.ndarray:
  """Returns Gaussian averages at every fourth pixel inside the margin.

  `x`, (..., height / 2**level, width / 2**level), was halved `level` times.
  """
  rows, columns = (_averaging(size * 2**level, level) for size in x.shape[-2:])
  return rows @ x @ columns.T


@functools.cache
def _wavelets(height: int, width: int) -> list[list[np.ndarray]]:
  """Returns filters by level and scale, spectra float32 (L, height, width).

  Height and width are the level's. Morlet wavelets' spectra are real.
  """
  full = [
    np.stack([_morlet(height, width, j, k) for k in range(_ORIENTATIONS)])
    for j in range(_SCALES)
  ]
  return [
    [_low(spectra, level).astype(np.float32) for spectra in full]
    for level in range(_SCALES)
  ]


def _low(spectrum: np.ndarray, level: int) -> np.ndarray:
  """Restricts a filter to the frequencies of halved images."""
  for axis in (-2, -1):
    size = spectrum.shape[axis]
    kept = np.fft.fftfreq(size >> level, 1 / (size >> level)).astype(int)
    spectrum = np.take(spectrum, kept, axis=axis, mode="wrap")
  return spectrum


def _morlet(
  height: int, width: int, scale: int, orientation: int
) -> np.ndarray:
  """Returns the spectrum of a Morlet wavelet, float64 (height, width).

  It is a plane wave under a Gaussian, minus a multiple of the Gaussian that
  makes the sum 0: its response to a constant image is 0.
  """
  angle = (_ORIENTATIONS // 2 - 1 - orientation) * np.pi / _ORIENTATIONS
  sigma, frequency = _WIDTH * 2**scale, _FREQUENCY / 2**scale
  envelope = _gabor(height, width, sigma, angle, 0.0)
  wave = _gabor(height, width, sigma, angle, frequency)
  wavelet = wave - envelope * (wave.sum() / envelope.sum())
  return np.fft.fft2(wavelet).real


def _gabor(
  height: int, width: int, sigma: float, angle: float, frequency: float
) -> np.ndarray:
  """Returns exp(i frequency u) under a Gaussian of sum 1, on a torus.

  u runs along the angle from the first axis, v across; the Gaussian's standard
  deviation is sigma along u and sigma / slant along v.
  """
  total = np.zeros((height, width), complex)
  for around in np.ndindex(5, 5):
    down, right = (
      np.arange(size) + (turn - 2) * size
      for size, turn in zip((height, width), around, strict=True)
    )
    u = down[:, None] * np.cos(angle) + right * np.sin(angle)
    v = right * np.cos(angle) - down[:, None] * np.sin(angle)
    total += np.exp(
      -(u**2 + (_SLANT * v) ** 2) / (2 * sigma**2) + 1j * frequency * u
    )
  return total * _SLANT / (2 * np.pi * sigma**2)


@functools.cache
def _averaging(size: int, level: int) -> np.ndarray:
  """Returns the averaging along one axis, as a float32 matrix.

  Its shape is (size / 4 without the margin, size / 2**level), where size is of
  the padded image along the axis, which has been halved `level` times.
  """
  sigma = _WIDTH * 2 ** (_SCALES - 1)
  at = np.arange(size)[:, None] + size * np.arange(-2, 3)
  kernel = np.exp(-(at**2) / (2 * sigma**2)).sum(1)
  spectrum = np.fft.fft(kernel / (np.sqrt(2 * np.pi) * sigma)).real
  small = size >> level
  kept = np.fft.fftfreq(small, 1 / small).astype(int)
  kernel = np.fft.ifft(spectrum[kept]).real
  centres = np.arange(1, size // _STEP - 1) * (_STEP >> level)
  offsets = (np.arange(small) - centres[:, None]) % small
  return kernel[offsets].astype(np.float32)
