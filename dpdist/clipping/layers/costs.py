"""Estimates what the strategies for a norm cost on each backend.

A strategy costs time, for arithmetic and memory traffic, and memory. The
constants are rough: they only have to rank strategies. The ranking was measured
on a CPU and read off programs compiled for a TPU; see
`tests/benchmarks/clipping.py` and `clipping_tpu.py` beside it.
"""

from collections.abc import Sequence
import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Cost(NamedTuple):
  """The cost for one example, beyond that of the clipped sum."""

  flops: float
  bytes: float  # Bytes read and written.
  kept: float  # Bytes that are kept until the sum.


class Model(NamedTuple):
  """A backend's speed."""

  flops_per_second: float
  bytes_per_second: float
  # Cost of a kept byte relative to that of a byte that is read.
  kept_factor: float
  # A matrix product computes multiples of this many entries, along the axis
  # that is summed and one of the others.
  tile: int = 1
  # Whether forming the gradient of a kernel reads the input once for each
  # offset, instead of once.
  reads_patches: bool = True
  # How often patches are read or written to make a matrix of them and use it.
  patch_passes: float = 3.0

  def product(self, rows: int, summed: int, columns: int) -> float:
    """Returns the floating-point operations of a matrix product."""
    tiled = lambda n: -(-n // self.tile) * self.tile
    free = min(rows * tiled(columns), tiled(rows) * columns)
    return 2.0 * free * tiled(summed)

  def without_keeping(self) -> "Model":
    """Returns a model with which nothing is kept that need not be."""
    return self._replace(kept_factor=1e6)

  def seconds(self, cost: Cost) -> float:
    """Returns the time that a cost takes."""
    traffic = cost.bytes + self.kept_factor * cost.kept
    return cost.flops / self.flops_per_second + traffic / self.bytes_per_second


# Most relative error with which a float32 product rounds its operands, by the
# format that it rounds them to: half a unit in the last of 11 significant bits,
# of 8, or of 3.
_UNIT_ROUNDOFF = {
  "F64": 0.0,
  "F32": 0.0,
  "TF32": 2.0**-11,
  "F16": 2.0**-11,
  "BF16": 2.0**-8,
  "ANY": 2.0**-3,
}
_FORMAT = {"cpu": "F32", "gpu": "TF32", "tpu": "BF16"}


def default_platform() -> str:
  """Returns the default device's platform: "cpu", "gpu" or "tpu"."""
  backend = jax.default_backend()
  return {"cuda": "gpu", "rocm": "gpu"}.get(backend, backend)


def unit_roundoff(platform: str, precision: Any) -> float:
  """Bounds the relative error with which a float32 product rounds its operands.

  The platform is "cpu", "gpu" or "tpu". The precision is as
  `jax.lax.dot_general` takes it; None means JAX's current setting of matmul
  precision. The bound is 0 for products that do not round their operands.
  """
  if isinstance(precision, jax.lax.DotAlgorithm):
    widths = (precision.lhs_precision_type, precision.rhs_precision_type)
    return max(float(jnp.finfo(dtype).eps) / 2 for dtype in widths)
  if isinstance(precision, tuple):
    return max(unit_roundoff(platform, each) for each in precision)
  if precision is None:
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
  with contextlib.suppress(ValueError):
    if jax.lax.Precision(precision) == jax.lax.Precision.HIGHEST:
      return 0.0
    precision = None
  # The rest are presets, such as BF16_BF16_F32, or their names.
  name = (
    "DEFAULT" if precision is None else getattr(precision, "name", precision)
  )
  if name == "DEFAULT":
    return _UNIT_ROUNDOFF[_FORMAT[platform]]
  return _UNIT_ROUNDOFF[name.split("_")[0]]


# The data that is worked on at once should fit here. For a TPU it is half of a
# v5e's 128 MiB, which leaves room for kept data. A GPU hides memory latency.
CACHE_BYTES = {"cpu": 2**22, "tpu": 2**26}

MODELS = {
  "cpu": Model(5e10, 1e10, 2.0),
  "gpu": Model(1e14, 2e12, 1.0),
  # The small products of one example leave most of the matrix unit idle.
  "tpu": Model(8e12, 8e11, 1.0, 128, reads_patches=False, patch_passes=12.0),
}


def gram(sizes: Sequence[tuple[int, int, int, int]], model: Model) -> Cost:
  """Returns the cost of all pairs' inner products, of lists of (S, T, m, n)."""
  (count, *_), *_ = sizes
  positions = sum(more for _, more, _, _ in sizes)
  widths = max(((m, n) for _, _, m, n in sizes), key=sum)
  if positions == 1:
    return Cost(0, 4.0 * count * sum(widths), 0)
  return Cost(
    count * sum(model.product(positions, n, positions) for n in widths),
    4.0 * count * (4 * positions**2 + positions * sum(widths)),
    0,
  )
