"""Sums of clipped gradients where products round their operands.

GPUs and TPUs multiply float32 with 11 or 8 significant bits. A CPU does so
here: the operands of every product that does not ask for more are rounded
first, as a device's matrix unit rounds them.
"""

import functools

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist import clipping

_FRACTION = {"gpu": 10, "tpu": 7}
_CLIP_NORM = 1.0


def _with_rounded_products(fn, platform):
  """fn, computed with products that round as a platform's do."""

  def run(*args):
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    leaves = _evaluated(closed, jax.tree.leaves(args), _FRACTION[platform])
    return jax.tree.unflatten(jax.tree.structure(shape), leaves)

  return run


def _evaluated(closed, values, fraction):
  jaxpr = closed.jaxpr
  env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  env.update(zip(jaxpr.invars, values, strict=True))
  read = lambda x: x.val if isinstance(x, core.Literal) else env[x]
  within = functools.partial(_evaluated, fraction=fraction)
  for eqn in jaxpr.eqns:
    values = [read(x) for x in eqn.invars]
    name, params = eqn.primitive.name, eqn.params
    if name in ("dot_general", "conv_general_dilated"):
      if set(np.ravel(params["precision"])) != {lax.Precision.HIGHEST}:
        values = [lax.reduce_precision(x, 8, fraction) for x in values]
      outs = eqn.primitive.bind(*values, **params)
    elif name == "cond":
      index, *operands = values
      branches = [lambda *xs, b=b: within(b, xs) for b in params["branches"]]
      outs = lax.switch(index, branches, *operands)
    elif name == "jit":
      outs = within(params["jaxpr"], values)
    elif name == "custom_vjp_call":
      outs = within(params["call_jaxpr"], values)
    elif name == "custom_vmap_call":
      outs = within(params["call"], values)
    else:
      assert not list(core.jaxprs_in_params(params)) or name.startswith(
        ("scatter", "reduce")
      ), name
      outs = eqn.primitive.bind(*values, **params)
    outs = outs if eqn.primitive.multiple_results else [outs]
    env.update(zip(eqn.outvars, outs, strict=True))
  return [read(x) for x in jaxpr.outvars]


def _dense(params, example):
  return jnp.sum((example[0] @ params) * example[1])


def _convolution(params, example):
  pixels = lax.conv_general_dilated(
    example[0][None], params, (1,), "SAME", dimension_numbers=_LAYOUT
  )
  return jnp.sum(pixels * example[1])


_LAYOUT = ("NWC", "WIO", "NWC")


def _examples(fraction, positions, rows, columns):
  """Numbers just above and just below what is rounded down and up."""
  rng = np.random.default_rng(0)
  size = 400

  def numbers(*shape):
    ulps = rng.choice([0.49, 0.51], (size, 1, 1))
    same = (1 + ulps * 2.0**-fraction) * 2.0 ** rng.integers(
      -3, 3, (size, 1, 1)
    )
    return np.broadcast_to(same, (size, *shape)).astype(np.float32)

  # Lengths differ, and with them the factors, which decide how what is scaled
  # is rounded.
  used = np.arange(rows) < rng.integers(1, rows + 1, (size, 1, 1))
  return jnp.where(used, numbers(positions, rows), 0), jnp.asarray(
    numbers(positions, columns)
  )


@pytest.mark.parametrize("method", ["bookkeeping", "two_pass"])
@pytest.mark.parametrize(
  ("platform", "loss", "shape"),
  [
    ("tpu", _dense, (1, 64, 1)),
    ("gpu", _dense, (1, 64, 1)),
    ("tpu", _dense, (3, 64, 32)),
    ("tpu", _dense, (40, 6, 2)),
    ("tpu", _convolution, (5, 32, 2)),
  ],
)
def test_what_a_product_rounds_is_inside_the_clip_norm(
  platform, loss, shape, method
):
  fn = clipping.clipped_grad(
    loss, l2_clip_norm=_CLIP_NORM, method=method, platform=platform
  )
  batch = _examples(_FRACTION[platform], *shape)
  params = jnp.zeros(shape[1:] if loss is _dense else (3, *shape[1:]))
  one = _with_rounded_products(
    lambda example: fn(params, jax.tree.map(lambda x: x[None], example)).sum,
    platform,
  )
  sums = np.asarray(jax.jit(jax.vmap(one))(batch), np.float64)
  longest = np.max(np.linalg.norm(sums.reshape(len(sums), -1), axis=1))
  assert (
    1 - 2.0 ** -(_FRACTION[platform] - 2) < longest / _CLIP_NORM <= 1 + 1e-5
  )
