"""One table of bad inputs and what is said of them.

Every message names the argument, gives the value, and says what would be right.
A row: the call; the argument; the value as it is shown; what would be right.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist import clipping

_NAN, _INF = float("nan"), float("inf")
_PARAMS = {"a": jnp.ones(()), "b": jnp.ones(())}


def _loss(p, x):
  return p["a"] * p["b"] * x


def _clip(**kwargs):
  return dpdist.clipped_grad(_loss, **{"l2_clip_norm": 1.0, **kwargs})


def _call(params=_PARAMS, batch=4, loss=_loss, **kwargs):
  options = {
    name: kwargs.pop(name)
    for name in ("l2_clip_norm", "frozen", "microbatch_size")
    if name in kwargs
  }
  fn = dpdist.clipped_grad(loss, **{"l2_clip_norm": 1.0, **options})
  batch = jnp.ones(batch) if isinstance(batch, int) else batch
  return fn(params, batch, **kwargs)


def _config(**kwargs):
  given = {
    "num_examples": 100,
    "expected_batch_size": 10,
    "num_steps": 5,
    "l2_clip_norm": 1.0,
    "target_delta": 1e-5,
    "noise_multiplier": 1.0,
  }
  return dpdist.PrivacyConfig(**{**given, **kwargs})


def _gradients(plan=None, **kwargs):
  plan = dpdist.make_plan(_config()) if plan is None else plan
  return dpdist.private_gradients(_loss, plan, **{"seed": 1, **kwargs})


def _sampler(**kwargs):
  given = {"num_examples": 9, "sampling_probability": 0.5, "seed": 1}
  return dpdist.PoissonSampler(**{**given, **kwargs})


def _epsilon(**kwargs):
  given = {
    "noise_multiplier": 1.0,
    "sampling_probability": 0.1,
    "num_steps": 1,
    "delta": 1e-5,
  }
  return dpdist.accounting.epsilon(**{**given, **kwargs})


def _virtual(*args):
  return clipping.VirtualStep(_clip(), *args)


def _stateful(**kwargs):
  loss = lambda p, s, rng, x: (p * x, (s + x if "mix" in kwargs else s, {}))
  fn = dpdist.with_state(
    loss, l2_clip_norm=1.0, aggregate=kwargs.get("aggregate", {})
  )
  return fn(1.0, jnp.ones(()), jnp.ones(4), rng=jax.random.key(0))


def _dp(**kwargs):
  given = {
    "epsilon": 2.0,
    "delta": 1e-5,
    "clipping_norm": 1.0,
    "batch_size": 8,
    "train_steps": 5,
    "train_size": 100,
  }
  return dpdist.DPConfig(**{**given, **kwargs})


def _in_groups(group_size):
  return _gradients(
    dpdist.make_plan(
      _config(group_size=group_size, neighboring_relation="zero_out")
    )
  )


def _changed(function, name, right, *values):
  return [
    (lambda v=v: function(**{name: v}), name, repr(v), right) for v in values
  ]


ROWS = [
  # Clipping.
  *_changed(
    _clip, "l2_clip_norm", "in [1e-12, 1e+18]", 0.0, -1.0, _NAN, _INF, "1"
  ),
  *_changed(_clip, "l2_clip_norm", "must hold a norm", None, {}, []),
  *_changed(_clip, "method", "'two_pass'", "magic", None, 1),
  *_changed(_clip, "platform", "'tpu'", "npu", 1),
  *_changed(
    _clip, "microbatch_size", "None or an integer >= 1", 0, -2, 1.5, True
  ),
  *_changed(
    _clip,
    "normalize_gamma",
    "None or finite and >= 1e-12",
    0.0,
    -1.0,
    _NAN,
  ),
  *_changed(_clip, "frozen", "True where", "a", 1),
  *_changed(_call, "frozen", "must leave a parameter to train", True),
  *_changed(_call, "frozen", "prefix pytree of params", {"a": True}, [True]),
  *_changed(_call, "l2_clip_norm", "prefix pytree of params", {"a": 1.0}),
  (
    lambda: _call(l2_clip_norm={"a": None, "b": 1.0}),
    "l2_clip_norm",
    "None",
    "a norm for each group that is trained",
  ),
  (
    lambda: _call(
      l2_clip_norm={"a": 3.0, "b": 1.0}, frozen={"a": True, "b": False}
    ),
    "l2_clip_norm",
    "3.0",
    "None for a group that is wholly frozen",
  ),
  (lambda: _call(batch=0), "batch", "(0,)", "at least 1"),
  (
    lambda: _call(batch=(jnp.ones(2), jnp.ones(3))),
    "batch",
    "[(2,), (3,)]",
    "one common leading axis",
  ),
  (lambda: _call(batch=jnp.ones(())), "batch", "()", "leading axis"),
  (
    lambda: _call(batch=3, microbatch_size=2),
    "microbatch_size",
    "2",
    "divide the batch of 3",
  ),
  (
    lambda: _call(is_padding_example=np.zeros(3, bool)),
    "is_padding_example",
    "(3,)",
    "(4,)",
  ),
  (
    lambda: _call(params={"a": 1.0, "b": jnp.int32(1)}),
    "params",
    "int32",
    "floating",
  ),
  (
    lambda: _call(batch=jnp.ones((4, 2))),
    "loss_fn",
    "(2,)",
    "one floating number",
  ),
  (
    lambda: _call(rng=jax.random.PRNGKey(0)),
    "rng",
    "uint32",
    "jax.random.wrap_key_data",
  ),
  (
    lambda: _call(rng=jax.random.split(jax.random.key(0), 3)),
    "rng",
    "(3,)",
    "(4,)",
  ),
  *_changed(
    lambda **kwargs: _clip().sensitivity(**kwargs),
    "neighboring_relation",
    "'replace_one'",
    "swap",
    None,
  ),
  # Virtual steps.
  (lambda: _virtual("max"), "reduction", "'max'", "'mean'"),
  (lambda: _virtual("mean"), "expected_batch_size", "None", "finite and > 0"),
  (lambda: _virtual("mean", -1), "expected_batch_size", "-1", "finite and > 0"),
  (lambda: _virtual("sum", 4), "expected_batch_size", "4", "None"),
  (
    lambda: clipping.VirtualStep(_loss),
    "fn",
    "_loss",
    "dpdist.clipped_grad",
  ),
  (lambda: _virtual().finish(), "finish", "nothing", "after add"),
  (
    lambda: _virtual().add(_PARAMS, jnp.ones(2), l2_clip_norm=_INF),
    "l2_clip_norm",
    "inf",
    "in [1e-12, 1e+18]",
  ),
  # Groups.
  *_changed(
    lambda group_size: clipping.into_groups(jnp.ones(8), group_size),
    "group_size",
    "an integer >= 1",
    0,
    1.5,
    True,
  ),
  *_changed(
    lambda group_size: clipping.into_groups(jnp.ones(8), group_size),
    "group_size",
    "divide the batch of 8",
    3,
  ),
  # Private gradients and noise.
  *_changed(_gradients, "batch_axis", "must be 0", 1, -1, (0, 0), True, None),
  *_changed(_in_groups, "group_size", "unless rows_are_fixed=True", 2),
  *_changed(_gradients, "l2_clip_norm", "in [1e-12, 1e+18]", -1.0),
  *_changed(_gradients, "plan", "dpdist.make_plan", "plan", 3),
  (lambda: _gradients(seed=1.5), "seed", "float", "int, non-empty bytes"),
  (lambda: _gradients(seed=b""), "seed", "bytes", "non-empty"),
  *_changed(
    lambda stddev: dpdist.gaussian_noise(stddev, 1),
    "stddev",
    "finite and at least 0",
    -1.0,
    _NAN,
    _INF,
    "1",
    True,
    None,
  ),
  (lambda: dpdist.gaussian_noise(1.0, None), "seed", "NoneType", "int"),
  (
    lambda: dpdist.gaussian_noise(1.0, jnp.zeros(2)),
    "seed",
    "float32",
    "one typed PRNG key",
  ),
  # Losses.
  (
    lambda: _stateful(mix=True),
    "network_state",
    "computed from them",
    "GroupNorm",
  ),
  (
    lambda: _stateful(aggregate={"x": "max"}),
    "aggregate",
    "'max' for 'x'",
    "'stack', 'mean', 'sum'",
  ),
  (
    lambda: _stateful(aggregate={"x": "sum"}),
    "aggregate",
    "['x']",
    "each metric of loss_fn",
  ),
  # Plans.
  *_changed(_config, "num_examples", "an integer >= 1", 0, 1.5, True),
  *_changed(_config, "expected_batch_size", "finite and > 0", 0, -1, _NAN),
  *_changed(_config, "expected_batch_size", "at most num_examples=100", 101.0),
  *_changed(_config, "num_steps", "an integer >= 1", 0, 2.5),
  *_changed(_config, "l2_clip_norm", "finite and > 0", 0, _INF),
  *_changed(_config, "target_delta", "in (0, 1)", 0, 1, -0.1),
  *_changed(_config, "noise_multiplier", "in (0, 1e+15]", 0, -1, _NAN),
  *_changed(_config, "accountant", "one of ('pld', 'rdp')", "gdp"),
  *_changed(_config, "noise_multiplier", "exactly one", None),
  *_changed(_dp, "epsilon", "finite and > 0", 0, _INF, "2"),
  *_changed(_dp, "delta", "in (0, 1)", 0, 1),
  *_changed(_dp, "clipping_norm", "finite and > 0", 0, None),
  *_changed(_dp, "batch_size", "an integer >= 1", 0, 1.5),
  *_changed(_dp, "batch_size", "at most train_size=100", 101),
  *_changed(_dp, "gradient_accumulation_steps", "an integer >= 1", 0),
  (
    lambda: _dp(gradient_accumulation_steps=13),
    "gradient_accumulation_steps",
    "104",
    "at most train_size=100",
  ),
  *_changed(_dp, "train_steps", "an integer >= 1", 0),
  *_changed(_dp, "microbatch_size", "at most batch_size=8", 9),
  *_changed(_dp, "noise_multiplier", "large enough for epsilon=2.0", 0.1),
  # Accounting and sampling.
  *_changed(_epsilon, "noise_multiplier", "in [0, 1e+15]", -1, _NAN),
  *_changed(_epsilon, "sampling_probability", "in (0, 1]", 0, 1.1),
  *_changed(_epsilon, "num_steps", "an integer >= 0", -1, 1.5),
  *_changed(_epsilon, "delta", "in (0, 1)", 0, 1),
  *_changed(_epsilon, "accountant", "one of ('pld', 'rdp')", "gdp"),
  *_changed(_sampler, "num_examples", f"[1, {2**62}]", 0),
  *_changed(_sampler, "sampling_probability", "(0, 1]", 0.0, 1.5, _NAN),
  (lambda: _sampler(seed=b""), "seed", "b''", "empty"),
  (lambda: _sampler()(-1), "step", "-1", f"[0, {2**63 - 1}]"),
]


def _name(row):
  _, argument, value, _ = row
  return f"{argument}={value}"


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_a_message_names_argument_value_and_what_would_be_right(row):
  call, argument, value, right = row
  with pytest.raises((ValueError, RuntimeError)) as error:
    call()
  text = str(error.value)
  for part in (argument, value, right):
    assert part in text, text
