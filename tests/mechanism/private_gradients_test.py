"""Private gradients in one line."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import dpdist
from dpdist.mechanism import private_gradients
from dpdist.noise import noise
from tests.support import turns

pytestmark = pytest.mark.usefixtures("quick_compiles")

_CONFIG = {
  "num_examples": 100,
  "expected_batch_size": 10,
  "num_steps": 3,
  "l2_clip_norm": 2.0,
  "target_delta": 1e-5,
  "noise_multiplier": 1.5,
}
_PLAN = dpdist.make_plan(dpdist.PrivacyConfig(**_CONFIG))
_SEED = b"not a secret"


def _loss(params, x):
  return 0.5 * jnp.sum((params["w"] - x) ** 2) * params["scale"], {"x": x}


def _params(size=3):
  return {"scale": jnp.ones(()), "w": jnp.zeros(size)}


def _batch(*shape):
  rng = np.random.default_rng(shape)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _make(group_size=1, **kwargs):
  given = {"seed": _SEED, "has_aux": True} | kwargs
  plan = _PLAN
  if group_size != 1:
    plan = dataclasses.replace(
      _PLAN, group_size=group_size, neighboring_relation="zero_out"
    )
  return dpdist.private_gradients(_loss, plan, **given)


def _without_noise(fn, got, stddev):
  """The gradient times the expected batch, less the noise."""
  zeros = jax.tree.map(jnp.zeros_like, got.gradient)
  transform = noise.gaussian_noise(stddev, _SEED)
  drawn, _ = jax.jit(transform.update)(zeros, transform.init(zeros))
  scale = fn.plan.expected_batch_size / fn.plan.group_size
  return jax.tree.map(lambda g, n: g * scale - n, got.gradient, drawn)


_OPTIONS = {
  "flat": ({}, 2.0),
  "norm accumulation": ({"method": "two_pass"}, 2.0),
  "own norm": ({"l2_clip_norm": 0.5}, 0.5),
  "by layer": ({"l2_clip_norm": {"scale": 3.0, "w": 4.0}}, 5.0),
  "rescaled": ({"rescale_to_unit_norm": True}, 1.0),
  "frozen": ({"frozen": lambda path: path == "scale"}, 2.0),
  "groups": ({"group_size": 4, "rows_are_fixed": True}, 2.0),
}


@pytest.mark.parametrize(
  "name", turns.cells(_OPTIONS, always=("flat", "by layer", "groups"))
)
def test_it_is_the_clipped_sum_and_noise_over_the_expected_batch(name):
  options, sensitivity = _OPTIONS[name]
  fn = _make(**options)
  params, batch = _params(), 2 * _batch(8, 3)
  got, state = jax.jit(fn)(params, batch, fn.init(params))
  assert int(state.draws) == 1
  assert fn.sensitivity == sensitivity
  assert fn.noise_stddev == 1.5 * sensitivity
  clip = {"l2_clip_norm": 2.0, "method": "vmap"} | options
  size = clip.pop("group_size", 1)
  clip.pop("rows_are_fixed", None)
  if size == 1:
    expected = dpdist.clipped_grad(_loss, has_aux=True, **clip)
    total = jax.jit(lambda p, x: expected(p, x).sum)(params, batch)
  else:
    w = -np.asarray(batch).reshape(2, 4, 3).mean(1)
    scale = 0.5 * np.square(batch).sum(1).reshape(2, 4).mean(1)
    factor = np.minimum(1, 2.0 / np.sqrt((w**2).sum(1) + scale**2))
    total = {"scale": factor @ scale, "w": factor @ w}
  for mine, theirs in zip(
    jax.tree.leaves(_without_noise(fn, got, 1.5 * sensitivity)),
    jax.tree.leaves(total),
    strict=True,
  ):
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_noise_has_the_deviation_of_the_plan():
  # The deviation's own standard error is 0.32 % of it, so that 2 % is 6.
  params = _params(50_000)
  for size, expected in ((1, 0.3), (4, 1.2)):
    fn = _make(group_size=size, rows_are_fixed=True)
    batch, padding = jnp.zeros((4, 50_000)), np.ones(4, bool)
    got, _ = jax.jit(fn)(
      params, batch, fn.init(params), is_padding_example=padding
    )
    np.testing.assert_allclose(np.std(got.gradient["w"]), expected, rtol=0.02)


def test_schedules_are_read_at_the_step_that_is_made():
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      **_CONFIG,
      noise_schedule=((1, 6.0),),
      batch_size_schedule=((2, 40.0),),
      accountant="rdp",
    )
  )
  fn = dpdist.private_gradients(_loss, plan, seed=_SEED, has_aux=True)
  compiled, params = jax.jit(fn), _params(50_000)
  batch, padding = jnp.zeros((1, 50_000)), np.ones(1, bool)
  state, got = fn.init(params), []
  for _ in range(3):
    found, state = compiled(params, batch, state, is_padding_example=padding)
    got.append(np.std(found.gradient["w"]))
  np.testing.assert_allclose(got, [0.3, 1.2, 0.3], rtol=0.02)


@pytest.mark.parametrize("size", [1, 2])
def test_values_are_means_over_real_examples(size):
  fn = _make(group_size=size, rows_are_fixed=True)
  padding = np.array([0, 0, 1, 0, 1, 1], bool)
  x = np.asarray(_batch(6, 3))
  batch = jnp.asarray(np.where(padding[:, None], np.nan, x))
  state = fn.init(_params())
  got, _ = jax.jit(fn)(_params(), batch, state, is_padding_example=padding)
  losses = 0.5 * np.square(x).sum(1)
  np.testing.assert_allclose(got.loss, losses[~padding].mean(), rtol=1e-5)
  np.testing.assert_allclose(got.aux["x"], x[~padding].mean(0), rtol=1e-5)
  assert np.all(np.isfinite(got.gradient["w"]))


def test_nobody_drawn_is_noise_all_the_same():
  fn = _make()
  got, _ = jax.jit(fn)(
    _params(),
    _batch(4, 3),
    fn.init(_params()),
    is_padding_example=np.ones(4, bool),
  )
  assert np.isnan(got.loss)
  assert np.all(np.asarray(got.gradient["w"]) != 0)
  rest = _without_noise(fn, got, fn.noise_stddev)
  np.testing.assert_allclose(rest["w"], 0, atol=1e-5)


def test_steps_draw_anew_and_end_with_the_plan():
  fn = _make()
  compiled = jax.jit(fn)
  state, seen = fn.init(_params()), []
  for _ in range(_PLAN.num_steps):
    got, state = compiled(_params(), _batch(4, 3), state)
    seen.append(np.asarray(got.gradient["w"]))
  assert np.unique(seen).size == 3 * _PLAN.num_steps
  assert np.all(np.isfinite(seen))
  over, _ = compiled(_params(), _batch(4, 3), state)
  assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(over.gradient))
  with pytest.raises(ValueError, match=r"state .* last step, 3, got 3.* spent"):
    fn(_params(), _batch(4, 3), state)


def test_each_example_has_its_own_randomness():
  loss = lambda p, x, rng: (p * x, jax.random.normal(rng) ** 2)
  fn = dpdist.private_gradients(loss, _PLAN, seed=1, has_aux=True)
  keys = jax.random.split(jax.random.key(1), 4)
  got, _ = jax.jit(fn)(jnp.ones(()), jnp.ones(4), fn.init(0), rng=keys)
  expected = np.mean(np.square(jax.jit(jax.vmap(jax.random.normal))(keys)))
  np.testing.assert_allclose(got.aux, expected, rtol=1e-5)


def test_a_key_that_can_be_guessed_is_refused_where_privacy_rests_on_it():
  """One key goes by row: a row less, and the other rows have other keys."""
  loss = lambda p, x, rng: p * x * jax.random.normal(rng)
  for seed, is_private in ((_SEED, True), (1, False)):
    fn = dpdist.private_gradients(loss, _PLAN, seed=seed)
    args = jnp.ones(()), jnp.ones(4), fn.init(0)
    compiled = jax.jit(fn)
    if is_private:
      with pytest.raises(ValueError, match=r"rng must be a secret key, .* int"):
        fn(*args, rng=jax.random.key(5))
    else:  # Nothing rests on it: the noise is public.
      compiled(*args, rng=jax.random.key(5))
    compiled(*args, rng=jax.random.split(jax.random.key(5), 4))
    with pytest.raises(ValueError, match=r"rng must be typed PRNG .* got 5"):
      fn(*args, rng=5)


def test_repr_tells_settings_and_no_secret():
  fn = _make(
    group_size=2, rows_are_fixed=True, method="two_pass", l2_clip_norm=0.5
  )
  text = repr(fn)
  for part in ("group_size=2", "'two_pass'", "l2_clip_norm=0.5", "frozen=None"):
    assert part in text
  assert "noise_stddev=0.75" in text
  words = np.asarray(jax.random.key_data(noise.key_of(_SEED)))
  for secret in (_SEED.decode(), "key", *map(str, words)):
    assert secret not in text


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_do_not_each_draw(check_vma):
  fn = _make()
  run = jax.shard_map(
    lambda p, x: fn(p, x, fn.init(p))[0].gradient,
    mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
    in_specs=(PartitionSpec(), PartitionSpec("data")),
    out_specs=PartitionSpec(),
    check_vma=check_vma,
  )
  with pytest.raises(ValueError, match=r"batch must be on one .*'data'"):
    run(_params(), _batch(8, 3))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"batch_axis": 1}, r"batch_axis must be 0, got 1"),
    ({"group_size": 0}, r"group_size .* >= 1, got 0"),
    ({"group_size": 4}, r"group_size .* 1, got 4, unless rows_are_fixed=True"),
    ({"seed": 1.5}, r"seed must be an int"),
    ({"l2_clip_norm": -1.0}, r"l2_clip_norm .* -1\.0"),
    ({"method": "magic"}, r"method .* 'magic'"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    _make(**arguments)
  with pytest.raises(ValueError, match=r"plan must come from .* None"):
    dpdist.private_gradients(_loss, None, seed=1)


def test_optax_alone_does_the_same():
  # clipped sum -> noise -> expected batch -> any optimizer.
  params, batch = _params(), _batch(8, 3)
  clipped = dpdist.clipped_grad(_loss, l2_clip_norm=2.0, has_aux=True)
  stddev = _PLAN.noise_multiplier * clipped.sensitivity()
  chain = optax.chain(
    dpdist.gaussian_noise(stddev, _SEED),
    optax.scale(1 / _PLAN.expected_batch_size),
    optax.adam(0.1),
  )

  @jax.jit
  def chained(params, batch):
    total = clipped(params, batch).sum
    return chain.update(total, chain.init(params), params)[0]

  one = chained(params, batch)

  fn, adam = _make(), optax.adam(0.1)
  got, _ = jax.jit(fn)(params, batch, fn.init(params))
  two, _ = adam.update(got.gradient, adam.init(params), params)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_public_name_is_the_function():
  assert dpdist.private_gradients is private_gradients.private_gradients
