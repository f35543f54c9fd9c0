"""The sentinel finds a wrong rule, before a run and while it runs.

Rules are made wrong on purpose. Statistical claims have fixed keys: of a right
program no example is found, and of a norm that is 1 % of what it should be an
example is found with probability above 0.9 at a look.
"""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpdist
from dpdist import clipping
from dpdist import config as config_lib
from dpdist import errors
from dpdist import models
from dpdist.clipping import watched
from dpdist.clipping.engines import bookkeeping
from dpdist.clipping.layers import inner_products
from dpdist.keys import keys
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.sensitivity import comparison
from dpdist.sensitivity import made_up_examples
from dpdist.tasks import cross_entropy
from dpdist.tasks import from_config
from dpdist.training import exact_step
from dpdist.training import setup
from dpdist.training import step as step_lib
from dpdist.training import step_sentinel
from tests.support import commands
from tests.support import meshes

pytestmark = pytest.mark.usefixtures("quick_compiles")

_CLIP = 0.1
_ROWS = 16


def _loss(params, example, rng=None):
  """Bytes that are looked up, a product, a bias."""
  del rng
  seen = jnp.mean(jnp.take(params["table"], example["ids"], axis=0), axis=0)
  out = jnp.tanh(seen @ params["w"] + params["b"])
  return 50 * jnp.sum((out - example["y"]) ** 2)


def _with_aux(*args):
  return _loss(*args), None


def _params():
  rng = np.random.default_rng(0)
  sizes = {"table": (32, 8), "w": (8, 4), "b": (4,)}
  return {
    name: jnp.asarray(rng.normal(size=size), jnp.float32)
    for name, size in sizes.items()
  }


def _batch(rows=_ROWS):
  rng = np.random.default_rng(1)
  return {
    "ids": rng.integers(0, 32, (rows, 6)).astype(np.uint8),
    "y": rng.normal(size=(rows, 4)).astype(np.float32),
  }


def _shapes(batch):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch
  )


def _direction(params, seed=0):
  key = jax.random.key(seed)
  return jax.tree.map(
    lambda x: jax.random.normal(key, x.shape, x.dtype), params
  )


def _weaken(monkeypatch, name, part):
  """Takes norms of the gradients of one kind of product for a part of them."""
  norm = bookkeeping.norm

  def wrong(problem, rule, *args):
    size, formed = norm(problem, rule, *args)
    is_it = any(use.name == name for use in rule.uses)
    return size * (part if is_it else 1), formed

  monkeypatch.setattr(bookkeeping, "norm", wrong)


def _step(mesh, *, loss=_with_aux, exact=False, **changes):
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
  made = mechanism.make(
    plan, loss, exact_group_size=1 if exact else None, **changes
  )
  kind = exact_step.ExactStep if exact else step_lib.Step
  return kind(made, optax.sgd(1.0), mesh)


def _check(step, *, frozen=None, params=None):
  batch = _batch()
  params = _params() if params is None else params
  return step_sentinel.check_step(
    step,
    step.placed(params),
    frozen,
    row=_shapes(batch),
    largest={"ids": 31, "y": 0},
    chunk_size=_ROWS,
  )


def test_right_rules_pass_on_eight_devices():
  step, tried = _step(meshes.of("8")), []
  accumulate = step.accumulate

  def note(params, accumulator, batch, is_padding, *rest):
    tried.append(jax.tree.map(np.asarray, (batch, is_padding)))
    return accumulate(params, accumulator, batch, is_padding, *rest)

  step.__dict__["accumulate"] = note
  report = _check(step)
  assert report.num_examples >= 8
  assert set(report.ways) == {"table", "w", "b"}
  # Each device has its turn, beside padding and beside others.
  beside_padding = [padding for _, padding in tried if np.any(padding)]
  assert 0 < len(beside_padding) < len(tried)
  rows = {int(*np.flatnonzero(~padding)) for padding in beside_padding}
  assert {row // (_ROWS // 8) for row in rows} == set(range(8))
  # What lies beside an example would be seen in whatever looks at it.
  for batch, is_padding in tried:
    assert np.all(np.isnan(batch["y"][is_padding]))
    assert np.all(batch["ids"][is_padding] == 255)
    assert np.all(np.isfinite(batch["y"][~is_padding]))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("8", {"exact": True}),
    ("8, fsdp", {}),
    ("8", {"method": "two_pass"}),
    ("8", {"method": "vmap"}),
    ("8", {"microbatch_size": 1}),
  ],
)
def test_right_rules_pass_on_any_mesh(name, changes):
  step = _step(meshes.of(name), **changes)
  assert _check(step).num_examples >= 8


def test_a_wrong_rule_is_named_before_anything_is_charged(monkeypatch):
  _weaken(monkeypatch, "gather", 0.1)
  with pytest.raises(errors.SensitivityError, match=r"params/table .*gather"):
    _check(_step(meshes.of("8")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "exact", "two_pass"])
def test_a_wrong_rule_is_found_on_any_mesh(monkeypatch, name):
  _weaken(monkeypatch, "gather", 0.01)
  step = {
    "fsdp": lambda: _step(meshes.of("8, fsdp")),
    "exact": lambda: _step(meshes.of("8"), exact=True),
    "two_pass": lambda: _step(meshes.of("8"), method="two_pass"),
  }[name]()
  with pytest.raises(errors.SensitivityError):
    _check(step)


def test_a_norm_without_its_guard_is_found(monkeypatch):
  """Terms that cancel: without a guard the norm is rounding error."""
  bare = lambda square, error, terms: jnp.sqrt(jnp.maximum(square, 0))
  monkeypatch.setattr(inner_products, "from_inner_products", bare)
  monkeypatch.setattr(inner_products, "with_room", lambda root, *rest: root)
  loss = lambda params, x: jnp.sum((x[0] @ params) * x[1])
  batch = (np.zeros((2, 8, 64), np.float32),) * 2
  with pytest.raises(errors.SensitivityError, match="long where its bound"):
    dpdist.check_sensitivity(
      loss, jnp.zeros((64, 64)), batch, l2_clip_norm=_CLIP, platform="cpu"
    )


def _one(**changes):
  """A right measurement of one example, of two parameters, that is clipped."""
  right = {
    **{"length": [_CLIP], "norm": [2.0], "truth": [2.0], "again": [2.0]},
    **{"is_finite": [True, True], "share": [0.8, 0.6]},
    **{"differs": [0.0, 0.0], "varies": [0.0, 0.0]},
  }
  return comparison.Measured(**right | changes)


@pytest.mark.parametrize(
  ("changes", "what"),
  [
    ({}, None),
    ({"norm": [2.5], "length": [0.8 * _CLIP]}, None),  # Longer than it is.
    ({"norm": [np.nan]}, None),  # Not known.
    ({"is_finite": [True, False]}, "not finite"),
    ({"length": [1.1 * _CLIP]}, "where its bound is"),
    # Within the bound, and yet the norm or the sum is that of something else.
    ({"norm": [1.9]}, "clipped by a norm of 1.9"),
    (
      {"truth": [0.05], "again": [0.05], "norm": [0.05]},
      "where the clipped gradient is 0.05",
    ),
    (
      {"truth": [0.05], "again": [0.05], "length": [0.05], "norm": [0.01]},
      "clipped by a norm of 0.01",
    ),
    ({"differs": [0.0, 0.1]}, "does not point"),
    # Nothing but the bound can be said of what other rounding would change.
    ({"norm": [1.0], "again": [2.5]}, None),
    ({"norm": [1.0], "varies": [0.0, 0.5]}, None),
  ],
  ids=str,
)
def test_each_way_in_which_a_sum_can_be_wrong_is_seen(changes, what):
  fn = dpdist.clipped_grad(_loss, l2_clip_norm=_CLIP)
  found = comparison.judge(
    fn, {"a": jnp.ones(2), "b": jnp.ones(2)}, _one(**changes), is_ordinary=True
  )
  assert (found is None) == (what is None)
  assert found is None or what in found.what


@pytest.mark.parametrize(
  ("name", "changes", "most"),
  [
    ("decoder", {"num_outputs": 300}, 299),
    # A table of its own, with more rows than there are classes.
    ("bert", {"num_outputs": 2, "vocabulary": 1000}, 999),
  ],
)
def test_made_up_tokens_are_as_large_as_any_that_a_model_looks_up(
  name, changes, most
):
  config = config_lib.default()
  sizes = {"width": 4, "depth": 1, "num_heads": 2}
  config.model.update({"name": name, **sizes, **changes})
  tokens = jax.ShapeDtypeStruct((6,), jnp.int32)
  row = {"inputs": tokens, "targets": tokens}
  largest = setup.largest_integers(from_config.make(config), row, dict)
  tried = [case.example for case in made_up_examples.cases(row, largest)]
  reached = {k: max(x[k].max() for x in tried) for k in row}
  assert reached == {"inputs": most, "targets": changes["num_outputs"] - 1}


def test_examples_of_any_shape_are_made_up():
  for shape in ((), (0,), (3, 0), (1,), (2, 3)):
    for dtype in (np.float32, np.int32, bool):
      row = jax.ShapeDtypeStruct(shape, dtype)
      cases = [*made_up_examples.cases(row, 3 if dtype == np.int32 else 1)]
      assert cases
      assert all(case.example.shape == shape for case in cases)


def test_a_regression_passes():
  loss = lambda p, x, y: jnp.square(x @ p - y)
  batch = np.ones((4, 3), np.float32), np.ones(4, np.float32)
  dpdist.check_sensitivity(
    lambda p, example: loss(p, *example), jnp.ones(3), batch, l2_clip_norm=1.0
  )


def test_what_one_program_flushes_to_0_and_another_does_not_is_no_fault():
  def loss(params, example):
    hidden = jnp.tanh(example["x"] @ params["hidden"])
    return jnp.square(hidden @ params["out"] - example["y"])

  first, second = jax.random.split(jax.random.key(0))
  params = {
    "hidden": 0.3 * jax.random.normal(first, (6, 8)),
    "out": 0.3 * jax.random.normal(second, (8,)),
  }
  batch = {"x": np.ones((8, 6), np.float32), "y": np.ones(8, np.float32)}
  # The products with weights are partly subnormal where inputs are least.
  dpdist.check_sensitivity(loss, params, batch, l2_clip_norm=1.0)


def test_a_norm_that_drops_the_smallest_inputs_is_found(monkeypatch):
  norm = bookkeeping.norm
  flush = lambda x: jnp.where(jnp.abs(x) < 1e-36, 0, x)
  monkeypatch.setattr(
    bookkeeping,
    "norm",
    lambda part, rule, operand, cotangent: norm(
      part, rule, jax.tree.map(flush, operand), cotangent
    ),
  )
  loss = lambda w, e: jnp.square(e["x"] @ w - e["y"])
  batch = {"x": np.ones((4, 6), np.float32), "y": np.ones(4, np.float32)}
  # The gradients that show it are not longer than this.
  with pytest.raises(errors.SensitivityError, match="clipped by a norm of 0"):
    dpdist.check_sensitivity(loss, jnp.ones(6), batch, l2_clip_norm=10.0)


def test_many_groups_raise_no_more_false_alarms_than_one():
  for count in (1, 2, 10, 1000):
    limit = watched.limit_of(count)
    assert count * math.erfc(limit / math.sqrt(2)) <= 8.04e-11
  assert watched.limit_of(1) == pytest.approx(6.5, abs=1e-6)


def test_a_fault_is_told_where_no_parameter_can_be_found(monkeypatch):
  """Others, which found nothing, wait for this process."""

  def fail(*args):
    raise MemoryError("no memory for gradients one by one")

  monkeypatch.setattr(comparison, "blamed", fail)
  _weaken(monkeypatch, "gather", 0.01)
  with pytest.raises(errors.SensitivityError, match="made-up example"):
    _check_alone(_params())


def _check_alone(params):
  return dpdist.check_sensitivity(_loss, params, _batch(4), l2_clip_norm=_CLIP)


def test_a_rule_behind_a_parameter_that_begins_as_0_is_tried(monkeypatch):
  """Such as the second factor of an adapter: it hides the first one's."""
  params = _params() | {"w": jnp.zeros((8, 4))}
  assert _check_alone(params).num_examples >= 8
  _weaken(monkeypatch, "gather", 0.01)
  with pytest.raises(errors.SensitivityError, match=r"params/table .*gather"):
    _check_alone(params)


def test_what_is_wrong_without_padding_alone_is_found(monkeypatch):
  clipped_sum = bookkeeping.clipped_sum

  def wrong(problem, examples, keep):
    sums, *others = clipped_sum(problem, examples, keep)
    factor = jnp.where(jnp.all(keep), 2.0, 1.0)
    return ([x * factor for x in sums], *others)

  monkeypatch.setattr(bookkeeping, "clipped_sum", wrong)
  with pytest.raises(errors.SensitivityError, match=r"is 0.2 long where its"):
    _check_alone(_params())


# While it runs.


def _looking(*found):
  """A sentinel of a step whose chunks show such examples, and what it gives."""
  step, given, shown = _step(meshes.of("1")), [], iter(found)

  def accumulate(params, accumulator, *rest):
    given.append(rest[-1])
    return accumulator, watched.Seen(jnp.array([next(shown)]), None)

  step.__dict__["accumulate"] = accumulate
  watches = step_sentinel.Sentinel(
    step, None, _streams(), every=1, first_step=0
  )
  return watches, given


def test_what_any_chunk_of_a_step_shows_is_found_and_of_no_other_step():
  watches, _ = _looking([0, 1, 0], [0, 0, 0], [0, 0, 2], [0, 0, 0])
  params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
  for chunks, wanted in ((3, [1, 2]), (1, []), (0, [])):
    watches.begin(chunks, params)
    for _ in range(chunks):
      watches.accumulate(None, None, "chunk")
    assert watches.end() == wanted


def test_each_step_and_parameter_has_a_direction_of_its_own():
  watches, given = _looking(*[[0, 0]] * 4)
  params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
  for t in (0, 0, 1, 2):
    watches.begin(t, params)
    watches.accumulate(None, None, "chunk")
  once, again, *others = (np.stack([x["a"], x["b"]]) for x in given)
  np.testing.assert_array_equal(once, again)  # A replay is the same release.
  every = np.concatenate([once, *others])
  assert len(np.unique(every)) == every.size


@functools.cache
def _looked(method="auto", microbatch_size=None, loss=_loss, part=None):
  """Compiled; part keeps programs of wrong rules apart."""
  del part
  fn = dpdist.clipped_grad(
    loss, l2_clip_norm=_CLIP, method=method, microbatch_size=microbatch_size
  )
  return jax.jit(lambda *args: fn(*args[:2], direction=args[2]))


def test_right_examples_are_all_kept_and_sums_are_as_they_were():
  params, batch = _params(), _batch(64)
  plain = jax.jit(dpdist.clipped_grad(_loss, l2_clip_norm=_CLIP))
  wanted = plain(params, batch)
  for seed in range(20):
    found = _looked()(params, batch, _direction(params, seed))
    assert not np.any(found.found)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
      found.sum,
      wanted.sum,
    )


@pytest.mark.parametrize(
  ("method", "microbatch_size"),
  [("auto", 8), pytest.param("two_pass", None, marks=pytest.mark.slow)],
)
def test_an_example_that_is_too_long_adds_nothing(
  monkeypatch, method, microbatch_size
):
  _weaken(monkeypatch, "gather", 1e-2)
  _weaken(monkeypatch, "dot_general", 1e-2)
  params, batch = _params(), _batch()
  # So that the bias does not make up for it.
  batch["y"] = batch["y"] * np.arange(1, 5) * 1e3
  loss = lambda params, example: _loss(params | {"b": 0.0}, example)
  out = _looked(method, microbatch_size, loss, "weak")(
    params, batch, _direction(params)
  )
  is_found = np.any(out.found, axis=1)
  assert is_found.sum() > 0.5 * _ROWS
  assert not np.any(out.found[:, 0])  # b, which sorts first, has no part.
  kept = jax.tree.map(lambda x: x[~is_found], batch)
  fn = dpdist.clipped_grad(loss, l2_clip_norm=_CLIP, method=method)
  wanted = jax.jit(fn)(params, kept).sum
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
    out.sum,
    wanted,
  )


def test_a_sum_that_is_not_finite_is_left_out_whole_and_found():
  total = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(3)}
  found = jnp.zeros((4, 2), bool)
  grads = clipping.ClippedGrads(total, None, jnp.ones(4), None, found=found)
  kept, seen = watched.seen(grads)
  assert seen.found.tolist() == [[1, 0]]
  assert not np.any(kept.sum["a"])
  assert not np.any(kept.sum["b"])


def test_rounding_of_the_derivative_is_no_alarm(monkeypatch):
  """Two sums in bfloat16 that are equal but for rounding: the gradient is 0."""

  def loss(params, example):
    x = (params * example).astype(jnp.bfloat16)
    rows = jnp.sum(jnp.sum(x, axis=0, dtype=jnp.bfloat16), dtype=jnp.bfloat16)
    cols = jnp.sum(jnp.sum(x, axis=1, dtype=jnp.bfloat16), dtype=jnp.bfloat16)
    return (rows - cols).astype(jnp.float32)

  rng = np.random.default_rng(0)
  params = jnp.asarray(rng.normal(size=(33, 65)), jnp.float32)
  batch = jnp.asarray(rng.normal(size=(32, 33, 65)), jnp.float32)
  fn = dpdist.clipped_grad(loss, l2_clip_norm=1e-4)
  look = lambda: jax.jit(lambda *args: fn(*args[:2], direction=args[2]))(
    params, batch, _direction(params)
  )
  assert not np.any(look().found)
  # It would be, if suspects were not confirmed.
  monkeypatch.setattr(watched, "_AGREES", np.inf)
  assert np.sum(look().found) > 16


def test_a_derivative_of_the_users_own_is_watched_too(monkeypatch):
  _weaken(monkeypatch, "gather", 1e-2)

  @jax.custom_vjp
  def square(x):
    return x**2

  square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))

  def loss(params, example):
    seen = jnp.take(params["table"], example["ids"], axis=0)
    return jnp.sum(square(seen)) * jnp.sum(example["y"]) ** 2

  params, batch = {"table": _params()["table"]}, _batch()
  out = _looked(loss=loss, part="weak")(params, batch, _direction(params))
  assert np.sum(out.found) > 0.5 * _ROWS


def _streams(branch="a"):
  return mechanism.Streams(keys.insecure_secret(3), branch)


def _watcher(every, **changes):
  return step_sentinel.Sentinel(
    *(_step(meshes.of("8")), None, _streams(**changes)),
    every=every,
    first_step=5,
  )


def test_the_first_step_and_one_in_a_hundred_are_watched():
  watches = _watcher(100)
  steps = [t for t in range(20_000) if watches.is_watched(t)]
  assert 5 in steps
  # 200 expected; five standard deviations.
  assert 130 < len(steps) < 272
  assert [t for t in steps if t < 4000] == [
    t for t in range(4000) if _watcher(100).is_watched(t)
  ]
  other = _watcher(100, branch="b")
  assert steps != [t for t in range(20_000) if other.is_watched(t)]
  assert not any(_watcher(0).is_watched(t) for t in range(100))
  assert all(_watcher(1).is_watched(t) for t in range(100))


# Whole models.

_MODELS = {
  "linear": ((6, 6, 3), (), {"num_groups": 3}),
  "random_features": ((6, 6, 1), (), {"width": 16}),
  "cnn": ((28, 28, 1), (), {"width": 4}),
  "wide_resnet": ((8, 8, 3), (), {"width": 1, "depth": 10, "num_groups": 4}),
  "decoder": ((6,), (6,), {"width": 8, "depth": 1, "num_heads": 2}),
  "stacked_decoder": ((6,), (6,), {"width": 8, "depth": 2, "num_heads": 2}),
  "bert": (
    *((6,), ()),
    {"width": 8, "depth": 1, "num_heads": 2, "vocabulary": 20},
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _MODELS)
def test_models_raise_no_alarm(name):
  inputs, targets, changes = _MODELS[name]
  config = config_lib.default()
  config.model.name = name
  config.model.num_outputs = 16
  config.model.update(changes)
  model = models.make(config.model)
  rng = np.random.default_rng(0)
  if name in ("decoder", "stacked_decoder", "bert"):
    x = rng.integers(0, 15, (32, *inputs)).astype(np.int32)
  else:
    x = rng.normal(size=(32, *inputs)).astype(np.float32)
  y = rng.integers(0, 16, (32, *targets)).astype(np.int32)
  batch = {"inputs": x, "targets": y}
  params = model.init(jax.random.key(0), x[0])["params"]
  loss = cross_entropy.loss_of(model)
  key = jax.random.key(0)
  report = dpdist.check_sensitivity(
    loss, params, batch, l2_clip_norm=_CLIP, has_aux=True, rng=key
  )
  assert report.num_examples >= 3
  fn = dpdist.clipped_grad(loss, l2_clip_norm=_CLIP, has_aux=True)
  look = jax.jit(
    lambda params, batch, direction: (
      fn(params, batch, rng=key, direction=direction).found
    )
  )
  for seed in range(10):
    assert not np.any(look(params, batch, _direction(params, seed)))


# A run.


def _config(**changes):
  from configs import digits

  config = digits.get_config()
  config.model.name = "linear"
  config.privacy.expected_batch_size = 64
  config.privacy.num_steps = 6
  config.checkpoint_every = 6
  config.privacy.target_epsilon = None
  config.privacy.noise_multiplier = 1.0
  config.update_from_flattened_dict(changes)
  return config


def test_a_run_stops_after_the_step_and_says_void(monkeypatch, tmp_path):
  _weaken(monkeypatch, "dot_general", 1e-3)
  monkeypatch.setattr(step_sentinel, "check_step", lambda *args, **kwargs: None)
  with pytest.raises(errors.SensitivityError) as caught:
    dpdist.train(_config(), tmp_path)
  assert "kernel" in str(caught.value)
  assert "dot_general" in str(caught.value)
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  assert ledger.guarantee == f"void: {history.TOO_LONG}"
  # The step that it was found in is charged, and saved, and the last.
  assert [saved.step for saved in ledger.checkpoints] == [1]
  assert not (tmp_path / "result.json").exists()
  # Not even the one of a rule that was mended goes on with it.
  monkeypatch.undo()
  with pytest.raises(errors.SettingsError, match="sentinel stopped") as told:
    dpdist.train(_config(), tmp_path)
  assert "\n" not in str(told.value)
  assert ledger_lib.Ledger(tmp_path / "ledger").head == ledger.head


def test_a_run_that_would_be_wrong_charges_nothing(monkeypatch, tmp_path):
  _weaken(monkeypatch, "dot_general", 1e-3)
  with pytest.raises(errors.SensitivityError, match="kernel"):
    dpdist.train(_config(), tmp_path)
  assert ledger_lib.Ledger(tmp_path / "ledger").spent_steps == 0


@pytest.mark.slow
def test_a_config_is_checked_and_the_exit_code_says_so(monkeypatch):
  args = ("--config=configs/digits.py", "--config.model.name=linear")
  monkeypatch.chdir(pathlib.Path(__file__).parents[2])
  right = commands.run("check", *args, "--json")
  assert right.code == 0
  assert json.loads(right.out)["sensitivity"]["num_examples"] >= 8
  wrong = commands.run("check", *args, "--config.sentinel.every=-1")
  assert wrong.code == 2
  assert "sentinel.every must be an integer >= 0, got -1" in wrong.err
  _weaken(monkeypatch, "dot_general", 1e-3)
  wrong = commands.run("check", *args)
  assert wrong.code == 1
  assert "kernel" in wrong.err
