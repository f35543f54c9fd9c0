"""The public transform: from the loss of one example to a clipped sum."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax

from dpdist import _validation
from dpdist.clipping import arguments
from dpdist.clipping import checks
from dpdist.clipping import explain
from dpdist.clipping import freezing
from dpdist.clipping import tracing
from dpdist.clipping import watched
from dpdist.clipping.engines import bookkeeping
from dpdist.clipping.engines import clip_norms
from dpdist.clipping.engines import microbatches
from dpdist.clipping.engines import two_pass
from dpdist.clipping.engines import vmap
from dpdist.clipping.engines.clip_norms import Scaling
from dpdist.clipping.layers import costs
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.layers import rules
from dpdist.clipping.trace import shards
from dpdist.clipping.trace import varying_axes

PyTree = Any

# How far the clipped sum can move, in clip norms, when one example is added or
# removed, is replaced by any other, or is replaced by one that contributes
# nothing.
_SENSITIVITY_FACTOR = {
  "add_or_remove_one": 1.0,
  "replace_one": 2.0,
  "zero_out": 1.0,
}


class ClippedGrads(NamedTuple):
  """The clipped sum, and values of the single examples.

  Only `sum`, or `sum` and `low` together, has bounded sensitivity, and even it
  must be kept secret until noise is added. `loss`, `grad_norms` and `aux` are
  per example and NOT private.

  Attributes:
    sum: pytree like params, float32 or wider; None where a parameter is frozen.
    loss: [B], the loss of every example, padding included.
    grad_norms: [B] float32, the norm before clipping; with per-layer clipping,
      a pytree of such arrays shaped like l2_clip_norm.
    aux: what loss_fn returned beside the loss, stacked along B; None without
      has_aux.
    low: what rounding left out of `sum` when microbatches of a given size were
      added up: a pytree like `sum`, to be added to the same total; None:
      nothing. Keep it as secret as `sum`.
    found: for a call with a direction, [B, trained parameters] bool: for each
      example that was left out, True at the parameter with its longest part.
  """

  sum: PyTree
  loss: jax.Array
  grad_norms: PyTree
  aux: Any
  low: PyTree = None
  found: jax.Array | None = None


# Compared by identity, so that it can be passed to jax.jit whatever it holds.
@dataclasses.dataclass(frozen=True, eq=False)
class ClippedGrad:
  """See `clipped_grad`, which makes it.

  It uses the layer rules that are registered when it is made.
  """

  loss_fn: Callable[..., Any]
  l2_clip_norm: PyTree
  has_aux: bool = False
  method: str = "auto"
  microbatch_size: int | None = None
  rescale_to_unit_norm: bool = False
  platform: str | None = None
  normalize_gamma: float | None = None
  frozen: freezing.Frozen = None
  layer_rules: tuple[layer_rule.LayerRule, ...] = dataclasses.field(
    default_factory=rules.registered
  )

  def __post_init__(self) -> None:
    checks.arguments(
      l2_clip_norm=self.l2_clip_norm,
      method=self.method,
      microbatch_size=self.microbatch_size,
      platform=self.platform,
      normalize_gamma=self.normalize_gamma,
    )
    freezing.check(self.frozen)

  def sensitivity(
    self, neighboring_relation: str = "add_or_remove_one"
  ) -> float:
    """Returns the l2 sensitivity of `ClippedGrads.sum`.

    Args:
      neighboring_relation: "add_or_remove_one", "replace_one" (twice as much)
        or "zero_out" (one example is replaced by one that contributes nothing).

    Returns:
      With clip norms C_1..C_g of g groups, the square root of the sum of C_i^2
      (of g, when rescaled to unit norm), doubled for replace_one. A group that
      is wholly frozen must have no norm, which a call checks, and does not
      count.

    Raises:
      ValueError: the relation is unknown.
    """
    _validation.check(
      "neighboring_relation",
      neighboring_relation,
      _validation.one_of(_SENSITIVITY_FACTOR),
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
    param_specs: PyTree | None = None,
    direction: PyTree | None = None,
  ) -> ClippedGrads:
    """Computes the clipped sum of a batch; see `clipped_grad`.

    Args:
      params: pytree of floating arrays or numbers; frozen ones may be of any
        dtype.
      batch: pytree; every leaf has the same leading axis B.
      is_padding_example: [B] bool; where True the example contributes exactly
        0, whatever it holds. None: no padding.
      rng: a PRNG key, or keys of shape [B], passed to loss_fn as its third
        argument. None: loss_fn takes two arguments. One key is split over the
        rows, not the examples: if a row is removed, those behind it get other
        keys. The sensitivity still holds if the key is secret and new at each
        step, as in `dpdist.train`, since such keys are as good as drawn again.
        It does not hold with a key that is known, or used twice: then pass a
        key for each example that depends only on the example and the step.
      param_specs: inside shard_map, for parameters of which each device holds a
        part: pytree like params of the PartitionSpecs with which params entered
        shard_map. Each has at most one mesh axis, along which the batch is
        divided too. The loss sees the whole parameter; its entry of the sum is
        this device's part of the sum over that axis. None: all are whole.
      direction: pytree like params, None where a parameter is frozen, with the
        same dtypes and layout: secret normal numbers, by which examples that
        are longer than their norms say are found and left out; see
        `dpdist.clipping.watched`. None: no example is checked.

    Returns:
      ClippedGrads.

    Raises:
      ValueError: the batch is empty, ragged or sharded outside shard_map; a
        shape does not fit; the loss mixes the examples of several devices.
    """
    call = arguments.lay_out(
      params,
      batch,
      is_padding_example=is_padding_example,
      rng=rng,
      param_specs=param_specs,
      direction=direction,
      frozen=self.frozen,
    )
    return self._clipped_sum(call)

  def _clipped_sum(self, call: arguments.Call) -> ClippedGrads:
    """Computes the clipped sum of a call."""
    parts, leaves = call.parts, call.parts.trainable
    scaling, groups, norm_def = self._scaling(call.params, parts.is_frozen)
    # Only shapes are needed; the gathered values are unused.
    traced = tracing.trace(
      self.loss_fn, self.has_aux, parts, call.examples, self.layer_rules
    )
    arguments.check_traced(call, traced)
    method, _ = traced.method(self.method, call.axes)

    def run(
      examples: tuple[PyTree, ...], keep: jax.Array
    ) -> tuple[list[jax.Array], jax.Array, list[jax.Array], Any]:
      how = watched.watch(scaling, traced, parts, examples, call.along, groups)
      if method == "vmap":
        with checks.effects(traced.effects):
          total, loss, norms, aux = vmap.clipped_sum(
            traced.of_trainable(parts),
            [shards.whole(x) for x in leaves],
            examples,
            keep,
            groups,
            how,
          )
        total = shards.sums(leaves, total)
        return total, loss, norms, (aux, watched.found(how))
      problem = self._problem(traced, parts, groups, how, method)
      engine = {"bookkeeping": bookkeeping, "two_pass": two_pass}[method]
      total, outs, norms = engine.clipped_sum(
        problem, jax.tree.leaves(examples), keep
      )
      loss, aux = jax.tree.unflatten(jax.tree.structure(traced.shapes), outs)
      return total, loss, norms, (aux, watched.found(how))

    size = self.microbatch_size
    if size is None:
      size = microbatches.automatic_size(
        traced.block, call.batch_size, self._platform
      )
      size = size if method == "bookkeeping" else call.batch_size
    total, loss, norms, (aux, found) = microbatches.run(
      run,
      (call.examples, call.keep),
      call.batch_size,
      size,
      call.axes,
      # XLA for CPUs is many times slower at convolutions inside a loop; for
      # TPUs it plans the use of fast memory better without a loop.
      unroll=(self._platform == "cpu" and traced.block.convolves())
      or (self._platform == "tpu" and self.microbatch_size is None),
      # A size that was chosen for speed makes no promise about rounding.
      keep_low=self.microbatch_size is not None,
    )
    return ClippedGrads(
      parts.of_trainable(total.high),
      loss,
      jax.tree.unflatten(norm_def, norms),
      aux if self.has_aux else None,
      None if total.low is None else parts.of_trainable(total.low),
      found=found,
    )

  def explain(self, params: PyTree, batch: PyTree, *, rng: Any = None) -> str:
    """Prints how each parameter would be clipped, and why.

    Args:
      params: as for a call; shapes are enough.
      batch: as for a call; shapes are enough.
      rng: as for a call.

    Returns:
      The printed text: the method, and for each rule its parameters, the form
      of its gradients, the way to their norms, and its cost for one example
      beyond the clipped sum: floating-point operations, bytes read and written,
      bytes kept.
    """
    text = self.explanation(params, batch, rng=rng)
    print(text)
    return text

  def explanation(
    self, params: PyTree, batch: PyTree, *, rng: Any = None
  ) -> str:
    """Returns what `explain` prints, with the same arguments."""
    method, reason, chosen, named = self._explained(params, batch, rng)
    return explain.table(
      method, reason, self._platform, chosen, named[False], named[True]
    )

  def ways(
    self, params: PyTree, batch: PyTree, *, rng: Any = None
  ) -> dict[str, str]:
    """Returns, by each trained parameter's path, how it is clipped."""
    method, _, chosen, _ = self._explained(params, batch, rng)
    is_frozen = freezing.split(params, self.frozen).is_frozen
    names = zip(freezing.names(params), is_frozen, strict=True)
    return explain.ways(
      method, chosen, [x for x, frozen in names if not frozen]
    )

  def scaling(self, params: PyTree) -> tuple[Scaling, list[int]]:
    """Returns how gradients are scaled, and each trained parameter's group."""
    scaling, groups, _ = self._scaling(
      params, freezing.split(params, self.frozen).is_frozen
    )
    return scaling, groups

  def _explained(
    self, params: PyTree, batch: PyTree, rng: Any
  ) -> tuple[str, str, Sequence[rules.Rule], dict[bool, list[str]]]:
    if rng is not None and not rng.shape:
      rng = jax.eval_shape(lambda k: jax.random.split(k, 1), rng)
    examples = (batch,) if rng is None else (batch, rng)
    parts = freezing.split(params, self.frozen)
    traced = tracing.trace(
      self.loss_fn, self.has_aux, parts, examples, self.layer_rules
    )
    scaling, groups, _ = self._scaling(params, parts.is_frozen)
    axes = varying_axes.varying_axes(examples)
    method, reason = traced.method(self.method, axes)
    named: dict[bool, list[str]] = {False: [], True: []}
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    for (path, _), is_frozen in zip(paths, parts.is_frozen, strict=True):
      named[is_frozen].append(jax.tree_util.keystr(path))
    chosen = (
      []
      if method == "vmap"
      else self._problem(traced, parts, groups, scaling, method).rules
    )
    return method, reason, chosen, named

  @property
  def _platform(self) -> str:
    return self.platform or costs.default_platform()

  def _problem(
    self,
    traced: tracing.Traced,
    parts: freezing.Split,
    groups: list[int],
    scaling: Scaling,
    method: str,
  ) -> bookkeeping.Problem:
    model = costs.MODELS[self._platform]
    if method == "two_pass":
      model = model.without_keeping()
    return bookkeeping.Problem(
      traced.block,
      rules.choose(traced.block.all_uses(), groups, model),
      parts.trainable,
      parts.frozen,
      groups,
      scaling,
      self._platform,
    )

  def _scaling(
    self, params: PyTree, is_frozen: Sequence[bool]
  ) -> tuple[Scaling, list[int], Any]:
    groups = clip_norms.groups(params, self.l2_clip_norm, is_frozen)
    norms, structure = jax.tree.flatten(self.l2_clip_norm)
    scaling = Scaling(
      tuple(float(norm) for norm in norms),
      self.rescale_to_unit_norm,
      None if self.normalize_gamma is None else float(self.normalize_gamma),
    )
    return scaling, groups, structure


def clipped_grad(
  loss_fn: Callable[..., Any],
  *,
  l2_clip_norm: PyTree,
  has_aux: bool = False,
  method: str = "auto",
  microbatch_size: int | None = None,
  rescale_to_unit_norm: bool = False,
  platform: str | None = None,
  normalize_gamma: float | None = None,
  frozen: freezing.Frozen = None,
) -> ClippedGrad:
  """Turns the loss of one example into a clipped sum of gradients.

  The per-example gradient g becomes g * min(1, C / ||g||_2) before it is summed
  (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

  Guarantees:
    * The sum moves by at most `sensitivity(relation)` when one example changes,
      for any data and parameters, on one device or inside shard_map on many,
      up to the rounding of float32, which docs/rounding.md bounds.
    * A padding example contributes exactly 0, whatever it holds, and so does
      one whose gradient norm is not finite (in float32: above 3e38). But under
      "vmap", so does one with activations of about 3e38, however small its
      gradient, and one that is shortened, with activations so large (a layer's
      sum above about 1e28 l2_clip_norm) that what they meet would underflow.
    * Randomness in the loss does not weaken this, if `rng` is secret and new at
      each step, or depends on the example: see `ClippedGrad.__call__`.
    * Norms and sums are float32 or wider, whatever the dtype of the model.

  Args:
    loss_fn: (params, example[, rng]) -> loss, or (loss, aux) with has_aux. An
      example is one unit of privacy: a pytree without the batch axis.
    l2_clip_norm: finite, at least 1e-12; or, for per-layer clipping, a prefix
      pytree of params with one such norm for each group.
    has_aux: whether loss_fn returns (loss, aux).
    method: "bookkeeping" takes about the time of an ordinary gradient and
      keeps activations and the gradients of layer outputs; "two_pass" takes
      about two thirds more time and the memory of an ordinary gradient; "vmap"
      instantiates every gradient, and is the reference. "auto" chooses
      "two_pass" where the loss rematerialises, and "bookkeeping" elsewhere;
      fn.explain(params, batch) prints what is done with each parameter. A loss
      with effects other than printing, such as those of jax.new_ref, always
      uses "vmap".
    microbatch_size: how many examples are worked on at once; must divide the
      batch. Microbatches are added up with two floats a number. None: the whole
      batch, or fewer where that is faster.
    rescale_to_unit_norm: whether to divide by the clip norm, so that the
      learning rate does not depend on it.
    platform: "cpu", "gpu" or "tpu": the platform whose costs and rounding
      decide the choices; None: that of the default device.
    normalize_gamma: None to clip. A number, at least 1e-12, to normalise
      instead, g * C / (||g||_2 + gamma): automatic clipping (Bu et al. 2023,
      arXiv:2206.07136).
    frozen: parameters that are not trained: a bool or prefix pytree of params
      of bools, True where frozen, or a predicate on a parameter's path, such as
      "encoder/0/kernel". Their gradients are not formed, and norm, sum and
      noise do not contain them; `sum` has None for each, see
      `dpdist.clipping.partition`. In a pytree l2_clip_norm, a group that is
      wholly frozen must have the norm None. None: all are trained.

  Returns:
    A `ClippedGrad`: fn(params, batch) -> ClippedGrads, and fn.sensitivity().

  Raises:
    ValueError: with the argument's name, its value and what would be right.
  """
  return ClippedGrad(
    loss_fn,
    l2_clip_norm,
    has_aux=has_aux,
    method=method,
    microbatch_size=microbatch_size,
    rescale_to_unit_norm=rescale_to_unit_norm,
    platform=platform,
    normalize_gamma=normalize_gamma,
    frozen=frozen,
  )
