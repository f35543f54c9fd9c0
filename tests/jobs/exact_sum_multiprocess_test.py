"""Exact sums over processes: however many, they end with the same bits.

Each run is a cluster of real processes on this machine, which meet over gloo.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.support import jobs

pytestmark = pytest.mark.cluster

_ROOT = pathlib.Path(__file__).parents[2]
_PROGRAM = """
import sys

import jax
import numpy as np
import optax

num_processes, process_id = int(sys.argv[1]), int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if num_processes > 1:
  jax.distributed.initialize(sys.argv[3], num_processes, process_id)

import dpdist
from dpdist.training import exact_step
from dpdist.mechanism import mechanism
from dpdist.distributed import mesh as mesh_lib
from dpdist.workdir import fingerprint as provenance

num_examples, chunk_size = 160, 128
rng = np.random.default_rng(0)
data = {
  "x": rng.normal(size=(num_examples, 20)).astype(np.float32),
  "y": rng.normal(size=(num_examples, 7)).astype(np.float32),
}
params = {
  "w": rng.normal(size=(20, 33)).astype(np.float32),
  "v": rng.normal(size=(33, 7)).astype(np.float32),
}


def loss(params, example, key):
  hidden = jax.numpy.tanh(example["x"] @ params["w"])
  hidden = hidden * jax.random.bernoulli(key, 0.5, hidden.shape)
  return jax.numpy.sum((hidden @ params["v"] - example["y"]) ** 2), None


plan = dpdist.make_plan(
  dpdist.PrivacyConfig(
    num_examples=num_examples,
    expected_batch_size=48,
    num_steps=3,
    l2_clip_norm=1.0,
    target_delta=1e-5,
    noise_multiplier=1.0,
  )
)
mesh = mesh_lib.make({"data": -1, "fsdp": 1, "model": 1})
step = exact_step.ExactStep(
  mechanism.make(plan, loss, exact_group_size=8), optax.adam(1e-2), mesh, 0.9
)
sharding = mesh_lib.examples(mesh)
mine = mesh_lib.local_rows(mesh, chunk_size)
put = lambda x: jax.make_array_from_process_local_data(
  sharding, x, (chunk_size, *x.shape[1:])
)
state = step.init(jax.tree.map(jax.numpy.asarray, params))
for t, size in enumerate((150, 0, 41)):
  accumulator = step.zeros(state.params)
  for start in range(0, size, chunk_size):
    rows = (start + mine) % num_examples
    accumulator = step.accumulate(
      state.params,
      accumulator,
      {name: put(x[rows]) for name, x in data.items()},
      put(start + mine >= size),
      jax.random.key(t),
      start,
    )
  state, released = step.apply(state, accumulator, jax.random.key(9))
values = jax.tree.map(lambda x: x.addressable_data(0), (state, released))
assert np.all(np.isfinite(values[0].params["w"]))
print(jax.process_count(), jax.device_count(), provenance.params_sha256(values))
"""


def _start(num_processes, devices_each):
  address = jobs.address()
  flag = f"--xla_force_host_platform_device_count={devices_each}"
  return [
    subprocess.Popen(
      [sys.executable, "-c", _PROGRAM, str(num_processes), str(i), address],
      cwd=_ROOT,
      env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(num_processes)
  ]


def _digests(num_processes, devices_each):
  """What every process of a cluster ends with."""
  processes = _start(num_processes, devices_each)
  try:
    digests = []
    for process in processes:
      out, err = process.communicate(timeout=120)
      assert process.returncode == 0, err
      # Gloo prints as well.
      count, devices, digest = out.splitlines()[-1].split()
      assert int(count) == num_processes
      assert int(devices) == num_processes * devices_each
      digests.append(digest)
    return digests
  finally:
    for process in processes:
      process.kill()
      process.communicate()


@pytest.fixture(scope="module")
def one_device():
  return _digests(1, 1)[0]


@pytest.mark.parametrize(
  ("num_processes", "devices_each"),
  [(1, 4), (2, 1), (2, 2), (2, 4), (4, 2), (4, 4)],
)
def test_clusters_end_with_the_same_bits(
  one_device, num_processes, devices_each
):
  digests = _digests(num_processes, devices_each)
  assert digests == [one_device] * num_processes


_CNN = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpdist
from dpdist.training import exact_step
from dpdist.tasks import classification as losses
from dpdist.mechanism import mechanism
from dpdist.distributed import mesh as mesh_lib
from dpdist.workdir import fingerprint as provenance
from dpdist.models import cnn

provenance.pin_threads()
rng = np.random.default_rng(0)
data = {
  "inputs": rng.normal(size=(32, 28, 28, 1)).astype(np.float32),
  "targets": rng.integers(0, 10, 32),
}
model = cnn.CNN(10, 16, jnp.float32)
plan = dpdist.make_plan(
  dpdist.PrivacyConfig(
    num_examples=32,
    expected_batch_size=32,
    num_steps=3,
    l2_clip_norm=1.0,
    target_delta=1e-5,
    noise_multiplier=1.0,
  )
)
mesh = mesh_lib.make({"data": -1, "fsdp": 1, "model": 1})
step = exact_step.ExactStep(
  mechanism.make(
    plan,
    losses.cross_entropy(model),
    method="two_pass",
    exact_group_size=8,
  ),
  optax.sgd(0.1),
  mesh,
)
params = model.init(jax.random.key(0), data["inputs"][0])["params"]
state = step.init(params)
put = lambda x: jax.device_put(x, mesh_lib.examples(mesh))
accumulator = step.accumulate(
  state.params,
  step.zeros(state.params),
  {name: put(x) for name, x in data.items()},
  put(np.zeros(32, bool)),
  jax.random.key(1),
  0,
)
state, _ = step.apply(state, accumulator, jax.random.key(9))
print(provenance.params_sha256(state.params))
"""


def test_convolutions_do_not_depend_on_how_many_devices_a_process_has():
  """XLA cuts their sums by the number of threads, that of devices at least."""
  digests = []
  for devices in (1, 4):
    flag = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    environment.pop("NPROC", None)
    done = subprocess.run(
      [sys.executable, "-c", _CNN],
      cwd=_ROOT,
      env=environment,
      capture_output=True,
      text=True,
      timeout=300,
    )
    assert done.returncode == 0, done.stderr
    digests.append(done.stdout.split()[-1])
  assert digests[0] == digests[1]
