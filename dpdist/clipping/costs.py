"""What the ways to a norm cost on each backend.

A way costs time, as arithmetic and as memory traffic, and room. The constants
are rough: they only have to rank the ways. What they rank was measured on a CPU
and read off programs compiled for a TPU; see `tests/benchmarks/clipping.py`.
"""

import math
from typing import NamedTuple

import jax

from dpdist.clipping import convolution
from dpdist.clipping import factors
from dpdist.clipping.program import Site


class Cost(NamedTuple):
  """Of one example, beyond what the clipped sum costs anyway.

  Attributes:
    flops: floating-point operations.
    bytes: read and written.
    kept: bytes that are needed until the sum.
  """

  flops: float
  bytes: float
  kept: float


class Model(NamedTuple):
  """A backend's prices.

  Attributes:
    flops_per_second: of matrix products.
    bytes_per_second: of memory.
    kept_factor: how much dearer a byte that is kept is than one that is read.
  """

  flops_per_second: float
  bytes_per_second: float
  kept_factor: float

  def without_keeping(self) -> "Model":
    """A model by which nothing is kept that need not be."""
    return self._replace(kept_factor=1e6)

  def seconds(self, cost: Cost) -> float:
    """The price of a way."""
    traffic = cost.bytes + self.kept_factor * cost.kept
    return cost.flops / self.flops_per_second + traffic / self.bytes_per_second


# Relative error with which a float32 product rounds its operands by default:
# TensorFloat-32 keeps 11 bits, bfloat16 8.
_UNIT_ROUNDOFF = {"cpu": 0.0, "gpu": 2.0**-11, "tpu": 2.0**-9}


def unit_roundoff(platform: str) -> float:
  """The same under JAX's present setting of matmul precision."""
  precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
  if precision in ("highest", "float32"):
    return 0.0
  return _UNIT_ROUNDOFF[platform]


MODELS = {
  "cpu": Model(5e10, 1e10, 2.0),
  "gpu": Model(1e14, 2e12, 1.0),
  "tpu": Model(5e13, 8e11, 1.0),
}


def forming(site: Site) -> Cost:
  """Forming the gradient of a product's weight."""
  _, positions, rows, columns, count = _shape(site)
  return Cost(
    2.0 * count * positions * rows * columns,
    4.0 * count * positions * (rows + columns),
    0,
  )


def _shape(site: Site) -> tuple[str, int, int, int, int]:
  if site.name == "dot_general":
    count, positions, rows, columns = factors.sizes(site)
    return "dot", positions, rows, columns, count
  loops = math.prod(site.lengths)
  if site.name == "gather":
    out = math.prod(site.out.shape)
    table = site.eqn.invars[0].aval.shape
    return "lookup", 1, table[0], table[1], out // max(1, out)
  s = convolution.sizes(site)
  return (
    "convolution",
    s.positions,
    s.offsets * s.inputs,
    s.outputs,
    s.groups * loops,
  )


def gram(sites: tuple[Site, ...]) -> Cost:
  """Inner products of all pairs of positions, of rows and of columns."""
  count, positions, width = 1, 0, 0
  for site in sites:
    if site.name == "gather":
      n = site.eqn.invars[0].aval.shape[1]
      positions += math.prod(site.tap_shape) // max(1, n)
      width = max(width, n)
    else:
      count, more, rows, columns = factors.sizes(site)
      positions += more
      width = max(width, rows + columns)
  if positions == 1:
    return Cost(0, 4.0 * count * width, 0)
  return Cost(
    2.0 * count * positions**2 * width,
    4.0 * count * (4 * positions**2 + positions * width),
    0,
  )


def patch_gram(s: convolution.Sizes) -> Cost:
  """The same for a convolution, of patches."""
  width = s.offsets * s.inputs + s.outputs
  return Cost(
    2.0 * s.groups * s.positions**2 * width,
    4.0 * s.groups * (4 * s.positions**2 + 3 * s.positions * width),
    0,
  )


def diagonal_gram(s: convolution.Sizes) -> Cost:
  """The same, of pixels, summed along diagonals."""
  pairs = s.padded**2 + s.positions**2
  return Cost(
    2.0 * s.groups * (s.padded**2 * s.inputs + s.positions**2 * s.outputs),
    4.0 * s.groups * (2 * pairs + s.offsets * s.positions**2),
    0,
  )
