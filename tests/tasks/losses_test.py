"""Every loss against another formula, and what a wrong target does to it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics as sk

import dpdist
from dpdist import errors
from dpdist import tasks
from dpdist.tasks.scoring import losses

pytestmark = pytest.mark.usefixtures("quick_compiles")

_KEY = jax.random.key(0)
_rng = np.random.default_rng(0)
# A model whose outputs are its parameters.
_FREE = (lambda key, inputs: jnp.zeros(3), lambda params, inputs: params)
_LOGITS = _rng.normal(size=3).astype(np.float32)
_X = np.zeros(2, np.float32)


def _loss(task: Any, outputs: Any, **arrays: Any) -> float:
  example = {"inputs": _X} | {k: np.asarray(v) for k, v in arrays.items()}
  # One program instead of one for each operation.
  value, aux = jax.jit(task.loss)(jnp.asarray(outputs), example, _KEY)
  assert aux is None
  assert value.shape == ()
  return float(value)


def test_classes_weights_and_smoothing() -> None:
  task = tasks.classification(
    _FREE, class_weights=[1.0, 2.0, 0.5], label_smoothing=0.2
  )
  smooth = optax.smooth_labels(jax.nn.one_hot(1, 3), 0.2)
  want = 2.0 * optax.softmax_cross_entropy(jnp.asarray(_LOGITS), smooth)
  assert _loss(task, _LOGITS, targets=1) == pytest.approx(float(want))
  plain = tasks.classification(_FREE)
  want = sk.log_loss([2], jax.nn.softmax(_LOGITS)[None], labels=[0, 1, 2])
  assert _loss(plain, _LOGITS, targets=2) == pytest.approx(want, rel=1e-6)


def test_a_sequence_has_the_mean_of_its_targets() -> None:
  task = tasks.language_model(_FREE, vocabulary=3)
  logits = _rng.normal(size=(4, 3)).astype(np.float32)
  want = optax.softmax_cross_entropy_with_integer_labels(
    logits[:2], jnp.array([2, 0])
  )
  got = _loss(task, logits, targets=[2, 0, -1, 3])
  assert got == pytest.approx(float(want.mean()))


def test_labels_and_their_weights() -> None:
  targets = np.array([1.0, 0.0, 0.7], np.float32)
  shares = 1 / (1 + np.exp(-_LOGITS.astype(float)))
  each = lambda y: -(y * np.log(shares) + (1 - y) * np.log(1 - shares))
  weights = np.array([1.0, 3.0, 0.0])
  task = tasks.multilabel(_FREE, class_weights=weights)
  want = float(np.mean(weights * each(targets)))
  assert _loss(task, _LOGITS, targets=targets) == pytest.approx(want, rel=1e-5)
  task = tasks.multilabel(_FREE, label_smoothing=0.1)
  want = float(np.mean(each(0.9 * targets + 0.05)))
  assert _loss(task, _LOGITS, targets=targets) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(("target", "weight"), [(0, 2.0), (1, 5.0)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_logit(target: int, weight: float, shape: tuple[int, ...]) -> None:
  task = tasks.binary(_FREE, class_weights=[2.0, 5.0])
  want = weight * np.log1p(np.exp(-0.3 if target else 0.3))
  got = _loss(task, np.full(shape, 0.3, np.float32), targets=target)
  assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
  ("kind", "want"),
  [
    ("squared", lambda e: np.mean(e**2)),
    ("absolute", lambda e: np.mean(np.abs(e))),
    ("huber", lambda e: np.mean(optax.huber_loss(e, delta=0.5))),
  ],
)
def test_errors_of_numbers(kind: str, want: Any) -> None:
  targets = np.array([3.0, 0.0, _LOGITS[2] + 0.1], np.float32)
  task = tasks.regression(_FREE, loss=kind, delta=0.5)
  got = _loss(task, _LOGITS, targets=targets)
  assert got == pytest.approx(float(want(_LOGITS - targets)), rel=1e-5)


def _pair_loss(a: Any, p: Any, temperature: float) -> float:
  """Returns InfoNCE of pairs, by NumPy, in float64."""
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  found = unit(a.astype(float)) @ unit(p.astype(float)).T / temperature
  own = np.diagonal(found)[: len(a)]
  return float(np.mean(np.log(np.exp(found).sum(1)) - own))


_ONE = (
  lambda key, inputs: jnp.ones(()),
  lambda params, inputs: params * inputs,
)


def test_pairs_are_told_from_those_of_their_own_example() -> None:
  a, p, more = (_rng.normal(size=(n, 4)).astype(np.float32) for n in (5, 5, 2))
  example = {"inputs": a, "targets": p, "n": more, "ok": np.arange(5) < 3}
  loss = lambda task: float(jax.jit(task.loss)(1.0, example, _KEY)[0])
  want = _pair_loss(a, p, 0.1)
  assert loss(tasks.contrastive(_ONE)) == pytest.approx(want, rel=1e-4)
  want = _pair_loss(a[:3], p[:3], 0.5)
  task = tasks.contrastive(_ONE, is_pair="ok", temperature=0.5)
  assert loss(task) == pytest.approx(want, rel=1e-4)
  want = _pair_loss(a, np.concatenate([p, more]), 0.5)
  task = tasks.contrastive(_ONE, negatives="n", temperature=0.5)
  assert loss(task) == pytest.approx(want, rel=1e-4)
  # Padding has no part in it, whatever it holds.
  padded = example | {"inputs": np.where(np.arange(5)[:, None] < 3, a, 1e3)}
  task = tasks.contrastive(_ONE, is_pair="ok")
  of = jax.jit(task.loss)
  one, other = (of(1.0, x, _KEY)[0] for x in (example, padded))
  assert one == other


def test_masked_tokens_are_the_ones_that_count() -> None:
  size, vocabulary = 4000, 7
  seen = []

  def apply(params: Any, tokens: Any) -> Any:
    seen.append(tokens)
    return jnp.broadcast_to(params, (size, vocabulary))

  task = tasks.masked_language_model(
    (lambda key, inputs: jnp.zeros(vocabulary), apply),
    vocabulary=vocabulary,
    mask_token=6,
    mask_rate=0.25,
    special_tokens=[0],
  )
  tokens = np.arange(size, dtype=np.int32) % 6
  logits = _rng.normal(size=vocabulary).astype(np.float32)
  loss, masked = jax.jit(lambda *given: (task.loss(*given)[0], seen.pop()))(
    logits, {"inputs": tokens}, _KEY
  )
  masked = np.asarray(masked)
  assert (masked[tokens == 0] == 0).all()
  share = np.mean(masked[tokens != 0] == 6)
  assert share == pytest.approx(0.25 * (0.8 + 0.1 / 7), abs=0.03)
  changed = np.mean(masked != tokens)
  assert changed == pytest.approx(5 / 6 * 0.25 * (0.8 + 0.1 * 6 / 7), abs=0.03)
  # Chosen evenly among the tokens 1 to 5.
  want = -float(np.mean(jax.nn.log_softmax(logits)[1:6]))
  assert float(loss) == pytest.approx(want, rel=0.1)
  of = jax.jit(task.metrics)
  found, again = (of(logits, {"inputs": tokens}) for _ in range(2))
  np.testing.assert_array_equal(found["loss"][1], again["loss"][1])
  assert np.mean(found["loss"][1]) == pytest.approx(5 / 6 * 0.25, abs=0.03)


def test_a_weight_multiplies_the_loss() -> None:
  task = tasks.regression(_FREE, weights="w")
  plain = _loss(tasks.regression(_FREE), _LOGITS, targets=np.zeros(3))
  for weight, factor in ((2.5, 2.5), (0.0, 0), (-1.0, 0), (np.nan, 0)):
    got = _loss(task, _LOGITS, targets=np.zeros(3), w=np.float32(weight))
    assert got == pytest.approx(factor * plain)


_WRONG = {
  "class": (tasks.classification, [-1, 3, 99]),
  "token": (
    lambda model: tasks.language_model(model, vocabulary=3),
    [-1, 3],
  ),
  "binary": (lambda model: tasks.binary((model[0], _first)), [-1, 2, np.nan]),
  "labels": (tasks.multilabel, [np.full(3, x) for x in (-1, 1.5, np.nan)]),
  "numbers": (tasks.regression, [np.full(3, x) for x in (np.nan, np.inf)]),
}


def _first(params: Any, inputs: Any) -> Any:
  return params[0]


@pytest.mark.parametrize("kind", _WRONG)
def test_a_target_that_cannot_be_right_does_nothing(kind: str) -> None:
  make, wrong = _WRONG[kind]
  task = make(_FREE)
  loss = lambda *given: task.loss(*given, _KEY)[0]
  of = jax.jit(jax.value_and_grad(loss))
  for target in wrong:
    example = {"inputs": _X, "targets": jnp.asarray(target)}
    value, gradient = of(_LOGITS, example)
    assert value == 0
    assert not np.any(gradient)


_RIGHT = {
  "class": np.array([0, 2, 1, 9], np.int32),
  "token": np.array([0, 2, 1, 9], np.int32),
  "binary": np.array([1, 0, np.nan, 5], np.float32),
  "labels": np.array([[1, 0, -1], [0, 0, 1], [7, 7, 7], [1, 1, 1]], np.int32),
  "numbers": np.array([[1e6, 0, 0], [1, np.nan, 2], [0, 0, 1], [9, 9, 9.0]]),
}


@pytest.mark.parametrize("kind", _RIGHT)
def test_clipping_bounds_each_example(kind: str) -> None:
  """The sum is of gradients of single examples, each clipped."""
  task, targets = _WRONG[kind][0](_FREE), jnp.asarray(_RIGHT[kind])
  batch = {"inputs": jnp.zeros((4, 2)), "targets": targets}
  loss = lambda params, example, rng: task.loss(params, example, rng)
  clipped = dpdist.clipped_grad(loss, l2_clip_norm=0.1, has_aux=True)
  params = jnp.asarray(_LOGITS)
  got = jax.jit(clipped)(params, batch, rng=_KEY)
  of = jax.jit(jax.grad(lambda *given: loss(*given)[0]))
  want = np.zeros(3)
  for i in range(4):
    example = jax.tree.map(lambda x, i=i: x[i], batch)
    gradient = np.asarray(of(params, example, _KEY))
    want += gradient * min(1, 0.1 / max(1e-30, float(np.linalg.norm(gradient))))
  np.testing.assert_allclose(got.sum, want, atol=1e-5)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: tasks.binary(_FREE, class_weights=[1.0]), "2 numbers"),
    (lambda: tasks.multilabel(_FREE, class_weights=[-1.0]), "at least 0"),
    (lambda: tasks.classification(_FREE, label_smoothing=1.0), "smoothing"),
    (lambda: tasks.regression(_FREE, loss="cubic"), "loss"),
    (lambda: tasks.contrastive(_FREE, temperature=0), "temperature"),
    (lambda: tasks.regression(_FREE, mertics=["r2"]), "'mertics'"),
    (lambda: tasks.regression(3), "model must be a module"),
    (lambda: tasks.regression(lambda: 3), "returns a int"),
    (lambda: tasks.regression(lambda a, b: 3), "one of"),
    (
      lambda: tasks.masked_language_model(_FREE, vocabulary=5, mask_token=5),
      "mask_token",
    ),
    (
      lambda: tasks.from_functions(*_FREE, metrics=[sk.max_error]),
      "predict must be given",
    ),
  ],
)
def test_wrong_options_are_named(make: Any, message: str) -> None:
  with pytest.raises(errors.ArgumentError, match=message):
    make()


def test_similarities_of_zero_vectors_have_gradients() -> None:
  zeros = jnp.zeros((2, 3))
  loss = lambda x: losses.cross_entropy(
    *losses.pair_logits(x, x, jnp.ones(2, bool), temperature=0.1)
  )
  assert np.isfinite(jax.jit(jax.grad(loss))(zeros)).all()
