"""A norm is an upper bound at any scale, whichever formula it comes from.

All kinds of products stand in one loss, each with a parameter and a clip norm
of its own, and all scales in one batch, so that one program shows them all. The
loss is linear in the parameters: what is left to go wrong is the norm.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist import clipping
from dpdist.clipping import rules

_CLIP = 1e-3
# Rounding of a norm that is not an upper bound alone may take so much.
_UNNOTICED = 1e-3
_MASK = np.random.default_rng(5).random((4, 3)) < 0.7


def _convolution(x, kernel, **kwargs):
  ndim = kernel.ndim - 2
  kwargs = {"window_strides": (1,) * ndim, "padding": "SAME"} | kwargs
  letters = "HW"[:ndim]
  return jax.lax.conv_general_dilated(
    x[None],
    kernel,
    dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    **kwargs,
  )[0]


# For each kind: the shapes of the parameter, of what it meets and of its
# product, whose gradient is given.
_KINDS = {
  "one position": ((4, 3), (1, 4), (1, 3), lambda p, x: x @ p),
  "dense": ((4, 3), (6, 4), (6, 3), lambda p, x: x @ p),
  "experts": (
    (2, 4, 3),
    (6, 2, 4),
    (6, 2, 3),
    lambda p, x: jnp.einsum("tsi,sio->tso", x, p),
  ),
  "convolution": (
    (3, 3, 3, 2),
    (4, 4, 3),
    (4, 4, 2),
    lambda p, x: _convolution(x, p),
  ),
  "groups, strides": (
    (2, 3, 2, 4),
    (5, 6, 4),
    (3, 2, 4),
    lambda p, x: _convolution(
      x, p, window_strides=(2, 3), feature_group_count=2
    ),
  ),
  "one axis": ((3, 3, 2), (7, 3), (7, 2), lambda p, x: _convolution(x, p)),
  "lookup": ((5, 3), (6,), (6, 3), lambda p, ids: p[ids]),
  "addition": ((6, 3), (6, 3), (6, 3), lambda p, x: x + p),
  "computed": (
    (4, 3),
    (6, 4),
    (6, 3),
    lambda p, x: x @ jnp.where(_MASK, 2 * p, 0),
  ),
}


def _loss(params, example):
  return sum(
    jnp.sum(product(params[kind], example[kind]["x"]) * example[kind]["g"])
    for kind, (*_, product) in _KINDS.items()
  )


def _params():
  return {kind: jnp.zeros(shapes[0]) for kind, shapes in _KINDS.items()}


# Powers of ten: of what is met, of the gradient of the product; and along what.
_SCALES = [
  *((a, b, "alike") for a, b in [(0, 0), (-37, 37), (37, -37), (-20, 22)]),
  *((a, b, "alike") for a, b in [(-30, 28), (22, -20), (30, -28), (-3, 36)]),
  *((a, b, "alike") for a, b in [(-20, 17), (18, 19), (-19, -10), (20, 20)]),
  *((a, b, "positions") for a, b in [(-37, 35), (-25, 27), (20, -20)]),
  *((a, b, "channels") for a, b in [(-37, 35), (-25, 20), (20, -18)]),
  *((a, b, "anything") for a, b in [(1, 0), (2, 0), (3, 0), (4, 0)]),
]


def _powers(shape, a, along, rng):
  if along == "alike" or not shape:
    return np.full(shape, a)
  if along == "anything":
    return rng.integers(-37, 37, shape)
  axis = -1 if along == "channels" else 0
  sign = np.where(np.arange(shape[axis]) % 2, 1, -1)
  return a * (sign if axis else sign.reshape(-1, *[1] * (len(shape) - 1)))


@functools.cache
def _batch():
  """An example a scale; norms in float64, [examples] a kind."""
  rng = np.random.default_rng(0)
  examples = []
  for a, b, along in _SCALES:
    example = {}
    for kind, (_, of_x, of_g, _) in _KINDS.items():
      x = rng.normal(size=of_x) * 10.0 ** _powers(of_x, a, along, rng)
      g = rng.normal(size=of_g) * 10.0 ** _powers(of_g, b, along, rng)
      if kind == "lookup":
        x = rng.integers(0, 5, of_x)
      elif kind == "addition" and a + b > 0:
        g = rng.normal(size=of_g) * 10.0**a
      example[kind] = {"x": x, "g": g}
    examples.append(example)
  batch = jax.tree.map(
    lambda *x: np.stack(x).astype(
      np.int32 if x[0].dtype.kind == "i" else np.float32
    ),
    *examples,
  )
  # A CPU takes what has no full fraction for 0.
  smallest = np.finfo(np.float32).smallest_normal
  batch = jax.tree.map(lambda x: np.where(abs(x) < smallest, 0, x), batch)
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: x if x.dtype == np.int32 else x.astype(np.float64), batch
    )
    grads = jax.jit(jax.vmap(jax.grad(_loss), in_axes=(None, 0)))(
      {k: np.zeros(s[0]) for k, s in _KINDS.items()}, wide
    )
    true = {
      kind: np.sqrt(np.sum(np.square(x.reshape(len(x), -1)), axis=1))
      for kind, x in jax.tree.map(np.asarray, grads).items()
    }
  return jax.tree.map(jnp.asarray, batch), true


def _take(way, monkeypatch):
  """Has rules take a way wherever there is one."""
  offered = rules._ways

  def ways(*args):
    found = dict(offered(*args))
    return {way: found[way]} if way in found else found

  monkeypatch.setattr(rules, "_ways", ways)


_RULES = [
  ("gram", "bookkeeping"),
  ("diagonal", "bookkeeping"),
  ("keep", "bookkeeping"),
  ("drop", "bookkeeping"),
  ("diagonal", "two_pass"),
  ("drop", "two_pass"),
  ("", "vmap"),
]


@pytest.mark.parametrize(("way", "method"), _RULES)
def test_a_norm_is_an_upper_bound_at_any_scale(way, method, monkeypatch):
  _take(way, monkeypatch)
  batch, true = _batch()
  fn = clipping.clipped_grad(
    _loss, l2_clip_norm=dict.fromkeys(_KINDS, _CLIP), method=method
  )

  @jax.jit
  def call(batch, is_padding_example):
    got = fn(_params(), batch, is_padding_example=is_padding_example)
    return got.sum, got.grad_norms

  size = len(_SCALES)
  _, found = call(batch, np.zeros(size, bool))
  for kind, norm in found.items():
    norm = np.asarray(norm, np.float64)
    # Below the smallest float32 nothing is left, of a sum neither.
    enough = norm >= true[kind] * (1 - _UNNOTICED) - 1e-36
    assert np.all(enough | ~np.isfinite(norm)), (kind, norm, true[kind])
    np.testing.assert_allclose(norm[0], true[kind][0], rtol=1e-5)
  for i in range(size):
    total, _ = call(batch, np.arange(size) != i)
    for kind, x in total.items():
      moved = np.linalg.norm(np.asarray(x, np.float64))
      assert moved <= _CLIP * (1 + _UNNOTICED), (kind, _SCALES[i])
