"""What rounding can do to a sum of clipped gradients is bounded."""

import dataclasses
import functools
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import dpdist
from dpdist import clipping
from dpdist.clipping.engines import microbatches
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism
from dpdist.privacy import rounding
from dpdist.sums import compensated
from dpdist.training import step as step_lib
from dpdist.training import summary
from tests.support import meshes

_CHUNK = 64
_ROUNDOFF = 2.0**-24


def _plan(**changed):
  return dpdist.make_plan(
    dpdist.PrivacyConfig(
      **{
        "num_examples": 4096,
        "expected_batch_size": 4096.0,
        "num_steps": 1,
        "l2_clip_norm": 1.0,
        "target_delta": 1e-6,
        "noise_multiplier": 1.0,
      }
      | changed
    )
  )


def _drifting(num_chunks=64):
  """Rows, chunk by chunk, whose float32 sum loses all after the first half.

  The first half adds up to 2048; each chunk after it to just less than half of
  the last bit of that.
  """
  rows = np.zeros((num_chunks, _CHUNK), np.float32)
  rows[: num_chunks // 2] = 1
  rows[num_chunks // 2 :, 0] = 2.0**-13 - 2.0**-20
  return rows.reshape(-1)


def _linear(params, example, rng=None):
  del rng
  return jnp.dot(params, example), None


@functools.cache
def _step(mesh_name):
  made = mechanism.make(_plan(), _linear)
  # The rate takes back the division by the batch.
  quiet = dataclasses.replace(made, noise_stddev=0.0)
  return step_lib.Step(quiet, optax.sgd(4096.0), meshes.of(mesh_name))


def _released(step, rows):
  """The sum of a step, as its update tells it."""
  put = lambda x: jax.device_put(x, mesh_lib.examples(step.mesh))
  state = step.init(jnp.zeros(1))
  accumulator = step.zeros(state.params)
  size = _CHUNK * mesh_lib.num_example_shards(step.mesh)
  padded = np.zeros(len(rows) + -len(rows) % size, np.float32)
  padded[: len(rows)] = rows
  for first in range(0, len(padded), size):
    accumulator = step.accumulate(
      state.params,
      accumulator,
      put(padded[first : first + size, None]),
      put(np.arange(first, first + size) >= len(rows)),
      jax.random.key(0),
      first,
    )
  after, _ = step.apply(state, accumulator, jax.random.key(1))
  return -float(np.asarray(after.params)[0])


def _last_bit(rows):
  return float(np.spacing(np.float32(math.fsum(rows))))


@pytest.mark.parametrize("mesh_name", ["1", "8"])
def test_a_step_of_many_chunks_is_rounded_once(mesh_name):
  rows = _drifting()
  if mesh_name == "8":
    # Each device gets such rows as the one did.
    chunks = np.repeat(rows.reshape(-1, 1, _CHUNK), 8, axis=1)
    rows = chunks.reshape(-1)
  step = _step(mesh_name)
  whole, without = _released(step, rows), _released(step, rows[1:])
  bit = _last_bit(rows)
  assert abs(whole - math.fsum(rows)) <= bit
  assert abs(without - math.fsum(rows[1:])) <= bit
  # With plain sums all that the second half adds is lost.
  assert math.fsum(rows) - rows.reshape(-1)[rows == 1].sum() > 7 * bit


def test_sums_of_devices_lose_nothing():
  """On the compiled program of eight devices, against exact sums."""
  step = _step("8")
  rng = np.random.default_rng(0)
  # At all scales, of both signs: sums that cancel too.
  high = rng.normal(size=(8, 512)) * 10.0 ** rng.uniform(-6, 1.8, (8, 512))
  high[4:] = np.where(rng.random((4, 512)) < 0.3, -high[:4], high[4:])
  high = high.astype(np.float32)
  low = (high * rng.uniform(-1, 1, (8, 512)) * 2.0**-25).astype(np.float32)
  state = step.init(jnp.zeros(512))
  put = lambda x: jax.device_put(x, step.zeros(state.params).low.sharding)
  accumulator = step.zeros(state.params)._replace(
    clipped_sum=put(high), low=put(low)
  )
  after, _ = step.apply(state, accumulator, jax.random.key(1))
  exact = [math.fsum([*a, *b]) for a, b in zip(high.T, low.T, strict=True)]
  error = -np.asarray(after.params, np.float64) - np.array(exact)
  (unit,) = step.mechanism.grid(state.params, 8)
  # Half of the last bit of the result, and what adding rests loses.
  allowed = np.spacing(np.abs(exact).astype(np.float32)) * 0.501
  assert np.all(np.abs(error) <= allowed + _ROUNDOFF * 72 * unit)


def test_a_sum_and_its_noise_are_rounded_together():
  made = mechanism.make(_plan(), _linear)
  rng = np.random.default_rng(1)
  high = rng.normal(size=4096).astype(np.float32)
  low = (high * rng.uniform(-1, 1, 4096) * 2.0**-25).astype(np.float32)
  key = jax.random.key(3)
  state = made.init(None)
  total = compensated.Sum(jnp.asarray(high), jnp.asarray(low))
  got, after = jax.jit(made.add_noise)(total, state, key)
  drawn, _ = jax.jit(made.draw_noise)(jnp.zeros(4096), state, key)
  exact = high.astype(np.float64) + low + np.asarray(drawn, np.float64)
  assert int(after.draws) == 1
  # The product of noise and deviation may be fused into the sum: rare.
  assert np.mean(got == exact.astype(np.float32)) > 0.999
  assert np.mean(got == high + np.asarray(drawn)) < 0.9


@pytest.mark.parametrize("kind", ["random", "one way", "cancelling"])
def test_compensated_sums_are_within_their_bound(kind):
  rng = np.random.default_rng(2)
  x = rng.uniform(0, 1, (2000, 8)) * 10.0 ** rng.uniform(-8, 0, (2000, 8))
  if kind == "one way":
    # Each addition to a plain sum would be rounded the same way.
    x[0], x[1:] = 2048, 2.0**-13 - 2.0**-20
  elif kind == "cancelling":
    x[1000:] = -x[:1000][::-1] + 1e-9
  x = x.astype(np.float32)

  def add(total, x):
    # A product, that a compiler would fuse into the addition.
    return compensated.add(total, 3 * x), None

  total, _ = jax.jit(
    lambda x: jax.lax.scan(add, compensated.zeros_like(x[0]), x)
  )(x)
  x = np.float32(3) * x
  exact = np.array([math.fsum(column) for column in x.T])
  partial = np.abs(np.cumsum(x.astype(np.float64), axis=0)).sum(axis=0)
  error = np.asarray(total.high, np.float64) + np.asarray(total.low) - exact
  assert np.all(np.abs(error) <= 2.001 * _ROUNDOFF**2 * partial)
  assert np.all(np.abs(total.low) <= _ROUNDOFF * np.abs(total.high))


@pytest.mark.parametrize("unroll", [False, True])
def test_microbatches_keep_what_float32_rounds_away(unroll):
  rows = _drifting(num_chunks=8)
  rows[: 4 * _CHUNK] *= 8  # 2048 again.
  part = lambda rows: ([jnp.sum(rows)[None]], rows, rows, rows)
  run = functools.partial(
    microbatches.run,
    part,
    batch_size=len(rows),
    size=_CHUNK,
    axes=frozenset(),
    unroll=unroll,
    keep_low=True,
  )
  total, loss, _, _ = jax.jit(lambda rows: run((rows,)))(rows)
  exact = math.fsum(rows)
  assert float(total.high[0][0]) + float(total.low[0][0]) == exact
  assert exact - 2048 > 1.9 * _last_bit(rows)
  np.testing.assert_array_equal(loss, rows)


def test_a_clipped_sum_of_microbatches_has_its_low_part():
  rows = _drifting(num_chunks=8)[:, None]
  fn = clipping.clipped_grad(
    lambda p, x: _linear(p, x)[0], l2_clip_norm=1.0, microbatch_size=_CHUNK
  )
  got = jax.jit(fn)(jnp.zeros(1), rows)
  assert float(got.sum[0]) + float(got.low[0]) == math.fsum(rows[:, 0])
  alone = jax.eval_shape(fn, jnp.zeros(1), rows[:_CHUNK])
  assert alone.low is None


def test_a_virtual_step_is_rounded_once():
  rows = _drifting().reshape(-1, _CHUNK, 1)
  step = clipping.VirtualStep(
    clipping.clipped_grad(lambda p, x: _linear(p, x)[0], l2_clip_norm=1.0)
  )
  for part in rows:
    step.add(jnp.zeros(1), part)
  value = float(step.finish().value[0])
  assert abs(value - math.fsum(rows.ravel())) <= _last_bit(rows.ravel()) / 2


# The bound itself.


def test_a_step_holds_no_more_than_it_says():
  for n, size in ((60_000, 256.0), (1438, 128.0), (50_000, 4096.0), (10, 1.0)):
    plan = _plan(num_examples=n, expected_batch_size=size)
    most = rounding.most_examples(plan)
    assert scipy.stats.binom.sf(most, n, size / n) <= rounding.TAIL
    # Chernoff's bound is not far from it.
    assert most <= size + 12 * math.sqrt(size) + 30
  assert rounding.most_examples(_plan()) == 4096
  fixed = _plan(
    expected_batch_size=64.0,
    sampling="fixed_size",
    neighboring_relation="replace_one",
  )
  assert rounding.most_examples(fixed) == 64
  cut = _plan(
    expected_batch_size=64.0,
    sampling="truncated_poisson",
    truncated_batch_size=96,
  )
  assert rounding.most_examples(cut) == 96
  grown = _plan(
    expected_batch_size=64.0, batch_size_schedule=((1, 512.0),), num_steps=2
  )
  assert rounding.most_examples(grown) == rounding.most_examples(
    _plan(expected_batch_size=512.0)
  )


@pytest.mark.parametrize("order", ["one by one", "random"])
def test_no_order_of_additions_loses_more_than_the_bound(order):
  rng = np.random.default_rng(3)
  size = 64
  bound = rounding.bound(
    _plan(), microbatch_size=size, rows_per_device=size, num_entries=16
  )
  allowed = bound.inside / (2 * (4096 / size))
  worst = 0.0
  for _ in range(200):
    x = rng.normal(size=(size, 16)) + rng.uniform(0, 3)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    nodes = list(x)
    while len(nodes) > 1:
      i = 0 if order == "one by one" else rng.integers(len(nodes))
      one = nodes.pop(i)
      j = 0 if order == "one by one" else rng.integers(len(nodes))
      nodes[j] = one + nodes[j]
    exact = x.astype(np.float64).sum(axis=0)
    worst = max(worst, np.linalg.norm(nodes[0] - exact))
  assert 0 < worst <= allowed


def test_the_bound_follows_plan_and_shapes():
  poisson = _plan(num_examples=60_000, expected_batch_size=256.0)
  of = functools.partial(
    rounding.bound, poisson, rows_per_device=256, num_entries=10**6
  )
  one = of(microbatch_size=1)
  assert one.inside == 0
  assert 0 < one.across < 1e-7
  assert one.num_examples == 420
  # Each of so many more chunks is rounded once more.
  assert of(microbatch_size=1, rows_per_device=1).across > one.across
  assert of(microbatch_size=1000).part_size == 420
  some = of(microbatch_size=32)
  assert some.inside == pytest.approx(420 * 33 * 2.0**-24, rel=1e-3)
  assert of(microbatch_size=8, num_sharing=4).inside == some.inside
  assert of(microbatch_size=32, is_cut=True).inside > 1.9 * some.inside
  # Of few examples a group it fits into the room of exact sums, of many not.
  assert of(microbatch_size=8, is_exact=True).inside == 0
  assert of(microbatch_size=128, is_exact=True).inside > 1e-3
  few = of(microbatch_size=8)
  assert of(microbatch_size=8, num_devices=8).across > few.across
  # Who is replaced in place moves nobody.
  exchanged = _plan(
    num_examples=60_000,
    expected_batch_size=256.0,
    neighboring_relation="zero_out",
  )
  moved = rounding.bound(
    exchanged, microbatch_size=32, rows_per_device=32, num_entries=1
  )
  assert moved.inside == pytest.approx(32 * 33 * 2.0**-24, rel=1e-3)


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize(("name", "sharing"), [("8", 1), ("8, fsdp", 4)])
def test_what_is_told_counts_all_that_add_up_at_once(
  name, sharing, microbatch_size
):
  plan = _plan(num_examples=60_000, expected_batch_size=256.0)
  made = mechanism.make(plan, _linear, microbatch_size=microbatch_size)
  job = types.SimpleNamespace(
    plan=plan,
    mesh=meshes.of(name),
    chunk_size=64,
    params=jnp.zeros(4),
    step=types.SimpleNamespace(mechanism=made),
  )
  told = summary.rounding(job)
  assert told.part_size == (microbatch_size or 8) * sharing
  assert told == rounding.bound(
    plan,
    microbatch_size=microbatch_size or 8,
    rows_per_device=8,
    num_entries=4,
    num_devices=8,
    num_sharing=sharing,
  )


@pytest.mark.parametrize("num_devices", [2, 8, 2048])
@pytest.mark.parametrize("num_entries", [1, 10**6, 10**10])
def test_pieces_of_devices_add_up_exactly(num_devices, num_entries):
  plan = _plan(
    num_examples=10**6, expected_batch_size=60_000.0, l2_clip_norm=0.37
  )
  units = rounding.grid(plan, num_devices, num_entries)
  assert all(math.frexp(unit)[0] == 0.5 for unit in units)
  largest = rounding.most_examples(plan) * plan.l2_clip_norm
  assert largest + num_devices * units[0] / 2 <= 2.0**24 * units[0]
  for unit, finer in itertools.pairwise(units):
    assert num_devices * (unit + finer / 2) <= 2.0**24 * finer
  bound = rounding.bound(
    plan,
    microbatch_size=8,
    rows_per_device=64,
    num_entries=num_entries,
    num_devices=num_devices,
  )
  assert bound.across < 1e-3


@pytest.mark.parametrize("size", [7, 16])
def test_an_example_has_the_same_bits_at_any_place(size):
  """What the bound for parts of one example, and for exchanges, rests on."""
  rng = np.random.default_rng(4)
  params = {
    "kernel": rng.normal(size=(3, 3, 1, 5)).astype(np.float32),
    "w": rng.normal(size=(180, 9)).astype(np.float32),
  }

  def loss(params, x):
    x = jax.lax.conv(
      x[None, None], params["kernel"].transpose(3, 2, 0, 1), (1, 1), "SAME"
    )
    return jnp.sum(jnp.tanh(jnp.tanh(x).reshape(-1) @ params["w"]) ** 2)

  batch = rng.normal(size=(size, 6, 6)).astype(np.float32)
  fn = jax.jit(
    clipping.clipped_grad(loss, l2_clip_norm=1.0, microbatch_size=size)
  )
  expected = fn(params, batch)
  for places in (1, 3):
    got = fn(params, np.roll(batch, places, axis=0))
    for name in ("grad_norms", "loss"):
      np.testing.assert_array_equal(
        np.roll(getattr(got, name), -places), getattr(expected, name)
      )
