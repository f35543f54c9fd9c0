"""The sentinel, by which a run checks its own sensitivity.

All privacy depends on one number, how far one example can move the clipped sum.
That depends on rules for norms, any of which may be wrong. So it is checked:

  * Before anything is charged, the step that will run is tried on made-up
    examples, one at a time among padding that holds NaN, and what it adds is
    compared with `jax.grad`; see `dpdist.sensitivity.trials`,
    `dpdist.sensitivity.made_up_examples` and `dpdist.sensitivity.comparison`.
    For your own loop there is `dpdist.check_sensitivity`, for a config
    `launch.check`.
  * During the run, at the first step of a branch and then at a secret one in
    `config.sentinel.every`, examples of the data that are longer than their
    norms say are found and add 0; see `dpdist.clipping.watched`, which proves
    how rarely that is a mistake. The run ends after that step, which is
    charged and saved like any other.

The watched steps, and the direction along which examples are checked, are
functions of (secret, branch, step): a step that runs again has the same bits.

That a run ends this way is an event that depends on the data. If clipping is
right, it happens for one example at one watched step with probability below
1e-10, which adds less than that to delta. If clipping is wrong, there was no
guarantee before: the ledger, and with it result and report, say void. They say
no more; only the owner's screen names the parameter and its rule.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpdist import clipping
from dpdist.clipping import freezing
from dpdist.mechanism import mechanism
from dpdist.sensitivity import comparison
from dpdist.sensitivity import trials

PyTree = Any
Report = trials.Report


def check_sensitivity(
  loss_fn: Callable[..., Any],
  params: PyTree,
  batch: PyTree,
  *,
  l2_clip_norm: PyTree,
  has_aux: bool = False,
  method: str = "auto",
  microbatch_size: int | None = None,
  rescale_to_unit_norm: bool = False,
  platform: str | None = None,
  normalize_gamma: float | None = None,
  frozen: freezing.Frozen = None,
  rng: jax.Array | None = None,
) -> Report:
  """Compares `dpdist.clipped_grad` of a loss with `jax.grad`.

  Call it once before training: it compiles the clipped sum of such a batch, and
  runs it on made-up examples.

  Args:
    loss_fn: as for `dpdist.clipped_grad`, and so are l2_clip_norm, has_aux,
      method, microbatch_size, rescale_to_unit_norm, platform, normalize_gamma
      and frozen.
    params: as for a call of its result.
    batch: as for a call of its result. Only shapes, dtypes and the largest
      integer of each array are read.
    rng: a PRNG key, if loss_fn takes one.

  Returns:
    A report of what was tried.

  Raises:
    SensitivityError: names the fault, the parameter and its rule.
    ValueError: for the reasons of `dpdist.clipped_grad`.
  """
  clipped_grad = clipping.clipped_grad(
    loss_fn,
    l2_clip_norm=l2_clip_norm,
    has_aux=has_aux,
    method=method,
    microbatch_size=microbatch_size,
    rescale_to_unit_norm=rescale_to_unit_norm,
    platform=platform,
    normalize_gamma=normalize_gamma,
    frozen=frozen,
  )
  params = jax.tree.map(jnp.asarray, params)
  batch = jax.tree.map(jnp.asarray, batch)
  trained, constants = clipping.partition(params, frozen)
  rows = len(jax.tree.leaves(batch)[0])
  rngs = None if rng is None else jax.random.split(rng, rows)
  one = _trial(clipped_grad, rngs)
  numbers = np.random.default_rng(0)
  drawn = jax.tree.map(lambda x: numbers.normal(size=x.shape), trained)
  both = trained, jax.jit(trials.moved)(trained, drawn)
  program = trials.Program(
    clipped_grad=clipped_grad,
    params=(params, clipping.merge(both[1], constants)),
    row=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch
    ),
    largest=jax.tree.map(largest_integer, batch),
    rows=rows,
    most=rows,
    place=lambda number: number % rows,
    run=lambda number, *args: iter([one(both[number], constants, *args)]),
    key=None if rngs is None else lambda row: rngs[row],
  )
  return trials.search(program)


def _trial(
  clipped_grad: clipping.ClippedGrad, rngs: jax.Array | None
) -> Callable[..., comparison.Measured]:
  """Compiles the comparison of a batch's clipped sum with a row's gradient."""
  measure = comparison.measurer(clipped_grad)

  @jax.jit
  def one(
    trained: PyTree,
    constants: PyTree,
    batch: PyTree,
    is_padding: jax.Array,
    row: int,
  ) -> comparison.Measured:
    params = clipping.merge(trained, constants)
    out = clipped_grad(params, batch, is_padding_example=is_padding, rng=rngs)
    # Keeps the comparison from being fused with the sum.
    out = jax.lax.optimization_barrier(out._replace(aux=None))
    example, key = jax.tree.map(lambda x: x[row], (batch, rngs))
    norms = [x[row] for x in jax.tree.leaves(out.grad_norms)]
    total = mean(out.sum, jnp.sum(~is_padding))
    return measure(trained, constants, example, key, total, norms)

  return one


def normal(params: PyTree, key: jax.Array) -> PyTree:
  """Returns normal numbers like params, in their dtypes; may be traced."""
  leaves, structure = jax.tree.flatten(params)
  drawn = [
    jax.random.normal(
      jax.random.fold_in(key, i),
      x.shape,
      jnp.promote_types(x.dtype, jnp.float32),
    ).astype(x.dtype)
    for i, x in enumerate(leaves)
  ]
  return jax.tree.unflatten(structure, drawn)


def is_watched(
  streams: mechanism.Streams, t: int, *, every: int, first_step: int
) -> bool:
  """Returns whether a step is watched: a secret, fixed for each step.

  On average one step in `every` is watched, none if that is 0. The branch's
  first step is watched too.
  """
  if not every:
    return False
  if t == first_step:
    return True
  high, low = streams.key_data("sentinel_step", t).tolist()
  return (high << 32 | low) % every == 0


def fault(
  clipped_grad: clipping.ClippedGrad,
  params: PyTree,
  row: PyTree,
  leaves: list[int],
  names: list[str] | None = None,
) -> str:
  """Returns the message for the owner's screen about a fault that was found.

  params are whole; shapes are enough. `row` has the shapes of a row of a chunk.
  `leaves` are numbers of the parameters that `Sentinel.end` found; `names` are
  those of the trained parameters, None: their paths.
  """
  paths, ways = trials.ways_of(clipped_grad, params, row, has_rng=True)
  where = ", ".join(
    f"{trials.path((names or paths)[i])} ({ways[paths[i]]})" for i in leaves
  )
  return (
    "the sentinel found an example whose clipped gradient is far longer than"
    f" the clip norm, along {where}: the guarantee of this run is void, and the"
    f" ledger says so; {trials.INSTEAD}"
  )


def mean(total: PyTree, count: jax.Array | int) -> PyTree:
  """Divides the sum of `count` equal examples by count; may be traced."""
  return jax.tree.map(lambda x: x / count, total)


def largest_integer(x: jax.Array | np.ndarray) -> int:
  """Returns the largest integer of an array; 0 for arrays of other dtypes."""
  is_integer = jnp.issubdtype(x.dtype, jnp.integer)
  return int(np.max(np.asarray(x), initial=0)) if is_integer else 0
