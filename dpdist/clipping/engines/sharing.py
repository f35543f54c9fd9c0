"""Makes norm and sum of clipped gradients use the same rounded values.

A compiler may compute a value separately for each of its uses, and round it
differently each time: it keeps float32 where the program says bfloat16, or
contracts a product and a sum into one operation. Where large terms cancel, the
norm is then that of another gradient than the one summed, and an example moves
the sum by more than its clip norm.
"""

import jax
from jax.experimental import xla_metadata


@jax.custom_vjp
def computed_once(x: jax.Array) -> jax.Array:
  """Returns x, computed and rounded once for all uses, as is its gradient."""
  return _barrier(x)


# The barrier's own derivative would create zeros for values without a gradient,
# such as a model's input data, and multiply them with the weights.
computed_once.defvjp(lambda x: (_barrier(x), None), lambda _, g: (_barrier(g),))


def _barrier(x: jax.Array) -> jax.Array:
  return jax.lax.platform_dependent(
    x, cpu=_call, default=jax.lax.optimization_barrier
  )


def _call(x: jax.Array) -> jax.Array:
  # XLA for CPUs removes barriers before it fuses operations. It does not fuse
  # across the call of a function, and the call copies nothing.
  with xla_metadata.set_xla_metadata(inlineable="false"):
    return _same(x)


_same = jax.jit(jax.lax.optimization_barrier)
