"""Values that the norm and the sum of clipped gradients must both see alike.

A compiler may compute a value once for each of its uses, and round it in each
in another way: it keeps float32 where the program says bfloat16, or contracts a
product and a sum into one operation. Where large terms cancel, the norm is then
of another gradient than the sum, and an example moves the sum by more than its
clip norm.
"""

import jax
from jax.experimental import xla_metadata


@jax.custom_vjp
def computed_once(x: jax.Array) -> jax.Array:
  """x, computed once for all its uses and rounded to its dtype; and so is its
  gradient."""
  return _barrier(x)


# The barrier's own derivative makes zeros of what has none, such as the data
# that a model begins with, and multiplies them with the weights.
computed_once.defvjp(lambda x: (_barrier(x), None), lambda _, g: (_barrier(g),))


def _barrier(x: jax.Array) -> jax.Array:
  return jax.lax.platform_dependent(
    x, cpu=_call, default=jax.lax.optimization_barrier
  )


def _call(x: jax.Array) -> jax.Array:
  # XLA for CPUs takes barriers away before it fuses operations. It fuses
  # nothing across the call of a function, which copies nothing either.
  with xla_metadata.set_xla_metadata(inlineable="false"):
    return _same(x)


_same = jax.jit(jax.lax.optimization_barrier)
