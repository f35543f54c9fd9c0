"""The public transform: from the loss of one example to a clipped sum."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist.clipping import manual_axes
from dpdist.clipping import reference

PyTree = Any

_METHODS = ("auto", "vmap")
_PLATFORMS = ("cpu", "gpu", "tpu")
# The square of a gradient entry below about 1e-19 is 0 in float32, so that a
# norm near that size would be taken for nothing.
_SMALLEST_NORM = 1e-12
# How far the clipped sum can move, in clip norms, when one example is added or
# taken away, is replaced by any other, or is replaced by one that contributes
# nothing.
_SENSITIVITY_FACTOR = {
  "add_or_remove_one": 1.0,
  "replace_one": 2.0,
  "zero_out": 1.0,
}


class ClippedGrads(NamedTuple):
  """The clipped sum and what was seen on the way.

  Only `sum` has bounded sensitivity, and even it is private until noise is
  added. `loss`, `grad_norms` and `aux` are per example and NOT private.

  Attributes:
    sum: pytree like params, float32 or wider.
    loss: [B], the loss of every example, padding included.
    grad_norms: [B] float32, the norm before clipping; with per-layer clipping a
      pytree shaped like l2_clip_norm of such arrays.
    aux: what loss_fn returned beside the loss, stacked along B; None without
      has_aux.
  """

  sum: PyTree
  loss: jax.Array
  grad_norms: PyTree
  aux: Any


@dataclasses.dataclass(frozen=True)
class ClippedGrad:
  """See `clipped_grad`, which makes it."""

  loss_fn: Callable[..., Any]
  l2_clip_norm: PyTree
  has_aux: bool = False
  method: str = "vmap"
  microbatch_size: int | None = None
  rescale_to_unit_norm: bool = False
  platform: str | None = None

  def sensitivity(
    self, neighboring_relation: str = "add_or_remove_one"
  ) -> float:
    """The l2 sensitivity of `ClippedGrads.sum`.

    Args:
      neighboring_relation: "add_or_remove_one", "replace_one" (twice as far) or
        "zero_out" (one example is replaced by one that contributes nothing).

    Returns:
      With clip norms C_1..C_g of g groups, the root of the sum of C_i^2 (of g,
      when rescaled to unit norm), doubled for replace_one.

    Raises:
      ValueError: unknown relation.
    """
    if neighboring_relation not in _SENSITIVITY_FACTOR:
      raise ValueError(
        "neighboring_relation must be one of"
        f" {sorted(_SENSITIVITY_FACTOR)}, got {neighboring_relation!r}"
      )
    norms = jax.tree.leaves(self.l2_clip_norm)
    if self.rescale_to_unit_norm:
      norms = [1.0] * len(norms)
    return _SENSITIVITY_FACTOR[neighboring_relation] * math.hypot(*norms)

  def __call__(
    self,
    params: PyTree,
    batch: PyTree,
    *,
    is_padding_example: jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> ClippedGrads:
    """Computes the clipped sum of a batch; see `clipped_grad`.

    Args:
      params: pytree of floating arrays.
      batch: pytree; every leaf has the same leading axis B.
      is_padding_example: [B] bool; where True the example contributes exactly
        0, whatever it holds. None: no padding.
      rng: a PRNG key, split over the examples, or keys of shape [B]; handed to
        loss_fn as its third argument. None: loss_fn takes two arguments.

    Returns:
      ClippedGrads.

    Raises:
      ValueError: the batch is empty, ragged or sharded outside shard_map; a
        shape does not fit; the loss mixes the examples of several devices.
    """
    batch_size = _batch_size(batch)
    _refuse_sharded_outside_shard_map(batch)
    axes = manual_axes.varying_axes((batch, is_padding_example, rng))
    if is_padding_example is None:
      keep = jnp.ones((batch_size,), bool)
    elif jnp.shape(is_padding_example) != (batch_size,):
      raise ValueError(
        "is_padding_example must have one entry an example, shape"
        f" ({batch_size},), got {jnp.shape(is_padding_example)}"
      )
    else:
      keep = ~jnp.asarray(is_padding_example, bool)
    rng = _per_example_keys(rng, batch_size, axes)
    params = manual_axes.cast_to_varying(params, axes)
    keep = manual_axes.cast_to_varying(keep, axes)

    loss_fn = self.loss_fn if self.has_aux else _with_aux(self.loss_fn)
    groups, norm_def = self._groups(params)
    _check_loss(loss_fn, params, batch, rng, axes)

    def run(
      batch: PyTree, rng: jax.Array | None, keep: jax.Array
    ) -> tuple[PyTree, jax.Array, list[jax.Array], Any]:
      return reference.clipped_sum(
        loss_fn,
        params,
        batch,
        rng,
        keep,
        groups,
        rescale_to_unit_norm=self.rescale_to_unit_norm,
      )

    size = self.microbatch_size
    if size is None or size >= batch_size:
      total, loss, norms, aux = run(batch, rng, keep)
    else:
      total, loss, norms, aux = _in_microbatches(
        run, (batch, rng, keep), batch_size, size, axes
      )
    return ClippedGrads(
      total,
      loss,
      jax.tree.unflatten(norm_def, norms),
      aux if self.has_aux else None,
    )

  def _groups(self, params: PyTree) -> tuple[reference.Groups, Any]:
    norms, structure = jax.tree.flatten(self.l2_clip_norm)
    # mypy takes JAX's own class of tree structures for a mere name.
    norm_def: Any = structure
    try:
      norm_def.flatten_up_to(params)
    except ValueError as error:
      raise ValueError(
        "l2_clip_norm must be a number or a prefix pytree of params, got"
        f" {self.l2_clip_norm!r} for params {jax.tree.structure(params)}"
      ) from error
    return (
      reference.Groups(
        norm_def.flatten_up_to, lambda g: jax.tree.unflatten(norm_def, g), norms
      ),
      norm_def,
    )


def clipped_grad(
  loss_fn: Callable[..., Any],
  *,
  l2_clip_norm: PyTree,
  has_aux: bool = False,
  method: str = "auto",
  microbatch_size: int | None = None,
  rescale_to_unit_norm: bool = False,
  platform: str | None = None,
) -> ClippedGrad:
  """Turns the loss of one example into a clipped sum of gradients.

  The per-example gradient g becomes g * min(1, C / ||g||_2) before it is summed
  (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1).

  Guarantees:
    * The sum moves by at most `sensitivity(relation)` when one example changes,
      for any data and parameters, on one device or inside shard_map on many,
      up to the rounding of float32.
    * An example whose gradient norm is not finite (in float32: entries beyond
      about 1e19 overflow it) contributes exactly 0.
    * A padding example contributes exactly 0, whatever it holds.
    * Norms and sums are float32 or wider whatever the dtype of the model.

  Args:
    loss_fn: (params, example[, rng]) -> loss, or (loss, aux) with has_aux. An
      example is one unit of privacy: a pytree without the batch axis.
    l2_clip_norm: finite, at least 1e-12; or a prefix pytree of params with one
      such norm a group, for per-layer clipping.
    has_aux: whether loss_fn returns (loss, aux).
    method: "vmap" instantiates every gradient; "auto" picks the method, today
      always "vmap".
    microbatch_size: how many gradients exist at once; must divide the batch.
      None: the whole batch.
    rescale_to_unit_norm: divide by the clip norm, so that the learning rate
      does not depend on it.
    platform: "cpu", "gpu" or "tpu", whose costs "auto" goes by; None: those of
      the default device. With one method there is nothing to choose yet.

  Returns:
    A callable fn(params, batch, *, is_padding_example=None, rng=None) ->
    ClippedGrads, with fn.sensitivity(neighboring_relation).

  Raises:
    ValueError: names the argument, its value and what would be right.
  """
  for norm in jax.tree.leaves(l2_clip_norm):
    if (
      isinstance(norm, bool)
      or not isinstance(norm, int | float)
      or not math.isfinite(norm)
      or norm < _SMALLEST_NORM
    ):
      raise ValueError(
        f"l2_clip_norm must be finite and at least {_SMALLEST_NORM}, got"
        f" {norm!r}"
      )
  if not jax.tree.leaves(l2_clip_norm):
    raise ValueError(f"l2_clip_norm must hold a norm, got {l2_clip_norm!r}")
  if method not in _METHODS:
    raise ValueError(f"method must be one of {_METHODS}, got {method!r}")
  if platform is not None and platform not in _PLATFORMS:
    raise ValueError(
      f"platform must be None or one of {_PLATFORMS}, got {platform!r}"
    )
  if microbatch_size is not None and (
    isinstance(microbatch_size, bool)
    or not isinstance(microbatch_size, int)
    or microbatch_size < 1
  ):
    raise ValueError(
      f"microbatch_size must be None or an int above 0, got {microbatch_size!r}"
    )
  return ClippedGrad(
    loss_fn,
    l2_clip_norm,
    has_aux,
    "vmap" if method == "auto" else method,
    microbatch_size,
    rescale_to_unit_norm,
    platform,
  )


def _with_aux(loss_fn: Callable[..., Any]) -> Callable[..., tuple[Any, None]]:
  return lambda *args: (loss_fn(*args), None)


def _check_loss(
  loss_fn: Callable[..., tuple[jax.Array, Any]],
  params: PyTree,
  batch: PyTree,
  rng: jax.Array | None,
  axes: frozenset[str],
) -> None:
  args = (batch,) if rng is None else (batch, rng)
  one = jax.tree.map(lambda x: x[0], args)
  jaxpr, (loss, _) = jax.make_jaxpr(loss_fn, return_shape=True)(params, *one)
  if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
    raise ValueError(
      "loss_fn must return one floating number for one example, got shape"
      f" {loss.shape} and dtype {loss.dtype}"
    )
  collective = manual_axes.collective_over(jaxpr.jaxpr, axes)
  if collective is not None:
    raise ValueError(
      "loss_fn must use one example alone, but it mixes the examples of several"
      f" devices by {collective} over the mesh axes {sorted(axes)}, along which"
      " the batch is divided"
    )
  found = manual_axes.abstract_varying_axes(loss)
  if found != axes:
    raise ValueError(
      "loss_fn must use one example alone, but its value varies over the"
      f" mesh axes {sorted(found)} while the batch varies over"
      f" {sorted(axes)}: it closes over data that should be"
      " passed in the batch, or depends on neither"
    )


def _batch_size(batch: PyTree) -> int:
  shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
  sizes = {shape[0] if shape else None for shape in shapes}
  if len(sizes) != 1 or None in sizes or 0 in sizes:
    raise ValueError(
      "batch must hold arrays with one common leading axis of at least 1, got"
      f" shapes {shapes}"
    )
  return shapes[0][0]


def _refuse_sharded_outside_shard_map(batch: PyTree) -> None:
  # Left to the partitioner, per-example convolution gradients of a sharded
  # batch come out wrong without an error.
  for leaf in jax.tree.leaves(batch):
    if manual_axes.varying_axes(leaf):
      continue
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and not sharding.is_fully_replicated:
      raise ValueError(
        "batch is sharded over several devices outside jax.shard_map, where"
        " per-example gradients cannot be trusted: call clipped_grad inside"
        f" jax.shard_map; got sharding {sharding}"
      )


def _per_example_keys(
  rng: jax.Array | None, batch_size: int, axes: frozenset[str]
) -> jax.Array | None:
  if rng is None:
    return None
  if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    raise ValueError(
      f"rng must be typed PRNG keys (jax.random.key), got dtype {rng.dtype}"
    )
  if rng.shape == (batch_size,):
    return rng
  if rng.shape:
    raise ValueError(
      f"rng must be one key or one an example, shape ({batch_size},), got"
      f" shape {rng.shape}"
    )
  if axes and not manual_axes.varying_axes(rng):
    raise ValueError(
      "rng is one key that is equal on every device, so that examples on"
      " different devices would share randomness: inside jax.shard_map pass"
      " one key an example"
    )
  return jax.random.split(rng, batch_size)


def _in_microbatches(
  run: Callable[..., tuple[PyTree, jax.Array, list[jax.Array], Any]],
  args: PyTree,
  batch_size: int,
  size: int,
  axes: frozenset[str],
) -> tuple[PyTree, jax.Array, list[jax.Array], Any]:
  if batch_size % size:
    raise ValueError(
      f"microbatch_size must divide the batch of {batch_size}, got {size}"
    )
  args = jax.tree.map(
    lambda x: x.reshape((batch_size // size, size) + x.shape[1:]), args
  )
  first = jax.tree.map(lambda x: x[0], args)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, *first)[0]
  )

  def body(total: PyTree, microbatch: PyTree) -> tuple[PyTree, Any]:
    more, *rest = run(*microbatch)
    return jax.tree.map(jnp.add, total, more), rest

  total, rest = jax.lax.scan(
    body, manual_axes.cast_to_varying(zeros, axes), args
  )
  loss, norms, aux = jax.tree.map(
    lambda x: x.reshape((batch_size,) + x.shape[2:]), tuple(rest)
  )
  return total, loss, norms, aux
