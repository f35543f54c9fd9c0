"""Adds up several mini-batches to one logical batch, for one draw of noise.

    step = clipping.VirtualStep(fn, "mean", expected_batch_size=256)
    for indices in parts_of(sampler(t)):  # One draw, cut into parts.
      step.add(params, load(indices))
    if not step.num_added:
      step.add_nothing(params)  # Nobody was drawn; noise is added all the same.
    mean, sensitivity = step.finish()

It is one step of DP-SGD only under these conditions, which cannot be checked
here:

* The mini-batches are parts of one draw. An example in two of them moves the
  sum twice. A separate draw for each mini-batch is another mechanism.
* An empty draw is a step like any other, with its noise: leaving it out would
  reveal that nobody was drawn. Call `add_nothing` for it.
* Clip norms, and so the sensitivity, are chosen without looking at the data. If
  mini-batches have different clip norms, call `add_nothing` with those norms
  for which no example was drawn.

A `VirtualStep` holds arrays between calls, and may itself be used in a function
that JAX traces, `jax.shard_map` included. A training loop that is compiled as a
whole does not need it: it adds up `fn(params, batch).sum`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist import _validation
from dpdist import errors
from dpdist.clipping import freezing
from dpdist.clipping import transform
from dpdist.sums import compensated

PyTree = Any

_REDUCTION = _validation.one_of(("sum", "mean"))


class LogicalBatch(NamedTuple):
  """What `VirtualStep.finish` returns; private until noise is added.

  Attributes:
    value: the clipped sum, or that divided by the expected batch size: a pytree
      like params, float32 or wider, None where a parameter is frozen.
    sensitivity: its l2 sensitivity.
  """

  value: PyTree
  sensitivity: float


class VirtualStep:
  """Accumulates clipped sums; see the module's docstring for its conditions.

  Guarantees:
    `LogicalBatch.value` moves by at most `LogicalBatch.sensitivity` when one
    example changes, if no example comes twice in the logical batch.
  """

  def __init__(
    self,
    fn: transform.ClippedGrad,
    reduction: str = "sum",
    expected_batch_size: float | None = None,
  ):
    """Begins an empty logical batch.

    Args:
      fn: from `dpdist.clipped_grad`.
      reduction: "sum", or "mean" for the sum over expected_batch_size.
      expected_batch_size: mean number of examples in a logical batch, a public
        number; never the number that was drawn. Only for "mean".

    Raises:
      ValueError: with the argument's name, its value and what would be right.
    """
    if not isinstance(fn, transform.ClippedGrad):
      raise errors.ArgumentError(
        f"fn must come from dpdist.clipped_grad, got {fn!r}"
      )
    _validation.check("reduction", reduction, _REDUCTION)
    if reduction == "mean":
      _validation.check(
        "expected_batch_size", expected_batch_size, _validation.POSITIVE
      )
    else:
      _validation.require(
        expected_batch_size is None,
        "expected_batch_size",
        "None for the reduction 'sum', which divides by nothing",
        expected_batch_size,
      )
    self._fn = fn
    self._divisor = float(expected_batch_size or 1)
    self._compiled: dict[Any, Any] = {}
    self._total: Any = None
    self._fns: list[transform.ClippedGrad] = []

  @property
  def num_added(self) -> int:
    """Counts `add` and `add_nothing` since the last `finish` or `clear`."""
    return len(self._fns)

  def add(
    self,
    params: PyTree,
    batch: PyTree,
    *,
    is_padding_example: jax.Array | None = None,
    rng: jax.Array | None = None,
    l2_clip_norm: PyTree | None = None,
  ) -> transform.ClippedGrads:
    """Adds a mini-batch.

    Args:
      params: as for fn.
      batch: as for fn.
      is_padding_example: as for fn.
      rng: as for fn.
      l2_clip_norm: the clip norm of this mini-batch. None: fn's.

    Returns:
      fn's result for this mini-batch alone. NOT private.

    Raises:
      ValueError: fn raised it, or the sum is not like the one so far. Then
        nothing has been added.
    """
    fn, run = self._with_norm(l2_clip_norm)
    total = self._total_like(fn, params)
    self._total, grads = run(total, params, batch, is_padding_example, rng)
    self._fns.append(fn)
    return grads

  def add_nothing(
    self, params: PyTree, *, l2_clip_norm: PyTree | None = None
  ) -> None:
    """Adds a mini-batch without examples: zeros, and their sensitivity.

    Args:
      params: as for fn; shapes and dtypes are enough.
      l2_clip_norm: the clip norm of this mini-batch. None: fn's.

    Raises:
      ValueError: the sum is not like the one so far.
    """
    fn, _ = self._with_norm(l2_clip_norm)
    self._total = self._total_like(fn, params)
    self._fns.append(fn)

  def finish(
    self, neighboring_relation: str = "add_or_remove_one"
  ) -> LogicalBatch:
    """Ends the logical batch; the next `add` begins another one.

    Args:
      neighboring_relation: the relation of the sensitivity; see
        `ClippedGrad.sensitivity`.

    Returns:
      The sum or mean, and its sensitivity. That is the greatest one of the
      mini-batches, since each example is in only one of them.

    Raises:
      RuntimeError: nothing was added.
      ValueError: the relation is unknown. The logical batch is not ended then.
    """
    if not self._fns:
      raise RuntimeError(
        "finish must come after add, got nothing accumulated: for a draw of"
        " nobody, which takes noise as well, call add_nothing(params) first"
      )
    sensitivity = max(fn.sensitivity(neighboring_relation) for fn in self._fns)
    value = jax.tree.map(lambda x: x / self._divisor, self._total.high)
    self.clear()
    return LogicalBatch(value, sensitivity / self._divisor)

  def clear(self) -> None:
    """Discards what was added, for example after an interruption."""
    self._total = None
    self._fns = []

  def _with_norm(
    self, l2_clip_norm: PyTree | None
  ) -> tuple[transform.ClippedGrad, Any]:
    """Returns fn with this clip norm, and it compiled with the addition."""
    fn = self._fn
    norms, structure = jax.tree.flatten(l2_clip_norm)
    if (*norms, structure) not in self._compiled:
      if l2_clip_norm is not None:
        fn = dataclasses.replace(fn, l2_clip_norm=l2_clip_norm)

      def run(total: PyTree, params: PyTree, batch: Any, *more: Any) -> Any:
        is_padding_example, rng = more
        grads = fn(
          params, batch, is_padding_example=is_padding_example, rng=rng
        )
        return compensated.add(total, grads.sum, grads.low), grads

      self._compiled[(*norms, structure)] = fn, jax.jit(run)
    return self._compiled[(*norms, structure)]

  def _total_like(
    self, fn: transform.ClippedGrad, params: PyTree
  ) -> compensated.Sum:
    """Returns the sum so far, which must be like params, or zeros."""
    trainable, _ = freezing.partition(params, fn.frozen)
    template = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        jnp.shape(x), jnp.promote_types(jnp.result_type(x), jnp.float32)
      ),
      trainable,
    )
    if not self._fns:
      return compensated.zeros_like(template)
    before = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._total.high
    )
    if before != template:
      raise errors.ArgumentError(
        "params must be like those of the mini-batches before,"
        f" {before}, got {template}: call finish or clear in between"
      )
    return self._total
