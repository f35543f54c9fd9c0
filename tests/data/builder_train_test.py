"""A run on a CSV file of one's own, from `data.name` to the result."""

import importlib
import json
import sys

import numpy as np
import pytest

import dpdist
from dpdist import config as config_lib
from dpdist import data
from dpdist import registry
from dpdist.data import users as users_lib
from dpdist.data.datasets import datasets
from dpdist.ledger import ledger as ledger_lib
from dpdist.workdir import verify

pytestmark = pytest.mark.usefixtures("quick_compiles")

_PROJECT = """
import json
import pathlib

from dpdist import data


def load(config):
  statistics = pathlib.Path(config.path).with_suffix(".json").read_text()
  return data.from_csv(
    config.path,
    inputs=["age", "job"],
    targets="label",
    classes=["no", "yes"],
    categories={"job": ["cook", "nurse", "pilot"]},
    public_statistics=json.loads(statistics),
    users="who" if config.examples_per_unit else None,
    split_by=None if config.examples_per_unit else "who",
    test_fraction=0.25,
  )
"""


@pytest.fixture(name="project")
def fixture_project(tmp_path, monkeypatch):
  """A project of somebody's, with a CSV file of made-up people."""
  rng = np.random.default_rng(0)
  lines = [
    f"{rng.integers(18, 90)},{('nurse', 'cook', 'pilot')[i % 3]},"
    f"{('no', 'yes')[i % 2]},p{i % 40}"
    for i in range(200)
  ]
  path = tmp_path / "people.csv"
  path.write_text("\n".join(["age,job,label,who", *lines]))
  path.with_suffix(".json").write_text('{"age": [45, 20]}')
  (tmp_path / "people_project.py").write_text(_PROJECT)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(registry, "_digests", {})
  importlib.invalidate_caches()
  yield path
  sys.modules.pop("people_project", None)


def _config(path, **changes):
  config = config_lib.default()
  config.update_from_flattened_dict(
    {
      "data.name": "people_project:load",
      "data.path": str(path),
      "model.name": "linear",
      "model.num_outputs": 2,
      "privacy.expected_batch_size": 8,
      "privacy.num_steps": 2,
      "privacy.noise_multiplier": 2.0,
      "insecure_seed": 1,
      **changes,
    }
  )
  return config


def _num_people(path):
  """How many rows are trained on, and how many people's they are."""
  dataset = data.from_csv(path, inputs="age", users="who", test_fraction=0.25)
  return len(dataset.train_users), len({*dataset.train_users})


@pytest.mark.slow
def test_a_csv_file_is_trained_on_by_a_config(project, tmp_path):
  """And under other statistics, with the same rows and code, by other keys."""
  rows, users = _num_people(project)
  assert 0 < users < 40
  workdir = tmp_path / "run"
  config = _config(project, **{"privacy.num_examples": rows})
  branches = []
  for age in ([45, 20], [45, 21]):
    project.with_suffix(".json").write_text(json.dumps({"age": age}))
    result = dpdist.train(config, workdir)
    assert result["num_steps"] == 2
    assert 0 <= result["test"]["accuracy"] <= 1
    ledger = ledger_lib.Ledger(workdir / "ledger")
    assert not [x for x in verify.verify(workdir, ledger) if x.problem]
    branches.append(ledger.branches)
    (workdir / "result.json").unlink()
  first, second = branches
  assert len(second) == len(first) + 1
  assert second[-1].identity != first[-1].identity


def test_the_users_of_a_csv_file_are_the_unit(project):
  _, users = _num_people(project)
  config = _config(project, **{"data.examples_per_unit": 3})
  loaded = datasets.load(config.data)
  assert isinstance(loaded.train, users_lib.UserSource)
  assert len(loaded.train) == users
  assert loaded.train.read(np.arange(4))["inputs"].shape == (4, 3, 4)
