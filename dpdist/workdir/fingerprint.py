"""Fingerprints what decides a step's bits: code, devices, settings."""

from collections.abc import Mapping, Sequence
import hashlib
from importlib import metadata
import json
import os
import pathlib
import platform
import re
import secrets
from typing import Any

import flax
import jax
from jax.sharding import Mesh
import numpy as np

from dpdist import _own_code
from dpdist.distributed import mesh as mesh_lib

_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "ml_dtypes")
# Prefixes of the installed packages that a GPU computes with.
_GPU_PACKAGES = ("jax-cuda", "jax-rocm", "nvidia-")
# fmt: off
# JAX's own options that change what a program computes.
_JAX_CONFIG = (
  "eager_constant_folding", "jax_allow_f16_reductions",
  "jax_bcoo_cusparse_lowering", "jax_compiler_enable_remat_pass",
  "jax_cpu_collectives_implementation", "jax_custom_vjp3",
  "jax_default_matmul_precision", "jax_default_prng_impl", "jax_disable_jit",
  "jax_disable_most_optimizations", "jax_embedded_constants_max_bytes",
  "jax_enable_pgle", "jax_enable_x64", "jax_exec_time_optimization_effort",
  "jax_high_dynamic_range_gumbel", "jax_memory_fitting_effort",
  "jax_memory_fitting_level", "jax_numpy_dtype_promotion",
  "jax_optimization_level", "jax_pallas_use_mosaic_gpu",
  "jax_ragged_dot_use_gpu_pallas_triton_lowering",
  "jax_ragged_dot_use_ragged_dot_instruction", "jax_random_seed_offset",
  "jax_remat3", "jax_scan3", "jax_softmax_custom_jvp",
  "jax_threefry_gpu_kernel_lowering", "jax_threefry_partitionable",
  "jax_use_direct_linearize", "jax_use_shardy_partitioner",
  "jax_use_simplified_jaxpr_constants",
)
# Environment variables that may change it too, and whose values are not secret.
_VARIABLES = (
  "CUBLAS_WORKSPACE_CONFIG", "JAX_DEFAULT_MATMUL_PRECISION",
  "JAX_DEFAULT_PRNG_IMPL", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_ENABLE_X64",
  "JAX_NUM_CPU_DEVICES", "JAX_NUM_PROCESSES", "JAX_NUMPY_DTYPE_PROMOTION",
  "JAX_PLATFORMS", "JAX_THREEFRY_PARTITIONABLE", "NCCL_ALGO", "NCCL_PROTO",
  "NPROC", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "PJRT_NPROC",
)
# Other variables with these prefixes may change it. Their contents are unknown,
# so they are compared by a digest. Not all of TF_: Terraform's variables begin
# so as well, and TF_VAR_ and TF_TOKEN_ hold credentials.
_COMPARED = (
  "CUBLAS", "CUDA_", "CUDNN_", "DNNL_", "FLAX_", "JAX_", "LIBTPU_", "NCCL_",
  "NVIDIA_TF32", "OMP_", "ONEDNN_", "TF_CUBLAS", "TF_CUDNN", "TF_DETERMINISTIC",
  "TF_DISABLE", "TF_ENABLE", "TF_FORCE", "TF_GPU", "TF_USE", "TF_XLA", "XLA_",
)
# Values of flags that are too plain to hold anything private.
_PLAIN = re.compile(r"[\w.,+-]{0,32}")
_FLAG = re.compile(r"--\w+")
# Digests that are compared but never released.
_COMPARED_ALONE = ("other_variables_sha256", "xla_files")
# A process may have up to so many devices without a change of bits.
_THREADS = 32
# Settings that no bit of a step depends on.
_HARMLESS = (
  "checkpoint_copies", "checkpoint_every", "data_budget", "eval_every",
  "ledger", "max_checkpoints", "secret_file", "store_timeout", "stuck_after",
  "unsafe_metrics",
)
_HARMLESS_DATA = (
  "changed_to", "num_threads", "path", "prefetch", "retry_seconds",
  "stall_seconds",
)
# The path that weights are read from; their contents do count.
_HARMLESS_MODEL = ("weights",)
# Variables that number this process, or say how to reach the others.
_WHO = (
  "CUDA_VISIBLE_DEVICES", "JAX_COORDINATOR_ADDRESS",
  "JAX_COORDINATOR_BIND_ADDRESS", "JAX_LOCAL_DEVICE_IDS", "JAX_PARTITION_INDEX",
  "JAX_PROCESS_ID", "JAX_SLICE_INDEX",
)
# fmt: on
# Settings that exact sums make harmless too: the number of devices and
# processes.
_TOPOLOGY = ("chunk_size", "mesh")
_TOPOLOGY_ENVIRONMENT = ("local_devices", "mesh", "num_processes")
_TOPOLOGY_FLAG = "--xla_force_host_platform_device_count"
_TOPOLOGY_VARIABLES = ("JAX_NUM_CPU_DEVICES", "JAX_NUM_PROCESSES")


def environment(mesh: Mesh) -> dict[str, Any]:
  """Returns versions, code and devices, JSON-able. Not to be released."""
  devices = jax.local_devices()
  device = devices[0]
  # One entry for all devices if they are alike, else one for each.
  kinds = [x.device_kind for x in devices]
  kinds = kinds[:1] if len(set(kinds)) == 1 else kinds
  xla_flags = os.environ.get("XLA_FLAGS", "")
  return {
    "packages": _versions(),
    "python": platform.python_version(),
    # Of what this process read: files may change while a run starts.
    "code_sha256": _CODE_AT_IMPORT,
    "device_kind": ", ".join(kinds),
    "mesh": dict(mesh.shape),
    "backend": device.client.platform_version,
    "xla_flags": xla_flags,
    "xla_files": _files(xla_flags),
    "variables": {
      name: os.environ[name] for name in _VARIABLES if name in os.environ
    },
    "other_variables_sha256": _other_variables(),
    "jax_config": {name: jax.config.values.get(name) for name in _JAX_CONFIG},
    "flax_config": {
      name: getattr(flax.config, name)
      for name in dir(flax.config)
      if name.startswith(("flax_", "nnx_"))
    },
    "unrepeatable": unrepeatable(device.platform, xla_flags),
    "num_processes": jax.process_count(),
    "local_devices": jax.local_device_count(),
    "host": _host(),
  }


def public(environment: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the part of `environment` that may be released.

  Variables and flags may hold credentials and paths. Not even a digest of those
  may be released: a short value can be guessed from it.
  """
  kept = {k: v for k, v in environment.items() if k not in _COMPARED_ALONE}
  flags = [
    (name, value if _PLAIN.fullmatch(value) else "not told")
    for name, value in _flags(environment["xla_flags"])
    if _FLAG.fullmatch(name)  # Not a file of flags, nor a value alone.
  ]
  return kept | {
    "xla_flags": " ".join("=".join(filter(None, flag)) for flag in flags),
    "variables": {
      name: value if _PLAIN.fullmatch(value) else "not told"
      for name, value in environment["variables"].items()
    },
  }


def _other_variables() -> str:
  named = {*_VARIABLES, *_WHO, "XLA_FLAGS"}
  others = {
    name: value
    for name, value in os.environ.items()
    if name.startswith(_COMPARED) and name not in named
  }
  return hashlib.sha256(_canonical(others).encode()).hexdigest()


def fingerprint(
  config: Mapping[str, Any],
  plan_fingerprint: str,
  data_digest: str,
  environments: Sequence[Mapping[str, Any]],
  made_of: Mapping[str, str] | None = None,
) -> str:
  """Returns a digest that is equal only if a replayed step has the same bits.

  With exact sums, on machines of one kind, the number of devices and processes
  and the chunk size do not count. There is an environment, from `environment`,
  of every process in order. `made_of` has, by name, the SHA-256 of the
  parameters that were read from disk or are frozen, and of the features that
  replace inputs; their paths do not count.
  """
  numbers = {k: v for k, v in config.items() if k not in _HARMLESS}
  numbers["data"] = {
    k: v for k, v in config["data"].items() if k not in _HARMLESS_DATA
  }
  numbers["model"] = {
    k: v for k, v in config["model"].items() if k not in _HARMLESS_MODEL
  }
  if config["clipping"]["exact_sum"]:
    kinds = {_canonical(_without_topology(e)) for e in environments}
    # With machines of several kinds it matters which one computes what.
    if len(kinds) == 1:
      environments = [json.loads(kind) for kind in kinds]
      numbers = {k: v for k, v in numbers.items() if k not in _TOPOLOGY}
  parts: list[Any] = [
    *(numbers, plan_fingerprint, data_digest),
    *(list(environments), dict(made_of or {})),
  ]
  text = _canonical(parts)
  return hashlib.sha256(text.encode()).hexdigest()


def unrepeatable(platform: str, xla_flags: str) -> str:
  """Returns a random text if a step run twice may differ; "" if it may not.

  A GPU sums in the order in which its threads finish, unless a flag of XLA
  forbids it. The noise of a replay that differs in a single bit could be
  subtracted, so there every start has a fingerprint of its own.
  """
  if platform in ("cpu", "tpu"):
    return ""
  # If a flag is given twice, XLA takes the last.
  flags = dict(_flags(xla_flags))
  if flags.get("--xla_gpu_deterministic_ops") == "true":
    return ""
  return secrets.token_hex(16)


def params_sha256(params: Any) -> str:
  """Returns the SHA-256 of parameters; must be called in all processes."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = mesh_lib.whole(leaf)
    name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def _canonical(value: Any) -> str:
  return json.dumps(value, sort_keys=True)


def _flags(xla_flags: str) -> list[tuple[str, str]]:
  """Returns names and values of flags; "" for a missing one."""
  parts = [flag.partition("=") for flag in xla_flags.split()]
  return [(name, value) for name, _, value in parts]


def _files(xla_flags: str) -> dict[str, str]:
  """Returns the SHA-256 of files that flags name: their contents count too."""
  # A name without a value may be a file of flags.
  names = {value or name for name, value in _flags(xla_flags)}
  paths = {name.strip("\"'") for name in names}
  return {
    path: hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    for path in sorted(paths)
    if os.path.isfile(path)
  }


def _without_topology(environment: Mapping[str, Any]) -> dict[str, Any]:
  """Removes what exact sums do not depend on from an environment."""

  def flags(text: str) -> str:
    kept = [x for x in text.split() if x.split("=")[0] != _TOPOLOGY_FLAG]
    return " ".join(kept)

  variables = {
    name: value
    for name, value in environment["variables"].items()
    if name not in _TOPOLOGY_VARIABLES
  }
  rest = {
    k: v for k, v in environment.items() if k not in _TOPOLOGY_ENVIRONMENT
  }
  return rest | {
    "xla_flags": flags(environment["xla_flags"]),
    "variables": variables,
  }


def code_digest() -> str:
  """Returns the SHA-256 of the source of dpdist and launch, hex."""
  digest = hashlib.sha256()
  root = pathlib.Path(__file__).parents[2]
  for name, file in _own_code.files(root):
    digest.update(name.encode())
    digest.update(hashlib.sha256(file.read_bytes()).digest())
  return digest.hexdigest()


_CODE_AT_IMPORT = code_digest()


def check_code() -> None:
  """Raises ValueError if the code on disk has changed since it was imported.

  `code_digest` reads the code on disk. Must be called before anything is
  charged under a fingerprint.
  """
  if code_digest() != _CODE_AT_IMPORT:
    raise ValueError(
      "the files of dpdist must stay as they are while a run starts, and have"
      " changed since this process read them: start it again"
    )


def pin_threads() -> None:
  """Gives XLA's CPU back end as many threads on any number of devices.

  By default it takes as many as there are processors or devices, and cuts the
  sums of convolutions by their number. Must be called before a device is
  touched. A number that the user set (NPROC) stays.
  """
  os.environ.setdefault("NPROC", str(max(_THREADS, _processors())))


def _processors() -> int:
  return len(os.sched_getaffinity(0))


def _threads() -> int:
  """Returns how many threads XLA's CPU back end takes."""
  given = os.environ.get("NPROC") or os.environ.get("PJRT_NPROC") or ""
  wanted = int(given) if given.isdecimal() else _processors()
  return max(wanted, jax.local_device_count())


def _versions() -> dict[str, str]:
  versions = {name: metadata.version(name) for name in _PACKAGES}
  for package in metadata.distributions():
    name = str(package.metadata["Name"])
    if name.startswith(_GPU_PACKAGES):
      versions[name] = package.version
  return versions


def _host() -> dict[str, Any]:
  """Returns what XLA's CPU code, and so its rounding, depends on."""
  lines: set[str] = set()
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    lines = {
      line
      for line in cpuinfo.read_text().splitlines()
      if line.startswith(("model name", "flags", "Features"))
    }
  return {
    "machine": platform.machine(),
    "threads": _threads(),
    "cpu_sha256": hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest(),
  }
