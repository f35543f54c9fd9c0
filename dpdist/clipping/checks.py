"""Checks the arguments of clipped sums, and raises ValueError for bad ones."""

from collections.abc import Iterator, Sequence
import contextlib
import contextvars
import functools
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist.clipping.trace import program
from dpdist.clipping.trace import varying_axes
from dpdist.clipping.trace.program import Block

PyTree = Any

_NUMBERS = (jax.Array, np.ndarray, np.generic, int, float, complex)
METHOD = _validation.one_of(("auto", "bookkeeping", "two_pass", "vmap"))
_PLATFORM = _validation.optional(_validation.one_of(("cpu", "gpu", "tpu")))
# Between these, dividing by a norm, or by a norm plus gamma, neither underflows
# nor overflows in float32.
_NORM = _validation.real(at_least=1e-12, at_most=1e18)
_GAMMA = _validation.optional(_validation.real(at_least=1e-12))
_SIZE = _validation.optional(_validation.COUNT)
_is_alone: contextvars.ContextVar[bool] = contextvars.ContextVar(
  "compiled for one device", default=False
)


def arguments(
  *,
  l2_clip_norm: PyTree,
  method: str,
  microbatch_size: int | None,
  platform: str | None,
  normalize_gamma: float | None,
) -> None:
  """Checks the arguments of `clipped_grad`."""
  norms(l2_clip_norm)
  _validation.check("method", method, METHOD)
  _validation.check("platform", platform, _PLATFORM)
  _validation.check("normalize_gamma", normalize_gamma, _GAMMA)
  _validation.check("microbatch_size", microbatch_size, _SIZE)


def norms(l2_clip_norm: PyTree) -> None:
  """Raises ValueError for clip norms that are invalid or missing."""
  leaves = jax.tree.leaves(l2_clip_norm)
  if not leaves:
    raise errors.ArgumentError(
      f"l2_clip_norm must hold a norm, got {l2_clip_norm!r}"
    )
  for norm in leaves:
    _validation.check("l2_clip_norm", norm, _NORM)


def whole(tree: PyTree, axes: frozenset[str]) -> None:
  """Raises ValueError for parameters that are divided without param_specs."""
  divided = varying_axes.varying_axes(tree) - axes
  if divided:
    raise errors.ArgumentError(
      "params must be whole on every device, or come with param_specs, but they"
      f" vary over the mesh axes {sorted(divided)}, along which the batch is"
      " not divided: norms would be of parts"
    )


def params(tree: PyTree) -> None:
  """Raises ValueError for parameters that are not floating arrays."""
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if not isinstance(leaf, _NUMBERS):
      raise errors.ArgumentError(
        "params must hold floating arrays alone, got a"
        f" {type(leaf).__name__} at params{jax.tree_util.keystr(path)}"
      )
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise errors.ArgumentError(
        "params must hold floating arrays alone, got dtype"
        f" {jnp.result_type(leaf)} at params{jax.tree_util.keystr(path)}: pass"
        " it as part of the batch, or let loss_fn close over it"
      )


def loss(block: Block, shape: Any, axes: frozenset[str]) -> None:
  """Raises ValueError for a loss that is no number or uses other examples."""
  if shape.shape or not jnp.issubdtype(shape.dtype, jnp.floating):
    raise errors.ArgumentError(
      "loss_fn must return one floating number for one example, got shape"
      f" {shape.shape} and dtype {shape.dtype}"
    )
  divided = axes | varying_axes.untold_axes(axes)
  collective = varying_axes.collective_over(block.jaxpr.jaxpr, divided)
  if collective is not None:
    raise errors.ArgumentError(
      "loss_fn must use one example alone, but it mixes the examples of several"
      f" devices by {collective} over the mesh axes {sorted(divided)}, along"
      " which the batch is divided"
    )
  of_loss = varying_axes.abstract_varying_axes(shape)
  if of_loss != axes:
    raise errors.ArgumentError(
      "loss_fn must use one example alone, but its value varies over the"
      f" mesh axes {sorted(of_loss)} while the batch varies over"
      f" {sorted(axes)}: it closes over data that should be"
      " passed in the batch, or depends on neither"
    )


def derivatives(
  block: Block, values: list[Any], num_params: int, axes: frozenset[str]
) -> None:
  """Raises ValueError for custom derivatives that use other examples.

  `values` are the inputs of the block, the loss of one example; its first
  num_params are the parameters. The batch is divided along `axes`.
  """
  closed = block.jaxpr
  if not any(program.calls(eqn, "custom_") for eqn in closed.jaxpr.eqns):
    return

  def loss(params: list[Any]) -> jax.Array:
    return core.jaxpr_as_fun(closed)(*params, *values[num_params:])[0]

  gradient = jax.make_jaxpr(jax.grad(loss))(values[:num_params])
  collective = varying_axes.collective_over(gradient.jaxpr, axes)
  if collective is not None:
    raise errors.ArgumentError(
      "loss_fn must use one example alone, but a derivative written by hand"
      f" mixes the gradients of several devices by {collective} over the mesh"
      f" axes {sorted(axes)}, along which the batch is divided"
    )


def randomness(jaxpr: Any) -> None:
  """Raises ValueError for random numbers that differ each time a loss runs.

  With them, norm and sum could be those of two different gradients.
  """
  if any(program.calls(eqn, "rng_uniform") for eqn in jaxpr.eqns):
    raise errors.ArgumentError(
      "loss_fn must draw its random numbers from its rng by jax.random, got"
      " jax.lax.rng_uniform, which draws others each time it is run"
    )


@contextlib.contextmanager
def effects(names: Sequence[str]) -> Iterator[None]:
  """Names the loss's effects in the error if running it fails."""
  try:
    yield
  except Exception as error:
    if not names:
      raise
    raise errors.ArgumentError(
      "loss_fn must have no effects but those that jax.vmap and jax.grad know"
      f" how to handle, got {list(names)}: {str(error).splitlines()[0]}"
    ) from error


def batch_size(batch: PyTree) -> int:
  shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
  sizes = {shape[0] if shape else None for shape in shapes}
  if len(sizes) != 1 or None in sizes or 0 in sizes:
    raise errors.ArgumentError(
      "batch must hold arrays with one common leading axis of at least 1, got"
      f" shapes {shapes}"
    )
  return shapes[0][0]


def padding(is_padding_example: Any, batch_size: int) -> jax.Array:
  """Returns the mask as an array [batch_size] of bool; all False for None."""
  if is_padding_example is None:
    return jnp.zeros((batch_size,), bool)
  if jnp.shape(is_padding_example) != (batch_size,):
    raise errors.ArgumentError(
      "is_padding_example must have one entry an example, shape"
      f" ({batch_size},), got {jnp.shape(is_padding_example)}"
    )
  return jnp.asarray(is_padding_example, bool)


def sharding(**arguments: PyTree) -> None:
  """Raises ValueError for arrays of examples that are known to be sharded.

  If anything with an axis over examples, even the padding mask, is sharded
  outside shard_map, XLA's partitioner computes convolutions with a kernel or a
  kernel's gradient for each example wrongly, without an error. On a mesh of
  Explicit axes, which `jax.make_mesh` makes, the type of a value says how it is
  sharded, inside a jit too. The arguments' names are shown in the message.
  """
  for name, leaf in _outside_shard_map(arguments):
    if varying_axes.is_divided_explicitly(leaf):
      _refuse(name, jax.typeof(leaf).sharding)
    if not isinstance(leaf, jax.core.Tracer):
      _refuse_sharding(name, getattr(leaf, "sharding", None))


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
  """Says that what is traced inside is compiled for one device.

  Then it is the same program whatever devices there are besides.
  """
  token = _is_alone.set(True)
  try:
    yield
  finally:
    _is_alone.reset(token)


def sharding_inside_jit(block: Block, **arguments: PyTree) -> None:
  """Does what `sharding` does where only the compiler knows the sharding."""
  if _is_alone.get() or jax.device_count() == 1 or not block.convolves():
    return
  for name, leaf in _outside_shard_map(arguments):
    if isinstance(leaf, jax.core.Tracer):
      jax.debug.inspect_array_sharding(
        leaf, callback=functools.partial(_refuse_sharding, name)
      )


def _outside_shard_map(arguments: PyTree) -> Iterator[tuple[str, Any]]:
  for name, tree in arguments.items():
    for leaf in jax.tree.leaves(tree):
      if not varying_axes.varying_axes(leaf):
        yield name, leaf


def _refuse_sharding(name: str, sharding: Any) -> None:
  if sharding is not None and not sharding.is_fully_replicated:
    _refuse(name, sharding)


def _refuse(name: str, sharding: Any) -> None:
  raise errors.ArgumentError(
    f"{name} is sharded outside jax.shard_map, where per-example gradients"
    " cannot be trusted: call clipped_grad inside jax.shard_map; got sharding"
    f" {sharding}"
  )


def per_example_keys(
  rng: jax.Array | None, batch_size: int, axes: frozenset[str]
) -> jax.Array | None:
  if rng is None:
    return None
  dtype = getattr(rng, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise errors.ArgumentError(
      "rng must be typed PRNG keys, as jax.random.wrap_key_data makes of random"
      f" words, got {f'dtype {dtype}' if dtype is not None else repr(rng)}"
    )
  if rng.shape == (batch_size,):
    return rng
  if rng.shape:
    raise errors.ArgumentError(
      f"rng must be one key or one an example, shape ({batch_size},), got"
      f" shape {rng.shape}"
    )
  divided = axes | varying_axes.untold_axes(axes)
  if divided and not varying_axes.varying_axes(rng):
    raise errors.ArgumentError(
      "rng is one key that is equal on every device, so that examples on"
      " different devices would share randomness: inside jax.shard_map pass"
      " one key an example"
    )
  return jax.random.split(rng, batch_size)
