"""The compiled, sharded step: sensitivity, noise and padding on every mesh.

What is measured is what users run: `Step.accumulate` and `Step.apply` as they
are compiled for a mesh. Sums are read through `apply` with the noise set to
zero and an optimizer that subtracts the sum, so that the reduction and the
division are inside what is tested.
"""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import dpdist
from dpdist import clipping
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism
from dpdist.noise import noise
from dpdist.training import step as step_lib
from tests.support import meshes

_CLIP = 0.75
# In two chunks of two examples a device, so that to mix those of one is seen.
_ROWS = 32


def _plan(**changes):
  return dpdist.make_plan(
    dpdist.PrivacyConfig(
      **{
        "num_examples": 1000,
        "expected_batch_size": 8,
        "num_steps": 10,
        "l2_clip_norm": _CLIP,
        "target_delta": 1e-5,
        "noise_multiplier": 1.5,
      }
      | changes
    )
  )


def _put(mesh, x):
  return jax.device_put(x, mesh_lib.examples(mesh))


# Models with a gradient that can be written down.


def _dense_loss(params, example, rng):
  del rng
  out = jnp.tanh(example["x"].reshape(-1) @ params["w"] + params["b"])
  return 5 * jnp.mean((out - example["y"]) ** 2), None


def _dense_gradients(params, batch):
  x = batch["x"].reshape(_ROWS, -1).astype(np.float64)
  out = np.tanh(x @ params["w"].astype(np.float64) + params["b"])
  slope = 10 * (out - batch["y"]) / out.shape[1] * (1 - out**2)
  return _flat({"b": slope, "w": np.einsum("bi,bj->bij", x, slope)})


def _conv_loss(params, example, rng):
  del rng
  out = nn.Conv(4, (3, 3), padding="VALID").apply(
    {"params": {"kernel": params["w"], "bias": params["b"]}},
    example["x"][..., None],
  )
  return 0.5 * jnp.sum((out - example["y"]) ** 2), None


def _conv_gradients(params, batch):
  x, w = batch["x"].astype(np.float64), params["w"].astype(np.float64)
  patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
  out = np.einsum("bhwij,ijo->bhwo", patches, w[:, :, 0]) + params["b"]
  residual = out - batch["y"][:, None, None]
  kernel = np.einsum("bhwij,bhwo->bijo", patches, residual)
  return _flat({"b": residual.sum((1, 2)), "w": kernel})


def _flat(tree):
  """One row an example, all leaves in order."""
  return np.concatenate(
    [tree[name].reshape(_ROWS, -1) for name in sorted(tree)], axis=1
  )


_MODELS = {
  "dense": (_dense_loss, _dense_gradients, (36, 4)),
  "convolution": (_conv_loss, _conv_gradients, (3, 3, 1, 4)),
}


def _problem(model):
  rng = np.random.default_rng(0)
  params = {
    "w": rng.normal(size=_MODELS[model][2]).astype(np.float32) / 3,
    "b": rng.normal(size=4).astype(np.float32),
  }
  batch = {
    "x": rng.normal(size=(_ROWS, 6, 6)).astype(np.float32),
    "y": rng.normal(size=(_ROWS, 4)).astype(np.float32),
  }
  return params, batch


class _ClippedSum:
  """The clipped sum as the compiled step of a mesh computes it."""

  def __init__(self, model, mesh):
    self._mesh = mesh
    bound = mechanism.make(_plan(), _MODELS[model][0])
    assert bound.noise_stddev == 1.5 * _CLIP
    self._step = step_lib.Step(
      dataclasses.replace(bound, noise_stddev=0.0),
      optax.sgd(bound.plan.expected_batch_size),
      mesh,
    )

  def __call__(self, params, batch, is_padding_example):
    step, mesh = self._step, self._mesh
    state = step.init(jax.tree.map(jnp.asarray, params))
    accumulator = step.zeros(state.params)
    # Two chunks, since a step may have any number.
    for rows in (slice(0, _ROWS // 2), slice(_ROWS // 2, _ROWS)):
      accumulator = step.accumulate(
        state.params,
        accumulator,
        {name: _put(mesh, x[rows]) for name, x in batch.items()},
        _put(mesh, is_padding_example[rows]),
        jax.random.key(0),
        rows.start,
      )
    after, _ = step.apply(state, accumulator, jax.random.key(0))
    moved = jax.tree.map(
      lambda x, y: x.astype(np.float64) - np.asarray(y), params, after.params
    )
    return np.concatenate([moved[name].ravel() for name in sorted(moved)])


@functools.cache
def _clipped_sum(model, mesh_name):
  """One program for all tests."""
  return _ClippedSum(model, meshes.of(mesh_name))


def _adversaries(batch):
  """Batches that differ from the given one in example 5 alone."""
  for value in (1e30, np.inf, -np.inf, np.nan, 0.0, 1e3):
    other = {name: x.copy() for name, x in batch.items()}
    other["x"][5] = value
    yield f"x={value}", other
  for scale in (-30.0, 1e3, 1e-3):
    other = {name: x.copy() for name, x in batch.items()}
    other["x"][5] *= scale
    other["y"][5] += 1e3
    yield f"x*{scale}, y+1000", other


# Two and four devices show what one and eight do not only where they differ;
# either model on one kind of mesh that divides parameters shows how.
_IN_TURN = (
  *(("dense", "8, fsdp"), ("convolution", "8, model")),
  *((model, name) for model in _MODELS for name in ("1", "2", "4")),
  ("convolution", "8, fsdp"),
)


@pytest.mark.parametrize(
  ("mesh_name", "model"),
  [
    pytest.param(
      *(name, model), marks=[pytest.mark.slow] * ((model, name) in _IN_TURN)
    )
    for name in meshes.SHAPES
    for model in _MODELS
  ],
)
def test_clipped_sum_matches_closed_form_and_moves_within_sensitivity(
  model, mesh_name
):
  params, batch = _problem(model)
  clipped_sum = _clipped_sum(model, mesh_name)
  real = np.zeros(_ROWS, bool)
  base = clipped_sum(params, batch, real)

  gradients = _MODELS[model][1](params, batch)
  norms = np.linalg.norm(gradients, axis=1)
  assert np.all(norms > _CLIP)
  expected = np.minimum(1, _CLIP / norms) @ gradients
  # float32 with a subtraction from the parameters: 1e-5 of a clip norm.
  np.testing.assert_allclose(base, expected, atol=1e-5 * _CLIP * _ROWS)

  sensitivity = clipping.clipped_grad(_dense_loss, l2_clip_norm=_CLIP)
  slack = 1 + 1e-4
  # Far enough for the bound to mean something, and never further.
  furthest = 0.0
  for name, other in _adversaries(batch):
    moved = np.linalg.norm(clipped_sum(params, other, real) - base)
    assert moved <= sensitivity.sensitivity("replace_one") * slack, name
    furthest = max(furthest, moved)
    without = real.copy()
    without[5] = True
    removed = clipped_sum(params, other, without)
    added = np.linalg.norm(clipped_sum(params, other, real) - removed)
    assert added <= sensitivity.sensitivity("add_or_remove_one") * slack, name
  assert furthest > _CLIP
  without = np.arange(_ROWS) == 5
  moved = np.linalg.norm(clipped_sum(params, batch, without) - base)
  assert moved <= sensitivity.sensitivity("zero_out") * slack
  np.testing.assert_allclose(moved, _CLIP, rtol=1e-4)


@pytest.mark.parametrize(
  ("mesh_name", "model"),
  [
    pytest.param(
      *(name, model), marks=[pytest.mark.slow] * ((model, name) in _IN_TURN)
    )
    for name in meshes.SHAPES
    for model in _MODELS
  ],
)
def test_padding_changes_no_bit_whatever_it_holds(model, mesh_name):
  params, batch = _problem(model)
  clipped_sum = _clipped_sum(model, mesh_name)
  is_padding_example = np.arange(_ROWS) % 3 == 0

  def padded_with(fill):
    filled = {name: x.copy() for name, x in batch.items()}
    for x in filled.values():
      x[is_padding_example] = fill
    return clipped_sum(params, filled, is_padding_example)

  base = padded_with(0.0)
  for fill in (np.nan, np.inf, 5.0):
    assert padded_with(fill).tobytes() == base.tobytes(), fill
  gradients = _MODELS[model][1](params, batch)[~is_padding_example]
  norms = np.linalg.norm(gradients, axis=1)
  expected = np.minimum(1, _CLIP / norms) @ gradients
  np.testing.assert_allclose(base, expected, atol=1e-5 * _CLIP * _ROWS)


# The noise of the compiled step, seen through zero gradients.

_SHAPES = {"a": (300, 500), "b": (300, 500), "c": (400, 300)}


def _noise_of_steps(mesh, num_steps, noise_multiplier=1.5):
  """Standard normals, if the step's noise is what its event claims."""
  plan = _plan(noise_multiplier=noise_multiplier)
  loss = lambda params, example, rng: (
    0.0 * sum(map(jnp.sum, params.values())) * jnp.sum(example["x"]),
    None,
  )
  bound = mechanism.make(plan, loss)
  step = step_lib.Step(bound, optax.sgd(plan.expected_batch_size), mesh)
  state = step.init({k: jnp.zeros(shape) for k, shape in _SHAPES.items()})
  batch = {"x": _put(mesh, np.ones((_ROWS, 2), np.float32))}
  is_padding_example = _put(mesh, np.zeros(_ROWS, bool))
  key = noise.as_key(np.array([1, 2], np.uint32))
  before = jax.tree.map(np.asarray, state.params)
  steps = []
  for _ in range(num_steps):
    accumulator = step.accumulate(
      state.params,
      step.zeros(state.params),
      batch,
      is_padding_example,
      jax.random.key(0),
      0,
    )
    state, _ = step.apply(state, accumulator, key)
    for leaf in state.params.values():
      # One draw: replicas that drew for themselves would differ.
      copies = {
        (str(s.index), np.asarray(s.data).tobytes())
        for s in leaf.addressable_shards
      }
      assert len(copies) == len({index for index, _ in copies})
    after = jax.tree.map(np.asarray, state.params)
    steps.append(jax.tree.map(lambda x, y: x - y, before, after))
    before = after
  return plan, steps


def _relative_deviation(draw, event, sensitivity):
  """The measured standard deviation over the one that the event claims."""
  claimed = event.event.event.noise_multiplier * sensitivity
  flat = np.concatenate([x.ravel() for x in draw.values()]).astype(np.float64)
  return flat.std() / claimed


@pytest.mark.parametrize(
  "mesh_name",
  [
    # What divides along all axes divides along those of the others.
    pytest.param(name, marks=[pytest.mark.slow] * (name != "8"))
    for name in meshes.SHAPES
  ],
)
def test_noise_has_the_standard_deviation_that_the_event_claims(mesh_name):
  plan, (draw,) = _noise_of_steps(meshes.of(mesh_name), 1)
  # 420,000 draws: standard error 0.11 %, so 0.5 % is 4.6 of them.
  close = lambda factor, multiplier: (
    abs(
      factor
      * _relative_deviation(
        draw, _plan(noise_multiplier=multiplier).event(), _CLIP
      )
      - 1
    )
    < 0.005
  )
  assert close(1.0, plan.noise_multiplier)
  assert not close(1.0, plan.noise_multiplier * 2 / 3)
  assert not close(1.0, plan.noise_multiplier * 3 / 2)


@pytest.mark.slow
def test_noise_bits_are_equal_on_every_mesh():
  draws = {
    name: _noise_of_steps(meshes.of(name), 2)[1] for name in meshes.SHAPES
  }
  for name, steps in draws.items():
    for mine, first in zip(steps, draws["1"], strict=True):
      for leaf in _SHAPES:
        np.testing.assert_array_equal(mine[leaf], first[leaf], err_msg=name)


def test_noise_is_distinct_across_leaves_and_steps():
  _, steps = _noise_of_steps(meshes.of("8"), 3)
  blocks = [step[leaf].ravel()[:100_000] for step in steps for leaf in "abc"]
  correlation = np.corrcoef(blocks) - np.eye(len(blocks))
  # Independent blocks: below 0.02 with error rate 1e-8; a shared key gives 1.
  assert np.max(np.abs(correlation)) < 0.02


def test_noise_does_not_repeat_within_a_leaf():
  # A block drawn once for each device would repeat along the leaf.
  _, (draw,) = _noise_of_steps(meshes.of("8"), 1)
  for leaf in draw.values():
    halves = leaf.ravel()[: leaf.size // 8 * 8].reshape(8, -1)
    correlation = np.corrcoef(halves) - np.eye(8)
    assert np.max(np.abs(correlation)) < 0.05


def test_accumulate_is_local_and_apply_reduces_once():
  mesh = meshes.of("8")
  plan = _plan()
  step = step_lib.Step(
    mechanism.make(plan, _dense_loss), optax.adam(1e-3), mesh, 0.9
  )
  params, batch = _problem("dense")
  state = step.init(jax.tree.map(jnp.asarray, params))
  accumulator = step.zeros(state.params)
  accumulate = step.accumulate.lower(
    state.params,
    accumulator,
    {name: _put(mesh, x) for name, x in batch.items()},
    _put(mesh, np.zeros(_ROWS, bool)),
    jax.random.key(0),
    0,
  )
  collectives = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
  text = accumulate.compile().as_text()
  assert not any(f"{name}(" in text for name in collectives)
  apply = step.apply.lower(state, accumulator, jax.random.key(0))
  text = apply.compile().as_text()
  counts = [text.count(f" {name}(") for name in collectives]
  assert counts == [1, 0, 0, 0]


def test_an_empty_step_is_noise_alone():
  mesh = meshes.of("8")
  plan = _plan()
  step = step_lib.Step(mechanism.make(plan, _dense_loss), optax.sgd(1.0), mesh)
  params, _ = _problem("dense")
  state = step.init(jax.tree.map(jnp.asarray, params))
  after, released = step.apply(
    state, step.zeros(state.params), jax.random.key(4)
  )
  assert int(after.step) == 1
  assert int(after.noise_state.draws) == 1
  moved = np.concatenate(
    [(np.asarray(after.params[k]) - params[k]).ravel() for k in params]
  )
  claimed = plan.noise_multiplier * _CLIP / plan.expected_batch_size
  assert 0.7 < moved.std() / claimed < 1.3
  np.testing.assert_allclose(
    released["noisy_gradient_norm"], np.linalg.norm(moved), rtol=1e-5
  )


def test_a_bfloat16_model_is_summed_and_noised_in_float32():
  mesh = meshes.of("8")
  loss = lambda params, example, rng: (
    jnp.sum(params["w"] * example["x"]),
    None,
  )
  bound = mechanism.make(_plan(l2_clip_norm=1.0), loss)
  step = step_lib.Step(bound, optax.sgd(1.0), mesh)
  state = step.init({"w": jnp.zeros(1, jnp.bfloat16)})
  accumulator = step.zeros(state.params)
  assert accumulator.clipped_sum["w"].dtype == jnp.float32
  x = np.ones((4096, 1), jnp.bfloat16)
  accumulator = step.accumulate(
    state.params,
    accumulator,
    {"x": _put(mesh, x)},
    _put(mesh, np.zeros(4096, bool)),
    jax.random.key(0),
    0,
  )
  assert float(np.sum(accumulator.clipped_sum["w"])) == 4096.0
  assert int(step.stats(accumulator).num_examples) == 4096


def test_stats_count_what_was_drawn_clipped_and_left_out():
  mesh = meshes.of("8, fsdp")
  params, batch = _problem("dense")
  batch["x"][3] = np.nan
  # The only one whose gradient is shorter than the clip norm: it is zero.
  batch["x"][4], batch["y"][4] = 0, np.tanh(params["b"])
  step = step_lib.Step(mechanism.make(_plan(), _dense_loss), optax.sgd(1), mesh)
  state = step.init(jax.tree.map(jnp.asarray, params))
  is_padding_example = np.arange(_ROWS) >= 12
  accumulator = step.accumulate(
    state.params,
    step.zeros(state.params),
    {name: _put(mesh, x) for name, x in batch.items()},
    _put(mesh, is_padding_example),
    jax.random.key(0),
    0,
  )
  stats = step.stats(accumulator)
  assert int(stats.num_examples) == 12
  assert int(stats.num_nonfinite) == 1
  assert int(stats.num_clipped) == 10
  assert np.isfinite(float(stats.loss))


def test_randomness_belongs_to_the_example_and_not_to_the_device():
  def draws(mesh_name, chunk):
    mesh = meshes.of(mesh_name)
    loss = lambda params, example, rng: (
      params["w"][example["i"]] * jax.random.normal(rng),
      None,
    )
    bound = mechanism.make(_plan(l2_clip_norm=1e3), loss)
    step = step_lib.Step(bound, optax.sgd(1.0), mesh)
    state = step.init({"w": jnp.zeros(_ROWS)})
    accumulator = step.zeros(state.params)
    for first_row in range(0, _ROWS, chunk):
      accumulator = step.accumulate(
        state.params,
        accumulator,
        {"i": _put(mesh, np.arange(first_row, first_row + chunk))},
        _put(mesh, np.zeros(chunk, bool)),
        jax.random.key(9),
        first_row,
      )
    return np.sum(accumulator.clipped_sum["w"], axis=0)

  one = draws("1", _ROWS)
  assert np.unique(one).size == _ROWS
  np.testing.assert_array_equal(draws("8", _ROWS), one)
  np.testing.assert_array_equal(draws("8", _ROWS // 2), one)
  np.testing.assert_array_equal(draws("8, model", _ROWS), one)


# A user's own shard_map, with its default settings.


def _in_shard_map(fn, mesh, *specs):
  return jax.jit(
    jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
  )


@pytest.mark.parametrize("model", _MODELS)
def test_clipped_grad_in_a_users_own_shard_map(model):
  mesh = meshes.of("8")
  params, batch = _problem(model)
  loss = lambda params, example: _MODELS[model][0](params, example, None)[0]
  fn = clipping.clipped_grad(loss, l2_clip_norm=_CLIP)
  total = _in_shard_map(
    lambda p, b: jax.lax.psum(fn(p, b).sum, mesh_lib.AXES[:2]),
    mesh,
    PartitionSpec(),
    mesh_lib.EXAMPLES,
  )(params, batch)
  alone = jax.jit(lambda p, b: fn(p, b).sum)(params, batch)
  for name in params:
    np.testing.assert_allclose(total[name], alone[name], atol=1e-5)


@pytest.mark.slow
def test_clipped_grad_in_shard_map_without_vma_checks_and_in_microbatches():
  mesh = meshes.of("8")
  params, batch = _problem("dense")
  loss = lambda params, example: _dense_loss(params, example, None)[0]
  fn = clipping.clipped_grad(loss, l2_clip_norm=_CLIP, microbatch_size=1)
  local = lambda p, b: jax.lax.psum(fn(p, b).sum, mesh_lib.AXES[:2])
  alone = jax.jit(lambda p, b: fn(p, b).sum)(params, batch)
  for check_vma in (True, False):
    total = jax.jit(
      jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), mesh_lib.EXAMPLES),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
      )
    )(params, batch)
    for name in params:
      np.testing.assert_allclose(total[name], alone[name], atol=1e-5)


def test_a_sharded_batch_outside_shard_map_is_refused():
  mesh = meshes.of("8")
  params, batch = _problem("convolution")
  loss = lambda params, example: _conv_loss(params, example, None)[0]
  fn = clipping.clipped_grad(loss, l2_clip_norm=_CLIP)
  sharded = jax.tree.map(lambda x: _put(mesh, x), batch)
  with pytest.raises(ValueError, match=r"outside jax\.shard_map"):
    fn(params, sharded)
  # Inside a jit only its compiler knows; what it raises is not a ValueError.
  with pytest.raises(Exception, match=r"outside jax\.shard_map"):
    jax.jit(lambda p, b: fn(p, b).sum)(params, sharded)
  alone = jax.jit(lambda p, b: fn(p, b).sum)(params, batch)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(alone))


def test_the_average_is_of_what_is_released():
  """Of the noised parameters, and of nothing else that a step computes."""
  step = step_lib.Step(
    mechanism.make(_plan(), _dense_loss),
    optax.sgd(1.0),
    meshes.of("8"),
    ema_decay=0.5,
  )
  state = step.init({"w": jnp.zeros((36, 4)), "b": jnp.zeros(4)})
  average = np.zeros((36, 4))
  for number in range(3):
    total = step.zeros(state.params)
    state, _ = step.apply(state, total, jax.random.key(1))
    w = np.asarray(state.params["w"])
    decay = min(0.5, (1 + number) / (10 + number))
    average = decay * average + (1 - decay) * w
    np.testing.assert_allclose(state.ema_params["w"], average, rtol=1e-5)
  assert np.std(w) > 0.1


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("what", ["batch", "is_padding_example", "rng"])
def test_what_an_explicit_mesh_shards_is_refused_and_named(what, size, wrap):
  """`jax.make_mesh` makes Explicit axes unless it is told otherwise."""
  mesh = jax.make_mesh((size,), ("data",), devices=jax.devices()[:size])
  given = {
    "batch": jnp.ones((8, 3)),
    "is_padding_example": jnp.zeros(8, bool),
    "rng": jax.random.split(jax.random.key(0), 8),
  }
  given[what] = jax.device_put(
    given[what], NamedSharding(mesh, PartitionSpec("data"))
  )
  fn = clipping.clipped_grad(
    lambda w, x, rng: jnp.sum(w * x) * jax.random.uniform(rng),
    l2_clip_norm=_CLIP,
  )
  with pytest.raises(ValueError, match=rf"{what} is .* outside jax\.shard_map"):
    wrap(fn)(jnp.ones(3), **given)


@pytest.mark.parametrize("what", ["is_padding_example", "rng"])
def test_padding_and_keys_that_jit_shards_are_refused_with_convolutions(what):
  """XLA divides the convolutions by them, and norms come out wrong."""
  mesh = meshes.of("8")
  params, batch = _problem("convolution")
  loss = lambda p, x, rng: _conv_loss(p, x, rng)[0]
  fn = clipping.clipped_grad(loss, l2_clip_norm=_CLIP, method="vmap")
  size = len(jax.tree.leaves(batch)[0])
  given = {
    "is_padding_example": jnp.zeros(size, bool),
    "rng": jax.random.split(jax.random.key(0), size),
  }
  given[what] = _put(mesh, given[what])
  with pytest.raises(ValueError, match=rf"{what} is .* outside jax\.shard_map"):
    fn(params, batch, **given)
  # Inside a jit XLA may have divided the batch by them.
  with pytest.raises(Exception, match=r"outside jax\.shard_map"):
    jax.jit(lambda p, b, k: fn(p, b, **k).sum)(params, batch, given)


@pytest.mark.parametrize(
  "method",
  [
    "bookkeeping",
    *(pytest.param(m, marks=pytest.mark.slow) for m in ("two_pass", "vmap")),
  ],
)
def test_a_batch_that_jit_shards_is_right_without_convolutions(method):
  mesh = meshes.of("8")
  params, batch = _problem("dense")
  loss = lambda params, example: _dense_loss(params, example, None)[0]
  fn = clipping.clipped_grad(loss, l2_clip_norm=_CLIP, method=method)
  run = jax.jit(lambda p, b: fn(p, b).sum)
  sharded = run(params, jax.tree.map(lambda x: _put(mesh, x), batch))
  alone = run(params, batch)
  for name in params:
    np.testing.assert_allclose(sharded[name], alone[name], atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
@pytest.mark.parametrize(
  "mix",
  [
    # The value of the first no longer varies; that of the others still does.
    lambda loss, x: jax.lax.pmean(loss, mesh_lib.AXES[:2]),
    lambda loss, x: loss * jnp.sum(x - jax.lax.pmean(x, "data")),
    lambda loss, x: loss * jnp.sum(jax.lax.all_gather(x, "fsdp")),
    lambda loss, x: loss * jnp.sum(jax.lax.ppermute(x, "data", [(0, 1)])),
  ],
)
def test_a_loss_that_mixes_devices_is_refused(mix, wrap):
  mesh = meshes.of("8, fsdp")
  params, batch = _problem("dense")

  @wrap
  def loss(params, example):
    return mix(_dense_loss(params, example, None)[0], example["x"])

  fn = clipping.clipped_grad(loss, l2_clip_norm=_CLIP)
  with pytest.raises(ValueError, match="must use one example alone"):
    _in_shard_map(
      lambda p, b: fn(p, b).sum, mesh, PartitionSpec(), mesh_lib.EXAMPLES
    )(params, batch)


def test_one_key_for_all_devices_is_refused():
  mesh = meshes.of("8")
  params, batch = _problem("dense")
  fn = clipping.clipped_grad(
    lambda p, e, rng: _dense_loss(p, e, rng)[0], l2_clip_norm=_CLIP
  )
  with pytest.raises(ValueError, match="one key an example"):
    _in_shard_map(
      lambda p, b: fn(p, b, rng=jax.random.key(0)).sum,
      mesh,
      PartitionSpec(),
      mesh_lib.EXAMPLES,
    )(params, batch)


def _summed_backward(x):
  everywhere = lambda g: jax.lax.pcast(
    jax.lax.psum(g, "data"), "data", to="varying"
  )
  backward = jax.custom_vjp(lambda x: x)
  backward.defvjp(lambda x: (x, None), lambda _, g: (everywhere(g),))
  return backward(x)


def _summed_tangent(x):
  forward = jax.custom_jvp(lambda x: x)
  forward.defjvp(
    lambda xs, ts: (
      xs[0],
      jax.lax.pcast(jax.lax.psum(ts[0], "data"), "data", to="varying"),
    )
  )
  return forward(x)


@pytest.mark.parametrize("hidden", [_summed_backward, _summed_tangent])
@pytest.mark.parametrize("method", ["auto", "vmap"])
def test_a_derivative_that_mixes_examples_is_refused(hidden, method):
  fn = clipping.clipped_grad(
    lambda w, x: jnp.sum(jnp.tanh(hidden(w * x))),
    l2_clip_norm=1.0,
    method=method,
  )
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  run = jax.shard_map(
    lambda w, x: fn(w, x).loss,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec("data")),
    out_specs=PartitionSpec("data"),
  )
  with pytest.raises(ValueError, match="derivative written by hand mixes"):
    run(jnp.ones(3), jnp.ones((8, 3)))


def _on_eight(run, *args, check_vma):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec("data")),
    out_specs=PartitionSpec("data"),
    check_vma=check_vma,
  )(*args)


@pytest.mark.parametrize("check_vma", [True, False])
def test_examples_are_not_mixed_whether_axes_are_told_or_not(check_vma):
  mixing = lambda w, x: jnp.dot(w, x) * jnp.sum(jax.lax.pmean(x, "data"))
  fn = clipping.clipped_grad(mixing, l2_clip_norm=1.0)
  with pytest.raises(ValueError, match="mixes the examples of several"):
    _on_eight(
      lambda w, x: fn(w, x).loss,
      *(jnp.ones(3), jnp.ones((8, 3))),
      check_vma=check_vma,
    )
  shared = clipping.clipped_grad(
    lambda w, x, key: jnp.dot(w, x) * jax.random.normal(key), l2_clip_norm=1.0
  )
  with pytest.raises(ValueError, match="rng is one key that is equal on"):
    _on_eight(
      lambda w, x: shared(w, x, rng=jax.random.key(0)).loss,
      *(jnp.ones(3), jnp.ones((8, 3))),
      check_vma=check_vma,
    )


@pytest.mark.parametrize("method", ["auto", "vmap"])
def test_parameters_divided_by_hand_are_refused(method):
  mesh = jax.make_mesh(
    (2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )
  loss = lambda w, x: jax.lax.psum(jnp.sum(w) * jnp.sum(x), "model")
  fn = clipping.clipped_grad(loss, l2_clip_norm=1.0, method=method)
  run = jax.shard_map(
    lambda w, x: fn(w, x).sum,
    mesh=mesh,
    in_specs=(PartitionSpec("model"), PartitionSpec("data")),
    out_specs=PartitionSpec(("data", "model")),
  )
  with pytest.raises(ValueError, match=r"params must be whole .*\['model'\]"):
    run(jnp.ones(8), jnp.ones((8, 3)))
