"""Losses with a network state, randomness and metrics.

    def loss_fn(params, network_state, rng, example):
      ...
      return loss, (new_network_state, {"accuracy": hit, "logits": logits})

    fn = dpdist.with_state(
      loss_fn, l2_clip_norm=1.0,
      aggregate={"accuracy": "mean", "logits": "stack"})
    got = fn(params, network_state, batch, rng=key)
    network_state = got.network_state

A state that is carried from step to step and released with the parameters must
not reveal the examples. The clipped sum is made private. A running mean of
activations, such as that of batch norm, is not; it also makes an example's
gradient depend on others. So a new state may be computed only from the old one
and the parameters, which are released anyway: a counter, a decay, the vectors
of spectral normalisation. A state that is computed from an example or its
randomness is refused; the flow of data through the traced loss shows it.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist import clipping
from dpdist import errors
from dpdist.clipping import checks
from dpdist.clipping import freezing
from dpdist.clipping.trace import dependence
from dpdist.clipping.trace import varying_axes

PyTree = Any

_AGGREGATIONS = ("stack", "mean", "sum")


class StatefulGrads(NamedTuple):
  """A `dpdist.ClippedGrads` with the new state and the metrics.

  Attributes:
    sum: pytree like params, float32 or wider; the clipped sum.
    loss: [B], the loss of every example, padding included. NOT private.
    grad_norms: as in ClippedGrads. NOT private.
    network_state: the new state, which does not depend on any example.
    metrics: by name, either stacked [B, ...], padding included; or the mean or
      sum over the examples that are not padding (a mean over none is NaN).
      Inside `jax.shard_map` means and sums are over all devices, unlike `sum`,
      which is that of one device. NOT private.
  """

  sum: PyTree
  loss: jax.Array
  grad_norms: PyTree
  network_state: PyTree
  metrics: dict[str, PyTree]


@dataclasses.dataclass(frozen=True, eq=False)
class StatefulGrad:
  """See `with_state`, which makes it."""

  loss_fn: Callable[..., Any]
  aggregate: Mapping[str, str]
  clipped_grad: clipping.ClippedGrad

  def sensitivity(
    self, neighboring_relation: str = "add_or_remove_one"
  ) -> float:
    """Returns the l2 sensitivity of `StatefulGrads.sum`."""
    return self.clipped_grad.sensitivity(neighboring_relation)

  def __call__(
    self,
    params: PyTree,
    network_state: PyTree,
    batch: PyTree,
    *,
    rng: jax.Array,
    is_padding_example: jax.Array | None = None,
  ) -> StatefulGrads:
    """Computes the clipped sum, the new state and the metrics of a batch.

    Args:
      params: pytree of floating arrays.
      network_state: pytree of arrays of any dtype; a constant of the loss.
      batch: pytree; every leaf has the same leading axis B.
      rng: a PRNG key, split over the examples, or keys of shape [B].
      is_padding_example: [B] bool; None: no padding.

    Raises:
      ValueError: the new state depends on an example, or is not like the old
        one; `aggregate` does not name a metric; or for the reasons of
        `dpdist.ClippedGrad.__call__`.
    """
    size = checks.batch_size(batch)
    axes = varying_axes.varying_axes((batch, is_padding_example, rng))
    is_real = ~checks.padding(is_padding_example, size)
    keys = checks.per_example_keys(rng, size, axes)
    new_state = self._new_state(params, network_state, batch)
    got = self.clipped_grad(
      (params, network_state),
      batch,
      is_padding_example=is_padding_example,
      rng=keys,
    )

    def total(x: jax.Array) -> jax.Array:
      return jax.lax.psum(x, tuple(sorted(axes))) if axes else x

    def aggregate(x: jax.Array, how: str) -> jax.Array:
      if how == "stack":
        return x
      if how == "mean":
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      rows = is_real.reshape((size,) + (1,) * (x.ndim - 1))
      added = total(jnp.sum(jnp.where(rows, x, 0), axis=0))
      if how == "sum":
        return added
      num_real = jnp.sum(varying_axes.cast_to_varying(is_real, axes))
      return added / total(num_real)

    metrics = {
      name: jax.tree.map(lambda x, how=how: aggregate(x, how), got.aux[name])
      for name, how in self.aggregate.items()
    }
    return StatefulGrads(
      got.sum[0], got.loss, got.grad_norms[0], new_state, metrics
    )

  def _new_state(
    self, params: PyTree, network_state: PyTree, batch: PyTree
  ) -> PyTree:
    """Returns the new state after checking that it depends on no example."""
    # Any example and key will do, since the state may depend on neither.
    example = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), batch)
    key = jax.random.key(0)
    arguments = (params, network_state, key, example)
    closed, shapes = jax.make_jaxpr(self.loss_fn, return_shape=True)(*arguments)
    try:
      _, (state, metrics) = shapes
    except (TypeError, ValueError):
      raise errors.ArgumentError(
        "loss_fn must return (loss, (new network_state, metrics)), got"
        f" {jax.tree.structure(shapes)}"
      ) from None
    if not isinstance(metrics, Mapping) or set(metrics) != {*self.aggregate}:
      names = sorted(metrics) if isinstance(metrics, Mapping) else metrics
      raise errors.ArgumentError(
        "aggregate must name each metric of loss_fn and no other, got"
        f" {sorted(self.aggregate)} for the metrics {names}"
      )
    _check_like(network_state, state)
    public = len(jax.tree.leaves((params, network_state)))
    marked = [i >= public for i in range(len(closed.jaxpr.invars))]
    flags = dependence.dependent(closed.jaxpr, marked)
    # The first output is the loss.
    paths = freezing.names(state)
    mixed = [
      path
      for path, flag in zip(paths, flags[1 : 1 + len(paths)], strict=True)
      if flag
    ]
    if mixed:
      raise errors.ArgumentError(
        "network_state must not depend on the examples or their randomness, or"
        f" it would release them, got {mixed} computed from them, as by batch"
        " norm: use GroupNorm or LayerNorm, which keep no state"
      )
    return self.loss_fn(*arguments)[1][0]


def with_state(
  loss_fn: Callable[..., Any],
  *,
  l2_clip_norm: PyTree,
  aggregate: Mapping[str, str],
  frozen: Any = None,
  **options: Any,
) -> StatefulGrad:
  """Turns a loss with a network state into a clipped sum.

  Args:
    loss_fn: (params, network_state, rng, example) -> (loss, (new network_state,
      metrics)), for one example; metrics is a dict.
    l2_clip_norm: as for `dpdist.clipped_grad`.
    aggregate: for each metric "stack", "mean" or "sum".
    frozen: as for `dpdist.clipped_grad`.
    **options: further arguments of `dpdist.clipped_grad`.

  Returns:
    A callable fn(params, network_state, batch, *, rng, is_padding_example=None)
    -> StatefulGrads, with fn.sensitivity(neighboring_relation).

  Raises:
    ValueError: with the argument's name, its value and what would be right.
  """
  for name, how in aggregate.items():
    if how not in _AGGREGATIONS:
      raise errors.ArgumentError(
        f"aggregate must be of {_AGGREGATIONS}, got {how!r} for {name!r}"
      )

  def loss(both: Any, example: PyTree, rng: jax.Array) -> Any:
    params, network_state = both
    value, (_, metrics) = loss_fn(params, network_state, rng, example)
    return value, dict(metrics)

  # The state is passed as a frozen parameter.
  is_frozen: Any
  if callable(frozen):
    is_frozen = lambda path: path[:1] == "1" or frozen(path[2:])
  else:
    freezing.check(frozen)
    is_frozen = (False if frozen is None else frozen, True)
  clipped_grad = clipping.clipped_grad(
    loss,
    l2_clip_norm=(l2_clip_norm, None),
    has_aux=True,
    frozen=is_frozen,
    **options,
  )
  return StatefulGrad(loss_fn, dict(aggregate), clipped_grad)


def _check_like(before: PyTree, after: PyTree) -> None:
  describe = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree
  )
  if describe(before) != describe(after):
    raise errors.ArgumentError(
      "network_state must keep its structure, shapes and dtypes, got"
      f" {describe(after)} from {describe(before)}"
    )
