"""Tasks of models of every framework, and what is refused or replaced."""

import functools
from typing import Any

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist import errors
from dpdist import tasks
from dpdist.frameworks import norms

pytestmark = pytest.mark.usefixtures("quick_compiles")

_KEY = jax.random.key(0)
_EXAMPLE = {"inputs": np.arange(4, dtype=np.float32), "targets": np.int32(1)}


class _Linen(nn.Module):
  norm: Any = nn.LayerNorm

  @nn.compact
  def __call__(self, x, train=False):
    x = self.norm(name="norm")(nn.Dense(8)(x))
    return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


class _Nnx(nnx.Module):
  def __init__(self, rngs, norm=nnx.LayerNorm):
    self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs), norm(8, rngs=rngs)])
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.out = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return self.out(self.drop(x))


class _Equinox(eqx.Module):
  first: eqx.nn.Linear
  norm: Any
  drop: eqx.nn.Dropout
  out: eqx.nn.Linear
  order: jax.Array  # Integers are no parameters.

  def __init__(self, key, norm=lambda: eqx.nn.LayerNorm(8)):
    keys = jax.random.split(key)
    self.first = eqx.nn.Linear(4, 8, key=keys[0])
    self.norm, self.drop = norm(), eqx.nn.Dropout(0.5)
    self.out = eqx.nn.Linear(8, 3, key=keys[1])
    self.order = jnp.array([1, 0, 2, 3])

  def __call__(self, x, *, key):
    x = self.norm(self.first(x[self.order]))
    return self.out(self.drop(x, key=key))


def _eqx_norm():
  return eqx.nn.BatchNorm(8, "batch", mode="batch")


def _pair_init(key, inputs):
  return {"w": jax.random.normal(key, (4, 3))}


def _pair_apply(params, inputs, rng=None):
  if rng is not None:
    inputs = inputs * jax.random.bernoulli(rng, 0.5, inputs.shape)
  return inputs @ params["w"]


_MODELS = {
  "linen": _Linen(),
  "nnx class": _Nnx,
  "nnx maker": lambda rngs: _Nnx(rngs),
  "nnx partial": functools.partial(_Nnx, norm=nnx.RMSNorm),
  "nnx of nothing": lambda: _Nnx(nnx.Rngs(1)),
  "nnx module": _Nnx(nnx.Rngs(1)),
  "equinox class": _Equinox,
  "equinox maker": lambda key: _Equinox(key),
  "equinox module": _Equinox(_KEY),
  "functions": (_pair_init, _pair_apply),
}
_FIXED = ("nnx of nothing", "nnx module", "equinox module")


@pytest.mark.parametrize("name", _MODELS)
def test_a_model_of_any_framework(name: str) -> None:
  task = tasks.classification(_MODELS[name])
  assert task.review(_EXAMPLE) == []
  task.check(_EXAMPLE, {k: np.stack([x, x]) for k, x in _EXAMPLE.items()})
  init = jax.jit(task.init)
  params, other = (init(jax.random.key(i), _EXAMPLE) for i in (0, 1))
  paths = jax.tree_util.tree_leaves_with_path(params)
  assert all(
    isinstance(entry, jax.tree_util.DictKey) and isinstance(entry.key, str)
    for path, _ in paths
    for entry in path
  )
  equal = jax.tree.map(lambda x, y: bool((x == y).all()), params, other)
  assert all(jax.tree.leaves(equal)) == (name in _FIXED)
  loss = jax.jit(lambda key: task.loss(params, _EXAMPLE, key)[0])
  assert loss(_KEY) == loss(_KEY)  # All that is drawn comes from the key.
  assert len({float(loss(jax.random.key(i))) for i in range(4)}) > 1
  predicted = task.predict(params, _EXAMPLE)
  np.testing.assert_array_equal(predicted, task.predict(params, _EXAMPLE))
  if name != "functions":
    whole = tasks.with_params(_MODELS[name], params)
    given = {"key": None} if name.startswith("equinox") else {}
    if name.startswith("equinox"):
      whole = eqx.nn.inference_mode(whole)
    elif name.startswith("nnx"):
      whole.eval()
    found = whole(_EXAMPLE["inputs"], **given)
    np.testing.assert_allclose(found, predicted, rtol=1e-5)


@pytest.mark.parametrize("name", ["nnx class", "equinox class"])
def test_gradients_are_clipped_for_any_framework(name: str) -> None:
  task = tasks.classification(_MODELS[name])
  batch = {k: np.stack([x, 50 * x]) for k, x in _EXAMPLE.items()}
  fn = dpdist.clipped_grad(task.loss, l2_clip_norm=0.01, has_aux=True)

  @jax.jit
  def square(batch: Any) -> Any:
    found = fn(task.init(_KEY, _EXAMPLE), batch, rng=_KEY).sum
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(found))

  assert 0 < square(batch) <= 0.02**2 * 1.0001


def test_more_classes_than_outputs_are_refused() -> None:
  task = tasks.classification(
    (_pair_init, lambda params, x: x @ params["w"]), num_classes=4
  )
  with pytest.raises(errors.ArgumentError, match="must be at most 3, the out"):
    task.check(_EXAMPLE, {k: np.stack([x]) for k, x in _EXAMPLE.items()})


def test_a_batch_axis_of_one() -> None:
  def apply(params, inputs):
    assert inputs.shape == (1, 4)
    return inputs @ params["w"]

  task = tasks.classification((lambda k, x: _pair_init(k, x), apply))
  with pytest.raises(errors.ArgumentError, match="inputs must be what"):
    task.check(_EXAMPLE, {k: np.stack([x]) for k, x in _EXAMPLE.items()})
  task = tasks.classification((_pair_init, apply), has_batch_axis=True)
  params = task.init(_KEY, _EXAMPLE)
  assert task.predict(params, _EXAMPLE).shape == (3,)


# What is refused, and what is replaced.

_LINEN_NORM = functools.partial(nn.BatchNorm, use_running_average=False)
_WITH_NORM = {
  "linen": (_Linen(_LINEN_NORM), "norm"),
  "nnx": (functools.partial(_Nnx, norm=nnx.BatchNorm), "layers/1"),
  "nnx module": (_Nnx(nnx.Rngs(0), nnx.BatchNorm), "layers/1"),
  "equinox": (lambda key: _Equinox(key, _eqx_norm), "model.norm"),
  "equinox module": (_Equinox(_KEY, _eqx_norm), "model.norm"),
}


@pytest.mark.parametrize("name", _WITH_NORM)
def test_batch_norm_is_refused_by_name(name: str) -> None:
  model, where = _WITH_NORM[name]
  with pytest.raises(errors.ArgumentError, match=f"got {where}: BatchNorm"):
    tasks.classification(model).review(_EXAMPLE)


@pytest.mark.parametrize("name", _WITH_NORM)
def test_batch_norm_is_replaced(name: str) -> None:
  model, where = _WITH_NORM[name]
  task = tasks.classification(model, fix=True)
  (said,) = task.review(_EXAMPLE)
  assert "BatchNorm was replaced by GroupNorm" in said
  assert where in said
  params = task.init(_KEY, _EXAMPLE)
  assert np.isfinite(task.loss(params, _EXAMPLE, _KEY)[0])
  # Two groups of four features, as scale is 1 and shift 0.
  if name == "equinox module":
    x = np.asarray(model.first(_EXAMPLE["inputs"][model.order])).reshape(2, 4)
    unit = (x - x.mean(1, keepdims=True)) / np.sqrt(
      x.var(1, keepdims=True) + model.norm.eps
    )
    want = model.out(unit.ravel())
    np.testing.assert_allclose(task.predict(params, _EXAMPLE), want, rtol=1e-4)


def test_check_model_replaces_in_a_copy() -> None:
  model = _WITH_NORM["nnx module"][0]
  fixed = dpdist.check_model(model, fix=True)
  assert isinstance(model.layers[1], nnx.BatchNorm)
  assert isinstance(fixed.model.layers[1], nnx.GroupNorm)
  assert len(fixed.changes) == 1
  assert not any("BatchNorm" in str(finding) for finding in fixed.findings)
  assert fixed.model.layers[1](jnp.ones((5, 8))).shape == (5, 8)
  with pytest.raises(errors.ArgumentError, match="fix must be False"):
    dpdist.check_model(object(), fix=True)


def test_batch_norm_that_a_method_names_is_said_to_stay() -> None:
  class Inside(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(nn.BatchNorm(use_running_average=False)(x))

  task = tasks.classification(Inside(), fix=True)
  with pytest.raises(errors.ArgumentError, match=r"could not .* BatchNorm_0"):
    task.review(_EXAMPLE)


def test_other_state_is_refused() -> None:
  class Counting(_Nnx):
    def __init__(self, rngs):
      super().__init__(rngs)
      self.count = nnx.Variable(jnp.zeros(()))

  task = tasks.classification(Counting)
  with pytest.raises(errors.ArgumentError, match="count: state"):
    task.review(_EXAMPLE)
  with pytest.raises(errors.ArgumentError, match="count: state"):
    task.init(_KEY, _EXAMPLE)


def test_what_may_be_meant_is_a_notice() -> None:
  def apply(params, inputs):
    return inputs @ params["w"]

  init = lambda key, inputs: _pair_init(key, inputs) | {"more": jnp.zeros(2)}
  (said,) = tasks.classification((init, apply)).review(_EXAMPLE)
  assert "parameters that no example touches" in said


@pytest.mark.parametrize(
  ("features", "groups"), [(1, 1), (3, 1), (4, 1), (8, 2), (64, 16), (256, 32)]
)
def test_groups_have_features_enough(features: int, groups: int) -> None:
  assert norms.num_groups(features) == groups


# Data that do not fit.


def _test(**arrays: Any) -> dict[str, np.ndarray]:
  return {"inputs": np.zeros((4, 3), np.float32)} | arrays


_SAME = (lambda key, inputs: jnp.zeros(()), lambda params, inputs: inputs)


@pytest.mark.parametrize(
  ("task", "test", "message"),
  [
    (
      tasks.multilabel(_SAME),
      _test(targets=np.full((4, 3), 2)),
      r"in \[0, 1\], or -1 where there is none, got 4 of 4",
    ),
    (
      tasks.multilabel(_SAME),
      _test(targets=np.zeros((4, 2))),
      r"outputs' shape \(3,\)",
    ),
    (
      tasks.regression(_SAME),
      _test(targets=np.full((4, 3), np.nan)),
      "must be finite, got 4 of 4",
    ),
    (
      tasks.regression(_SAME, weights="w"),
      _test(targets=np.zeros((4, 3))),
      "must have columns 'inputs' and 'targets' and 'w'",
    ),
    (
      tasks.regression(_SAME, weights="w"),
      _test(targets=np.zeros((4, 3)), w=np.zeros((4, 2))),
      "one number for each example",
    ),
    (
      tasks.multilabel(_SAME, class_weights=[1.0]),
      _test(targets=np.zeros((4, 3))),
      "a number for each label",
    ),
    (
      tasks.classification(_SAME, class_weights=[1.0]),
      _test(targets=np.zeros(4, np.int32)),
      "each of the 3 classes",
    ),
    (
      tasks.regression(_SAME, inputs="x", targets="y"),
      _test(targets=np.zeros((4, 3))),
      "must have columns 'x' and 'y'",
    ),
    (
      tasks.contrastive(_SAME),
      _test(targets=np.zeros((4, 5))),
      "as many rows as an example has pairs",
    ),
  ],
)
def test_data_that_do_not_fit_are_named(
  task: Any, test: Any, message: str
) -> None:
  example = {name: np.zeros_like(x[0]) for name, x in test.items()}
  with pytest.raises(errors.ArgumentError, match=message):
    task.check(example, test)
