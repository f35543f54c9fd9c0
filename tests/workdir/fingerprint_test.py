"""What a replay may differ in, and what not."""

import dataclasses
import functools
from importlib import metadata
import json
import os
import pathlib
import platform
import types

import jax
import jax.numpy as jnp
import pytest

from configs import digits
import dpdist
from dpdist import config as config_lib
from dpdist.distributed import mesh as mesh_lib
from dpdist.training import job as job_lib
from dpdist.workdir import fingerprint


def _fingerprint(changes=(), *environments, plan="p", data="d"):
  config = digits.get_config()
  config.update_from_flattened_dict(dict(changes))
  environments = environments or ({"kind": "here"},)
  return fingerprint.fingerprint(config.to_dict(), plan, data, environments)


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
    environment = fingerprint.environment(mesh)
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
  here = fingerprint.environment(mesh_lib.make(_SIZES))
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
  forty = fingerprint.environment(mesh)
  monkeypatch.setenv("NPROC", "41")
  other = fingerprint.environment(mesh)
  for exact in (True, False):
    changes = {"clipping.exact_sum": exact}
    assert _fingerprint(changes, forty) != _fingerprint(changes, other)
  assert forty["host"]["threads"] == 40
  # Never fewer than devices.
  monkeypatch.setenv("NPROC", "3")
  assert fingerprint.environment(mesh)["host"]["threads"] == 8
  monkeypatch.delenv("NPROC")
  fingerprint.pin_threads()
  pinned = int(os.environ["NPROC"])
  assert pinned >= max(32, os.cpu_count())
  monkeypatch.setenv("NPROC", "5")
  fingerprint.pin_threads()
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
    environments.append(fingerprint.environment(mesh_lib.make(_SIZES)))
  assert environments[0] == environments[2] != environments[1]


@pytest.mark.parametrize(
  "name", ["JAX_DISABLE_MOST_OPTIMIZATIONS", "LIBTPU_INIT_ARGS"]
)
def test_variables_that_may_change_bits_are_in_the_environment(
  name, monkeypatch
):
  mesh = mesh_lib.make({"data": -1, "fsdp": 1, "model": 1})
  before = fingerprint.environment(mesh)
  monkeypatch.setenv(name, "1")
  assert fingerprint.environment(mesh) != before


def test_no_credential_or_path_of_the_environment_is_public(monkeypatch):
  monkeypatch.setenv(
    "XLA_FLAGS",
    "--xla_dump_to=/home/hunter2 --xla_a=true /home/hunter2 --xla_b hunter2",
  )
  for name in (
    *("TF_VAR_db_password", "TF_TOKEN_app_terraform_io", "JAX_SERVICE_TOKEN"),
    *("CUDA_LICENSE_KEY", "OMP_NUM_THREADS", "XLA_OTHER"),
  ):
    monkeypatch.setenv(name, "/home/hunter2")
  monkeypatch.setenv("JAX_ENABLE_X64", "0")
  everything = fingerprint.environment(mesh_lib.make(_SIZES))
  public = fingerprint.public(everything)
  assert "hunter2" not in json.dumps(public)
  assert everything["other_variables_sha256"] not in json.dumps(public)
  assert public["variables"]["JAX_ENABLE_X64"] == "0"
  assert public["xla_flags"] == "--xla_dump_to=not told --xla_a=true --xla_b"


def test_variables_of_others_change_no_fingerprint(monkeypatch):
  before = fingerprint.environment(mesh_lib.make(_SIZES))
  monkeypatch.setenv("TF_TOKEN_app_terraform_io", "hunter2")
  monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
  assert fingerprint.environment(mesh_lib.make(_SIZES)) == before
  monkeypatch.setenv("JAX_SOMETHING", "hunter2")
  after = fingerprint.environment(mesh_lib.make(_SIZES))
  assert _fingerprint((), after) != _fingerprint((), before)


def test_plan_data_and_environment_change_the_fingerprint():
  assert _fingerprint((), {"kind": "there"}) != _fingerprint()
  assert _fingerprint(plan="q") != _fingerprint()
  assert _fingerprint(data="e") != _fingerprint()


def test_environment_names_code_packages_and_devices():
  sizes = {"data": -1, "fsdp": 1, "model": 1}
  one = fingerprint.environment(mesh_lib.make(sizes))
  two = fingerprint.environment(mesh_lib.make(sizes | {"fsdp": 2}))
  assert one != two
  assert one["packages"]["jax"]
  assert len(one["code_sha256"]) == 64


def test_gpus_repeat_themselves_only_when_told_to():
  deterministic = "--xla_a=1 --xla_gpu_deterministic_ops=true"
  for name, flags in (("cpu", ""), ("tpu", ""), ("cuda", deterministic)):
    assert fingerprint.unrepeatable(name, flags) == ""
  # Of two XLA takes the last.
  flags = f"--xla_gpu_deterministic_ops=false {deterministic}"
  assert fingerprint.unrepeatable("gpu", flags) == ""
  contradiction = f"{deterministic} --xla_gpu_deterministic_ops=false"
  for flags in ("", "--xla_gpu_deterministic_ops=false", contradiction):
    one, two = (fingerprint.unrepeatable("gpu", flags) for _ in range(2))
    assert one
    assert two
    assert one != two


def test_params_digest_sees_names_dtypes_shapes_and_bytes():
  params = {"a": jnp.arange(4.0), "b": jnp.zeros(2)}
  digest = fingerprint.params_sha256(params)
  assert fingerprint.params_sha256(dict(params)) == digest
  others = [
    {"a": jnp.arange(4.0), "c": jnp.zeros(2)},
    {"a": jnp.arange(4), "b": jnp.zeros(2)},
    {"a": jnp.arange(4.0).reshape(2, 2), "b": jnp.zeros(2)},
    {"a": jnp.arange(4.0).at[0].set(1e-40), "b": jnp.zeros(2)},
  ]
  digests = {fingerprint.params_sha256(other) for other in others}
  assert len({digest, *digests}) == 5


# --- One thing at a time ------------------------------------------------------

# What may differ in a replay. Spelt out, so that nothing becomes harmless by a
# change of the code's lists alone; everything else that there is, or will be,
# makes another fingerprint.
_HARMLESS = {
  "checkpoint_copies",
  *("checkpoint_every", "eval_every", "ledger", "max_checkpoints"),
  *("secret_file", "stuck_after", "unsafe_metrics"),
  *("data.changed_to", "data.num_threads", "data.path", "data.prefetch"),
  *("data.retry_seconds", "data.stall_seconds"),
  *("data_budget.delta", "data_budget.epsilon", "data_budget.location"),
  "data_budget.reservation",
  "model.weights",  # What they are counts, not where.
}
# With exact sums these too.
_HARMLESS_IF_EXACT = {"chunk_size", "mesh.data", "mesh.fsdp", "mesh.model"}
_SETTINGS = config_lib.default().to_dict()


def _leaves(tree, path=()):
  """The paths of all that is in a tree of dicts; of one that is empty, its."""
  for name, value in tree.items():
    if isinstance(value, dict) and value:
      yield from _leaves(value, (*path, name))
    else:
      yield (*path, name)


def _get(tree, path):
  return functools.reduce(lambda found, name: found[name], path, tree)


def _with(tree, path, value):
  """A copy of a tree of dicts in which one value is another."""
  name, *rest = path
  return (
    {**tree, name: _with(tree.get(name, {}), rest, value)}
    if rest
    else {
      **tree,
      name: value,
    }
  )


def _other(value):
  """Another value of the same kind."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int | float):
    return value + 1
  if isinstance(value, dict):
    return {**value, "another": 1}
  if isinstance(value, list | tuple):
    return [*value, [1, 1.0]]
  return 1 if value is None else f"{value}x"


def _of(settings, environments=({"xla_flags": "", "variables": {}},), **given):
  facts = {"plan_fingerprint": "p", "data_digest": "d", "made_of": {}}
  return fingerprint.fingerprint(
    settings, environments=environments, **{**facts, **given}
  )


@pytest.mark.parametrize("exact", [False, True])
def test_each_setting_changes_the_fingerprint_or_is_harmless(exact):
  base = _with(_SETTINGS, ("clipping", "exact_sum"), exact)
  before, harmless = _of(base), set()
  for path in _leaves(base):
    if path == ("clipping", "exact_sum"):
      continue
    if _of(_with(base, path, _other(_get(base, path)))) == before:
      harmless.add(".".join(path))
  assert harmless == _HARMLESS | (_HARMLESS_IF_EXACT if exact else set())
  # Nor is a setting harmless that comes later.
  for path in _leaves(_SETTINGS):
    section = path[:-1]
    if section not in {("data_budget",), ("mesh",)}:
      assert _of(_with(base, (*section, "new"), 1)) != before, section


# What exact sums make harmless of an environment.
_TOPOLOGY_ALONE = {
  *(("local_devices",), ("num_processes",)),
  *(("mesh", axis) for axis in ("data", "fsdp", "model")),
  ("variables", "JAX_NUM_PROCESSES"),
}


@pytest.mark.parametrize("exact", [False, True])
def test_each_fact_of_an_environment_changes_the_fingerprint(
  exact, monkeypatch
):
  monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
  here = fingerprint.environment(mesh_lib.make(_SIZES))
  settings = _with(_SETTINGS, ("clipping", "exact_sum"), exact)
  before, harmless = _of(settings, [here]), set()
  for path in _leaves(here):
    there = _with(here, path, _other(_get(here, path)))
    if _of(settings, [there]) == before:
      harmless.add(path)
    # In any process, and not in the first alone.
    elif not exact:
      pairs = ([here, here], [here, there])
      assert _of(settings, pairs[0]) != _of(settings, pairs[1]), path
  assert harmless == (_TOPOLOGY_ALONE if exact else set())
  assert _of(settings, [here | {"new": 1}]) != before


@pytest.mark.parametrize(
  "given",
  [
    {"plan_fingerprint": "q"},
    {"data_digest": "e"},
    {"made_of": {"weights_sha256": "w"}},
    {"made_of": {"frozen_sha256": "w"}},
    {"made_of": {"frozen_sha256": "v"}},
    {"made_of": {"frozen_sha256": "w", "features_sha256": "w"}},
  ],
)
def test_what_steps_are_made_of_changes_the_fingerprint(given):
  every = [{}, {"plan_fingerprint": "q"}, {"data_digest": "e"}]
  every += [
    {"made_of": {name: value}}
    for name in ("weights_sha256", "frozen_sha256", "features_sha256")
    for value in ("v", "w")
  ]
  others = [_of(_SETTINGS, **other) for other in every if other != given]
  assert _of(_SETTINGS, **given) not in others


def test_a_job_has_no_digest_beside_those_that_a_step_is_made_of():
  """All that `made_of` holds enters the fingerprint, as tested above."""
  names = {field.name for field in dataclasses.fields(job_lib.Job)}
  assert "made_of" in names
  assert not [name for name in names if name.endswith("_sha256")]


class _Device:
  """A device of another kind."""

  platform = "cpu"

  def __init__(self, kind, version="1"):
    self.device_kind = kind
    self.client = types.SimpleNamespace(platform_version=version)


def _devices(*kinds, version="1"):
  return lambda: [_Device(kind, version) for kind in kinds]


_read = pathlib.Path.read_text


def _read_text(path, *args, **kwargs):
  """That of a machine whose processors have another feature."""
  text = _read(path, *args, **kwargs)
  return text + "flags: another\n" if path.name == "cpuinfo" else text


# What the machine is, and how it comes to be another.
_MACHINES = {
  "interpreter": lambda p: p.setattr(platform, "python_version", lambda: "9"),
  "machine": lambda p: p.setattr(platform, "machine", lambda: "riscv64"),
  "processors": lambda p: p.setattr(pathlib.Path, "read_text", _read_text),
  "device kind": lambda p: p.setattr(jax, "local_devices", _devices("v")),
  "second device": lambda p: p.setattr(
    jax, "local_devices", _devices("k", "v")
  ),
  "back end": lambda p: p.setattr(
    jax, "local_devices", _devices("k", version="2")
  ),
  "processes": lambda p: p.setattr(jax, "process_count", lambda: 3),
  "devices": lambda p: p.setattr(jax, "local_device_count", lambda: 3),
  "code": lambda p: p.setattr(fingerprint, "_CODE_AT_IMPORT", "another"),
  "flags": lambda p: p.setenv("XLA_FLAGS", "--xla_b=1"),
  "flax": lambda p: p.setattr(
    fingerprint.flax, "config", types.SimpleNamespace(flax_profile="another")
  ),
  "flax's variables": lambda p: p.setenv("FLAX_FIX_RNG_SEPARATOR", "true"),
  "oneDNN": lambda p: p.setenv("ONEDNN_MAX_CPU_ISA", "SSE41"),
  "oneDNN by its old name": lambda p: p.setenv("DNNL_MAX_CPU_ISA", "SSE41"),
}


@pytest.mark.parametrize("name", _MACHINES)
def test_each_thing_of_a_machine_is_in_its_environment(name, monkeypatch):
  mesh = mesh_lib.make(_SIZES)
  monkeypatch.setattr(jax, "local_devices", _devices("k", "k"))
  before = _of(_SETTINGS, [fingerprint.environment(mesh)])
  assert _of(_SETTINGS, [fingerprint.environment(mesh)]) == before
  with monkeypatch.context() as patch:
    _MACHINES[name](patch)
    changed = fingerprint.environment(mesh)
  assert _of(_SETTINGS, [changed]) != before


@pytest.mark.parametrize(
  "name", ["jax", "jaxlib", "numpy", "flax", "optax", "ml_dtypes"]
)
def test_each_package_that_computes_is_in_the_environment(name, monkeypatch):
  version = metadata.version
  monkeypatch.setattr(
    fingerprint.metadata,
    "version",
    lambda package: "0" if package == name else version(package),
  )
  assert fingerprint.environment(mesh_lib.make(_SIZES))["packages"][name] == "0"


@pytest.mark.parametrize(
  "name", ["jax-cuda12-plugin", "nvidia-cublas-cu12", "jax-rocm60-plugin"]
)
def test_each_library_of_a_gpu_is_in_the_environment(name, monkeypatch):
  found = types.SimpleNamespace(metadata={"Name": name}, version="7")
  monkeypatch.setattr(fingerprint.metadata, "distributions", lambda: [found])
  assert fingerprint.environment(mesh_lib.make(_SIZES))["packages"][name] == "7"


@pytest.mark.parametrize(
  "name",
  [
    *("jax_default_matmul_precision", "jax_default_prng_impl"),
    *("jax_disable_jit", "jax_disable_most_optimizations", "jax_enable_x64"),
    *("jax_numpy_dtype_promotion", "jax_optimization_level"),
    *("jax_exec_time_optimization_effort", "jax_memory_fitting_level"),
    *("jax_random_seed_offset", "jax_softmax_custom_jvp"),
    *("jax_threefry_partitionable", "jax_use_direct_linearize"),
    *("jax_cpu_collectives_implementation", "jax_use_shardy_partitioner"),
  ],
)
def test_each_option_that_changes_bits_is_in_the_environment(name, monkeypatch):
  assert name in jax.config.values
  assert name in fingerprint.environment(mesh_lib.make(_SIZES))["jax_config"]
  values = {**jax.config.values, name: "another"}
  monkeypatch.setattr(
    fingerprint.jax, "config", types.SimpleNamespace(values=values)
  )
  found = fingerprint.environment(mesh_lib.make(_SIZES))["jax_config"]
  assert found[name] == "another"


def test_code_that_changed_after_it_was_read_is_refused(monkeypatch):
  fingerprint.check_code()
  monkeypatch.setattr(fingerprint, "code_digest", lambda: "another")
  with pytest.raises(ValueError, match="start it again"):
    fingerprint.check_code()


def test_each_file_of_the_code_is_in_its_digest(tmp_path, monkeypatch):
  file = tmp_path / "dpdist" / "workdir" / "fingerprint.py"
  monkeypatch.setattr(fingerprint, "__file__", str(file))
  (tmp_path / "dpdist" / "models").mkdir(parents=True)
  (tmp_path / "launch").mkdir()
  digests = [fingerprint.code_digest()]
  for name, text in (
    ("dpdist/config.py", "a"),
    ("dpdist/models/cnn.py", "a"),
    ("dpdist/models/cnn.py", "b"),
    ("dpdist/models/bert.py", "b"),
    ("launch/train.py", "b"),
  ):
    (tmp_path / name).write_text(text)
    digests.append(fingerprint.code_digest())
  folder = tmp_path / "dpdist" / "models"
  (folder / "bert.py").rename(folder / "tree.py")
  digests.append(fingerprint.code_digest())
  assert len({*digests}) == len(digests)


def _tree(folder, monkeypatch, *names):
  """The digest of a tree with these files, each of its last name's text."""
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name)
  file = folder / "dpdist" / "workdir" / "fingerprint.py"
  monkeypatch.setattr(fingerprint, "__file__", str(file))
  return fingerprint.code_digest()


def test_installed_code_has_the_digest_of_a_checkout(tmp_path, monkeypatch):
  """There, launch/ and configs/ are inside of dpdist/."""
  checkout = _tree(
    tmp_path / "checkout",
    monkeypatch,
    *("dpdist/a.py", "launch/__init__.py", "launch/b.py", "configs/c.py"),
  )
  inside = ("dpdist/a.py", "dpdist/launch/__init__.py", "dpdist/launch/b.py")
  wheel = tmp_path / "wheel"
  names = (*inside, "dpdist/configs/c.py")
  assert _tree(wheel, monkeypatch, *names) == checkout
  # A package of that name is somebody else's there.
  assert _tree(wheel, monkeypatch, "launch/other.py") == checkout
  assert _tree(wheel, monkeypatch, "dpdist/launch/more.py") != checkout


def test_the_digest_is_of_every_file_of_both_packages(monkeypatch):
  root = pathlib.Path(dpdist.__file__).parents[1]
  read = []
  monkeypatch.setattr(
    pathlib.Path, "read_bytes", lambda path: read.append(path) or b""
  )
  fingerprint.code_digest()
  files = [*root.glob("dpdist/**/*.py"), *root.glob("launch/**/*.py")]
  assert len(files) > 150
  assert {*read} == {*files}
