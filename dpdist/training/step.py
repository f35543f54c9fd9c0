"""One training step: accumulate chunks, then apply.

`accumulate` adds a chunk's clipped sum to each device's own accumulator, which
keeps what float32 rounds away (`dpdist.sums.compensated`), and touches no
network where every device has all parameters. `apply` reduces the accumulators
over the mesh, draws noise once, divides by the expected batch size and updates
the parameters. A step may have any number of chunks, also none, so that a draw
of any size fits any memory and nothing recompiles.

Where the mesh divides parameters (see `dpdist.distributed.mesh.partition`),
everything that is kept beside them is divided in the same way: accumulator,
noise, the optimizer's state, average. `accumulate` then gathers a parameter
where the loss uses it, and reduces over `fsdp` at once, so that only `data` is
left for `apply`.

Frozen parameters are not part of the state, where None stands in their place.
Only `accumulate` takes them; see `dpdist.clipping.freezing`.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from dpdist import clipping
from dpdist.clipping import watched
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism as mechanism_lib
from dpdist.mechanism import stats as stats_lib
from dpdist.sums import compensated

PyTree = Any
Accumulator = stats_lib.Accumulator


class TrainState(NamedTuple):
  """The contents of a checkpoint; all of it is released."""

  step: jax.Array  # int32 scalar, updates made so far.
  params: PyTree  # None where one is frozen.
  opt_state: PyTree
  # Exponential moving average of params; None without one.
  ema_params: PyTree | None
  noise_state: Any  # Of the mechanism; see `Mechanism.init`.


@dataclasses.dataclass(frozen=True)
class Step:
  """The two halves of a step, compiled once for a mesh."""

  mechanism: mechanism_lib.Mechanism  # The guarantee depends on it.
  optimizer: optax.GradientTransformation  # Applied to the noisy mean.
  mesh: Mesh  # With the axes of `mesh_lib`.
  ema_decay: float = 0.0  # Of the parameters' moving average; 0 keeps none.
  rules: mesh_lib.Rules = ()  # How the parameters are divided over `model`.
  # (params, what the optimizer returns) -> params.
  apply_updates: Callable[[PyTree, PyTree], PyTree] = optax.apply_updates

  def specs(self, params: PyTree) -> PyTree:
    """Returns the parameters' layout: pytree like params of PartitionSpecs."""
    return mesh_lib.partition(params, self.mesh, self.rules)

  def state_specs(self, state: TrainState) -> PyTree:
    """Returns a state's layout; the optimizer's arrays lie like parameters."""
    specs, whole = self.specs(state.params), mesh_lib.REPLICATED
    like = jax.tree.map(lambda x, spec: (x.shape, spec), state.params, specs)
    opt_state = optax.tree.map_params(
      self.optimizer,
      lambda x, at: at[1] if x.shape == at[0] else whole,
      state.opt_state,
      like,
      transform_non_params=lambda x: whole,
    )
    everywhere = jax.tree.map(lambda x: whole, state)
    return everywhere._replace(
      params=specs,
      opt_state=opt_state,
      ema_params=None if state.ema_params is None else specs,
      noise_state=mesh_lib.specs_of_parts(
        state.noise_state, state.params, specs
      ),
    )

  def accumulator_specs(self, params: PyTree) -> PyTree:
    """Returns the layout of an accumulator: of PartitionSpecs."""
    sums = jax.tree.map(mesh_lib.stacked, self._sum_specs(self.specs(params)))
    stats = jax.tree.map(lambda x: mesh_lib.EXAMPLES, stats_lib.no_stats(1))
    learned = self.mechanism.clipper.init()
    learned = jax.tree.map(lambda x: mesh_lib.REPLICATED, learned)
    return Accumulator(sums, stats, sums, learned)

  def _sum_specs(self, specs: PyTree) -> PyTree:
    """Returns the layout of a sum, from that of its gradient."""
    return self.mechanism.with_extra(specs, lambda shape: mesh_lib.REPLICATED)

  def begin(self, state: TrainState) -> Accumulator:
    """Returns an empty accumulator for the step after a state."""
    # A copy: state and accumulator are donated by different calls.
    learned = jax.tree.map(jnp.copy, self.mechanism.learned(state.noise_state))
    return self.zeros(state.params)._replace(learned=learned)

  def init(self, params: PyTree) -> TrainState:
    """Returns the state before the first step, from whole parameters."""
    state = self.initial(params)
    return mesh_lib.place(state, self.state_specs(state), self.mesh)

  def initializer(
    self, make: Callable[..., PyTree], *args: Any
  ) -> jax.stages.Wrapped:
    """Returns what makes the state before the first step, from such args.

    No device need ever have all parameters. `make` maps args, which are NumPy
    arrays and equal in all processes, to parameters, and is traced. The state
    still has to be put `on_mesh`.
    """

    def initial(*args: Any) -> TrainState:
      return self.initial(make(*args))

    specs = self.state_specs(jax.eval_shape(initial, *args))
    if all(spec == mesh_lib.REPLICATED for spec in jax.tree.leaves(specs)):
      # The program of one device, whose bits do not depend on the mesh.
      return jax.jit(initial)
    shardings = jax.tree.map(functools.partial(NamedSharding, self.mesh), specs)
    return jax.jit(initial, out_shardings=shardings)

  def on_mesh(self, state: TrainState) -> TrainState:
    """Puts what an `initializer` made on the mesh, if it is not there yet."""
    specs = self.state_specs(state)
    is_alone = all(x == mesh_lib.REPLICATED for x in jax.tree.leaves(specs))
    return mesh_lib.place(state, specs, self.mesh) if is_alone else state

  def placed(self, params: PyTree) -> PyTree:
    """Puts whole parameters, NumPy arrays of this process, on the mesh."""
    return mesh_lib.place(params, self.specs(params), self.mesh)

  def initial(self, params: PyTree) -> TrainState:
    """Returns the state before the first step, where params are; traceable."""
    params = _strong(params)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=_strong(self.optimizer.init(params)),
      # A copy: state and average may be donated in the same call.
      ema_params=jax.tree.map(jnp.copy, params) if self.ema_decay else None,
      noise_state=self.mechanism.init(params),
    )

  @functools.cached_property
  def zeros(self) -> Callable[..., Any]:
    """Returns the compiled function (params) -> an empty Accumulator."""
    shards = mesh_lib.num_example_shards(self.mesh)
    learned = self.mechanism.clipper.init()

    def zeros(params: PyTree) -> Accumulator:
      sums = jax.tree.map(
        lambda x, spec: jnp.zeros(
          (self._num_summed(spec), *x.shape),
          jnp.promote_types(x.dtype, jnp.float32),
        ),
        self.mechanism.with_extra(params, jnp.zeros),
        self._sum_specs(self.specs(params)),
      )
      empty = compensated.zeros_like(sums)
      return self._constrained(
        params,
        Accumulator(empty.high, stats_lib.no_stats(shards), empty.low, learned),
      )

    return jax.jit(zeros)

  def _num_summed(self, spec: PartitionSpec) -> int:
    return math.prod(self.mesh.shape[x] for x in mesh_lib.summed_axes(spec))

  def _constrained(
    self, params: PyTree, accumulator: Accumulator
  ) -> Accumulator:
    """Constrains the layout of a traced accumulator."""
    specs = self.accumulator_specs(params)
    return mesh_lib.constrain(accumulator, specs, self.mesh)

  def _add_chunk(
    self,
    specs: PyTree,
    params: PyTree,
    frozen: PyTree | None,
    direction: PyTree | None,
    accumulator: Accumulator,
    batch: PyTree,
    is_padding_example: jax.Array,
    rngs: jax.Array,
  ) -> Any:
    """Does a device's part of `accumulate`, with its part of the chunk."""
    grads = self.mechanism.clipped_sum(
      whole(params, frozen),
      batch,
      accumulator.learned,
      is_padding_example=is_padding_example,
      rng=rngs,
      param_specs=specs,
      direction=direction,
    )
    grads, seen = watched.seen(grads)
    stats = stats_lib.count(self.mechanism, grads, is_padding_example)
    # The leading axis has one entry for each device, here this device's own.
    more, low, stats = jax.tree.map(
      lambda x: x[None], (grads.sum, grads.low, stats)
    )
    before = compensated.Sum(accumulator.clipped_sum, accumulator.low)
    total = compensated.add(before, more, low)
    stats = jax.tree.map(jnp.add, accumulator.stats, stats)
    after = Accumulator(total.high, stats, total.low, accumulator.learned)
    return after if seen is None else (after, seen)

  @functools.cached_property
  def accumulate(self) -> Callable[..., Any]:
    """Returns the compiled function that adds one chunk.

    It has no collectives, except those that gather divided parameters and
    reduce their sums.

    Args of the function:
      params: the state's.
      accumulator: of the same step; its memory is reused.
      batch: pytree; its leading axis is the chunk, divided like
        `mesh.examples`.
      is_padding_example: [chunk] bool, divided like batch.
      key: the step's key for dropout and the like.
      first_row: where the chunk begins in the step's list of examples, so that
        randomness belongs to an example and not to a device.
      frozen: the frozen parameters, None where one is trained; None: all are
        trained. They must be those that `mechanism.clipped_grad` freezes.
      direction: for a step that the sentinel watches, which is another program;
        see `dpdist.clipping.watched`. None: it is not watched.

    Returns of the function:
      The accumulator with the chunk's clipped sum; with a direction, also what
      was seen.
    """

    def accumulate(
      params: PyTree,
      accumulator: Accumulator,
      batch: PyTree,
      is_padding_example: jax.Array,
      key: jax.Array,
      first_row: jax.Array | int,
      frozen: PyTree | None = None,
      direction: PyTree | None = None,
    ) -> Any:
      rows = first_row + jnp.arange(is_padding_example.shape[0])
      rngs = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
      specs, frozen_specs = (
        jax.tree.map(mesh_lib.without_model, self.specs(x))
        for x in (params, frozen)
      )
      stacked: Any = jax.tree.map(mesh_lib.stacked, self._sum_specs(specs))
      sums: Any = self.accumulator_specs({})._replace(
        clipped_sum=stacked, low=stacked
      )
      run = jax.shard_map(
        functools.partial(self._add_chunk, whole(specs, frozen_specs)),
        mesh=self.mesh,
        in_specs=(specs, frozen_specs, None if direction is None else specs)
        + (sums,)
        + (mesh_lib.EXAMPLES,) * 3,
        out_specs=sums if direction is None else (sums, mesh_lib.EXAMPLES),
        axis_names=mesh_lib.manual_axes(self.mesh),
      )
      after = run(
        *(params, frozen, direction, accumulator),
        *(batch, is_padding_example, rngs),
      )
      if direction is None:
        return self._constrained(params, after)
      return self._constrained(params, after[0]), after[1]

    return jax.jit(accumulate, donate_argnums=(1,))

  @functools.cached_property
  def total(self) -> Callable[..., Any]:
    """Returns the compiled (params, accumulator) -> gradients' sum."""

    def total(params: PyTree, accumulator: Accumulator) -> PyTree:
      summed = jax.tree.map(
        lambda high, low: jnp.sum(high + low, 0),
        self.mechanism.gradient_of(accumulator.clipped_sum),
        self.mechanism.gradient_of(accumulator.low),
      )
      return mesh_lib.constrain(summed, self.specs(params), self.mesh)

    return jax.jit(total)

  @functools.cached_property
  def apply(self) -> Callable[..., Any]:
    """Returns the compiled function that ends a step, with one reduction.

    Args of the function:
      state: before the step; its memory is reused.
      accumulator: with all chunks of the step.
      noise_key: a typed PRNG key, secret; the step counter is folded into it.
      release_index: int32 scalar, the step's place among all that are charged
        under the plan; needed where the plan has a schedule.

    Returns of the function:
      The state after the step, and released metrics: "noisy_gradient_norm".
    """

    def reduce(params: PyTree, total: compensated.Sum) -> compensated.Sum:
      specs = self._sum_specs(self.specs(params))
      both = compensated.Sum(specs, specs)
      if mesh_lib.num_example_shards(self.mesh) == 1:
        # There is nothing to add up. XLA fails on a sum over axes of size 1
        # where it divides other axes itself (jax 0.10.2).
        alone = jax.tree.map(lambda x: x[0], total)
        return mesh_lib.constrain(alone, both, self.mesh)
      manual = jax.tree.map(mesh_lib.without_model, specs)
      parts = jax.tree.map(mesh_lib.stacked, manual)
      units = self.mechanism.grid(params, self._num_summed(mesh_lib.REPLICATED))

      @functools.partial(
        jax.shard_map,
        mesh=self.mesh,
        in_specs=(compensated.Sum(parts, parts),),
        out_specs=compensated.Sum(manual, manual),
        axis_names=mesh_lib.manual_axes(self.mesh),
      )
      def add(total: compensated.Sum) -> compensated.Sum:
        mine = jax.tree.map(lambda x: x[0], total)
        axes = jax.tree.map(
          lambda x, spec: mesh_lib.summed_axes(spec), mine.high, manual
        )
        return compensated.over_devices(mine, axes, units)

      return mesh_lib.constrain(add(total), both, self.mesh)

    def apply(
      state: TrainState,
      accumulator: Accumulator,
      noise_key: jax.Array,
      release_index: jax.Array | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
      # Outside shard_map: inside, each device would draw, and the sum of their
      # draws, or copies of one block, is not the noise that was planned.
      total = compensated.Sum(accumulator.clipped_sum, accumulator.low)
      noisy_sum, noise_state = self.mechanism.add_noise(
        reduce(state.params, total), state.noise_state, noise_key, release_index
      )
      after, released = update(
        self.mechanism,
        self.optimizer,
        self.ema_decay,
        state,
        noisy_sum,
        noise_state,
        release_index,
        apply_updates=self.apply_updates,
      )
      specs = self.state_specs(after)
      released = jax.lax.with_sharding_constraint(
        released, mesh_lib.replicated(self.mesh)
      )
      return mesh_lib.constrain(after, specs, self.mesh), released

    return jax.jit(apply, donate_argnums=(0,))

  @functools.cached_property
  def stats(self) -> Callable[..., Any]:
    """Returns the compiled (accumulator) -> Stats of all devices. Sensitive."""
    return jax.jit(
      lambda accumulator: jax.tree.map(jnp.sum, accumulator.stats),
      out_shardings=mesh_lib.replicated(self.mesh),
    )


def whole(params: PyTree, frozen: PyTree | None) -> PyTree:
  """Merges trained and frozen parameters, each None where the other has one."""
  return params if frozen is None else clipping.merge(params, frozen)


def update(
  mechanism: mechanism_lib.Mechanism,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
  state: TrainState,
  noisy_sum: PyTree,
  noise_state: Any,
  release_index: jax.Array | None = None,
  *,
  apply_updates: Callable[[PyTree, PyTree], PyTree] = optax.apply_updates,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns the state after the step, and released metrics, from noisy sums."""
  gradient, noise_state = mechanism.finish(
    noisy_sum, noise_state, release_index
  )
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = _strong(apply_updates(state.params, updates))
  new_state = TrainState(
    state.step + 1,
    params,
    _strong(opt_state),
    _ema(ema_decay, params, state.ema_params, state.step),
    noise_state,
  )
  return new_state, {"noisy_gradient_norm": optax.tree.norm(gradient)}


def _strong(arrays: PyTree) -> PyTree:
  # A checkpoint has no weak types: a state with them would be traced anew.
  strong = lambda x: x.astype(x.dtype) if getattr(x, "weak_type", 0) else x
  return jax.tree.map(strong, jax.tree.map(jnp.asarray, arrays))


def _ema(
  ema_decay: float, params: PyTree, ema_params: PyTree | None, step: jax.Array
) -> PyTree | None:
  if ema_params is None:
    return None
  # Early on the average follows closely, so that it forgets the initial values.
  decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
  return optax.incremental_update(params, ema_params, 1.0 - decay)
