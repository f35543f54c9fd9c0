"""Losses of odd constructs: every method gives the gradients of jax.grad.

Programs are put together at random, of a fixed seed, from blocks that each use
parameters and data in some way that JAX allows.
"""

import functools

import jax
from jax.experimental import io_callback
from jax.experimental import ode
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist.clipping.trace import dependence

METHODS = ("bookkeeping", "two_pass", "vmap")
_TABLE = np.array([0.5, -1.0, 2.0], np.float32)
_MASK = np.array([True, False, True])
_SIZE = 3
_NUM_EXAMPLES = 3


# What a user may write with a derivative of his own.


@jax.custom_vjp
def _with_table(x, table):
  return x * jnp.sum(table)


def _with_table_forward(x, table):
  return _with_table(x, table), (x, table)


def _with_table_backward(kept, g):
  _, table = kept
  total = jax.lax.fori_loop(0, 3, lambda i, a: a + table[i], 0.0)
  return g * total, jnp.zeros_like(table)


_with_table.defvjp(_with_table_forward, _with_table_backward)


@jax.custom_vjp
def _clipped_backward(x):
  return x


_clipped_backward.defvjp(
  lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),)
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _scaled_derivative(x, factor):
  return jnp.sin(x)


@_scaled_derivative.defjvp
def _scaled_derivative_jvp(factor, primals, tangents):
  return jnp.sin(primals[0]), factor * jnp.cos(primals[0]) * tangents[0]


@jax.custom_jvp
def _jvp_with_table(x, table):
  return x * table


@_jvp_with_table.defjvp
def _jvp_with_table_jvp(primals, tangents):
  x, table = primals
  total = jax.lax.fori_loop(0, 3, lambda i, a: a + table[i], 0.0)
  return x * table, tangents[0] * total


# Blocks: (params, example, h) -> h, all of [3].


def _ref(p, e, h):
  ref = jax.new_ref(h * p["a"])
  ref[...] = ref[...] * e["x"]
  ref[0] += p["b"][0]
  return ref[...]


def _ref_in_scan(p, e, h):
  def body(carry, row):
    ref = jax.new_ref(row)
    ref[...] = ref[...] * carry
    return carry + p["s"], ref[...]

  return jax.lax.scan(body, e["x"][0], h * p["a"])[1]


def _ref_written_by_a_scan(p, e, h):
  ref = jax.new_ref(h)

  def body(carry, x):
    ref[...] = ref[...] * x + p["b"]
    return carry, None

  jax.lax.scan(body, 0.0, e["x"])
  return jax.ref.freeze(ref)


def _ref_in_jit(p, e, h):
  return jax.jit(lambda h: _ref(p, e, h))(h)


def _debug(p, e, h):
  jax.debug.callback(lambda *_: None, p["a"], e["x"], h)
  jax.debug.callback(lambda *_: None, p["b"] * 2, ordered=True)
  return h * p["a"] + e["x"]


def _io(p, e, h):
  io_callback(lambda _: None, None, e["x"])
  return h * p["a"]


def _pure_callback(p, e, h):
  shape = jax.ShapeDtypeStruct((_SIZE,), jnp.float32)
  double = lambda x: np.asarray(2 * x, np.float32)
  got = jax.pure_callback(double, shape, e["x"], vmap_method="expand_dims")
  return h * got * p["b"]


def _table(p, e, h):
  return _with_table(h * p["a"], jnp.array([0.0, 0.5, 1.0]))


def _jvp_table(p, e, h):
  return _jvp_with_table(h * p["b"], jnp.asarray(_TABLE))


def _nonlinear_backward(p, e, h):
  return _clipped_backward(p["w"]) @ h + _clipped_backward(e["x"] * p["b"])


def _own_jvp(p, e, h):
  return _scaled_derivative(h * p["a"] + e["x"], 3.0)


def _scan(p, e, h):
  def body(carry, row):
    return jnp.tanh(carry @ p["w"] + row * _TABLE), jnp.sum(carry)

  carry, sums = jax.lax.scan(body, h, p["w"] * e["x"])
  return carry + sums


def _scan_of_constants(p, e, h):
  body = lambda c, t: (c * p["a"] + t, c)
  return jax.lax.scan(body, h, jnp.asarray(_TABLE))[0]


def _while(p, e, h):
  num = jax.lax.while_loop(
    lambda n: n < 2 + (e["x"][0] > 0), lambda n: n + 1, 0
  )
  return h * num * p["a"]


def _fori(p, e, h):
  return jax.lax.fori_loop(0, 2, lambda i, c: c * p["b"] + e["x"][i], h)


def _cond(p, e, h):
  return jax.lax.cond(
    e["x"][0] > 0, lambda: h * p["a"], lambda: jnp.sin(h) + p["b"]
  )


def _cond_on_weights(p, e, h):
  return jax.lax.cond(p["a"][0] > 0, lambda h: p["w"] @ h, lambda h: h, h)


def _switch(p, e, h):
  return jax.lax.switch(
    e["i"], [lambda h: h, lambda h: h * p["a"], lambda h: h + p["b"]], h
  )


def _closed_over(p, e, h):
  return jnp.where(_MASK, h * p["a"], e["x"]) * _TABLE


def _integers(p, e, h):
  return h * p["a"][p["table"][e["i"]]] + jnp.argmax(p["b"]) + p["table"]


def _lookup(p, e, h):
  return h + p["w"][e["i"]] + p["w"][p["table"]].sum(0)


def _slice(p, e, h):
  return h * jax.lax.dynamic_slice(p["long"], (e["i"],), (_SIZE,))


def _keys(p, e, h):
  kept = jax.random.bernoulli(e["key"], 0.5, (_SIZE,))
  noise = jax.random.normal(jax.random.fold_in(p["key"], e["i"]), (_SIZE,))
  return jnp.where(kept, h * p["a"], 0) + noise * p["b"]


def _checkpoint(p, e, h):
  return jax.checkpoint(lambda p, h: jnp.tanh(p["w"] @ h + e["x"]))(
    {"w": p["w"]}, h
  )


def _sorted(p, e, h):
  return jnp.sort(p["a"] * h) + jnp.cumsum(p["b"])


def _complex(p, e, h):
  return jnp.real(jnp.fft.ifft(jnp.fft.fft(p["a"]) * jnp.fft.fft(h)))


def _solve(p, e, h):
  return jnp.linalg.solve(p["w"] + 5 * jnp.eye(_SIZE), h)


def _python_number(p, e, h):
  return h * p["s"] + jax.lax.stop_gradient(p["s"] * h) + p["s"]


def _joined(p, e, h):
  both = jnp.concatenate([p["a"], p["b"]])
  return both[2:5] * h + jnp.stack([p["a"], p["b"]]).mean(0)


_BLOCKS = (
  *(_ref, _ref_in_scan, _ref_written_by_a_scan, _ref_in_jit, _debug, _io),
  *(_pure_callback, _table, _jvp_table, _nonlinear_backward, _own_jvp, _scan),
  *(_scan_of_constants, _while, _fori, _cond, _cond_on_weights, _switch),
  *(_closed_over, _integers, _lookup, _slice, _keys, _checkpoint, _sorted),
  *(_complex, _solve, _python_number, _joined),
)
_EFFECTS = {_ref, _ref_in_scan, _ref_written_by_a_scan, _ref_in_jit, _io}
_FROZEN = ("key", "table")
_IS_FROZEN = {
  k: k in _FROZEN for k in ("a", "b", "key", "long", "s", "table", "w")
}


def _params():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "a": jnp.asarray(draw(_SIZE)),
    "b": draw(_SIZE),
    "key": jax.random.key(3),
    "long": jnp.asarray(draw(5)),
    "s": 0.7,
    "table": jnp.array([2, 0, 1]),
    "w": jnp.asarray(draw(_SIZE, _SIZE)) / 2,
  }


def _batch():
  rng = np.random.default_rng(1)
  return {
    "i": jnp.arange(_NUM_EXAMPLES),
    "key": jax.random.split(jax.random.key(5), _NUM_EXAMPLES),
    "x": jnp.asarray(rng.normal(size=(_NUM_EXAMPLES, _SIZE)), jnp.float32),
  }


# What is run once need not run fast.
_compiled = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _loss_of(blocks):
  def loss(params, example):
    h = example["x"]
    for block in blocks:
      h = block(params, example, h)
    # All parameters are touched, so that none can be left out unseen.
    rest = sum(jnp.sum(params[k]) for k in ("a", "b", "long", "s", "w"))
    return jnp.sum(jnp.sin(h)) + 0.01 * rest * example["x"][1]

  return loss


def _expected(loss, params, batch):
  """Gradients of jax.grad, one example after another."""
  frozen = {k: params[k] for k in _FROZEN}
  given = {k: params[k] for k in params if k not in _FROZEN}
  grad = _compiled(jax.grad(lambda given, e: loss(given | frozen, e)))
  return [
    grad(given, jax.tree.map(lambda x, i=i: x[i], batch))
    for i in range(_NUM_EXAMPLES)
  ]


def _check(blocks, methods=METHODS):
  loss, params, batch = _loss_of(blocks), _params(), _batch()
  gradients = _expected(loss, params, batch)
  norms = np.array(
    [
      np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(g)))
      for g in gradients
    ]
  )
  clip_norm = float(np.median(norms))
  scales = np.minimum(1, clip_norm / norms)
  for method in methods:
    fn = _compiled(
      dpdist.clipped_grad(
        loss, l2_clip_norm=clip_norm, method=method, frozen=_IS_FROZEN
      )
    )
    if method not in ("auto", "vmap") and _EFFECTS.intersection(blocks):
      with pytest.warns(UserWarning, match="'vmap' is taken"):
        got = fn(params, batch)
    else:
      got = fn(params, batch)
    np.testing.assert_allclose(got.grad_norms, norms, rtol=1e-4)
    for name in gradients[0]:
      want = sum(s * g[name] for s, g in zip(scales, gradients, strict=True))
      np.testing.assert_allclose(
        got.sum[name], want, rtol=1e-3, atol=1e-4 * clip_norm, err_msg=method
      )


def _chains(length, seed):
  """All blocks, in chains at random; those with effects are in one chain."""
  rng = np.random.default_rng(seed)
  pure = [b for b in _BLOCKS if b not in _EFFECTS]
  order = [pure[i] for i in rng.permutation(len(pure))]
  chains = [order[i : i + length] for i in range(0, len(order), length)]
  # Not in another order: JAX 0.10.2 fails of two of them under vmap itself.
  return [
    *chains,
    [_ref_written_by_a_scan, _ref_in_scan, _ref, _ref_in_jit, _io],
  ]


def _name(blocks):
  return "-".join(block.__name__[1:] for block in blocks)


@pytest.mark.parametrize("blocks", _chains(8, seed=0), ids=_name)
def test_odd_losses_have_the_gradients_of_jax(blocks):
  _check(blocks, ("auto", "two_pass"))


@pytest.mark.slow
@pytest.mark.parametrize(
  "blocks",
  [[b] for b in _BLOCKS] + [c for i in range(8) for c in _chains(3, i + 1)],
  ids=_name,
)
def test_more_odd_losses_have_the_gradients_of_jax(blocks):
  _check(blocks)


def _simple(blocks):
  fn = dpdist.clipped_grad(
    _loss_of(blocks), l2_clip_norm=1.0, frozen=_IS_FROZEN
  )
  return fn(_params(), _batch())


_KEPT = jax.new_ref(np.ones(_SIZE, np.float32))


def _kept(p, e, h):
  """Writes an example into what outlives the call."""
  _KEPT[...] = e["x"]
  return h * p["a"]


def _ordered_io(p, e, h):
  io_callback(lambda _: None, None, e["x"], ordered=True)
  return h * p["a"]


def _io_of_weights(p, e, h):
  io_callback(lambda _: None, None, p["a"])
  return h * p["a"]


def _ref_in_cond(p, e, h):
  ref = jax.new_ref(h * p["a"])

  def write():
    ref[...] = e["x"]

  jax.lax.cond(e["x"][0] > 0, write, lambda: None)
  return ref[...]


@pytest.mark.parametrize(
  ("block", "message"),
  [
    (_kept, r"loss_fn must have no effects .* \['WriteEffect'\]: .*set/swap"),
    (_ordered_io, r"loss_fn .* \['OrderedIOEffect'\]: .*vmap.*ordered"),
    (_io_of_weights, r"loss_fn .* \['IOEffect'\]: IO callbacks do not supp"),
    (_ref_in_cond, r"loss_fn .* \['Internal.*vmap-of-cond"),
    (
      lambda p, e, h: h * p["a"] * jax.lax.rng_uniform(0.0, 1.0, (_SIZE,)),
      r"random numbers from its rng by jax.random, got jax.lax.rng_uniform",
    ),
  ],
)
def test_an_effect_that_cannot_be_had_is_one_clear_error(block, message):
  with pytest.raises(ValueError, match=message):
    _simple([block])


def test_explain_says_why_a_loss_with_effects_is_not_taken_apart():
  fn = dpdist.clipped_grad(
    _loss_of([_ref]), l2_clip_norm=1.0, frozen=_IS_FROZEN
  )
  text = fn.explanation(_params(), _batch())
  assert "vmap" in text
  assert "MutableArrayEffect" in text


@pytest.mark.slow
def test_a_weight_is_printed_once_in_the_forward_pass():
  seen = []

  def loss(w, x):
    jax.debug.callback(lambda w: seen.append(w), w * 2)
    return jnp.dot(w * 2, x) ** 2

  fn = dpdist.clipped_grad(loss, l2_clip_norm=1.0, method="bookkeeping")
  jax.block_until_ready(fn(jnp.ones(2), jnp.ones((3, 2))))
  jax.effects_barrier()
  assert len(seen) == 1


def test_what_is_read_back_from_a_ref_depends_on_what_was_written():
  def state(w, x):
    ref = jax.new_ref(w)
    before = ref[...] * 2
    ref[...] = x
    return before, ref[...], w + 1

  closed = jax.make_jaxpr(state)(jnp.ones(3), jnp.ones(3))
  assert dependence.dependent(closed.jaxpr, [False, True]) == [
    False,
    True,
    False,
  ]
  # Inside a call, and a loop, all that it gives back does.
  inner = jax.make_jaxpr(jax.jit(state))(jnp.ones(3), jnp.ones(3))
  assert dependence.dependent(inner.jaxpr, [False, True])[1]


def test_a_state_that_an_example_reaches_through_a_ref_is_refused():
  def loss(params, state, rng, example):
    ref = jax.new_ref(state)
    ref[...] = ref[...] * 0.9 + example
    return jnp.sum(params * example), (ref[...], {})

  fn = dpdist.with_state(loss, l2_clip_norm=1.0, aggregate={})
  with pytest.raises(ValueError, match="network_state must not depend"):
    fn(jnp.ones(2), jnp.ones(2), jnp.ones((3, 2)), rng=jax.random.key(0))


@pytest.mark.slow
def test_ordinary_differential_equations_can_be_solved():
  def loss(params, example):
    field = lambda y, t: jnp.tanh(params @ y) * t
    return jnp.sum(ode.odeint(field, example, jnp.array([0.0, 0.5, 1.0])) ** 2)

  params, batch = _params()["w"], _batch()["x"]
  want = [jnp.linalg.norm(jax.grad(loss)(params, x)) for x in batch]
  for method in METHODS:
    fn = dpdist.clipped_grad(loss, l2_clip_norm=1.0, method=method)
    got = jax.jit(fn)(params, batch).grad_norms
    np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
  "number",
  [
    1.5,
    *(
      pytest.param(x, marks=pytest.mark.slow)
      for x in (np.float32(1.5), np.float64(1.5), np.array(1.5))
    ),
  ],
)
def test_numbers_are_parameters(number, method):
  """As for jax.grad and optax."""
  loss = lambda p, x: (p["w"] * x + p["b"][0]) ** 2
  params = {"b": (number,), "w": 0.5}
  batch = jnp.array([1.0, -2.0])
  fn = dpdist.clipped_grad(loss, l2_clip_norm=1e3, method=method)
  want = [jax.grad(loss)({"b": (1.5,), "w": 0.5}, x) for x in batch]
  got = fn(params, batch).sum
  for name in params:
    total = sum(jax.tree.leaves([g[name] for g in want]))
    assert jax.tree.leaves(got[name])[0].dtype == jnp.float32
    np.testing.assert_allclose(jax.tree.leaves(got[name])[0], total, rtol=1e-5)


@pytest.mark.parametrize(
  ("leaf", "message"),
  [
    (2, r"params must hold floating arrays alone, got dtype int32 .*\['n'\]"),
    (True, r"got dtype bool at params\['n'\]"),
    (np.int8(3), r"got dtype int8 at params\['n'\]"),
    (1j, r"got dtype complex64 at params\['n'\]"),
    ("text", r"got a str at params\['n'\]"),
  ],
)
def test_what_is_no_floating_number_is_named(leaf, message):
  loss = lambda p, x: p["w"] * x
  fn = dpdist.clipped_grad(loss, l2_clip_norm=1.0)
  with pytest.raises(ValueError, match=message):
    fn({"n": leaf, "w": 1.0}, jnp.ones(2))
