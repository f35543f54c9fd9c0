"""Exact sums: the same bits on every mesh, and inside the sensitivity.

Steps are those that users run, compiled for meshes of one to eight devices.
"""

import dataclasses
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpdist
from dpdist.clipping import watched
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism
from dpdist.mechanism import stats as stats_lib
from dpdist.models import cnn
from dpdist.models import decoder
from dpdist.sums import fixed_point
from dpdist.tasks import cross_entropy
from dpdist.training import exact_step
from dpdist.training import step as step_lib
from dpdist.workdir import fingerprint
from tests.support import meshes

pytestmark = pytest.mark.usefixtures("quick_compiles")

_CLIP = 0.75
_GROUP = 8
_NUM_EXAMPLES = 200


def _plan(**changes):
  return dpdist.make_plan(
    dpdist.PrivacyConfig(
      **{
        "num_examples": _NUM_EXAMPLES,
        "expected_batch_size": 64,
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


class _Mlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(33)(x))
    if self.has_rng("dropout"):
      x = nn.Dropout(0.5, deterministic=False)(x)
    return nn.Dense(10)(x)


def _images(rng, *shape):
  inputs = rng.normal(size=(_NUM_EXAMPLES, *shape)).astype(np.float32)
  return {
    "inputs": inputs,
    "targets": rng.integers(0, 10, _NUM_EXAMPLES, np.int32),
  }


def _tokens(rng):
  tokens = rng.integers(0, 32, (_NUM_EXAMPLES, 12), np.int32)
  return {"inputs": tokens, "targets": np.roll(tokens, -1, 1)}


@functools.cache
def _problem(name):
  """Model, parameters and all examples."""
  rng = np.random.default_rng(0)
  if name == "mlp":
    model, data = _Mlp(), _images(rng, 20)
  elif name == "cnn":
    model, data = cnn.CNN(10, 2, jnp.float32), _images(rng, 14, 14, 1)
  else:
    model = decoder.Decoder(32, 16, 1, 2, jnp.float32)
    data = _tokens(rng)
  params = jax.jit(model.init)(jax.random.key(0), data["inputs"][0])["params"]
  return model, jax.tree.map(np.asarray, params), data


@functools.cache
def _mechanism(model_name):
  model, _, _ = _problem(model_name)
  return mechanism.make(
    _plan(), cross_entropy.loss_of(model), exact_group_size=_GROUP
  )


@functools.cache
def _step(model_name, optimizer_name):
  """On one device; others share its programs by dataclasses.replace."""
  optimizer = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
  }[optimizer_name]
  return exact_step.ExactStep(
    _mechanism(model_name), optimizer, meshes.of("1"), 0.9
  )


def _accumulated(step, params, data, rows, chunk_size, key):
  """The accumulator of a step that draws the given rows of data."""
  params = jax.device_put(params, mesh_lib.replicated(step.mesh))
  accumulator = step.zeros(params)
  for start in range(0, len(rows), chunk_size):
    mine = rows[start : start + chunk_size]
    is_padding_example = np.arange(chunk_size) >= len(mine)
    padded = np.pad(mine, (0, chunk_size - len(mine)))
    accumulator = step.accumulate(
      params,
      accumulator,
      {name: _put(step.mesh, x[padded]) for name, x in data.items()},
      _put(step.mesh, is_padding_example),
      key,
      start,
    )
  return accumulator


_DRAWS = (100, 0, 37)


def _digest(step, params, data, chunk_size):
  """Of all that steps with several chunks, none, and one leave."""
  state = step.init(jax.tree.map(jnp.array, params))
  rng = np.random.default_rng(1)
  for t, size in enumerate(_DRAWS):
    rows = np.sort(rng.choice(_NUM_EXAMPLES, size, replace=False))
    accumulator = _accumulated(
      step, state.params, data, rows, chunk_size, jax.random.key(t)
    )
    state, released = step.apply(state, accumulator, jax.random.key(9))
  for leaf in jax.tree.leaves(state):
    copies = {np.asarray(s.data).tobytes() for s in leaf.addressable_shards}
    assert len(copies) == 1
    assert leaf.sharding == mesh_lib.replicated(step.mesh)
  assert np.isfinite(float(released["noisy_gradient_norm"]))
  return fingerprint.params_sha256((state, released))


@pytest.mark.parametrize(
  ("model", "optimizer"),
  [
    pytest.param("mlp", "adam", marks=pytest.mark.slow),
    pytest.param("mlp", "momentum", marks=pytest.mark.slow),
    pytest.param("cnn", "momentum", marks=pytest.mark.slow),
    pytest.param("decoder", "adam", marks=pytest.mark.slow),
  ],
)
def test_a_step_has_the_same_bits_on_every_mesh_for_chunks_of_any_size(
  model, optimizer
):
  _, params, data = _problem(model)
  step = _step(model, optimizer)
  expected = _digest(step, params, data, 64)
  # Each further device compiles the model once more.
  names = tuple(meshes.SHAPES) if model == "mlp" else ("1", "2", "4")
  for name, chunk_size in [
    ("1", 8),
    ("2", 64),
    ("2", 16),
    ("4", 128),
    ("8", 64),
    ("8, fsdp", 128),
    ("8, model", 32),
  ]:
    if name not in names:
      continue
    other = dataclasses.replace(step, mesh=meshes.of(name))
    got = _digest(other, params, data, chunk_size)
    assert got == expected, (name, chunk_size)


def _value(step, params, accumulator):
  """The exact sum in float64, one vector."""
  form = step.mechanism.sum_format(params)
  total, _ = step.reduce(accumulator)
  values = jax.tree.map(
    lambda _, limbs: sum(
      np.ldexp(np.asarray(limb, np.float64), -form.exponent - 20 * i)
      for i, limb in enumerate(limbs)
    ),
    params,
    total,
  )
  return np.concatenate([x.ravel() for x in jax.tree.leaves(values)])


def test_the_sum_is_that_of_floats_up_to_rounding():
  _, params, data = _problem("mlp")
  # Each device compiles for itself.
  exact = dataclasses.replace(_step("mlp", "adam"), mesh=meshes.of("2"))
  plain = step_lib.Step(exact.mechanism, exact.optimizer, exact.mesh)
  rows = np.arange(100)
  args = (params, data, rows, 64, jax.random.key(0))
  total = _value(exact, params, _accumulated(exact, *args))
  floats = _accumulated(plain, *args)
  expected = np.concatenate(
    [np.sum(x, 0).ravel() for x in jax.tree.leaves(floats.clipped_sum)]
  )
  assert np.linalg.norm(expected) > 2 * _CLIP
  np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
  stats, same = exact.stats(_accumulated(exact, *args)), plain.stats(floats)
  assert stats[:3] == same[:3]
  assert int(stats.num_examples) == 100


@pytest.mark.slow
def test_randomness_belongs_to_the_place_in_the_steps_list():
  loss = lambda params, example, rng: (
    params["w"][example["i"]] * jax.random.normal(rng),
    None,
  )
  bound = mechanism.make(_plan(l2_clip_norm=1e3), loss, exact_group_size=_GROUP)
  params = {"w": jnp.zeros(64)}
  exact = exact_step.ExactStep(bound, optax.sgd(1.0), meshes.of("2"))
  plain = step_lib.Step(bound, optax.sgd(1.0), meshes.of("2"))
  args = (params, {"i": np.arange(64)}, np.arange(64), 32, jax.random.key(9))
  draws = _value(exact, params, _accumulated(exact, *args))
  assert np.unique(draws).size == 64
  floats = _accumulated(plain, *args).clipped_sum["w"]
  np.testing.assert_allclose(draws, np.sum(floats, 0), atol=1e-4)


@pytest.mark.slow
def test_removing_any_example_moves_the_sum_within_the_sensitivity():
  """Though those after it move to other places, and to other groups."""
  _, params, data = _problem("mlp")
  step = dataclasses.replace(_step("mlp", "adam"), mesh=meshes.of("2"))
  rng = np.random.default_rng(2)
  # Dropout would go by the place; here every example keeps its gradient.
  loss = lambda p, e, rng: cross_entropy.loss_of(_NoDropout())(p, e, rng)
  step = dataclasses.replace(
    step, mechanism=mechanism.make(_plan(), loss, exact_group_size=_GROUP)
  )
  key = jax.random.key(0)
  furthest = 0.0
  for _ in range(60):
    scale = np.float32(10.0 ** rng.uniform(-2, 3))
    changed = data | {"inputs": data["inputs"] * scale}
    rows = np.sort(rng.choice(_NUM_EXAMPLES, 40, replace=False))
    without = np.delete(rows, rng.integers(len(rows)))
    one, two = (
      _value(step, params, _accumulated(step, params, changed, r, 48, key))
      for r in (rows, without)
    )
    furthest = max(furthest, np.linalg.norm(one - two))
  assert furthest <= step.mechanism.sensitivity == _CLIP
  assert furthest > 0.99 * _CLIP


class _NoDropout(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10, name="Dense_1")(
      nn.relu(nn.Dense(33, name="Dense_0")(x))
    )


def test_one_example_is_no_longer_than_the_clip_norm():
  _, params, data = _problem("mlp")
  step = _step("mlp", "adam")
  data = data | {"inputs": data["inputs"] * 100}
  norms = []
  for row in range(40):
    accumulator = _accumulated(
      step, params, data, np.array([row]), _GROUP, jax.random.key(row)
    )
    norms.append(np.linalg.norm(_value(step, params, accumulator)))
  # Rounding inside the group included, with the room that is left for it.
  assert max(norms) <= _CLIP * (1 - 2**-11)
  assert np.median(norms) > 0.99 * _CLIP


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
  "clip_norm",
  [
    pytest.param(1e-6, marks=pytest.mark.slow),
    0.75,
    pytest.param(3e5, marks=pytest.mark.slow),
  ],
)
@pytest.mark.slow
def test_all_examples_in_one_direction_do_not_overflow(sign, clip_norm):
  loss = lambda params, example, rng: (
    sign * 1e9 * params["w"][0] * example["x"],
    None,
  )
  plan = _plan(l2_clip_norm=clip_norm, noise_multiplier=1e-3)
  bound = mechanism.make(plan, loss, exact_group_size=_GROUP)
  bound = dataclasses.replace(bound, noise_stddev=0.0)
  step = exact_step.ExactStep(bound, optax.sgd(64.0), meshes.of("8"))
  params = {"w": jnp.zeros(3)}
  data = {"x": np.ones(_NUM_EXAMPLES + 1, np.float32)}

  def after(num_examples):
    state = step.init(jax.tree.map(jnp.array, params))
    rows, key = np.arange(num_examples), jax.random.key(0)
    accumulator = _accumulated(step, state.params, data, rows, 64, key)
    total = _value(step, params, accumulator)
    return total, step.apply(state, accumulator, key)[0].params["w"]

  group, _ = after(_GROUP)
  total, moved = after(_NUM_EXAMPLES)
  np.testing.assert_array_equal(total, group * (_NUM_EXAMPLES // _GROUP))
  assert total[0] * sign > 0.998 * _NUM_EXAMPLES * clip_norm
  np.testing.assert_allclose(-moved, total, rtol=1e-6)
  # More than the bound covers is not passed over.
  _, broken = after(_NUM_EXAMPLES + 1)
  assert np.all(np.isnan(broken))


def test_noise_has_its_standard_deviation_on_an_empty_step():
  loss = lambda params, example, rng: (jnp.sum(params["w"]), None)
  bound = mechanism.make(_plan(), loss, exact_group_size=_GROUP)
  step = exact_step.ExactStep(bound, optax.sgd(1.0), meshes.of("2"))
  state = step.init({"w": jnp.zeros(100_000)})
  after, _ = step.apply(state, step.zeros(state.params), jax.random.key(4))
  assert int(after.step) == int(after.noise_state.draws) == 1
  claimed = 1.5 * _CLIP / 64
  # Standard error 0.22 %.
  np.testing.assert_allclose(np.std(after.params["w"]) / claimed, 1, atol=0.015)
  plain = step_lib.Step(bound, optax.sgd(1.0), meshes.of("2"))
  state = plain.init({"w": jnp.zeros(100_000)})
  same, _ = plain.apply(state, plain.zeros(state.params), jax.random.key(4))
  np.testing.assert_allclose(
    after.params["w"], same.params["w"], rtol=1e-5, atol=1e-9
  )


def test_only_integers_meet_and_once():
  _, params, data = _problem("mlp")
  step = dataclasses.replace(_step("mlp", "adam"), mesh=meshes.of("8"))
  state = step.init(jax.tree.map(jnp.array, params))
  accumulator = step.zeros(state.params)
  collectives = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
  count = lambda text: [text.count(f" {name}(") for name in collectives]

  text = step.reduce.lower(accumulator).compile().as_text()
  assert count(text) == [1, 0, 0, 0]
  assert "f32" not in text
  one = dataclasses.replace(step, mesh=meshes.of("1"))
  key = jax.random.key(0)
  group = {name: x[:_GROUP] for name, x in data.items()}
  add = exact_step.add_group.lower(
    one.mechanism,
    params,
    one.zeros(params),
    group,
    np.zeros(_GROUP, bool),
    key,
    0,
  )
  total, num_examples = one.reduce(one.zeros(params))
  finish = exact_step.finish.lower(
    one.mechanism,
    one.optimizer,
    0.9,
    one.init(jax.tree.map(jnp.array, params)),
    total,
    num_examples,
    key,
  )
  for lowered in (add, finish):
    text = lowered.compile().as_text()
    assert count(text) == [0, 0, 0, 0]
    assert "num_partitions=" not in text


@pytest.mark.parametrize("mesh_name", ["1", "2"])
def test_what_rounds_is_compiled_for_one_device(mesh_name, monkeypatch):
  """Even on a mesh of one: its arrays make XLA compile another program."""
  shardings = set()

  def watch(compiled):
    def call(*args):
      arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
      shardings.update(type(x.sharding) for x in arrays)
      return compiled(*args)

    return call

  for name in ("add_group", "finish"):
    monkeypatch.setattr(exact_step, name, watch(getattr(exact_step, name)))
  _, params, data = _problem("mlp")
  step = dataclasses.replace(_step("mlp", "adam"), mesh=meshes.of(mesh_name))
  _digest(step, params, data, 64)
  assert shardings == {jax.sharding.SingleDeviceSharding}


@pytest.mark.slow
def test_a_groups_program_is_the_same_whatever_devices_there_are():
  """Convolutions are looked at by the compiler where there are several."""
  step, (_, params, data) = _step("cnn", "adam"), _problem("cnn")
  group = {name: x[:_GROUP] for name, x in data.items()}
  padding, key = np.zeros(_GROUP, bool), jax.random.key(0)
  args = (step.mechanism, params, step.zeros(params), group, padding, key, 0)
  found = str(exact_step.add_group.trace(*args).jaxpr)
  assert "conv_general_dilated" in found
  assert "inspect_sharding" not in found
  sums = functools.partial(step.mechanism.clipped_sum, params)
  assert "inspect_sharding" in str(
    jax.make_jaxpr(
      lambda batch: sums(
        batch, is_padding_example=padding, rng=jax.random.split(key, _GROUP)
      )
    )(group)
  )


def test_rows_that_make_no_whole_groups_are_refused():
  _, params, data = _problem("mlp")
  step = dataclasses.replace(_step("mlp", "adam"), mesh=meshes.of("2"))
  with pytest.raises(ValueError, match="4 rows a device for groups of 8"):
    _accumulated(step, params, data, np.arange(8), 8, jax.random.key(0))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"exact_group_size": 0}, r"exact_group_size .* got 0"),
    ({"exact_group_size": 2**13 + 1}, r"exact_group_size .* 8193"),
    ({"exact_group_size": 8, "microbatch_size": 3}, "divide .* 8, got 3"),
  ],
)
def test_bad_groups_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    mechanism.make(_plan(), lambda p, e, rng: (0.0, None), **changes)


def test_limbs_are_added_until_truncation_is_inside_the_sensitivity():
  for num_examples, num_entries, limbs in (
    (1000, 10**6, 2),
    (10**6, 10**8, 3),
    (10**9, 10**10, 4),
  ):
    plan = _plan(num_examples=num_examples, noise_multiplier=1.0)
    bound = mechanism.make(
      plan, lambda p, e, rng: (0.0, None), exact_group_size=32
    )
    params = {"w": jax.ShapeDtypeStruct((num_entries,), jnp.float32)}
    form = bound.sum_format(params)
    assert form.num_limbs == limbs
    groups = -(-num_examples // 32)
    rounding = 2 * groups * num_entries**0.5 * form.unit
    assert bound.clipped_grad.l2_clip_norm + rounding <= _CLIP


def test_no_noise_that_can_be_drawn_is_cut_off():
  """The law of the noise has its tails, as far as a float32 normal does."""
  made = mechanism.make(
    _plan(), lambda p, e, rng: (0.0, None), exact_group_size=_GROUP
  )
  form = made.sum_format({"w": jnp.zeros(8)})
  # `jax.random.normal` makes it of a uniform number in (-1, 1).
  last = np.nextafter(np.float32(1), np.float32(0))
  furthest = made.noise_stddev * math.sqrt(2) * jax.lax.erf_inv(last)
  assert furthest > 5.4 * made.noise_stddev
  for noise in (furthest, -furthest):
    limbs = fixed_point.split(form, noise, made.largest_noise, is_floored=True)
    found = fixed_point.to_float(form, fixed_point.carry(limbs), jnp.float32)
    np.testing.assert_allclose(found, noise, rtol=1e-6)


def test_noise_on_the_sum_of_2048_devices_does_not_overflow():
  """Each has a sum just below 0, whose limbs are as large as they get."""
  step = _step("mlp", "momentum")
  _, params, _ = _problem("mlp")
  form = step.mechanism.sum_format(params)
  one = fixed_point.add(
    fixed_point.zeros(form, ()),
    fixed_point.split(form, jnp.float32(-2 * form.unit), 1.0),
  )
  # As devices add: modulo 2**32, without carries.
  reduced = tuple(jnp.int32(np.int32(int(x) * 2048)) for x in one)

  def end(limbs):
    state = step.initial(jax.tree.map(jnp.array, params))
    total = jax.tree.map(
      lambda x: tuple(jnp.broadcast_to(y, x.shape) for y in limbs), params
    )
    return exact_step.finish(
      step.mechanism,
      step.optimizer,
      step.ema_decay,
      state,
      total,
      jnp.int32(0),
      jax.random.key(9),
    )[0].params

  # The same number, with limbs that leave room for everything.
  carried = end(fixed_point.carry(reduced))
  assert fingerprint.params_sha256(end(reduced)) == fingerprint.params_sha256(
    carried
  )


def test_more_devices_than_a_sum_has_room_for_are_refused(monkeypatch):
  monkeypatch.setattr(fixed_point, "MOST_DEVICES", 4)
  with pytest.raises(ValueError, match=r"exact_sum must be False .* got 8"):
    dataclasses.replace(_step("mlp", "momentum"), mesh=meshes.of("8"))


@pytest.mark.parametrize("changes", [{"l2_clip_norm": 1e30}])
def test_a_sum_beyond_float32_is_refused(changes):
  with pytest.raises(ValueError, match=r"l2_clip_norm .* got 1e\+30"):
    mechanism.make(
      _plan(**changes), lambda p, e, r: (0.0, None), exact_group_size=8
    )


def test_what_any_group_of_a_chunk_shows_is_kept():
  groups = [
    watched.Seen(jnp.array([[i, 0]]), jnp.full(2, float(i))) for i in (1, 0, 2)
  ]
  seen = exact_step._together(groups)
  assert seen.found.tolist() == [[3, 0]]
  assert seen.norms.tolist() == [1, 1, 0, 0, 2, 2]


def test_a_group_of_microbatches_is_summed_without_rounding():
  """Of gradients that nothing cuts off, at many scales."""
  made = mechanism.make(
    _plan(),
    lambda params, x, rng: (jnp.sum(params * x), None),
    exact_group_size=_GROUP,
    microbatch_size=1,
  )
  rng = np.random.default_rng(0)
  x = rng.normal(size=(_GROUP, 64)) * 10.0 ** rng.uniform(-6, -2, (_GROUP, 64))
  x = x.astype(np.float32)
  params = jnp.zeros(64)
  form = made.sum_format(params)
  empty = step_lib.Accumulator(
    fixed_point.zeros(form, (1, 64)), stats_lib.no_stats(1)
  )
  after = exact_step.add_group(
    made, params, empty, x, np.zeros(_GROUP, bool), jax.random.key(0), 0
  )
  limbs = np.stack([np.asarray(x[0], np.int64) for x in after.clipped_sum])
  found = sum(
    limb * math.ldexp(1.0, -form.exponent - 20 * i)
    for i, limb in enumerate(limbs)
  )
  exact = np.array([math.fsum(column) for column in x.T])
  # Each of the two parts is truncated.
  assert np.max(np.abs(found - exact)) < 2 * form.unit
  assert np.max(np.abs(x.sum(0) - exact)) > 100 * form.unit
