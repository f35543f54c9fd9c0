"""Parameters that the mesh divides, on eight devices and in compiled programs.

What a mesh divides must change nothing but where things are: sums, norms and
updates are held against those of one device, sensitivity against adversaries,
and the compiled programs against what they should send and hold.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import dpdist
from dpdist import clipping
from dpdist import config as config_lib
from dpdist import models
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism
from dpdist.tasks import cross_entropy
from dpdist.training import parameters
from dpdist.training import step as step_lib
from tests.support import meshes

_CLIP = 0.1
_ROWS = 16
_LENGTH = 6
_VOCABULARY = 64
_MESHES = {
  "data": (8, 1, 1),
  "fsdp": (1, 8, 1),
  "data, fsdp": (2, 4, 1),
  "model": (1, 1, 4),
  "data, model": (2, 1, 4),
  "data, fsdp, model": (2, 2, 2),
}


def _mesh(name):
  return meshes.shaped(_MESHES.get(name, (1, 1, 1)))


# The engines, inside a shard_map of ours.


def _deep(remat):
  """A loss with everything that a divided parameter can meet: a lookup, a loop,
  a loop's promoted scale, a weight of a weight, and a tied table."""

  def block(h, w):
    return h + jnp.tanh(h @ w["in"] + w["bias"]) @ w["out"] * w["scale"], None

  def loss(params, example):
    h = params["table"][example["tokens"]] + example["x"]
    block_ = jax.checkpoint(block) if remat else block
    h, _ = jax.lax.scan(block_, h, params["blocks"])
    scale = params["scale"] / jnp.linalg.norm(params["scale"])
    logits = (h * scale) @ params["table"].T
    return jnp.mean(jax.nn.logsumexp(logits, -1))

  return loss


def _deep_problem():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / 3
  params = {
    "table": draw(24, 16),
    "blocks": {
      "in": draw(3, 16, 32),
      "bias": draw(3, 32),
      "out": draw(3, 32, 16),
      "scale": draw(3, 16),
    },
    "scale": draw(16),
  }
  batch = {"tokens": rng.integers(0, 24, (_ROWS, 5)), "x": draw(_ROWS, 16)}
  # The first quarter is padding: whole devices have nothing else, and what they
  # add to others' sums must be 0, not NaN.
  batch["x"][: _ROWS // 4] = np.nan
  return params, batch, np.arange(_ROWS) < _ROWS // 4


_SPECS = {
  "table": P("fsdp", None),
  "blocks": {
    "in": P(None, None, "fsdp"),
    "bias": P(None, "fsdp"),
    "out": P(None, "fsdp", None),
    "scale": P(None, None),
  },
  "scale": P("fsdp"),
}


def _clipped(fn, mesh, params, batch, is_padding_example, specs=_SPECS):
  """Clipped sum over the mesh, and all norms."""

  def local(params, batch, is_padding_example):
    grads = fn(
      params,
      batch,
      is_padding_example=is_padding_example,
      param_specs=specs,
    )
    add = lambda x, spec: jax.lax.psum(x, mesh_lib.summed_axes(spec))
    return jax.tree.map(add, grads.sum, specs), grads.grad_norms

  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs, mesh_lib.EXAMPLES, mesh_lib.EXAMPLES),
    out_specs=(specs, mesh_lib.EXAMPLES),
    axis_names=mesh_lib.manual_axes(mesh),
  )
  return jax.jit(run)(params, batch, is_padding_example)


@pytest.mark.parametrize(
  "norms", ["one", pytest.param("per layer", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  "method",
  [
    "bookkeeping",
    pytest.param("two_pass", marks=pytest.mark.slow),
    pytest.param("vmap", marks=pytest.mark.slow),
  ],
)
@pytest.mark.slow
@pytest.mark.parametrize(
  "remat", [True, pytest.param(False, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  "mesh_name",
  # The larger one divides along the axes of the other too.
  ["data, fsdp, model", pytest.param("data, fsdp", marks=pytest.mark.slow)],
)
def test_engines_take_norms_of_whole_parameters(
  mesh_name, remat, method, norms
):
  params, batch, padding = _deep_problem()
  clip_norm = (
    _CLIP if norms == "one" else {"table": 0.1, "blocks": 0.2, "scale": 0.3}
  )
  make = functools.partial(
    clipping.clipped_grad, _deep(remat), l2_clip_norm=clip_norm
  )
  expected = jax.jit(make(method="vmap"))(
    params, batch, is_padding_example=padding
  )
  total, grad_norms = _clipped(
    make(method=method), _mesh(mesh_name), params, batch, padding
  )
  for got, want in (
    (total, expected.sum),
    (
      jax.tree.map(lambda x: x[~padding], grad_norms),
      jax.tree.map(lambda x: x[~padding], expected.grad_norms),
    ),
  ):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
      got,
      want,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["two_pass", "bookkeeping", "vmap"])
def test_a_stack_that_is_divided_along_its_loop(method):
  params, batch, padding = _deep_problem()
  params["blocks"] = jax.tree.map(
    lambda x: np.concatenate([x, x[:1]]), params["blocks"]
  )
  specs = _SPECS | {
    "blocks": jax.tree.map(lambda x: P("fsdp"), params["blocks"])
  }
  fn = clipping.clipped_grad(_deep(True), l2_clip_norm=_CLIP, method=method)
  expected = jax.jit(fn)(params, batch, is_padding_example=padding).sum
  total, _ = _clipped(fn, _mesh("data, fsdp"), params, batch, padding, specs)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    total,
    expected,
  )


@pytest.mark.parametrize(
  "spec", [P("fsdp", "data"), P(("data", "fsdp"), None), P("model", None)]
)
def test_other_divisions_are_refused(spec):
  params, batch, padding = _deep_problem()
  params["table"] = np.zeros((24, 16), np.float32)
  specs = _SPECS | {"table": spec}
  fn = clipping.clipped_grad(_deep(True), l2_clip_norm=_CLIP)
  with pytest.raises(ValueError, match="param_specs must name at most one"):
    _clipped(fn, _mesh("data, fsdp"), params, batch, padding, specs)


# The step that users run.


@functools.cache
def _model(name):
  config = config_lib.default().model
  config.update(
    {
      "name": name,
      "num_outputs": _VOCABULARY,
      "width": 16,
      "depth": 3 if name == "stacked_decoder" else 1,
      "num_heads": 8,
      "num_kv_heads": 4,
      "hidden": 32,
    }
  )
  return models.make(config)


@functools.cache
def _tokens():
  rng = np.random.default_rng(1)
  return rng.integers(0, _VOCABULARY, (_ROWS, _LENGTH + 1)).astype(np.int32)


@functools.cache
def _params(name):
  params = _model(name).init(jax.random.key(0), _tokens()[0, :-1])["params"]
  return jax.tree.map(np.asarray, params)


def _step(name, mesh, **changes):
  model = _model(name)
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=1000,
      expected_batch_size=8,
      num_steps=10,
      l2_clip_norm=_CLIP,
      target_delta=1e-5,
      noise_multiplier=1.0,
    )
  )
  bound = mechanism.make(plan, cross_entropy.loss_of(model))
  return step_lib.Step(
    dataclasses.replace(bound, **changes),
    optax.adam(1e-2),
    mesh,
    0.9,
    model.partitioning,
  )


def _arguments(step, state, tokens, is_padding_example):
  put = lambda x: jax.device_put(x, mesh_lib.examples(step.mesh))
  return (
    state.params,
    step.zeros(state.params),
    {"inputs": put(tokens[:, :-1]), "targets": put(tokens[:, 1:])},
    put(is_padding_example),
    jax.random.key(0),
    0,
  )


def _after_a_step(name, mesh_name):
  step = _step(name, _mesh(mesh_name))
  state = step.init(_params(name))
  accumulator = step.accumulate(
    *_arguments(step, state, _tokens(), np.arange(_ROWS) < 4)
  )
  sums = _summed(accumulator)
  state, released = step.apply(state, accumulator, jax.random.key(1))
  return step, sums, state, released


def _summed(accumulator):
  return jax.tree.map(lambda x: np.sum(x, axis=0), accumulator.clipped_sum)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "mesh_names"),
  [("stacked_decoder", tuple(_MESHES)), ("decoder", ("data, fsdp, model",))],
)
def test_a_step_is_the_same_however_the_mesh_divides_it(name, mesh_names):
  _, expected_sums, expected, expected_released = _after_a_step(name, "one")
  for mesh_name in mesh_names:
    step, sums, state, released = _after_a_step(name, mesh_name)
    close = functools.partial(
      np.testing.assert_allclose, rtol=1e-5, atol=1e-6, err_msg=mesh_name
    )
    jax.tree.map(close, sums, expected_sums)
    # The noise has the same bits, so that parameters differ by rounding alone.
    jax.tree.map(close, state, expected)
    jax.tree.map(close, released, expected_released)
    # And lies where it should.
    jax.tree.map(
      lambda x, spec, step=step: _assert_lies(x, spec, step.mesh),
      state,
      step.state_specs(state),
    )


def _assert_lies(x, spec, mesh):
  expected = NamedSharding(mesh, spec)
  assert x.sharding.is_equivalent_to(expected, x.ndim), (x.sharding, spec)


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh_name",
  ["data, fsdp", pytest.param("data, fsdp, model", marks=pytest.mark.slow)],
)
def test_clipped_sums_move_within_the_sensitivity(mesh_name):
  step = _step("stacked_decoder", _mesh(mesh_name))
  state = step.init(_params("stacked_decoder"))
  bound = step.mechanism.sensitivity
  tokens = _tokens()
  run = lambda tokens, padding: np.concatenate(
    [
      x.ravel()
      for x in jax.tree.leaves(
        _summed(step.accumulate(*_arguments(step, state, tokens, padding)))
      )
    ]
  )
  nobody = np.zeros(_ROWS, bool)
  base = run(tokens, nobody)
  moves = []
  for row in (0, 5, 15):
    one = nobody.copy()
    one[row] = True
    moves.append(np.linalg.norm(run(tokens, one) - base))
    for other in range(3):
      changed = tokens.copy()
      changed[row] = other
      moved = np.linalg.norm(run(changed, nobody) - base)
      assert moved <= 2 * bound * (1 + 1e-4)
  # Every example is clipped here, and moves the sum by all that it may.
  np.testing.assert_allclose(moves, bound, rtol=1e-4)


@pytest.mark.slow
def test_each_device_holds_its_part_of_the_state():
  whole = sum(
    x.nbytes for x in jax.tree.leaves(_step_state("one")) if x.size > 1
  )
  for mesh_name, parts in (("data, fsdp", 4), ("data, fsdp, model", 4)):
    state = _step_state(mesh_name)
    for device in jax.devices():
      mine = sum(
        shard.data.nbytes
        for x in jax.tree.leaves(state)
        if x.size > 1
        for shard in x.addressable_shards
        if shard.device == device
      )
      # What a mesh does not divide, the scales of norms over `model`, is small.
      assert whole / parts <= mine < 1.02 * whole / parts


def _step_state(mesh_name):
  return _step("stacked_decoder", _mesh(mesh_name)).init(
    _params("stacked_decoder")
  )


@pytest.mark.slow
def test_an_initializer_makes_the_same_parameters_in_place():
  task = cross_entropy.classification(_model("stacked_decoder"))
  words = np.array([3, 4], np.uint32)
  example = {"inputs": _tokens()[0, :-1]}
  make = functools.partial(parameters.make_params, task)
  made = lambda step: step.on_mesh(
    step.initializer(make, words, example)(words, example)
  )
  one = made(_step("stacked_decoder", _mesh("one")))
  step = _step("stacked_decoder", _mesh("data, fsdp, model"))
  many = made(step)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), many, one
  )
  jax.tree.map(
    lambda x, spec: _assert_lies(x, spec, step.mesh),
    many,
    step.state_specs(many),
  )


# The compiled programs.


def _compiled(mesh_name, **changes):
  step = _step("stacked_decoder", _mesh(mesh_name), **changes)
  state = step.init(_params("stacked_decoder"))
  arguments = _arguments(step, state, _tokens(), np.zeros(_ROWS, bool))
  accumulate = step.accumulate.lower(*arguments).compile().as_text()
  apply = step.apply.lower(state, arguments[1], jax.random.key(0))
  return accumulate, apply.compile().as_text()


_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


def _count(text, name):
  return len(re.findall(rf" {name}(?:-start)?\(", text))


@pytest.mark.slow
def test_only_data_is_left_for_apply_where_fsdp_divides():
  accumulate, apply = _compiled("data, fsdp")
  assert _count(accumulate, "all-reduce") == 0
  assert _count(accumulate, "reduce-scatter") > 0
  # One of sums over `data`, and one of the released norm, a number.
  assert [_count(apply, name) for name in _COLLECTIVES] == [2, 0, 0, 0]


@pytest.mark.slow
def test_noise_is_drawn_where_it_lies():
  _, apply = _compiled("fsdp")
  # No array of a program of one device is as large as the table, of which the
  # device has an eighth, and no random bits of a stack are.
  sizes = [
    int(np.prod([int(n) for n in shape.split(",") if n]))
    for shape in re.findall(r"(?:f32|u32|s32)\[([\d,]*)\]", apply)
  ]
  largest = max(x.size for x in jax.tree.leaves(_params("stacked_decoder")))
  assert max(sizes) <= largest // 8 * 2  # Bits come in pairs of words.


@pytest.mark.slow
def test_blocks_are_put_together_one_at_a_time():
  accumulate, _ = _compiled("fsdp")
  gathered = [
    tuple(map(int, shape.split(",")))
    for shape in re.findall(
      r"f32\[([\d,]+)\]\S* all-gather(?:-start)?\(", accumulate
    )
  ]
  params = _params("stacked_decoder")
  stacks = {x.shape for x in jax.tree.leaves(params["blocks"])}
  assert gathered
  assert not stacks & set(gathered)
  blocks = {tuple(sorted(shape[1:])) for shape in stacks}
  seen = {tuple(sorted(n for n in shape if n > 1)) for shape in gathered}
  assert blocks <= seen


# Rules.


def test_partition_takes_the_longest_dimension_that_is_left():
  mesh = _mesh("data, fsdp, model")
  shapes = {
    "a": jax.ShapeDtypeStruct((6, 8), jnp.float32),
    "b": jax.ShapeDtypeStruct((3, 5), jnp.float32),
    "c": jax.ShapeDtypeStruct((4, 4), jnp.float32),
    "d": {"up": jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)},
  }
  rules = (("d/up$", (None, "model")), ("up", ("model",)))
  assert mesh_lib.partition(shapes, mesh, rules) == {
    "a": P(None, "fsdp"),
    "b": P(),
    "c": P(None, "fsdp"),
    "d": {"up": P(None, "fsdp", "model")},
  }
  plain = mesh_lib.partition(shapes, _mesh("data"), rules)
  assert set(jax.tree.leaves(plain)) == {P()}


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ((("a", (None, "model", None)),), "at most the 2 dimensions of a"),
    ((("a", (None, "model")),), r"mesh.model must divide .* of a \(6, 5\)"),
  ],
)
def test_rules_that_do_not_fit_are_refused(rules, message):
  shapes = {"a": jax.ShapeDtypeStruct((6, 5), jnp.float32)}
  with pytest.raises(ValueError, match=message):
    mesh_lib.partition(shapes, _mesh("data, model"), rules)
