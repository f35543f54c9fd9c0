"""Every config says, in its docstring, what its plan spends, and runs."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import configs
from dpdist import config as config_lib
from dpdist.assets import fetch
from dpdist.data.datasets import datasets
from dpdist.privacy import plan as plan_lib
from tests.support import packages

_NAMES = sorted(
  path.stem for path in pathlib.Path(configs.__file__).parent.glob("[!_]*.py")
)
_SPENT = re.compile(r"[Ee]psilon\s+([\d.]+),\s+delta\s+([\d.e-]*\d)")


@pytest.mark.parametrize("name", _NAMES)
def test_epsilon_and_delta_are_as_stated(name):
  module = importlib.import_module(f"configs.{name}")
  assert module.__doc__ is not None
  stated = _SPENT.search(module.__doc__)
  privacy = config_lib.privacy_config(module.get_config())
  if stated is None:
    # What was not trained says so, and has nothing to state.
    assert "nothing was\ntrained" in module.__doc__ or (
      "nothing was trained" in module.__doc__
    )
    return
  epsilon, delta = float(stated[1]), float(stated[2])
  assert privacy.target_delta == delta
  digits = len(stated[1].partition(".")[2])
  if privacy.target_epsilon is not None:
    # A plan never spends more than its target; plan_test holds it to that.
    assert privacy.target_epsilon == epsilon
    return
  spent = plan_lib.make_plan(privacy).epsilon()
  assert epsilon - 0.5 * 10**-digits <= spent <= epsilon + 0.5 * 10**-digits


# Where a model is too large to be tried, or less data is read.
_TEXT = {"data.num_train": 128, "data.num_test": 16}
_SMALL_DECODER = _TEXT | {
  "data.name": "text",
  "data.sequence_length": 16,
  "model.num_outputs": 256,
  "model.width": 32,
  "model.depth": 2,
  "model.head_dim": 8,
  "model.hidden": 64,
  "mesh.fsdp": 2,
  "clipping.microbatch_size": 2,
}
_SMALLER = {
  "cifar10_wrn": {
    "augmentation.multiplicity": 2,
    "clipping.microbatch_size": 2,
    "model.depth": 10,
    "model.width": 1,
  },
  "decoder": _TEXT,
  "decoder_1b": _SMALL_DECODER,
  "decoder_8b": _SMALL_DECODER,
  "smollm2_chitchat": {
    "model.num_outputs": 257,
    "model.width": 36,
    "model.depth": 2,
    "model.hidden": 48,
  },
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """All that the registries carry, small."""
  folder = tmp_path_factory.mktemp("cache")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("DPDIST_CACHE", str(folder))
    for name in fetch.PACKAGES:
      packages.write(name)
    yield folder


# The digits train in every run: in tests/training/train_test.py.
@pytest.mark.slow
@pytest.mark.parametrize("name", _NAMES)
def test_it_trains_two_steps(name, cache, tmp_path):
  changes = _SMALLER.get(name, {}) | {
    "chunk_size": 16,
    "optimizer.warmup_steps": 0,
    "privacy.expected_batch_size": 16,
    "privacy.num_steps": 2,
  }
  config = importlib.import_module(f"configs.{name}").get_config()
  config.update_from_flattened_dict(changes)
  changes["privacy.num_examples"] = len(datasets.load(config.data).train)
  done = subprocess.run(
    [
      *(sys.executable, "-m", "launch.train", f"--config=configs/{name}.py"),
      f"--workdir={tmp_path / 'run'}",
      *(f"--config.{key}={value}" for key, value in changes.items()),
    ],
    cwd=pathlib.Path(configs.__file__).parents[1],
    env=os.environ
    | {
      "DPDIST_CACHE": str(cache),
      # Enough for every mesh.
      "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["num_steps"] == 2
  assert result["guarantee"] == "holds"
  assert np.isfinite(result["test"]["loss"])
