"""Private gradients for your own training loop.

    plan = dpdist.make_plan(dpdist.PrivacyConfig(...))
    gradients = dpdist.private_gradients(loss_fn, plan, seed=secret)
    noise_state, opt_state = gradients.init(params), optimizer.init(params)

    @jax.jit
    def step(params, opt_state, noise_state, batch, is_padding_example):
      got, noise_state = gradients(
        params, batch, noise_state, is_padding_example=is_padding_example
      )
      updates, opt_state = optimizer.update(got.gradient, opt_state, params)
      return optax.apply_updates(params, updates), opt_state, noise_state

The plan's guarantee depends on what the loop does. Batches must be the plan's
draws (`dpdist.PoissonSampler`, padded, never cut). An empty draw is a step too,
of padding alone. Give each call the state that the last one returned. Save the
state in checkpoints, and use no state twice. `dpdist.train` does all of that.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist import clipping
from dpdist.clipping import checks
from dpdist.clipping.trace import varying_axes
from dpdist.mechanism import mechanism as mechanism_lib
from dpdist.mechanism import state as state_lib
from dpdist.noise import noise
from dpdist.privacy import plan as plan_lib
from dpdist.sums import compensated

PyTree = Any


class PrivateGradients(NamedTuple):
  """A gradient that may be released, and values that may not.

  Attributes:
    gradient: (clipped sum + noise) / expected batch size: a pytree like params,
      float32 or wider, None where a parameter is frozen. With groups, it is
      divided by the expected number of groups.
    loss: mean loss over the examples that are not padding; NaN if there are
      none. NOT private.
    aux: what loss_fn returned beside the loss, float leaves averaged like the
      loss, as float32 or wider; None without has_aux. NOT private.
  """

  gradient: PyTree
  loss: jax.Array
  aux: PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class PrivateGradientFn:
  """See `private_gradients`, which makes it. Its repr leaves out the secret."""

  mechanism: mechanism_lib.Mechanism
  _key: jax.Array = dataclasses.field(repr=False)
  _is_public: bool = False

  @property
  def plan(self) -> plan_lib.PrivacyPlan:
    """Returns the plan."""
    return self.mechanism.plan

  @property
  def clipped_grad(self) -> clipping.ClippedGrad:
    """Returns the function that clips and sums gradients."""
    return self.mechanism.clipped_grad

  @property
  def sensitivity(self) -> float:
    """Returns the l2 sensitivity of the clipped sum."""
    return self.mechanism.sensitivity

  @property
  def noise_stddev(self) -> float:
    """Returns the first step's noise standard deviation on a sum's entry."""
    return self.mechanism.noise_stddev

  def init(self, params: PyTree) -> Any:
    """Returns the state before the first step.

    It is only a counter, unless noise or clipping remember anything.
    """
    return self.mechanism.init(params)

  def __call__(
    self,
    params: PyTree,
    batch: PyTree,
    state: Any,
    *,
    is_padding_example: jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> tuple[PrivateGradients, Any]:
    """Computes one step's gradient; may be compiled.

    Args:
      params: pytree of floating arrays.
      batch: pytree of all of the step's examples, on one device; every leaf has
        the same leading axis B.
      state: from `init` or the previous call.
      is_padding_example: [B] bool; padding contributes exactly 0.
      rng: a PRNG key, or one for each example (for each group, if there are
        groups), if loss_fn takes one. A single key is split over rows, and the
        guarantee depends on it: it must be as secret as the seed and new at
        each step, see `dpdist.clipped_grad`.

    Returns:
      PrivateGradients, and the next state. After the plan's last step the
      gradient is NaN and nothing is learned: nothing more may be spent.

    Raises:
      ValueError: as `dpdist.clipped_grad`; group_size does not divide the
        batch; inside `jax.shard_map`, where each device would draw noise; and,
        unless compiled, if the plan is used up or rng is the key of an int.
    """
    if not self._is_public and rng is not None and noise.is_of_an_int(rng):
      raise ValueError(
        "rng must be a secret key, new at each step, got jax.random.key of an"
        " int, which can be guessed: one key goes by row, and a row that is"
        " taken away moves the others' randomness; use"
        " jax.random.wrap_key_data of random words, or a key for each example"
      )
    axes = varying_axes.divided_axes((batch, is_padding_example, rng))
    if axes:
      raise ValueError(
        "batch must be on one device, since noise is drawn once, got one that"
        f" is divided along {sorted(axes)}: see dpdist.training.step for many"
      )
    left = state.draws < self.plan.num_steps
    if not isinstance(left, jax.core.Tracer) and not left:
      raise ValueError(
        f"state must be before the plan's last step, {self.plan.num_steps}, got"
        f" {state.draws} draws: the budget is spent"
      )
    is_real = ~checks.padding(is_padding_example, checks.batch_size(batch))
    is_padding_row = ~is_real
    size = self.plan.group_size
    if size > 1:
      batch, is_padding_row = clipping.into_groups(
        batch, size, is_padding_example=~is_real
      )
    made, learned = self.mechanism, self.mechanism.learned(state)
    got = made.clipped_sum(
      params, batch, learned, is_padding_example=is_padding_row, rng=rng
    )
    release_index = state.draws
    noisy, state = made.add_noise(
      compensated.of(got.sum, got.low), state, self._key, release_index
    )
    gradient, state = made.finish(noisy, state, release_index)
    gradient = jax.tree.map(lambda x: jnp.where(left, x, jnp.nan), gradient)
    state = _learned_where(left, state, learned)
    num_in_row = jnp.sum(is_real.reshape(is_padding_row.shape[0], -1), axis=1)
    aux = got.aux
    if size > 1:
      aux = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), aux)
    return (
      PrivateGradients(
        gradient,
        _mean(got.loss, num_in_row),
        jax.tree.map(lambda x: _mean(x, is_real), aux),
      ),
      state,
    )


def private_gradients(
  loss_fn: Callable[..., Any],
  plan: plan_lib.PrivacyPlan,
  *,
  seed: int | bytes | jax.Array,
  has_aux: bool = False,
  l2_clip_norm: PyTree | None = None,
  method: str = "auto",
  microbatch_size: int | None = None,
  rescale_to_unit_norm: bool = False,
  frozen: Any = None,
  rows_are_fixed: bool = False,
  batch_axis: int = 0,
) -> PrivateGradientFn:
  """Turns the loss of one example into private gradients of a batch.

  Guarantees:
    Each of the plan's steps is the Gaussian mechanism with the plan's noise
    multiplier. Whatever the other arguments are, the noise's standard deviation
    is that multiplier times the l2 sensitivity of the clipped sum.

  Args:
    loss_fn: (params, example[, rng]) -> loss, or (loss, aux) with has_aux.
    plan: gives the noise multiplier, the steps and the expected batch size.
    seed: the seed of the noise; see `dpdist.gaussian_noise`. For the guarantee
      to hold it must be secret, with 128 bits of entropy or more, such as
      os.urandom(32); an int is not. It becomes a constant of programs that this
      is compiled into.
    has_aux: whether loss_fn returns (loss, aux).
    l2_clip_norm: a number, or a prefix pytree of params for per-layer clipping;
      noise grows with the root of the sum of squares. None: the plan's.
    method: see `dpdist.clipped_grad`; "two_pass" is norm accumulation: norms
      first, then one weighted backward pass.
    microbatch_size: how many gradients are worked on at once.
    rescale_to_unit_norm: whether to divide by the clip norm, noise included.
    frozen: parameters that are not trained; see `dpdist.clipped_grad`.
    rows_are_fixed: declares that the rows of a group are always the same
      examples, as a plan with a group_size requires: see
      `dpdist.clipping.example_groups`. It is not true for a Poisson draw of
      examples that is packed without gaps: no noise would be enough for that.
    batch_axis: must be 0.

  Returns:
    An object with init(params) -> state, and (params, batch, state, *,
    is_padding_example=None, rng=None) -> (PrivateGradients, state).

  Raises:
    ValueError: with the argument's name, its value and what would be right.
  """
  _check_arguments(plan, rows_are_fixed, batch_axis)
  if plan.group_size > 1:
    loss_fn = clipping.mean_of_group(loss_fn, has_aux=has_aux)
  clipped_grad = clipping.clipped_grad(
    loss_fn,
    l2_clip_norm=plan.l2_clip_norm if l2_clip_norm is None else l2_clip_norm,
    has_aux=has_aux,
    method=method,
    microbatch_size=microbatch_size,
    rescale_to_unit_norm=rescale_to_unit_norm,
    frozen=frozen,
  )
  return PrivateGradientFn(
    mechanism_lib.of(plan, clipped_grad),
    _key=noise.key_of(seed),
    _is_public=isinstance(seed, int),
  )


def _check_arguments(
  plan: plan_lib.PrivacyPlan, rows_are_fixed: bool, batch_axis: int
) -> None:
  """Raises ValueError for what the plan's accounting does not cover."""
  if isinstance(batch_axis, bool) or batch_axis != 0:
    raise ValueError(
      f"batch_axis must be 0, got {batch_axis!r}: move the examples' axis first"
    )
  if not isinstance(plan, plan_lib.PrivacyPlan):
    raise ValueError(f"plan must come from dpdist.make_plan, got {plan!r}")
  if plan.statistics_noise_multiplier:
    raise ValueError(
      "statistics_noise_multiplier must be 0 here, since dpdist.train alone"
      f" releases private statistics, got {plan.statistics_noise_multiplier}"
    )
  if plan.group_size > 1 and rows_are_fixed is not True:
    raise ValueError(
      f"group_size must be 1, got {plan.group_size}, unless"
      " rows_are_fixed=True: in a draw that is closed up, one more example"
      " moves all later ones to other groups"
    )


def _learned_where(left: jax.Array, state: Any, before: PyTree) -> Any:
  """Returns a state that has learned no more than before if none is left."""
  if not isinstance(state, state_lib.MechanismState):
    return state
  keep = lambda x, old: jnp.where(left, x, old)
  return state._replace(learned=jax.tree.map(keep, state.learned, before))


def _mean(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Averages over the first axis; rows of weight 0 may hold anything."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  weight = weight.reshape(weight.shape + (1,) * (x.ndim - 1)).astype(dtype)
  total = jnp.sum(jnp.where(weight > 0, x * weight, 0), axis=0)
  return total / jnp.sum(weight)
