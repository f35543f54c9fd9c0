"""Compares a clipped sum with `jax.grad`, for one made-up example at a time.

It checks that:
  * For any example, the sum is finite and no longer than its bound.
  * Where the gradient is steady, the norm is not smaller than the gradient's,
    and the sum is no longer than the clipped gradient. A gradient is steady if
    different rounding would not change it. To find out, parameters and inputs
    are changed by a little more than their rounding errors, and so is what each
    operation returns; see `dpdist.sensitivity.rounding_errors`.
  * For examples of ordinary size, the sum has the gradient's direction.
A norm may be too large: then the example adds less to the sum than it could.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpdist import clipping
from dpdist.clipping import freezing
from dpdist.clipping import watched
from dpdist.clipping.layers import costs
from dpdist.clipping.trace import program
from dpdist.sensitivity import rounding_errors

PyTree = Any

# How much longer than its bound a sum may be, relative; rules promise less.
LONGER = 0.01
# Tolerance for a steady gradient, in addition to a few of its own changes.
_TOLERANCE = 1e-3
_STEADY = 2.0**-5


class Measured(NamedTuple):
  """Lengths, by group, and directions, by trained parameter; NumPy float."""

  length: Any  # [groups], length of the sum.
  # [groups], norm that the example was clipped by; NaN where unknown.
  norm: Any
  truth: Any  # [groups], length of the gradient.
  again: Any  # [groups], length of the gradient with different rounding.
  is_finite: Any  # [parameters], whether the sum is finite.
  share: Any  # [parameters], share in the length of the group's gradient.
  # [parameters], distance of the sum's direction from the gradient's; a group's
  # direction is a vector of length 1.
  differs: Any
  # [parameters], distance of the gradient's direction with different rounding.
  varies: Any


@dataclasses.dataclass(frozen=True)
class Problem:
  """A fault of a clipped sum."""

  what: str  # A clause that follows "the clipped sum of one example".
  # Numbers of the trained parameters that show it, worst first.
  leaves: tuple[int, ...]


def measurer(
  clipped_grad: clipping.ClippedGrad,
) -> Callable[..., Measured]:
  """Makes a function that measures a sum of one example; it may be traced.

  The function maps (params, frozen, example, rng, total, norms) to Measured, of
  jax.Arrays. params has None where a parameter is frozen. frozen has None where
  it is trained, or is None. rng is the example's key or None. norms has one
  norm for each group.
  """

  def measure(
    params: PyTree,
    frozen: PyTree | None,
    example: PyTree,
    rng: jax.Array | None,
    total: PyTree,
    norms: list[jax.Array],
  ) -> Measured:
    rngs = () if rng is None else (rng,)

    def loss(params: PyTree, frozen: PyTree | None, example: PyTree) -> Any:
      whole = params if frozen is None else clipping.merge(params, frozen)
      out = clipped_grad.loss_fn(whole, example, *rngs)
      return out[0] if clipped_grad.has_aux else out

    whole = params if frozen is None else clipping.merge(params, frozen)
    scaling, groups = clipped_grad.scaling(whole)
    unit = _rounding(clipped_grad, loss, params, frozen, example)
    gradient = jax.grad(loss)
    given = params, frozen, example
    true = _wide(gradient(*given))
    again = rounding_errors.enlarged(gradient, unit)
    other = _wide(again(*_shaken(given, 4 * unit)))
    sums = jax.tree.leaves(total)
    count = len(scaling.bounds)
    lengths = [_lengths(xs, groups, count) for xs in (sums, true, other)]
    directions = [
      [x / length[i] for x, i in zip(xs, groups, strict=True)]
      for xs, length in zip((sums, true, other), lengths, strict=True)
    ]
    far = lambda xs, ys: jnp.stack(
      [_length([x - y]) for x, y in zip(xs, ys, strict=True)]
    )
    return Measured(
      length=lengths[0],
      norm=jnp.stack(norms),
      truth=lengths[1],
      again=lengths[2],
      is_finite=jnp.stack([jnp.all(jnp.isfinite(x)) for x in sums]),
      share=jnp.stack([_length([x]) for x in directions[1]]),
      differs=far(directions[0], directions[1]),
      varies=far(directions[2], directions[1]),
    )

  return measure


def judge(
  clipped_grad: clipping.ClippedGrad,
  params: PyTree,
  measured: Measured,
  *,
  is_ordinary: bool,
) -> Problem | None:
  """Returns the fault of the sum of one example, or None.

  params are whole; shapes are enough. `is_ordinary` says that none of the
  example's numbers has an extreme size.
  """
  scaling, groups = clipped_grad.scaling(params)
  seen = Measured(*[np.asarray(x, np.float64) for x in measured])
  for i, bound in enumerate(scaling.bounds):
    leaves = [leaf for leaf, group in enumerate(groups) if group == i]
    by = lambda sizes, leaves=leaves: tuple(
      sorted(leaves, key=lambda x: -sizes[x])
    )
    endless = tuple(leaf for leaf in leaves if not seen.is_finite[leaf])
    if endless:
      return Problem("is not finite", endless)
    if seen.length[i] > (1 + LONGER) * bound:
      return Problem(
        f"is {seen.length[i]:.4g} long where its bound is {bound:.4g}",
        by(np.nan_to_num(seen.share)),
      )
    truth = seen.truth[i]
    if not 0 < truth < math.inf:
      continue
    change = max(abs(seen.again[i] / truth - 1), *seen.varies[leaves])
    if not change <= _STEADY:
      continue
    near = _TOLERANCE + 8 * change
    expected = truth * _scale(scaling, i, truth)
    if seen.length[i] > (1 + near) * expected + _TOLERANCE * bound:
      return Problem(
        f"is {seen.length[i]:.4g} long where the clipped gradient is"
        f" {expected:.4g}",
        by(seen.share),
      )
    short = (1 - near) * truth - _TOLERANCE * scaling.l2_clip_norms[i]
    if seen.norm[i] < short:
      return Problem(
        f"is clipped by a norm of {seen.norm[i]:.4g} where that of the gradient"
        f" is {truth:.4g}",
        by(seen.share),
      )
    is_seen = is_ordinary and expected > 0 and seen.length[i] > 0
    if is_seen and np.max(seen.differs[leaves]) > near:
      what = "does not point where the gradient does"
      return Problem(what, by(seen.differs))
  return None


def blamed(
  clipped_grad: clipping.ClippedGrad,
  params: PyTree,
  example: PyTree,
  rng: jax.Array | None,
  leaves: Sequence[int],
  *,
  most: int = 16,
) -> list[int]:
  """Finds a parameter whose norm is wrong when it is trained alone.

  Trains one parameter at a time, at most `most` of them, and compiles a program
  for each. params are whole, on one device. `leaves` are numbers of trained
  parameters, the most suspect first. Returns the number of the first that is
  wrong alone; an empty list if none is.
  """
  parts = freezing.split(params, clipped_grad.frozen)
  trained = [
    name
    for name, is_frozen in zip(
      freezing.names(params), parts.is_frozen, strict=True
    )
    if not is_frozen
  ]
  scaling, groups = clipped_grad.scaling(params)
  for leaf in leaves[:most]:
    name = trained[leaf]
    is_alone = len(freezing.names(params)) == 1
    alone = dataclasses.replace(
      clipped_grad,
      l2_clip_norm=scaling.l2_clip_norms[groups[leaf]],
      frozen=None if is_alone else functools.partial(operator.ne, name),
      microbatch_size=None,
    )
    trained_alone, rest = clipping.partition(params, alone.frozen)
    measure = measurer(alone)

    def one(
      params: PyTree,
      rest: PyTree,
      alone: clipping.ClippedGrad = alone,
      measure: Callable[..., Measured] = measure,
    ) -> Measured:
      whole = clipping.merge(params, rest)
      batch = jax.tree.map(lambda x: jnp.asarray(x)[None], example)
      keys = None if rng is None else rng[None]
      out = alone(whole, batch, rng=keys)
      norms = [x[0] for x in jax.tree.leaves(out.grad_norms)]
      return measure(params, rest, example, rng, out.sum, norms)

    measured = jax.device_get(jax.jit(one)(trained_alone, rest))
    if judge(alone, params, measured, is_ordinary=False) is not None:
      return [leaf]
  return []


def _scale(scaling: Any, group: int, norm: float) -> float:
  """Returns the factor of a gradient with this norm."""
  if scaling.normalize_gamma is None:
    divisor = max(norm, scaling.l2_clip_norms[group])
  else:
    divisor = norm + scaling.normalize_gamma
  return scaling.bounds[group] / divisor


def _lengths(
  xs: Sequence[jax.Array], groups: Sequence[int], count: int
) -> jax.Array:
  return jnp.stack(
    [
      _length(
        [x for x, its_group in zip(xs, groups, strict=True) if its_group == i]
      )
      for i in range(count)
    ]
  )


def _length(xs: Sequence[jax.Array]) -> jax.Array:
  """Returns the norm of all together; no square over- or underflows."""
  largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in xs]))
  safe = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
  return largest * jnp.sqrt(sum(jnp.sum(jnp.square(x / safe)) for x in xs))


def _wide(gradient: PyTree) -> list[jax.Array]:
  return [
    x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for x in jax.tree.leaves(gradient)
  ]


def _shaken(tree: PyTree, amount: float) -> PyTree:
  """Makes each float a little larger or smaller."""
  leaves, structure = jax.tree.flatten(tree)
  changed = []
  for i, x in enumerate(leaves):
    if jnp.issubdtype(x.dtype, jnp.floating):
      wide = jnp.promote_types(x.dtype, jnp.float32)
      sign = watched.signs(x.shape, i).astype(wide)
      x = (x * (1 + amount * sign)).astype(x.dtype)
    changed.append(x)
  return jax.tree.unflatten(structure, changed)


def _rounding(
  clipped_grad: clipping.ClippedGrad,
  loss: Callable[..., Any],
  *args: PyTree,
) -> float:
  """Returns the relative error of the coarsest numbers in a loss."""
  floats = [
    x.dtype
    for x in jax.tree.leaves(args[0])
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  unit = max(float(jnp.finfo(dtype).eps) for dtype in floats)
  jaxpr = jax.make_jaxpr(loss)(*args).jaxpr
  if any(map(program.computes_narrow, jaxpr.eqns)):
    unit = max(unit, 2.0**-8)
  platform = clipped_grad.platform or costs.default_platform()
  return max(unit, costs.unit_roundoff(platform, None))
