"""What decides the bits of a step: versions, code, devices, settings."""

from collections.abc import Mapping
import hashlib
from importlib import metadata
import json
import os
import pathlib
import platform
import secrets
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax")
# Those of JAX's own options that change what a program computes.
_JAX_CONFIG = (
  "jax_default_matmul_precision",
  "jax_default_prng_impl",
  "jax_enable_x64",
  "jax_numpy_dtype_promotion",
  "jax_threefry_partitionable",
  "jax_use_shardy_partitioner",
)
# Of the environment's variables, those that may change it too.
_VARIABLES = ("JAX_", "LIBTPU_", "NVIDIA_TF32", "TF_", "XLA_")
# Settings that no bit of a step depends on.
_HARMLESS = (
  "checkpoint_every",
  "data_budget",
  "eval_every",
  "ledger",
  "max_checkpoints",
  "secret_file",
  "unsafe_metrics",
)
_HARMLESS_DATA = ("changed_to", "num_threads", "path", "prefetch")


def environment(mesh: Mesh) -> dict[str, Any]:
  """Versions, code and devices, JSON-able."""
  device = mesh.devices.flat[0]
  xla_flags = os.environ.get("XLA_FLAGS", "")
  return {
    "packages": {name: metadata.version(name) for name in _PACKAGES},
    "python": platform.python_version(),
    "code_sha256": _code_digest(),
    "device_kind": device.device_kind,
    "mesh": dict(mesh.shape),
    "backend": device.client.platform_version,
    "xla_flags": xla_flags,
    "variables": {
      name: value
      for name, value in sorted(os.environ.items())
      if name.startswith(_VARIABLES)
    },
    "jax_config": {name: jax.config.values.get(name) for name in _JAX_CONFIG},
    "unrepeatable": unrepeatable(device.platform, xla_flags),
    "num_processes": jax.process_count(),
    "host": _host(),
  }


def fingerprint(
  config: Mapping[str, Any],
  plan_fingerprint: str,
  data_manifest: str,
  environment: Any,
) -> str:
  """A digest that is equal only if a step run again gives the same bits.

  Args:
    config: all settings, JSON-able.
    plan_fingerprint: of the plan.
    data_manifest: of the training set.
    environment: from `environment`.

  Returns:
    SHA-256, hex.
  """
  numbers = {k: v for k, v in config.items() if k not in _HARMLESS}
  numbers["data"] = {
    k: v for k, v in config["data"].items() if k not in _HARMLESS_DATA
  }
  text = json.dumps(
    [numbers, plan_fingerprint, data_manifest, environment], sort_keys=True
  )
  return hashlib.sha256(text.encode()).hexdigest()


def unrepeatable(platform: str, xla_flags: str) -> str:
  """Something unique where a step run twice may differ; "" where it may not.

  A GPU sums in the order in which its threads finish, unless XLA is told
  otherwise. The noise of a replay that differs in a single bit could be
  subtracted, so there every start has a fingerprint of its own.

  Args:
    platform: of the devices, as JAX names it.
    xla_flags: the environment variable XLA_FLAGS.
  """
  if platform in ("cpu", "tpu"):
    return ""
  if "--xla_gpu_deterministic_ops=true" in xla_flags.split():
    return ""
  return secrets.token_hex(16)


def params_sha256(params: Any) -> str:
  """SHA-256 over the paths, dtypes, shapes and bytes of all parameters."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.asarray(leaf)
    name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def _code_digest() -> str:
  digest = hashlib.sha256()
  root = pathlib.Path(__file__).parent
  for file in sorted(root.rglob("*.py")):
    digest.update(file.relative_to(root).as_posix().encode())
    digest.update(hashlib.sha256(file.read_bytes()).digest())
  return digest.hexdigest()


def _host() -> dict[str, Any]:
  """What XLA's CPU code and its thread pool, hence rounding, depend on."""
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
    "cpus": len(os.sched_getaffinity(0)),
    "cpu_sha256": hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest(),
  }
