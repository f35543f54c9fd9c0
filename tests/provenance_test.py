"""What a replay may differ in, and what not."""

import os

import jax
import jax.numpy as jnp
import pytest

from configs import digits
from dpdist import mesh as mesh_lib
from dpdist import provenance


def _fingerprint(changes=(), *environments, plan="p", data="d"):
  config = digits.get_config()
  config.update_from_flattened_dict(dict(changes))
  environments = environments or ({"kind": "here"},)
  return provenance.fingerprint(config.to_dict(), plan, data, environments)


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
    {"data.retry_seconds": 1.0},
    {"data.stall_seconds": 1.0},
    {"data.path": "moved"},
  ],
)
def test_settings_that_change_no_bit_keep_the_fingerprint(changes):
  assert _fingerprint(changes) == _fingerprint()


@pytest.mark.parametrize(
  "changes",
  [
    {"augmentation.multiplicity": 2},
    {"augmentation.flip": True},
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


_SIZES = {"data": -1, "fsdp": 1, "model": 1}
_COUNT = "--xla_force_host_platform_device_count"


def _exact(monkeypatch, changes=(), sizes=(), devices=8, flags="", **variables):
  """The fingerprint with exact sums, here but for what is given."""
  with monkeypatch.context() as patch:
    patch.setenv("XLA_FLAGS", flags)
    for name, value in variables.items():
      patch.setenv(name, value)
    mesh = mesh_lib.make(_SIZES | dict(sizes), jax.devices()[:devices])
    environment = provenance.environment(mesh)
  changes = {"clipping.exact_sum": True} | dict(changes)
  return _fingerprint(changes, environment)


_TOPOLOGY = [
  {"devices": 4},
  {"devices": 1},
  {"sizes": {"fsdp": 2}},
  {"changes": {"chunk_size": 64}},
  {"changes": {"mesh.fsdp": 2}},
  {"flags": f" {_COUNT}=4"},
  {"JAX_NUM_PROCESSES": "2"},
]


@pytest.mark.parametrize("topology", _TOPOLOGY)
def test_exact_sums_make_the_topology_harmless(topology, monkeypatch):
  assert _exact(monkeypatch, **topology) == _exact(monkeypatch)
  floats = {"clipping.exact_sum": False}
  topology = topology | {"changes": floats | topology.get("changes", {})}
  assert _exact(monkeypatch, **topology) != _exact(monkeypatch, floats)


def test_exact_sums_make_the_number_of_processes_harmless():
  here = provenance.environment(mesh_lib.make(_SIZES))
  for exact, same in ((True, True), (False, False)):
    changes = {"clipping.exact_sum": exact}
    one = _fingerprint(changes, here)
    several = _fingerprint(changes, *[here | {"num_processes": 4}] * 4)
    assert (several == one) is same
  # But not what they run on.
  there = here | {"host": {"machine": "another"}}
  assert _fingerprint(changes, here, there) != _fingerprint(changes, here)
  changes = {"clipping.exact_sum": True}
  assert _fingerprint(changes, here, there) != _fingerprint(changes, here)
  assert _fingerprint(changes, here, there) != _fingerprint(
    changes, there, here
  )


def test_the_number_of_threads_is_part_of_what_rounds(monkeypatch):
  """XLA's CPU back end cuts sums of convolutions by it."""
  mesh = mesh_lib.make(_SIZES)
  monkeypatch.setenv("NPROC", "40")
  forty = provenance.environment(mesh)
  monkeypatch.setenv("NPROC", "41")
  other = provenance.environment(mesh)
  for exact in (True, False):
    changes = {"clipping.exact_sum": exact}
    assert _fingerprint(changes, forty) != _fingerprint(changes, other)
  assert forty["host"]["threads"] == 40
  # Never fewer than devices.
  monkeypatch.setenv("NPROC", "3")
  assert provenance.environment(mesh)["host"]["threads"] == 8
  monkeypatch.delenv("NPROC")
  provenance.pin_threads()
  pinned = int(os.environ["NPROC"])
  assert pinned >= max(32, os.cpu_count())
  monkeypatch.setenv("NPROC", "5")
  provenance.pin_threads()
  assert os.environ["NPROC"] == "5"


@pytest.mark.parametrize(
  "name", ["JAX_COORDINATOR_ADDRESS", "JAX_LOCAL_DEVICE_IDS", "JAX_PROCESS_ID"]
)
def test_where_processes_meet_changes_nothing(name, monkeypatch):
  for exact in (True, False):
    changes = {"clipping.exact_sum": exact}
    before = _exact(monkeypatch, changes)
    assert _exact(monkeypatch, changes, **{name: "1"}) == before


@pytest.mark.parametrize(
  "other",
  [
    {"changes": {"clipping.exact_group_size": 16}},
    {"changes": {"clipping.microbatch_size": 2}},
    {"changes": {"ema_decay": 0.5}},
    {"flags": f"{_COUNT}=8 --xla_cpu_enable_fast_math=true"},
    {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
  ],
)
def test_exact_sums_keep_what_else_changes_bits(other, monkeypatch):
  assert _exact(monkeypatch, **other) != _exact(monkeypatch)


def test_exact_sums_are_not_the_others(monkeypatch):
  floats = _exact(monkeypatch, {"clipping.exact_sum": False})
  assert _exact(monkeypatch) != floats


@pytest.mark.parametrize("flag", ["--xla_gpu_load_autotune_results_from=", ""])
def test_files_that_flags_name_count_by_their_content(
  flag, tmp_path, monkeypatch
):
  file = tmp_path / "results"
  monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 {flag}{file}")
  environments = []
  for content in ("one", "two", "one"):
    file.write_text(content)
    environments.append(provenance.environment(mesh_lib.make(_SIZES)))
  assert environments[0] == environments[2] != environments[1]


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
  assert _fingerprint((), {"kind": "there"}) != _fingerprint()
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
  # Of two XLA takes the last.
  flags = f"--xla_gpu_deterministic_ops=false {deterministic}"
  assert provenance.unrepeatable("gpu", flags) == ""
  contradiction = f"{deterministic} --xla_gpu_deterministic_ops=false"
  for flags in ("", "--xla_gpu_deterministic_ops=false", contradiction):
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
