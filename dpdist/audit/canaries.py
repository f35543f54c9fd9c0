"""Runs the step on canaries, and records what an attacker sees of them.

The step is the config's own: its mechanism, clipping, mesh, chunks and sampler,
compiled as they are for training. Its data are canaries: units whose gradient
is far longer than the clip norm, in a direction that the attacker knows. All
other units have zero gradients, and the parameters stay the same: the attacker
may choose both, and these choices make the attack easiest (Nasr et al. 2021,
arXiv:2101.04535, "gradient canaries"). A coin of its own decides whether a
canary is in the data. The attacker sees every noisy mean that is released.
"""

from collections.abc import Callable, Iterator
import dataclasses
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from dpdist import _validation
from dpdist import clipping
from dpdist import config as config_lib
from dpdist.audit import games
from dpdist.data import pipeline
from dpdist.distributed import mesh as mesh_lib
from dpdist.keys import keys
from dpdist.mechanism import mechanism
from dpdist.privacy import plan as plan_lib
from dpdist.tasks import parts as parts_lib
from dpdist.training import abstract_step
from dpdist.training import parameters
from dpdist.training import setup
from dpdist.training import step as step_lib

PyTree = Any

# The fields that a unit of the audit has besides its arrays: a factor of the
# model's loss, a factor of the parameters' entry that is the canary's, and the
# entry's index.
_FACTOR, _PULL, _ENTRY = "audit_factor", "audit_pull", "audit_entry"
# The norm of a canary's gradient, in clip norms. Large, so that a clip that
# leaves a part of it is detected.
_LENGTH = 100.0


class Program(NamedTuple):
  """The step that is audited."""

  # What the config trains, with the numbers that are claimed.
  experiment: setup.Experiment
  # The config's, except that its loss can be a canary's, and that its state
  # keeps the released mean instead of an optimizer's state.
  step: step_lib.Step
  state: step_lib.TrainState  # Before the first step.
  unit: dict[str, np.ndarray]  # One unit, NumPy arrays.
  # Of the unit's own gradient, of norm 1, if that is the canary; None if a
  # canary is an entry of the parameters.
  direction: PyTree | None = None
  length: float = 1.0  # The norm of that gradient.
  frozen: PyTree | None = None  # Parameters that no canary can pull on.

  @property
  def plan(self) -> plan_lib.PrivacyPlan:
    """Returns the numbers."""
    return self.experiment.plan

  @property
  def num_entries(self) -> int:
    """Returns how many numbers the trained parameters are."""
    return sum(x.size for x in jax.tree.leaves(self.state.params))


class Observed(NamedTuple):
  """What an attacker saw of canaries, separately for each run and canary."""

  # [n, steps] float64, the noisy sums in the canary's direction, in units of
  # the distance between the sums with and without it.
  sums: np.ndarray
  is_in: np.ndarray  # [n] bool, the coins.


def prepare(
  config: ml_collections.ConfigDict,
  *,
  canary: str = "entry",
  parts: parts_lib.Parts = parts_lib.NAMED,
) -> Program:
  """Makes a config's step on all devices, for canaries."""
  _validation.check("canary", canary, _validation.one_of(games.CANARIES))
  plan = plan_lib.make_plan(config_lib.privacy_config(config))
  users = plan.examples_per_user
  _validation.require(
    users == 1, "privacy.examples_per_user", "1 for an audit", users
  )
  experiment = setup.build(config, plan=plan, parts=parts)
  step, task = experiment.step, experiment.task
  clipped_grad = step.mechanism.clipped_grad
  step = dataclasses.replace(
    step,
    mechanism=dataclasses.replace(
      step.mechanism,
      clipped_grad=dataclasses.replace(
        clipped_grad,
        loss_fn=_canary_loss(clipped_grad, has_entry=canary == "entry"),
      ),
    ),
    optimizer=recording(),
    ema_decay=0.0,
  )
  example = abstract_step.example(experiment)
  unit = abstract_step.unit(config, example)
  rng = np.random.default_rng(0)
  largest = experiment.largest_integers(example)
  filled = lambda shapes: {
    name: _random(rng, largest.get(name, 0) + 1, x)
    for name, x in shapes.items()
  }
  key_data = keys.key_data(keys.insecure_secret(0))
  start = parameters.of(task, key_data, example)
  program = Program(
    experiment,
    step,
    start.init(step),
    filled(unit),
    frozen=start.frozen(step),
  )
  return _with_direction(program) if canary == "example" else program


def _random(rng: np.random.Generator, most: int, x: Any) -> np.ndarray:
  if np.issubdtype(x.dtype, np.floating):
    return rng.normal(size=x.shape).astype(x.dtype)
  if x.dtype == np.bool_:
    return np.zeros(x.shape, np.bool_)  # No slot of a user is empty.
  return rng.integers(0, most, x.shape).astype(x.dtype)


def _canary_loss(
  clipped_grad: clipping.ClippedGrad, *, has_entry: bool
) -> Callable[..., Any]:
  """Returns the loss times a unit's factor, plus its pull on one entry."""

  def loss(
    params: PyTree, unit: dict[str, jax.Array], rng: jax.Array
  ) -> tuple[jax.Array, Any]:
    unit = dict(unit)
    factor, pull = unit.pop(_FACTOR), unit.pop(_PULL)
    index = unit.pop(_ENTRY)
    value, aux = clipped_grad.loss_fn(params, unit, rng)
    value = factor * value
    if has_entry:
      trained, _ = clipping.partition(params, clipped_grad.frozen)
      value += pull * _entry(trained, index)
    return value, aux

  return loss


def _entry(params: PyTree, index: jax.Array) -> jax.Array:
  """Returns one entry of all parameters, in their order."""
  value = jnp.zeros(())
  for leaf in jax.tree.leaves(params):
    is_here = (index >= 0) & (index < leaf.size)
    # Not by indexing, which would send the parameters if they are divided.
    chosen = jnp.arange(leaf.size) == jnp.where(is_here, index, -1)
    value += jnp.sum(
      jnp.where(chosen.reshape(leaf.shape), leaf, 0), dtype=jnp.float32
    )
    index = index - leaf.size
  return value


def recording() -> optax.GradientTransformation:
  """Keeps the updates that it gets, and leaves the parameters unchanged."""

  def init(params: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, params)

  def update(
    updates: PyTree, state: PyTree, params: PyTree = None
  ) -> tuple[PyTree, PyTree]:
    del params
    zeros = jax.tree.map(jnp.zeros_like, updates)
    return zeros, jax.tree.map(lambda x, y: x.astype(y.dtype), updates, state)

  return optax.GradientTransformation(init, update)


# The attack.


@dataclasses.dataclass(frozen=True)
class _Units:
  """The data of one run: all units, canaries among them."""

  unit: dict[str, np.ndarray]  # The arrays of every unit.
  factors: np.ndarray  # [units] float32.
  pulls: np.ndarray  # [units] float32.
  entries: np.ndarray  # [units] int32, -1 for units that are no canary.

  def __len__(self) -> int:
    return len(self.entries)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """See `dpdist.data.sources.Source`."""
    rows = {
      name: np.broadcast_to(x, (len(indices), *x.shape))
      for name, x in self.unit.items()
    }
    return rows | {
      _FACTOR: self.factors[indices],
      _PULL: self.pulls[indices],
      _ENTRY: self.entries[indices],
    }

  def content_digest(self) -> str:
    """Returns "": there is no content to identify."""
    return ""


def observe(
  program: Program,
  *,
  num_runs: int,
  num_canaries: int,
  num_steps: int,
  seed: int | None,
) -> Observed:
  """Runs the step on canaries, with a new secret for each run.

  Each run has `num_canaries`, on entries of their own.
  """
  plan = program.plan
  rng = np.random.default_rng(seed)
  look, places = _looker(program), worlds(plan)
  # One of the two is a clip norm away from 0, or both are.
  size = plan.l2_clip_norm / max(map(abs, places))
  sums = np.zeros((num_runs, num_canaries, num_steps))
  is_in = np.zeros((num_runs, num_canaries), bool)
  for run in range(num_runs):
    units = rng.choice(plan.num_units, num_canaries, replace=False)
    entries = rng.choice(program.num_entries, num_canaries, replace=False)
    is_in[run] = rng.integers(0, 2, num_canaries).astype(bool)
    pulls = np.zeros(plan.num_units, np.float32)
    # Times the sign of the sum in each case: the gradient is clipped anyway.
    signs = np.sign(np.where(is_in[run], places[1], places[0]))
    pulls[units] = _LENGTH * plan.l2_clip_norm * signs
    where = np.full(plan.num_units, -1, np.int32)
    where[units] = entries
    # One of the two is the canary's, and the other is 0.
    is_entry = program.direction is None
    factors = np.zeros_like(pulls) if is_entry else pulls / program.length
    data_of_run = _Units(program.unit, factors, pulls, where)
    secret = (
      os.urandom(keys.SECRET_BYTES)
      if seed is None
      else keys.insecure_secret(seed * 2**32 + run)
    )
    released = _releases(program, data_of_run, secret, num_steps)
    sums[run] = np.stack(
      [look(mean, entries) * batch / size for mean, batch in released], axis=-1
    )
  return Observed(sums.reshape(-1, num_steps), is_in.reshape(-1))


def worlds(plan: plan_lib.PrivacyPlan) -> tuple[float, float]:
  """Returns where a drawn canary puts the sum if it is out, and if it is in.

  Both are multiples of the distance between the two.
  """
  is_replaced = plan.neighboring_relation == "replace_one"
  return (-0.5, 0.5) if is_replaced else (0.0, 1.0)


def _looker(program: Program) -> Callable[[PyTree, np.ndarray], np.ndarray]:
  """Returns the canaries' components of a released mean, float64 [canaries]."""

  def look(mean: PyTree, entries: jax.Array) -> jax.Array:
    if program.direction is not None:
      return optax.tree.vdot(mean, program.direction)[None]
    leaves = [x.reshape(-1) for x in jax.tree.leaves(mean)]
    return jnp.concatenate(leaves)[entries]

  compiled = jax.jit(look, out_shardings=mesh_lib.replicated(program.step.mesh))
  return lambda mean, entries: np.asarray(compiled(mean, entries), np.float64)


def _with_direction(program: Program) -> Program:
  """Sets the direction to the unit's gradient, by JAX alone, unclipped."""
  unit: dict[str, Any] = {k: jnp.asarray(x) for k, x in program.unit.items()}
  unit |= {_FACTOR: jnp.ones(()), _PULL: jnp.zeros(()), _ENTRY: jnp.array(-1)}
  loss_fn = program.step.mechanism.clipped_grad.loss_fn
  gradient = jax.jit(
    jax.grad(
      lambda params, frozen: loss_fn(
        step_lib.whole(params, frozen), unit, jax.random.key(0)
      )[0]
    )
  )(program.state.params, program.frozen)
  length = float(optax.tree.norm(gradient))
  if not 0 < length < np.inf:
    raise ValueError(
      "canary must be 'entry' where a random example's gradient has no length,"
      f" got 'example' with a gradient of length {length}"
    )
  direction = jax.tree.map(lambda x: x / length, gradient)
  return program._replace(direction=direction, length=length)


def _releases(
  program: Program, units: _Units, secret: bytes, num_steps: int
) -> Iterator[tuple[PyTree, float]]:
  """Yields each step's release, and the number it was divided by."""
  plan, step = program.plan, program.step
  chunk_size = program.experiment.chunk_size
  data = program.experiment.config.data
  streams = mechanism.Streams(secret, "audit")
  noise_key = streams.key("noise")
  put = lambda rows: mesh_lib.put_rows(rows, chunk_size, step.mesh)
  # A copy, since steps reuse the memory of the state that they get.
  state = jax.tree.map(jnp.copy, program.state)
  for t, chunks in pipeline.steps(
    units,
    streams.sampler(plan),
    start_step=0,
    num_steps=num_steps,
    chunk_size=chunk_size,
    rows=mesh_lib.local_rows(step.mesh, chunk_size),
    num_threads=data.num_threads,
    prefetch=data.prefetch,
  ):
    accumulator = step.begin(state)
    key = streams.key("model_rng", t)
    for i, chunk in enumerate(chunks):
      batch, is_padding_example = jax.tree.map(put, tuple(chunk))
      accumulator = step.accumulate(
        state.params,
        accumulator,
        batch,
        is_padding_example,
        key,
        i * chunk_size,
        program.frozen,
      )
    release_index = [np.int32(t)] if len(plan.phases) > 1 else []
    state, _ = step.apply(state, accumulator, noise_key, *release_index)
    batch_size = plan.phase(t).expected_batch_size / plan.group_size
    yield state.opt_state, batch_size
