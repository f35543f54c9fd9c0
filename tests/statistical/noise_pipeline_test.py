"""The sensitivity of the whole pipeline, by search for the worst neighbours.

What is searched is the clipped sum as `Step.accumulate` and `Step.apply` of a
mesh compile it, read where an optimizer would get it. Neighbours may differ in
one row that is anything: huge, tiny, infinite, no number, or padding. The
parameters are the attacker's too. Never may the sum move further than is
stated, but for the rounding of float32, `_ROOM`; and the search must come
within 2 % of it, so that it is known to look in the right places.

Seeds are fixed and the search is deterministic.
tests/training/multidevice_test.py holds the same sum against closed forms.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist.audit import canaries
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism
from dpdist.noise import noise
from dpdist.training import step as step_lib

pytestmark = pytest.mark.usefixtures("quick_compiles")

_CLIP, _ROWS, _BATCH = 0.5, 16, 8
_ROOM = 1 + 1e-5
_BITE = 0.98
_TRIES, _CLIMBS = 80, 24
_RELATIONS = ("replace_one", "add_or_remove_one", "zero_out")
_MESHES = {"8": (8, 1, 1), "8, fsdp": (2, 4, 1)}
_VALUES = (0.0, -0.0, 1e-45, 1e-38, 1e-20, 1e-3, 1.0, 1e3, 1e10, 1e18, 1e19)
_VALUES += (1e30, 3.4e38, np.inf, -np.inf, np.nan)


class _Net(nn.Module):
  """A convolution, a normalisation, and dense layers with a tied weight."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3))(x[..., None]).reshape(-1)
    dense = nn.Dense(16, kernel_init=nn.initializers.normal(0.3))
    x = nn.tanh(nn.LayerNorm()(nn.Dense(16)(x)))
    return nn.Dense(2)(dense(nn.tanh(dense(x))))


def _net_loss(params, row, rng):
  del rng
  out = _Net().apply({"params": params}, row["x"])
  return jnp.mean((out - row["y"]) ** 2), None


def _linear_loss(params, row, rng):
  del rng
  return jnp.dot(params["w"], row["x"].ravel()) * row["y"][0], None


_LOSSES = {"net": _net_loss, "linear": _linear_loss}


def _row(rng):
  return {
    "x": rng.normal(size=(6, 6)).astype(np.float32),
    "y": rng.normal(size=2).astype(np.float32),
  }


def _mechanism(loss, relation):
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=1000,
      expected_batch_size=_BATCH,
      num_steps=10,
      l2_clip_norm=_CLIP,
      target_delta=1e-5,
      noise_multiplier=1.0,
      neighboring_relation=relation,
    )
  )
  return mechanism.make(plan, _LOSSES[loss])


def _sensitivity(relation):
  """What the noise that would be drawn is for."""
  bound = _mechanism("linear", relation)
  return bound.noise_stddev / bound.plan.noise_multiplier


class _Pipeline:
  """The clipped sum of a step without noise."""

  def __init__(self, loss, mesh_name):
    bound = _mechanism(loss, "add_or_remove_one")
    mesh = mesh_lib.make(
      dict(zip(mesh_lib.AXES, _MESHES[mesh_name], strict=True))
    )
    self._step = step_lib.Step(
      dataclasses.replace(bound, noise_stddev=0.0), canaries.recording(), mesh
    )
    example = {
      name: jnp.asarray(x) for name, x in _row(np.random.default_rng(0)).items()
    }
    params = {"w": jnp.zeros(36)}
    if loss == "net":
      params = _Net().init(jax.random.key(1), example["x"])["params"]
    self._state = self._step.init(params)
    self._key = noise.as_key(np.zeros(2, np.uint32))

  def __call__(self, rows, is_padding_example):
    step = self._step
    put = lambda x: jax.device_put(x, mesh_lib.examples(step.mesh))
    state = jax.tree.map(jnp.copy, self._state)
    batch = {
      name: put(np.stack([row[name] for row in rows])) for name in ("x", "y")
    }
    accumulator = step.accumulate(
      state.params,
      step.zeros(state.params),
      batch,
      put(np.asarray(is_padding_example)),
      self._key,
      0,
    )
    state, _ = step.apply(state, accumulator, self._key)
    leaves = [np.asarray(x).ravel() for x in jax.tree.leaves(state.opt_state)]
    return np.concatenate(leaves).astype(np.float64) * _BATCH


def _wild(rng):
  """A row with some entries, or all of them, that no data should have."""
  row = _row(rng)
  for x in row.values():
    kind = rng.integers(4)
    if kind == 0:
      x *= np.float32(rng.choice(_VALUES))
    elif kind == 1:
      x.flat[rng.integers(x.size)] = rng.choice(_VALUES)
    elif kind == 2:
      x[...] = rng.choice(_VALUES, x.shape)
  return row


def _pair(rng):
  """Two wild rows, or two that pull in opposite directions."""
  one, other = _wild(rng), _wild(rng)
  if rng.integers(2):
    factor = np.float32(rng.choice(_VALUES))
    one = {"x": _row(rng)["x"], "y": factor * _row(rng)["y"]}
    other = {"x": one["x"], "y": -one["y"]}
  return one, other


def _near(rng, pair, size):
  """A pair not far from a pair."""
  return tuple(
    {name: row[name] + size * x for name, x in _row(rng).items()}
    for row in pair
  )


@pytest.mark.parametrize(
  ("loss", "mesh_name"),
  [
    ("linear", "8, fsdp"),
    *(
      pytest.param(loss, name, marks=pytest.mark.slow)
      for loss, name in (("net", "8"), ("net", "8, fsdp"), ("linear", "8"))
    ),
  ],
)
@np.errstate(over="ignore", invalid="ignore")
def test_no_neighbours_are_further_apart_than_stated(loss, mesh_name):
  pipeline, rng = _Pipeline(loss, mesh_name), np.random.default_rng(5)
  others = [_wild(rng) if i % 3 else _row(rng) for i in range(_ROWS)]
  padding = np.arange(_ROWS) % 5 == 0
  stated = {name: _sensitivity(name) for name in _RELATIONS}
  furthest: dict = dict.fromkeys(_RELATIONS, (0.0, None))
  num_moved = 0

  def total(place, row, is_out):
    rows = [*others[:place], row, *others[place + 1 :]]
    without = padding.copy()
    without[place] = is_out
    found = pipeline(rows, without)
    assert np.all(np.isfinite(found))
    return found

  for i in range(_TRIES + _CLIMBS):
    place = i % _ROWS  # Every device has its turn.
    pair = _pair(rng)
    if i >= _TRIES:
      # Uphill, by steps that grow and shrink in turn.
      best = furthest[_RELATIONS[i % len(_RELATIONS)]][1]
      pair = _near(rng, best, np.float32(2.0 ** -(i // 3 % 6)))
    one, other = (total(place, row, False) for row in pair)
    out = total(place, pair[i % 2], True)
    exchanged = np.linalg.norm(one - other)
    added = max(np.linalg.norm(one - out), np.linalg.norm(other - out))
    num_moved += exchanged > 0
    for name in _RELATIONS:
      distance = exchanged if name == "replace_one" else added
      assert distance <= stated[name] * _ROOM, (name, pair, place)
      if distance > furthest[name][0]:
        furthest[name] = distance, pair
  for name, (distance, _) in furthest.items():
    assert distance >= _BITE * stated[name], name
  assert num_moved > _TRIES / 3
