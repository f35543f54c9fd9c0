"""Counts the matrix products of a traced program.

Compilers count a loop's body once. Here it counts as often as it runs, and what
`jax.shard_map` runs counts for one device.
"""

import math
from typing import Any, NamedTuple

from jax.extend import core


class Work(NamedTuple):
  """The cost of products.

  Attributes:
    flops: floating-point operations, two for each multiplication.
    num_bytes: of their operands and results, each read or written once.
  """

  flops: float
  num_bytes: float

  def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
    return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)

  def times(self, n: float) -> "Work":
    """Returns the work of n repetitions."""
    return Work(self.flops * n, self.num_bytes * n)


def count(jaxpr: Any) -> Work:
  """Returns the work of a jaxpr and all it calls; of the dearest branch."""
  total = Work(0, 0)
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      (summed, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      total += _product(eqn, math.prod(shape[i] for i in summed))
    elif name == "conv_general_dilated":
      # Each entry of the result sums over all of the kernel but its output
      # channels.
      kernel = eqn.invars[1].aval.shape
      out = eqn.params["dimension_numbers"].rhs_spec[0]
      total += _product(eqn, math.prod(kernel) // kernel[out])
    elif name == "cond":
      branches = [count(branch.jaxpr) for branch in eqn.params["branches"]]
      total += max(branches, key=lambda work: work.flops)
    else:
      times = eqn.params["length"] if name == "scan" else 1
      for inner in core.jaxprs_in_params(eqn.params):
        total += count(inner).times(times)
  return total


def _product(eqn: Any, summed: int) -> Work:
  (out,) = eqn.outvars
  values = [*eqn.invars, out]
  return Work(
    2 * math.prod(out.aval.shape) * summed,
    sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in values),
  )
