"""The noise of a job of several processes: one draw, which they share out.

The law of that draw is held by tests/statistical/noise_law_test.py. Seeds are
fixed, so that every answer is always the same; over seeds, a right program
fails a test here with probability below 1e-6.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.statistical import noise_draws
from tests.support import jobs

pytestmark = pytest.mark.cluster

_LEVEL = 1e-6
_ROOT = pathlib.Path(__file__).parents[2]


def _job(folder, count, devices_each):
  """What each process of a job holds."""
  address = jobs.address()
  flag = f"--xla_force_host_platform_device_count={devices_each}"
  files = [folder / f"{count}-{i}.npz" for i in range(count)]
  processes = [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "tests.statistical.noise_draws"),
        *(str(count), str(i), address, file),
      ],
      cwd=_ROOT,
      env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i, file in enumerate(files)
  ]
  try:
    for process in processes:
      _, err = process.communicate(timeout=300)
      assert process.returncode == 0, err
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  return [dict(np.load(file)) for file in files]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  return _job(tmp_path_factory.mktemp("alone"), 1, 8)[0]


@pytest.fixture(scope="module", params=[(2, 4), (4, 2)], ids=str)
def held(request, tmp_path_factory):
  return _job(tmp_path_factory.mktemp("job"), *request.param)


def _of(mesh, held):
  return {k: x for k, x in held.items() if k.startswith(f"{mesh}/")}


def test_together_they_hold_the_draw_of_one_process(alone, held):
  divided = [_of("fsdp", each) for each in held]
  assert sum(map(len, divided)) == len(_of("fsdp", alone))
  for each in divided:
    assert len(each) == len(_of("fsdp", alone)) / len(held)
    for where, part in each.items():
      np.testing.assert_array_equal(part, alone[where], err_msg=where)


def test_copies_are_of_one_draw(alone, held):
  for each in held:
    copies = _of("data", each)
    assert copies.keys() == _of("data", alone).keys()
    for where, copy in copies.items():
      np.testing.assert_array_equal(copy, alone[where], err_msg=where)


def _steps(held):
  """All that one process holds of each step, [steps, values]."""
  rows = [
    np.concatenate(
      [x.ravel() for k, x in sorted(held.items()) if k.startswith(f"fsdp/{t}/")]
    )
    for t in range(noise_draws.STEPS)
  ]
  return np.array(rows, np.float64) * noise_draws.SCALE


def test_processes_are_independent_of_one_another(held):
  rows = np.concatenate([_steps(each) for each in held])
  assert rows.shape[0] == len(held) * noise_draws.STEPS
  assert noise_draws.are_independent(rows, _LEVEL)
  # Where each drew by itself from the same key, their parts would be alike.
  rows[-1] = 0.1 * rows[0] + np.sqrt(0.99) * rows[-1]
  assert not noise_draws.are_independent(rows, _LEVEL)


def test_no_two_processes_hold_the_same_bits(held):
  found = [x.tobytes() for each in held for x in _of("fsdp", each).values()]
  assert len(set(found)) == len(found)
