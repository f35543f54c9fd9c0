"""A training step whose bits do not depend on how many devices share it.

Floating point is used in two compiled programs only, and both are for one
device, whatever the mesh. One adds a group of examples, of fixed size and cut
by their places in the step's list, to a device's integers. The other turns the
total and the noise into an update, on one device of each process. Between them
one reduction adds integers, which may be added in any order.

A program over several devices would not do: XLA compiles it differently for one
partition than for several, and it then rounds differently.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import SingleDeviceSharding
import optax

from dpdist import errors
from dpdist.clipping import checks
from dpdist.clipping import watched
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism as mechanism_lib
from dpdist.mechanism import stats as stats_lib
from dpdist.sums import fixed_point
from dpdist.training import step as step_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class ExactStep(step_lib.Step):
  """A `dpdist.training.step.Step` with exact sums.

  Guarantees:
    * The state after a step has the same bits on any mesh and any number of
      processes, for chunks of any size, on devices of one kind and, on CPUs,
      with as many threads (`dpdist.workdir.fingerprint.pin_threads`): XLA's CPU
      back end cuts the sums of convolutions by their number.
    * No sum overflows: see `dpdist.sums.fixed_point.choose`. A step with more
      than plan.num_examples examples, which the bound does not cover, ends in
      NaN.
    * Truncation is inside the sensitivity: see
      `dpdist.mechanism.mechanism.Mechanism`.

  Every device has all parameters, whatever the mesh.

  Needs mechanism.exact_group_size. The clipped sum of an Accumulator has a
  tuple of limbs for each parameter.
  """

  def __post_init__(self) -> None:
    shards = mesh_lib.num_example_shards(self.mesh)
    if shards > fixed_point.MOST_DEVICES:
      raise ValueError(
        f"clipping.exact_sum must be False where more than"
        f" {fixed_point.MOST_DEVICES} devices divide the examples, got {shards}"
      )
    if jax.tree.leaves(self.mechanism.clipper.init()):
      raise errors.ArgumentError(
        "clipping.exact_sum must be False with a clipper that learns, got"
        f" {self.mechanism.plan.clipping!r}"
      )

  def specs(self, params: PyTree) -> PyTree:
    """Returns specs by which nothing is divided."""
    return jax.tree.map(lambda x: mesh_lib.REPLICATED, params)

  @functools.cached_property
  def zeros(self) -> Callable[..., Any]:
    """Returns the compiled function (params) -> an empty Accumulator."""
    shards = mesh_lib.num_example_shards(self.mesh)

    def zeros(params: PyTree) -> step_lib.Accumulator:
      form = self.mechanism.sum_format(params)
      sums = jax.tree.map(
        lambda x: fixed_point.zeros(form, (shards, *x.shape)),
        self.mechanism.with_extra(params, jnp.zeros),
      )
      return step_lib.Accumulator(sums, stats_lib.no_stats(shards))

    return jax.jit(zeros, out_shardings=mesh_lib.examples(self.mesh))

  @functools.cached_property
  def reduce(self) -> jax.stages.Wrapped:
    """Returns the compiled (accumulator) -> limbs of all devices, examples."""
    axes = tuple(mesh_lib.EXAMPLES[0])

    @functools.partial(
      jax.shard_map,
      mesh=self.mesh,
      in_specs=mesh_lib.EXAMPLES,
      out_specs=mesh_lib.REPLICATED,
    )
    def reduce(accumulator: step_lib.Accumulator) -> tuple[PyTree, jax.Array]:
      mine = (accumulator.clipped_sum, accumulator.stats.num_examples)
      return jax.lax.psum(jax.tree.map(lambda x: x[0], mine), axes)

    return jax.jit(reduce)

  def accumulate(
    self,
    params: PyTree,
    accumulator: step_lib.Accumulator,
    batch: PyTree,
    is_padding_example: jax.Array,
    key: jax.Array,
    first_row: int,
    frozen: PyTree | None = None,
    direction: PyTree | None = None,
  ) -> Any:
    """Adds one chunk; a device's rows must be a multiple of the group size."""
    size = self.mechanism.exact_group_size
    assert size is not None
    num_rows = is_padding_example.sharding.shard_shape(
      is_padding_example.shape
    )[0]
    if num_rows % size:
      raise ValueError(
        "a chunk must hold a multiple of exact_group_size for each device, got"
        f" {num_rows} rows a device for groups of {size}"
      )
    devices = _devices(is_padding_example)
    starts = [
      first_row + (shard.index[0].start or 0)
      for shard in is_padding_example.addressable_shards
    ]
    params, frozen = _split(params, devices), _split(frozen, devices)
    direction = _split(direction, devices)
    rows = _split((batch, is_padding_example), devices)
    parts = _split(accumulator, devices)
    seen: list[list[watched.Seen]] = [[] for _ in devices]
    # One group on every device before the next, so that all devices are busy.
    for row in range(0, num_rows, size):
      for i in range(len(devices)):
        group = _cut(rows[i], row, size)
        parts[i] = add_group(
          self.mechanism,
          params[i],
          parts[i],
          *group,
          key,
          starts[i] + row,
          frozen[i],
          direction[i],
        )
        if direction[i] is not None:
          parts[i], more = parts[i]
          seen[i].append(more)
    after = _join(parts, self.mesh)
    if not seen[0]:
      return after
    return after, _join([_together(groups) for groups in seen], self.mesh)

  @functools.cached_property
  def total(self) -> Callable[..., Any]:
    """Returns the compiled (params, accumulator) -> gradients' sum."""

    def total(params: PyTree, accumulator: step_lib.Accumulator) -> PyTree:
      form = self.mechanism.sum_format(params)
      limbs, _ = self.reduce(accumulator)
      return jax.tree.map(
        lambda x, sums: fixed_point.to_float(
          form, fixed_point.carry(sums), jnp.promote_types(x.dtype, jnp.float32)
        ),
        params,
        self.mechanism.gradient_of(limbs),
      )

    return jax.jit(total)

  def apply(
    self,
    state: step_lib.TrainState,
    accumulator: step_lib.Accumulator,
    noise_key: jax.Array,
  ) -> tuple[step_lib.TrainState, dict[str, jax.Array]]:
    """Ends a step; see `dpdist.training.step.Step.apply`."""
    devices = _devices(state.step)
    # On one device, and copied: so it is compiled once for each process.
    mine, total = _split((state, self.reduce(accumulator)), devices[:1])[0]
    after = finish(
      self.mechanism, self.optimizer, self.ema_decay, mine, *total, noise_key
    )
    return mesh_lib.replicate(after, self.mesh)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def add_group(
  mechanism: mechanism_lib.Mechanism,
  params: PyTree,
  accumulator: step_lib.Accumulator,
  batch: PyTree,
  is_padding_example: jax.Array,
  key: jax.Array,
  first_row: jax.Array | int,
  frozen: PyTree | None = None,
  direction: PyTree | None = None,
) -> Any:
  """Adds one group to the device's accumulator; compiled for one device."""
  form = mechanism.sum_format(params)
  rows = first_row + jnp.arange(is_padding_example.shape[0])
  rngs = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
  with checks.on_one_device():
    grads = mechanism.clipped_sum(
      step_lib.whole(params, frozen),
      batch,
      is_padding_example=is_padding_example,
      rng=rngs,
      direction=direction,
    )
  grads, seen = watched.seen(grads)
  # The leading axis has one entry for each device.
  total = accumulator.clipped_sum
  # What rounding left out of the sum of microbatches counts too.
  for part in (grads.sum,) if grads.low is None else (grads.sum, grads.low):
    total = jax.tree.map(
      lambda x, limbs: fixed_point.add(
        limbs, fixed_point.split(form, x[None], mechanism.largest_in_group)
      ),
      part,
      total,
    )
  stats = stats_lib.count(mechanism, grads, is_padding_example)
  after = step_lib.Accumulator(
    total, jax.tree.map(jnp.add, accumulator.stats, stats)
  )
  return after if seen is None else (after, seen)


@jax.jit
def _together(groups: Sequence[watched.Seen]) -> watched.Seen:
  """Combines what a device's groups showed, for its part of a chunk."""
  found = jnp.sum(jnp.stack([group.found for group in groups]), axis=0)
  return watched.Seen(found, jnp.concatenate([x.norms for x in groups]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3,))
def finish(
  mechanism: mechanism_lib.Mechanism,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
  state: step_lib.TrainState,
  total: PyTree,
  num_examples: jax.Array,
  noise_key: jax.Array,
) -> tuple[step_lib.TrainState, dict[str, jax.Array]]:
  """Adds noise and updates; compiled for one device, from the reduced sum."""
  form = mechanism.sum_format(state.params)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
    mechanism.with_extra(state.params, jnp.zeros),
  )
  noise, noise_state = mechanism.draw_noise(zeros, state.noise_state, noise_key)
  # More examples than plan.num_examples would break the format's bounds.
  is_sound = num_examples <= mechanism.plan.num_examples

  def add(noise: jax.Array, limbs: fixed_point.Limbs) -> jax.Array:
    part = fixed_point.split(
      form, noise, mechanism.largest_noise, is_floored=True
    )
    # Carried first: with the noise, a limb of 2048 devices would overflow.
    noisy = fixed_point.add(fixed_point.carry(limbs), part)
    value = fixed_point.to_float(form, noisy, noise.dtype)
    # Larger noise was cut. No normal of the planned deviation is so large.
    is_whole = jnp.abs(noise) <= mechanism.largest_noise
    return jnp.where(is_sound & is_whole, value, jnp.nan)

  noisy_sum = jax.tree.map(add, noise, total)
  return step_lib.update(
    mechanism, optimizer, ema_decay, state, noisy_sum, noise_state
  )


@functools.partial(jax.jit, static_argnums=(2,))
def _cut(rows: PyTree, start: int, size: int) -> PyTree:
  # Separate from the program that computes, which must not depend on how many
  # rows the device has.
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), rows
  )


def _devices(x: jax.Array) -> list[jax.Device]:
  """Returns this process's devices, in the order of an array's shards."""
  return [shard.device for shard in x.addressable_shards]


def _split(tree: PyTree, devices: Sequence[jax.Device]) -> list[PyTree]:
  """Returns each device's own part of every array."""
  leaves, structure = jax.tree.flatten(tree)
  on_device = [
    {shard.device: shard.data for shard in leaf.addressable_shards}
    for leaf in leaves
  ]

  def part(data: jax.Array, device: jax.Device) -> jax.Array:
    sharding = SingleDeviceSharding(device)
    # The shard of a mesh of one device has that mesh's sharding, and would make
    # another program. No copy is made.
    return data if data.sharding == sharding else jax.device_put(data, sharding)

  return [
    jax.tree.unflatten(
      structure, [part(leaf[device], device) for leaf in on_device]
    )
    for device in devices
  ]


def _join(parts: Sequence[PyTree], mesh: Mesh) -> PyTree:
  """Joins the devices' rows to arrays over the mesh."""
  shards = mesh_lib.num_example_shards(mesh)

  def join(*arrays: jax.Array) -> jax.Array:
    rows, *rest = arrays[0].shape
    return jax.make_array_from_single_device_arrays(
      (rows * shards, *rest), mesh_lib.examples(mesh), list(arrays)
    )

  return jax.tree.map(join, *parts)
