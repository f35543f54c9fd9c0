"""Runs a program as if each of its operations rounded a little worse.

Two right programs for one gradient differ where a result is rounded, and near
the smallest normal number where one flushes to 0 what another, by a fused
multiply-add, keeps. What comes after may enlarge that: the derivative of a tanh
near 1 is what rounding left of it. Inputs that are changed a little do not show
it, since their results are rounded to the same number. So results are changed.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import random
from typing import Any, Self

import jax
from jax.extend import core
import jax.numpy as jnp

from dpdist.clipping import watched
from dpdist.clipping.trace import program

PyTree = Any

_PRODUCTS = ("dot_general", "conv_general_dilated")
# Bodies of others, as of a kernel, run as they are.
_CALLS = frozenset(
  (
    *("pjit", "jit", "closed_call", "core_call", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
  )
)
# Operations whose results are rounded; others move numbers or choose among
# them.
_ROUNDED = frozenset(
  (
    *_PRODUCTS,
    *("add", "add_any", "sub", "mul", "div", "rem", "integer_pow", "pow"),
    *("square", "sqrt", "rsqrt", "cbrt", "exp", "exp2", "expm1", "log"),
    *("log1p", "logistic", "sin", "cos", "tan", "asin", "acos", "atan"),
    *("atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf"),
    *("erfc", "erf_inv", "lgamma", "digamma", "reduce_sum", "reduce_prod"),
    *("reduce_window_sum", "cumsum", "cumprod", "cumlogsumexp"),
    *("scatter-add", "scatter_mul", "select_and_scatter_add"),
  )
)


def enlarged(fn: Callable[..., PyTree], unit: float) -> Callable[..., PyTree]:
  """Returns a function like `fn`, with larger rounding errors.

  Each result of an operation is changed by a unit of its last place, and by
  what may have been flushed; `unit` is the relative error of products, which is
  coarser on some devices. Bodies of loops are changed alike in all iterations.
  """

  def run(*args: PyTree) -> PyTree:
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    outs = _run(closed, jax.tree.leaves(args), _Errors(unit))
    return jax.tree.unflatten(jax.tree.structure(shape), outs)

  return run


class _Errors:
  """Changes results; programs compile quickly, since shapes share signs."""

  def __init__(
    self, unit: float, signs: Mapping[tuple[int, ...], jax.Array] | None = None
  ):
    self._unit = unit
    self._signs = dict(signs or {})
    self._coin = random.Random(0)

  def inside(self) -> Self:
    """Returns errors for a body, whose values must not leave it."""
    return type(self)(self._unit, self._signs)

  def changed(self, x: Any, eqn: Any) -> Any:
    """Changes a float but for exact zeros, which are zeros in any program."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    info = jnp.finfo(x.dtype)
    # Float16 is not flushed, only rounded.
    is_flushed = info.dtype != jnp.float16
    least = info.smallest_normal if is_flushed else info.smallest_subnormal
    relative = float(info.eps)
    if eqn.primitive.name in _PRODUCTS:
      relative = max(relative, self._unit)
    flushed = 2 * math.sqrt(_terms(eqn)) * float(least)
    if x.shape not in self._signs:
      self._signs[x.shape] = watched.signs(x.shape, len(self._signs))
    # One way or the other at random, or errors would only grow or cancel.
    sign = self._signs[x.shape].astype(x.dtype) * self._coin.choice((-1, 1))
    error = sign * jnp.asarray(flushed, x.dtype)
    return jnp.where(
      x == 0, x, x + (x * (sign * jnp.asarray(relative, x.dtype)) + error)
    )


def _run(
  closed: core.ClosedJaxpr, values: Sequence[Any], changes: _Errors
) -> list[Any]:
  jaxpr = closed.jaxpr
  env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  env.update(zip(jaxpr.invars, values, strict=True))
  read = lambda x: x.val if isinstance(x, core.Literal) else env[x]
  for eqn in jaxpr.eqns:
    outs = _outs(eqn, [read(x) for x in eqn.invars], changes)
    env.update(zip(eqn.outvars, outs, strict=True))
  return [read(x) for x in jaxpr.outvars]


def _outs(eqn: Any, values: list[Any], changes: _Errors) -> list[Any]:
  """Runs an equation, and changes its results or those of its bodies."""
  name, params = eqn.primitive.name, eqn.params
  inside = lambda body: (
    lambda *args: _run(_closed(body), args, changes.inside())
  )
  if name == "scan":
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, rest = values[:num_consts], values[num_consts:]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
      outs = inside(params["jaxpr"])(*consts, *carry, *xs)
      return outs[:num_carry], outs[num_carry:]

    carry, ys = jax.lax.scan(
      body,
      rest[:num_carry],
      rest[num_carry:],
      length=params["length"],
      reverse=params["reverse"],
    )
    return [*carry, *ys]
  if name == "while":
    first, second = params["cond_nconsts"], params["body_nconsts"]
    tested, used = values[:first], values[first : first + second]
    # Rounding must not decide when a loop ends: it would run for ever.
    goes_on = lambda x: core.jaxpr_as_fun(params["cond_jaxpr"])(*tested, *x)[0]
    once = lambda x: inside(params["body_jaxpr"])(*used, *x)
    return list(jax.lax.while_loop(goes_on, once, values[first + second :]))
  if name == "cond":
    branches = [inside(branch) for branch in params["branches"]]
    return list(jax.lax.switch(values[0], branches, *values[1:]))
  if name in _CALLS:
    return inside(params.get("jaxpr", params.get("call_jaxpr")))(*values)
  outs = program.bind(eqn, values)
  if name not in _ROUNDED:
    return outs
  return [changes.changed(x, eqn) for x in outs]


def _terms(eqn: Any) -> int:
  """Returns how many products are added up for an entry of a result."""
  if eqn.primitive.name == "dot_general":
    (axes, _), _ = eqn.params["dimension_numbers"]
    return math.prod(eqn.invars[0].aval.shape[axis] for axis in axes)
  if eqn.primitive.name == "conv_general_dilated":
    shape = eqn.invars[1].aval.shape
    outputs = eqn.params["dimension_numbers"].rhs_spec[0]
    return math.prod(shape) // max(1, shape[outputs])
  return 1


def _closed(body: Any) -> core.ClosedJaxpr:
  return (
    body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ())
  )
