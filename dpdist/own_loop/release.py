"""The programs of a release: clipped sums of chunks, and one draw of noise.

They are those of `dpdist.train`: a `dpdist.training.step.Step` whose optimizer
adds the noisy mean to zeros, which are made anew for each release.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import hmac
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from dpdist import clipping
from dpdist import errors
from dpdist.data import pipeline
from dpdist.data import users
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism as mechanism_lib
from dpdist.noise import noise
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rounding as rounding_lib
from dpdist.sensitivity import sentinel as sentinel_lib
from dpdist.tasks import per_unit
from dpdist.training import abstract_step
from dpdist.training import setup
from dpdist.training import step as step_lib
from dpdist.training import step_sentinel

PyTree = Any
Chunks = Sequence[pipeline.Chunk]

# What a loss is given beside its parameters, which no gradient is taken of.
_GIVEN = "given"


class Program:
  """What computes the gradients of one loss, for parameters of fixed shapes."""

  def __init__(
    self,
    loss: Callable[..., Any],
    plan: plan_lib.PrivacyPlan,
    mesh: Mesh,
    params: PyTree,
    given: PyTree,
    row: Mapping[str, jax.ShapeDtypeStruct],
    *,
    chunk_size: int,
    method: str,
    microbatch_size: int | None,
    is_watched: bool,
    is_of_units: bool = False,
  ):
    """Binds a loss to a plan, and runs it on zeros.

    So what fails for shapes or memory fails before a step begins. `row` has the
    shapes of an example, or with is_of_units of what `dpdist.data.users` reads
    of several that are clipped as one; the whole mesh computes chunk_size of
    them at once. With is_watched the sentinel watches steps.
    """
    self._mesh, self._row, self._chunk_size = mesh, dict(row), chunk_size
    self._has_schedule = len(plan.phases) > 1
    self._is_frozen = (
      None if given is None else lambda path: path.split("/")[0] == _GIVEN
    )
    of_row = _of_tree(loss)
    if is_of_units:
      of_row = per_unit.mean_over_unit(of_row, empty_slot=users.SLOT_IS_EMPTY)
    self._step = step_lib.Step(
      mechanism_lib.make(
        plan,
        of_row,
        method=method,
        microbatch_size=microbatch_size,
        frozen=self._is_frozen,
      ),
      optax.identity(),
      mesh,
    )
    self.shapes = _shapes((params, given))
    self.num_entries = sum(x.size for x in jax.tree.leaves(params))
    trained, frozen = self._parts(params, given)
    # Under a public key, and of no example.
    key = noise.as_key(setup.PUBLIC_KEY_DATA)
    zeros = pipeline.Chunk(
      *jax.tree.map(
        lambda x: np.zeros((len(self.local_rows), *x.shape), x.dtype),
        (self._row, jax.ShapeDtypeStruct((), np.bool_)),
      )
    )
    lowered = dict(
      self._lowered(trained, frozen, zeros, key, is_watched=is_watched)
    )
    # The digest of what is computed: of the programs, with their constants.
    self.sha256 = abstract_step.lowered_sha256(lowered.items())
    self._bound = abstract_step.bound(self._step, lowered)
    total = self._step.zeros(trained)
    for chunk in self._on_mesh([zeros, zeros]):
      total = self._bound.accumulate(
        *(trained, total, *chunk[1:], key, chunk[0], *_if_any(frozen))
      )
    jax.block_until_ready(self._applied(trained, total, key, 0, 0))

  @property
  def local_rows(self) -> np.ndarray:
    """Returns the rows of a chunk that this process has."""
    return mesh_lib.local_rows(self._mesh, self._chunk_size)

  def check(
    self,
    params: PyTree,
    given: PyTree,
    largest: Mapping[str, int],
    *,
    is_watched: bool,
  ) -> None:
    """Compares clipped sums of made-up examples with `jax.grad`.

    `largest` has public upper bounds of integers in an example. Raises
    SensitivityError; see `dpdist.sensitivity.sentinel`.
    """
    trained, frozen = self._parts(params, given)
    step_sentinel.check_step(
      self._bound,
      trained,
      frozen,
      row=self._row,
      largest=dict(largest),
      chunk_size=self._chunk_size,
      is_watched=is_watched,
    )

  def gradients(
    self,
    params: PyTree,
    given: PyTree,
    chunks: Chunks,
    streams: mechanism_lib.Streams,
    *,
    number: int,
    release_index: int,
    sentinel_every: int,
    first: int,
  ) -> tuple[PyTree, list[int]]:
    """Returns the noisy mean of clipped gradients, and what the sentinel found.

    It must have been charged, and committed to. `number` is that of the charged
    step, release_index its place among all under the plan, and `first` the
    number of the branch's first. What was found are numbers of parameters, see
    `fault`; if there are any, clipping did not bound an example.
    """
    trained, frozen = self._parts(params, given)
    sentinel = step_sentinel.Sentinel(
      self._bound, frozen, streams, every=sentinel_every, first_step=first
    )
    total = self._step.zeros(trained)
    sentinel.begin(number, trained)
    key = streams.key("model_rng", number)
    for first_row, batch, is_padding in self._on_mesh(chunks):
      total = sentinel.accumulate(
        trained, total, batch, is_padding, key, first_row
      )
    gradient = self._applied(
      trained, total, streams.key("noise"), number, release_index
    )
    jax.block_until_ready(gradient)
    return gradient, sentinel.end()

  def rounding(self) -> rounding_lib.Bound:
    """Returns what float rounding can add to the sensitivity."""
    shards = mesh_lib.num_example_shards(self._mesh)
    rows = self._chunk_size // shards
    mechanism = self._step.mechanism
    return rounding_lib.bound(
      mechanism.plan,
      microbatch_size=min(rows, mechanism.clipped_grad.microbatch_size or rows),
      rows_per_device=rows,
      num_entries=self.num_entries,
      num_devices=shards,
      num_sharing=1,
      is_cut=self._mesh.devices.flat[0].platform != "cpu",
      is_exact=False,
    )

  def fault(self, params: PyTree, given: PyTree, found: list[int]) -> str:
    """Describes what the sentinel found. Not to be released."""
    clipped_grad = self._step.mechanism.clipped_grad
    return sentinel_lib.fault(
      clipped_grad, _tree(params, given), self._row, found
    )

  def _parts(self, params: PyTree, given: PyTree) -> tuple[PyTree, PyTree]:
    tree = _tree(params, given)
    if self._is_frozen is None:
      return tree, None
    parts: tuple[PyTree, PyTree] = clipping.partition(tree, self._is_frozen)
    return parts

  def _on_mesh(self, chunks: Chunks) -> Iterator[tuple[int, PyTree, jax.Array]]:
    put = lambda x: mesh_lib.put_rows(x, self._chunk_size, self._mesh)
    for i, chunk in enumerate(chunks):
      batch, is_padding = jax.tree.map(put, tuple(chunk))
      yield i * self._chunk_size, batch, is_padding

  def _applied(
    self,
    trained: PyTree,
    total: step_lib.Accumulator,
    key: jax.Array,
    number: int,
    release_index: int,
  ) -> PyTree:
    """Returns the noisy mean, from all sums of a release."""
    after, _ = self._bound.apply(
      *self._arguments(trained, total, key, number, release_index)
    )
    return after.params["params"]

  def _arguments(
    self,
    trained: PyTree,
    total: step_lib.Accumulator,
    key: jax.Array,
    number: int,
    release_index: int,
  ) -> tuple[Any, ...]:
    state = self._zero_state(_shapes(trained), np.int32(number))
    more = [np.int32(release_index)] if self._has_schedule else []
    return (state, total, key, *more)

  @functools.cached_property
  def _zero_state(self) -> Callable[..., step_lib.TrainState]:
    """Returns the compiled (shapes, number of draws) -> a state of zeros."""

    def make(shapes: Any, draws: jax.Array) -> step_lib.TrainState:
      leaves = [
        jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
        for shape, dtype in shapes[1]
      ]
      params = jax.tree.unflatten(shapes[0], leaves)
      state = self._step.initial(params)
      return state._replace(
        noise_state=self._step.mechanism.state_at(params, draws)
      )

    replicated = mesh_lib.replicated(self._mesh)
    return jax.jit(make, static_argnums=0, out_shardings=replicated)

  def _lowered(
    self,
    trained: PyTree,
    frozen: PyTree,
    chunk: pipeline.Chunk,
    key: jax.Array,
    *,
    is_watched: bool,
  ) -> Iterator[tuple[str, jax.stages.Lowered]]:
    accumulate: Any = self._step.accumulate
    apply: Any = self._step.apply
    total = self._step.zeros(trained)
    _, batch, is_padding = next(self._on_mesh([chunk]))
    given = (trained, total, batch, is_padding, key, 0)
    yield "chunk", accumulate.lower(*given, *_if_any(frozen))
    if is_watched:  # Along a direction like the parameters.
      yield "watched chunk", accumulate.lower(*given, frozen, trained)
    yield "update", apply.lower(*self._arguments(trained, total, key, 0, 0))


def replicated(tree: PyTree, mesh: Mesh) -> PyTree:
  """Puts arrays on every device of the mesh, if they are not there yet."""
  sharding = mesh_lib.replicated(mesh)

  def put(x: Any) -> jax.Array:
    if isinstance(x, jax.Array):
      if x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
      # Of several processes' devices, but laid out in another way.
      x = x if x.is_fully_addressable else np.asarray(x)
    copied: jax.Array = mesh_lib.replicate(jnp.asarray(x), mesh)
    return copied

  return jax.tree.map(put, tree)


def check_shapes(program: Program, params: PyTree, given: PyTree) -> None:
  """Raises ArgumentError if a loss is given other shapes than at first."""
  if _shapes((params, given)) != program.shapes:
    raise errors.ArgumentError(
      "params and given must keep their structure, shapes and dtypes from step"
      " to step, got others than at first"
    )


def digest(key: bytes, facts: Sequence[str], *trees: PyTree) -> str:
  """Returns the keyed digest of texts and of arrays, hex."""
  mac = hmac.new(key, digestmod="sha256")
  for text in facts:
    mac.update(f"{len(text)} {text}\0".encode())
  for tree in trees:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    mac.update(f"{len(leaves)}\0".encode())
    for path, leaf in leaves:
      array = np.ascontiguousarray(mesh_lib.whole(leaf))
      name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\0"
      mac.update(name.encode())
      mac.update(array.tobytes())
  return mac.hexdigest()


def _of_tree(loss: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the loss of what `_tree` makes."""

  def of_tree(tree: PyTree, example: Any, rng: jax.Array) -> tuple[Any, None]:
    more = [tree["given"]] if "given" in tree else []
    value = loss(tree["params"], example, rng, *more)
    # What it returns besides is computed from one private example.
    return (value[0] if isinstance(value, tuple) else value), None

  return of_tree


def _tree(params: PyTree, given: PyTree) -> PyTree:
  return {"params": params} | ({} if given is None else {"given": given})


def _if_any(frozen: PyTree) -> list[PyTree]:
  return [] if frozen is None else [frozen]


def _shapes(tree: PyTree) -> tuple[Any, tuple[Any, ...]]:
  leaves, structure = jax.tree.flatten(tree)
  return structure, tuple((x.shape, np.dtype(x.dtype)) for x in leaves)
