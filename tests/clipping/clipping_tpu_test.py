"""Clipping costs little more than an ordinary gradient on a TPU.

Needs libtpu, and no TPU: python -m pytest -m tpu
"""

import json
import subprocess
import sys

import pytest

from tests.benchmarks import clipping_models

# Of the figures of the ordinary gradient.
_MOST = {"flops_ratio": 1.10, "bytes_ratio": 2.0, "temp_ratio": 2.5}


@pytest.mark.tpu
@pytest.mark.parametrize("model", clipping_models.NAMES)
def test_costs_on_a_tpu(model):
  # In a process of its own: libtpu would take this one over.
  run = subprocess.run(
    [
      sys.executable,
      "-m",
      "tests.benchmarks.clipping_tpu",
      "--json",
      f"--models={model}",
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  ordinary, auto = json.loads(run.stdout)["rows"]
  assert (ordinary["method"], auto["method"]) == ("ordinary", "auto")
  assert ordinary["flops"] > 0
  assert ordinary["bytes"] > 0
  for figure, most in _MOST.items():
    assert auto[figure] <= most, auto
