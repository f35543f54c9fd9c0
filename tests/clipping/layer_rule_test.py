"""Rules of layers from outside of the package, right ones and wrong ones."""

import importlib
import sys

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist import clipping
from dpdist import config as config_lib
from dpdist import errors
from dpdist import registry
from dpdist.ledger import ledger as ledger_lib
from dpdist.sensitivity import comparison
from dpdist.training import job as job_lib

pytestmark = pytest.mark.usefixtures("quick_compiles")

_RULES = """
import math

from dpdist import registry
from dpdist.clipping.layers import costs
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.layers import norms

OWN = layer_rule.Strategy("norm by a toy rule")
PART = 1.0


class _Elementwise(layer_rule.LayerRule):
  weight_operands = (0, 1)

  def forming_cost(self, use, model):
    return costs.Cost(0, 4.0 * math.prod(use.tap_shape), 0)

  def strategies(self, use, model):
    return {} if use.lengths else {OWN: costs.Cost(0, 0, 0)}

  def positions(self, use, operand):
    return math.prod(use.lengths)


@registry.register("layer_rule", "scale")
class Scale(_Elementwise):
  primitive = "mul"

  def norm(self, strategy, use, operand, cotangent, unit_roundoff):
    return PART * norms.of(norms.widen(operand) * norms.widen(cotangent))

  def terms(self, use, operand, cotangent):
    product, power = norms.products(norms.of(operand), norms.of(cotangent))
    return norms.times_power_of_two(product, power)


@registry.register("layer_rule", "bias")
class Bias(_Elementwise):
  primitive = "add"
  multiplies = False

  def norm(self, strategy, use, operand, cotangent, unit_roundoff):
    return PART * norms.of(cotangent)
"""


@pytest.fixture(name="use_rules")
def fixture_use_rules(tmp_path, monkeypatch):
  """Imports toy rules, as another process would; forgets them at the end."""
  monkeypatch.syspath_prepend(tmp_path)

  def forget():
    sys.modules.pop("toy_rules", None)
    for name in ("scale", "bias"):
      registry._things["layer_rule"].pop(name, None)
    monkeypatch.setattr(registry, "_digests", {})
    importlib.invalidate_caches()

  def use(text=_RULES):
    forget()
    (tmp_path / "toy_rules.py").write_text(text)
    return importlib.import_module("toy_rules")

  yield use
  forget()


def _loss(params, x):
  x = jnp.tanh(params["scale"] * x + params["bias"])

  def body(x, scale):
    return jnp.tanh(params["shared"] * (x * scale)), None

  x, _ = lax.scan(body, x, params["each"])
  return jnp.sum(x * jnp.arange(1.0, 6.0))


def _made():
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"scale": normal(5), "bias": normal(5)}
  params |= {"each": normal(3, 5), "shared": normal(5)}
  return params, normal(16, 5)


def _norms_and_sum(params, batch, clip_norm):
  """What the sum should be, from the gradients of `jax.grad`."""
  grads = jax.vmap(jax.grad(_loss), (None, 0))(params, batch)
  flat = np.concatenate(
    [np.reshape(x, (len(batch), -1)) for x in jax.tree.leaves(grads)], 1
  )
  norms = np.linalg.norm(flat.astype(np.float64), axis=1)
  factors = np.minimum(1, clip_norm / norms)
  total = lambda x: np.einsum("b,b...->...", factors, np.float64(x))
  return norms, jax.tree.map(total, grads)


@pytest.mark.parametrize("method", ["bookkeeping", "two_pass"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one", "eight"])
@pytest.mark.slow
def test_a_rule_from_outside_is_used_and_has_the_norms_of_jax(
  method, sharded, use_rules
):
  params, batch = _made()
  before = clipping.clipped_grad(_loss, l2_clip_norm=0.5, method=method)
  use_rules()
  fn = clipping.clipped_grad(_loss, l2_clip_norm=0.5, method=method)
  text = fn.explanation(params, batch)
  for name in ("mul 5", "add 5", "norm by a toy rule", "mul 3x5 in 3"):
    assert name in text
    # Made before, so with rules of which no digest may know.
    assert name not in before.explanation(params, batch)

  def call(params, batch):
    out = fn(params, batch)
    return out.sum, out.grad_norms

  if sharded:
    inner, spec = call, jax.sharding.PartitionSpec

    def call(params, batch):
      total, norms = inner(params, batch)
      return lax.psum(total, "data"), norms

    call = jax.shard_map(
      call,
      mesh=jax.make_mesh(
        (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
      ),
      in_specs=(spec(), spec("data")),
      out_specs=(spec(), spec("data")),
    )
  total, norms = jax.jit(call)(params, batch)
  true_norms, true_total = _norms_and_sum(params, batch, 0.5)
  np.testing.assert_allclose(norms, true_norms, rtol=1e-5)
  for name in params:
    np.testing.assert_allclose(
      total[name], true_total[name], rtol=1e-4, atol=1e-6
    )


def test_a_right_rule_passes_the_comparison_and_a_wrong_one_does_not(use_rules):
  loss = lambda params, x: 5 * jnp.sum(jnp.tanh(params["scale"] * x) * x)
  params, batch = {"scale": jnp.ones(5)}, _made()[1]
  toy = use_rules()
  check = lambda: dpdist.check_sensitivity(loss, params, batch, l2_clip_norm=1)
  assert "toy rule" in check().ways["scale"]
  toy.PART = 0.1
  with pytest.raises(errors.SensitivityError, match=r"params/.*toy rule"):
    check()


def _config(folder, model, *inputs, **changes):
  """A run on 64 made-up rows, with such inputs."""
  rng = np.random.default_rng(0)
  for part in ("train", "test"):
    np.savez(
      folder / f"{part}.npz",
      inputs=rng.normal(size=(64, *inputs)).astype(np.float32),
      targets=np.arange(64, dtype=np.int32) % 2,
    )
  config = config_lib.default()
  config.update_from_flattened_dict(
    {
      "data.name": "npz",
      "data.path": str(folder),
      "model.name": model,
      "model.num_outputs": 2,
      "model.width": 2,
      "privacy.num_examples": 64,
      "privacy.expected_batch_size": 16,
      "privacy.num_steps": 4,
      "privacy.noise_multiplier": 2.0,
      "insecure_seed": 1,
      **changes,
    }
  )
  return config


@pytest.mark.slow
def test_a_wrong_rule_stops_a_run_before_anything_is_charged(
  use_rules, tmp_path, monkeypatch
):
  use_rules().PART = 0.01
  # To find the parameter would compile a program for each.
  monkeypatch.setattr(comparison, "blamed", lambda *args: [])
  config = _config(tmp_path, "cnn", 20, 20, 1)
  with pytest.raises(errors.SensitivityError, match="not clipped as it"):
    dpdist.train(config, tmp_path / "run")
  assert not ledger_lib.Ledger(tmp_path / "run" / "ledger").spent_steps


def test_other_rules_get_other_keys(use_rules, tmp_path):
  """Also where no layer of the model has the rule."""
  config = _config(tmp_path, "linear", 4)
  made_of = []
  for i, text in enumerate((_RULES, _RULES, _RULES + "\n# Another.\n", None)):
    if text is None:
      for name in ("scale", "bias"):
        del registry._things["layer_rule"][name]
    else:
      use_rules(text)
    workdir = tmp_path / f"run_{i}"
    with ledger_lib.Ledger(workdir / "ledger") as ledger:
      job = job_lib.prepare(config, workdir, ledger)
      job.close()
    made_of.append(job.made_of)
  once, again, other, without = made_of
  assert once == again
  assert once["layer_rules_code_sha256"] != other["layer_rules_code_sha256"]
  assert "layer_rules_code_sha256" not in without


def test_a_rule_is_a_layer_rule(monkeypatch):
  monkeypatch.setitem(
    registry._things["layer_rule"],
    "toy",
    registry._Thing(lambda eqn: None, __name__),
  )
  with pytest.raises(errors.ArgumentError, match=r"class .* LayerRule.*'toy'"):
    clipping.clipped_grad(_loss, l2_clip_norm=0.5)
