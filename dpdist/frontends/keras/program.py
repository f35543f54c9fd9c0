"""The step of a Keras fit: the one of `dpdist.train`, of a Keras model.

The model's variables become the parameters of a `dpdist.training.step.Step`:
those that are trained, and frozen ones. Its optimizer applies the noisy mean.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from dpdist import clipping
from dpdist.clipping import freezing
from dpdist.data import sources
from dpdist.data import users
from dpdist.distributed import mesh as mesh_lib
from dpdist.frontends import keras_loss
from dpdist.mechanism import mechanism as mechanism_lib
from dpdist.mechanism import outside_code
from dpdist.noise import noise
from dpdist.privacy import plan as plan_lib
from dpdist.tasks import per_unit
from dpdist.training import abstract_step
from dpdist.training import step as step_lib
from dpdist.training import step_sentinel
from dpdist.workdir import fingerprint

PyTree = Any

_TRAINED, _FROZEN = "trainable", "non_trainable"
_PUBLIC_KEY = np.zeros(2, np.uint32)


class Program:
  """The compiled functions of a fit, and the state between model and mesh."""

  def __init__(
    self,
    model: Any,
    plan: plan_lib.PrivacyPlan,
    source: sources.Source,
    join: Callable[[Mapping[str, Any]], tuple[PyTree, ...]],
    *,
    mesh: Mesh,
    chunk_size: int,
    options: Mapping[str, Any],
  ):
    """Makes the functions; nothing is compiled yet.

    `source` has the rows, which are units if it is of users or groups, and
    `join` makes an example of a row. Options are those of
    `dpdist.clipped_grad`.
    """
    self.model, self.mesh, self.chunk_size = model, mesh, chunk_size
    self.has_schedule = len(plan.phases) > 1
    self.row = {
      name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
      for name, x in source.read(np.zeros(1, np.int64)).items()
    }
    self._state_variables = [
      v for v in model.non_trainable_variables if not keras_loss.is_seed(v)
    ]
    loss = self._loss(join)
    if isinstance(source, users.UserSource):
      loss = per_unit.mean_over_unit(loss, empty_slot=users.SLOT_IS_EMPTY)
    self._is_frozen = _is_frozen if self._state_variables else None
    clipped_grad = clipping.clipped_grad(
      loss, has_aux=True, frozen=self._is_frozen, **options
    )
    self.step = step_lib.Step(
      mechanism_lib.of(plan, clipped_grad),
      self._optimizer(),
      mesh,
      # The optimizer returns the parameters themselves: it may constrain them.
      apply_updates=lambda params, updated: updated,
    )
    # That which runs, with the programs that were digested; see `rehearse`.
    self.bound = self.step

  def _loss(
    self, join: Callable[[Mapping[str, Any]], tuple[PyTree, ...]]
  ) -> Callable[..., tuple[jax.Array, None]]:
    model = self.model

    def loss(
      params: PyTree, row: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, None]:
      frozen = iter(params.get(_FROZEN, {}).values())
      # Seeds are replaced by those of the example.
      state = [
        v.value if keras_loss.is_seed(v) else next(frozen)
        for v in model.non_trainable_variables
      ]
      of_one = keras_loss.per_example_loss(model, state)
      return of_one(list(params[_TRAINED].values()), join(row), rng), None

    return loss

  def _optimizer(self) -> optax.GradientTransformation:
    optimizer = self.model.optimizer

    def init(params: PyTree) -> list[jax.Array]:
      del params  # Keras has built it.
      return [v.value for v in optimizer.variables]

    def update(
      gradient: PyTree, state: list[jax.Array], params: PyTree
    ) -> tuple[PyTree, list[jax.Array]]:
      before = params[_TRAINED]
      after, state = optimizer.stateless_apply(
        state, list(gradient[_TRAINED].values()), list(before.values())
      )
      named = OrderedDict(zip(before, after, strict=True))
      return {**params, _TRAINED: named}, state

    return optax.GradientTransformation(init, update)

  def state(self, num_updates: int) -> step_lib.TrainState:
    """Returns a copy of the model's state on the mesh, after some updates."""
    params, _ = self._params()
    made = self.step.initial(params)
    made = made._replace(
      step=jnp.int32(num_updates),
      noise_state=self.step.mechanism.state_at(params, jnp.int32(num_updates)),
    )
    return self._placed(made)

  def _placed(self, state: step_lib.TrainState) -> step_lib.TrainState:
    # Copies: the step reuses their memory.
    copy = jax.tree.map(jnp.copy, state)
    return mesh_lib.place(copy, self.step.state_specs(copy), self.mesh)

  def frozen(self) -> PyTree | None:
    """Returns the variables that are not trained; None if there are none."""
    frozen = self._params()[1]
    # A copy: Keras gives the memory of the model's away when it evaluates.
    copy = jax.tree.map(jnp.copy, frozen)
    return None if frozen is None else self.step.placed(copy)

  def _params(self) -> tuple[PyTree, PyTree | None]:
    trained = {_TRAINED: _named(self.model.trainable_variables)}
    if self._is_frozen is None:
      return trained, None
    whole = trained | {_FROZEN: _named(self._state_variables)}
    params, frozen = freezing.partition(whole, self._is_frozen)
    return params, frozen

  def assign(self, state: step_lib.TrainState) -> None:
    """Gives the model a copy of a state."""
    for variables, values in (
      (self.model.trainable_variables, state.params[_TRAINED].values()),
      (self.model.optimizer.variables, state.opt_state),
    ):
      for variable, value in zip(variables, values, strict=True):
        variable.assign(jnp.copy(value.addressable_data(0)))

  def put(self, x: np.ndarray) -> jax.Array:
    """Puts the rows of a chunk on the mesh."""
    return mesh_lib.put_rows(x, self.chunk_size, self.mesh)

  def rehearse(self, is_watched: bool) -> str:
    """Makes a step of zeros, so that failures come before a charge.

    The programs of `bound` are those of the digest, from then on.
    Returns the digest of what the step computes; "" if its code calls back into
    Python, where no digest tells what is computed.
    """
    state, frozen = self.state(0), self.frozen()
    key = noise.as_key(_PUBLIC_KEY)
    zeros = jax.tree.map(
      lambda x: self.put(np.zeros((self.chunk_size, *x.shape), x.dtype)),
      (self.row, jax.ShapeDtypeStruct((), np.bool_)),
    )
    more = [] if frozen is None else [frozen]
    accumulator = self.step.begin(state)
    accumulate: Any = self.step.accumulate
    apply: Any = self.step.apply
    release = [np.int32(0)] if self.has_schedule else []

    def programs() -> Iterator[tuple[str, jax.stages.Lowered]]:
      given = (state.params, accumulator, *zeros, key, 0)
      yield "chunk", accumulate.lower(*given, *more)
      if is_watched:
        along = step_sentinel.drawer(self.step)(state.params, key)
        watched = accumulate.lower(*given, frozen, along)
        yield "watched chunk", watched
      yield "update", apply.lower(state, accumulator, key, *release)

    lowered = dict(programs())
    digest = _digest(lowered.items())
    self.bound = abstract_step.bound(self.step, lowered)
    for first_row in (0, self.chunk_size):  # A draw may need more than one.
      accumulator = self.bound.accumulate(
        state.params, accumulator, *zeros, key, first_row, *more
      )
    jax.block_until_ready(self.bound.apply(state, accumulator, key, *release))
    return digest

  def check_sensitivity(
    self, largest: Mapping[str, int], *, is_watched: bool
  ) -> None:
    """Holds the sums of made-up examples against `jax.grad`.

    Raises SensitivityError, which names what is wrong, the parameter and its
    rule.
    """
    step_sentinel.check_step(
      self.bound,
      self.state(0).params,
      self.frozen(),
      row=self.row,
      largest={name: largest.get(name, 1) for name in self.row},
      chunk_size=self.chunk_size,
      is_watched=is_watched,
    )

  def fingerprint(
    self, source: sources.Source, digest: str, numbers: Mapping[str, Any]
  ) -> str | None:
    """Returns the fingerprint of what decides a step's bits, beside the state.

    The digest is what `rehearse` returned. None if no fingerprint can tell:
    every session then has keys of its own.
    """
    if not digest:
      return None
    fingerprint.check_code()
    plan = self.step.mechanism.plan
    return fingerprint.fingerprint(
      {
        "keras": {**numbers, "chunk_size": self.chunk_size},
        "clipping": {"exact_sum": False},
        "data": {},
        "model": {},
      },
      plan.fingerprint(),
      source.content_digest(),
      [fingerprint.environment(self.mesh)],
      {
        "encoding_sha256": sources.encoding_digest(source),
        "lowered_sha256": digest,
        "mechanism_code_sha256": outside_code.sha256(plan),
      },
    )


def _digest(programs: Iterable[tuple[str, jax.stages.Lowered]]) -> str:
  try:
    return abstract_step.lowered_sha256(programs)
  except ValueError:
    return ""


def _is_frozen(path: str) -> bool:
  return path.split("/")[0] == _FROZEN


def _named(variables: Sequence[Any]) -> OrderedDict[str, jax.Array]:
  """Returns values by path, in the order of the model."""
  named: OrderedDict[str, jax.Array] = OrderedDict()
  for variable in variables:
    name, number = variable.path, 1
    while name in named:
      number += 1
      name = f"{variable.path}#{number}"
    named[name] = variable.value
  return named


def values(model: Any) -> dict[str, list[jax.Array]]:
  """Returns what a checkpoint of a model holds; it is released."""
  state = {
    "trainable": [v.value for v in model.trainable_variables],
    "non_trainable": [v.value for v in model.non_trainable_variables],
    "optimizer": [v.value for v in model.optimizer.variables],
  }
  # An empty list would be no part of a checkpoint's tree.
  return {name: found for name, found in state.items() if found}


def restore(model: Any, state: Mapping[str, list[jax.Array]]) -> None:
  """Gives a model what `values` returned."""
  for variables, found in (
    (model.trainable_variables, state.get("trainable", [])),
    (model.non_trainable_variables, state.get("non_trainable", [])),
    (model.optimizer.variables, state.get("optimizer", [])),
  ):
    for variable, value in zip(variables, found, strict=True):
      variable.assign(value)


class Kept:
  """What a model's state is at some time, by its digest.

  Keras gives the memory of arrays away when it evaluates. The seeds of a
  model's layers do not count: each example has its own.
  """

  def __init__(self, model: Any):
    """Takes note of the state."""
    self._model = model
    self._arrays = self._now()
    self._digest = fingerprint.params_sha256(self._arrays)

  def _now(self) -> list[jax.Array]:
    variables = [
      *self._model.trainable_variables,
      *self._model.non_trainable_variables,
      *self._model.optimizer.variables,
    ]
    return [v.value for v in variables if not keras_loss.is_seed(v)]

  def change(self) -> str:
    """Returns the digest of the state if a bit is not as it was, else ""."""
    now = self._now()
    if len(now) == len(self._arrays) and all(
      a is b for a, b in zip(now, self._arrays, strict=True)
    ):
      return ""
    digest = fingerprint.params_sha256(now)
    return "" if digest == self._digest else digest

  @property
  def digest(self) -> str:
    """Returns the digest of the state then."""
    return self._digest
