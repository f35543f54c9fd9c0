"""What the sentinel would have found of faults that dpdist has had.

Each mend is taken out, as by a patch in `tests/privacy/bugs`, and the loss and
the inputs are those that showed the fault: once the check before a run is held
against it, and once a watched step. `docs/sentinel.md` has the table.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist import errors
from dpdist.clipping import watched
from dpdist.clipping.engines import clip_norms
from dpdist.clipping.engines import two_pass
from dpdist.clipping.layers import convolution
from dpdist.clipping.layers import dense
from dpdist.clipping.layers import embedding
from dpdist.clipping.layers import factors
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.layers import norms
from dpdist.clipping.layers import pixels
from dpdist.clipping.layers import rules


def _plain(x, axes=None):
  """A norm from squares of numbers as they are."""
  square = jnp.sum(jnp.square(x.astype(norms.wide(x.dtype))), axes)
  # Or the compiler would see what the root of a square is.
  return jnp.sqrt(jax.lax.optimization_barrier(square))


def _as_it_is(x, axes=None):
  power = jnp.sum(jnp.zeros_like(x, jnp.int32), axes, keepdims=True)
  return x.astype(norms.wide(x.dtype)), power


def _pixels_as_they_are(monkeypatch):
  plain = types.SimpleNamespace(
    **vars(norms)
    | {
      "of": _plain,
      "scaled": _as_it_is,
      "products": lambda a, b: (a * b, jnp.zeros((), jnp.int32)),
    }
  )
  monkeypatch.setattr(pixels, "norms", plain)
  monkeypatch.setattr(pixels, "_SMALLEST_PATCH", -1.0)
  _take(convolution.DIAGONAL_GRAM, monkeypatch)


def _take(strategy, monkeypatch):
  offered = rules._strategies
  monkeypatch.setattr(
    rules, "_strategies", lambda *args: {strategy: offered(*args)[strategy]}
  )


def _convolution():
  numbers = ("NHWC", "HWIO", "NHWC")

  def loss(kernel, example):
    out = jax.lax.conv_general_dilated(
      example["x"][None], kernel, (1, 1), "SAME", dimension_numbers=numbers
    )
    return jnp.sum(out[0] * example["y"])

  batch = {
    "x": np.full((4, 4, 4, 3), 1e-19, np.float32),
    "y": np.full((4, 4, 4, 2), 1e19, np.float32),
  }
  return loss, jnp.zeros((3, 3, 3, 2)), batch, {"l2_clip_norm": 1.0}


def _ids_in_their_own_dtype(monkeypatch):
  def lookup(use, indices, cotangent):
    size, width = use.eqn.invars[0].aval.shape
    ids, columns = indices.reshape(-1), cotangent.reshape(-1, width)
    inside = (ids >= 0) & (ids < jnp.asarray(size).astype(ids.dtype))
    columns = jnp.where(inside[:, None], columns, 0)
    return factors.Lookup(ids.astype(jnp.int32), columns)

  monkeypatch.setattr(embedding, "lookup", lookup)


def _bytes():
  ids = np.arange(16, dtype=np.uint8).reshape(4, 4)
  loss = lambda table, ids: 100 * jnp.sum(jnp.take(table, ids, axis=0))
  return loss, jnp.ones((256, 3)), ids, {"l2_clip_norm": 1e-3}


def _summed_before_the_parameters(monkeypatch):
  all_norms = two_pass._norms

  def without_kept(*args):
    found, lost, _, outs = all_norms(*args)
    return found, lost, {}, outs

  monkeypatch.setattr(two_pass, "_norms", without_kept)


def _standardised():
  def loss(params, example):
    weight = (params - params.mean(0)) / jnp.sqrt(params.var(0) + 1e-5)
    return jnp.sum((example[0] @ weight) * example[1])

  rng = np.random.default_rng(0)
  params = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
  x = np.repeat(rng.normal(size=(4, 6, 1)), 3, 2).astype(np.float32)
  g = (1e8 * rng.normal(size=(4, 6, 3))).astype(np.float32)
  options = {"l2_clip_norm": 1.0, "method": "two_pass"}
  return loss, params, (x, g), options


def _float64_as_it_is(monkeypatch):
  exponent = norms.exponent
  monkeypatch.setattr(
    norms, "exponent", lambda x: exponent(x) * (x.dtype != jnp.float64)
  )


def _float64():
  loss = lambda p, e: jnp.sum((e[0] @ p) * e[1])
  x, g = np.full((4, 2, 64), 1.4e-154), np.full((4, 2, 4), 3.5e153)
  params = jnp.zeros((64, 4), jnp.float64)
  return loss, params, (x, g), {"l2_clip_norm": 1e-3, "platform": "cpu"}


def _factors_above_one(monkeypatch):
  one = property(lambda self: (1.0,) * len(self.bounds))
  monkeypatch.setattr(clip_norms.Scaling, "enlargements", one)


def _rescaled():
  loss = lambda p, e: jnp.sum((e[0] @ p) * e[1])
  x = np.full((4, 2, 4), 1.3e-38, np.float32)
  g = np.full((4, 2, 4), 1e36, np.float32)
  g[:, 1] *= -1
  options = {"l2_clip_norm": 1e-4, "rescale_to_unit_norm": True}
  return loss, jnp.zeros((4, 4)), (x, g), options


def _no_floor(monkeypatch):
  def terms(rule, use, x, g):
    rows, columns = rule.to_factors(use, x, g)
    return jnp.sum(_plain(rows, -1) * _plain(columns, -1))

  monkeypatch.setattr(dense.DotGeneral, "terms", terms)
  _take(layer_rule.RECOMPUTE, monkeypatch)


def _mirrored():
  loss = lambda p, e: jnp.sum((e[0] @ p) * e[1])
  rng = np.random.default_rng(0)
  x = np.abs(rng.normal(size=(64, 512, 1))) * 3e-20
  g = rng.normal(size=(64, 512, 1)) * 1.2e19 / 512**0.5
  x[:, 256:], g[:, 256:] = x[:, :256], -g[:, :256]
  order = rng.permutation(512)
  batch = tuple(z[:, order].astype(np.float32) for z in (x, g))
  options = {"l2_clip_norm": 1e-9, "method": "two_pass", "platform": "cpu"}
  return loss, jnp.zeros((1, 1)), batch, options


_FAULTS = {
  "conv_pixels_underflow": (_pixels_as_they_are, _convolution),
  "narrow_token_ids": (_ids_in_their_own_dtype, _bytes),
  "two_pass_derived_weight": (_summed_before_the_parameters, _standardised),
  "f64_dense_underflow": (_float64_as_it_is, _float64),
  "unit_norm_overflow": (_factors_above_one, _rescaled),
  "drop_floor_underflow": (_no_floor, _mirrored),
}


# Which move a sum by many sensitivities, so that a watched step finds them too.
_LARGE = {
  "conv_pixels_underflow",
  "narrow_token_ids",
  "f64_dense_underflow",
  "unit_norm_overflow",
}


def _moved(fn, params, batch):
  """How far an example moves a sum at most, in sensitivities."""
  rows = jax.tree.leaves(batch)[0].shape[0]

  @jax.jit
  def alone(batch, row):
    return fn(params, batch, is_padding_example=jnp.arange(rows) != row).sum

  lengths = [
    np.linalg.norm(np.asarray(alone(batch, row), np.float64))
    for row in range(rows)
  ]
  return np.max(np.nan_to_num(lengths, nan=np.inf)) / fn.sensitivity()


def _found(fn, params, batch, seeds):
  """What was found in so many watched chunks."""

  @jax.jit
  def look(batch, direction):
    _, seen = watched.seen(fn(params, batch, direction=direction))
    return seen.found

  found = 0
  for seed in range(seeds):
    v = np.random.default_rng(seed).normal(size=params.shape)
    found += int(np.sum(look(batch, jnp.asarray(v, params.dtype))) > 0)
  return found


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(
      name, marks=[] if name == "unit_norm_overflow" else pytest.mark.slow
    )
    for name in _FAULTS
  ],
)
def test_a_fault_that_there_was_would_have_been_found(name, monkeypatch):
  take_out, make = _FAULTS[name]
  with jax.enable_x64(name == "f64_dense_underflow"):
    loss, params, batch, options = make()
    fn = dpdist.clipped_grad(loss, **options)
    with monkeypatch.context() as patch:
      take_out(patch)
      moved = _moved(fn, params, batch)
      assert moved > (50 if name in _LARGE else 1.2)
      with pytest.raises(errors.SensitivityError):
        dpdist.check_sensitivity(loss, params, batch, **options)
      if name in _LARGE:
        # Each is found with probability 0.77, if it is finite.
        assert _found(fn, params, batch, 8) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", _FAULTS)
def test_what_was_mended_is_not_found(name):
  _, make = _FAULTS[name]
  with jax.enable_x64(name == "f64_dense_underflow"):
    loss, params, batch, options = make()
    fn = dpdist.clipped_grad(loss, **options)
    assert _moved(fn, params, batch) <= 1.001
    dpdist.check_sensitivity(loss, params, batch, **options)
    assert not _found(fn, params, batch, 8)
