"""What a replay may differ in, and what not."""

import jax.numpy as jnp
import pytest

from configs import digits
from dpdist import mesh as mesh_lib
from dpdist import provenance


def _fingerprint(changes=(), environment="here", plan="p", data="d"):
  config = digits.get_config()
  config.update_from_flattened_dict(dict(changes))
  return provenance.fingerprint(config.to_dict(), plan, data, environment)


@pytest.mark.parametrize(
  "changes",
  [
    {"eval_every": 3},
    {"checkpoint_every": 3},
    {"max_checkpoints": 9},
    {"unsafe_metrics": True},
    {"secret_file": "elsewhere"},
    {"ledger": "gs://bucket/run"},
    {"data.num_threads": 1},
    {"data.prefetch": 1},
    {"data.path": "moved"},
  ],
)
def test_settings_that_change_no_bit_keep_the_fingerprint(changes):
  assert _fingerprint(changes) == _fingerprint()


@pytest.mark.parametrize(
  "changes",
  [
    {"chunk_size": 64},
    {"clipping.microbatch_size": 2},
    {"mesh.fsdp": 2},
    {"model.dtype": "bfloat16"},
    {"optimizer.learning_rate": 1.0},
    {"ema_decay": 0.5},
    {"data.sequence_length": 3},
  ],
)
def test_settings_that_change_bits_change_the_fingerprint(changes):
  assert _fingerprint(changes) != _fingerprint()


@pytest.mark.parametrize(
  "name", ["JAX_DISABLE_MOST_OPTIMIZATIONS", "LIBTPU_INIT_ARGS"]
)
def test_variables_that_may_change_bits_are_in_the_environment(
  name, monkeypatch
):
  mesh = mesh_lib.make({"data": -1, "fsdp": 1, "model": 1})
  before = provenance.environment(mesh)
  monkeypatch.setenv(name, "1")
  assert provenance.environment(mesh) != before


def test_plan_data_and_environment_change_the_fingerprint():
  assert _fingerprint(environment="there") != _fingerprint()
  assert _fingerprint(plan="q") != _fingerprint()
  assert _fingerprint(data="e") != _fingerprint()


def test_environment_names_code_packages_and_devices():
  sizes = {"data": -1, "fsdp": 1, "model": 1}
  one = provenance.environment(mesh_lib.make(sizes))
  two = provenance.environment(mesh_lib.make(sizes | {"fsdp": 2}))
  assert one != two
  assert one["packages"]["jax"]
  assert len(one["code_sha256"]) == 64


def test_gpus_repeat_themselves_only_when_told_to():
  deterministic = "--xla_a=1 --xla_gpu_deterministic_ops=true"
  for platform, flags in (("cpu", ""), ("tpu", ""), ("cuda", deterministic)):
    assert provenance.unrepeatable(platform, flags) == ""
  for flags in ("", "--xla_gpu_deterministic_ops=false"):
    one, two = (provenance.unrepeatable("gpu", flags) for _ in range(2))
    assert one
    assert two
    assert one != two


def test_params_digest_sees_names_dtypes_shapes_and_bytes():
  params = {"a": jnp.arange(4.0), "b": jnp.zeros(2)}
  digest = provenance.params_sha256(params)
  assert provenance.params_sha256(dict(params)) == digest
  others = [
    {"a": jnp.arange(4.0), "c": jnp.zeros(2)},
    {"a": jnp.arange(4), "b": jnp.zeros(2)},
    {"a": jnp.arange(4.0).reshape(2, 2), "b": jnp.zeros(2)},
    {"a": jnp.arange(4.0).at[0].set(1e-40), "b": jnp.zeros(2)},
  ]
  digests = {provenance.params_sha256(other) for other in others}
  assert len({digest, *digests}) == 5
