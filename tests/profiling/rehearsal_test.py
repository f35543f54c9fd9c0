"""What a run would do before its first charge is done, and told."""

import dataclasses
import hashlib
import json
import math
import types

import numpy as np
import pytest

from configs import digits
import dpdist
from dpdist import config as config_lib
from dpdist.data import arrays
from dpdist.data import dataset as dataset_lib
from dpdist.distributed import progress as progress_lib
from dpdist.privacy import plan as plan_lib
from dpdist.profiling import rehearsal
from dpdist.sampling import poisson
from dpdist.tasks import parts as parts_lib
from dpdist.workdir import outlook

pytestmark = pytest.mark.usefixtures("quick_compiles")

_NUM_TRAIN, _NUM_TEST = 600, 40


@dataclasses.dataclass
class _Watched:
  """A source that notes the rows that are read of it."""

  source: arrays.ArraySource
  read_rows: list

  def __len__(self):
    return len(self.source)

  def read(self, indices):
    self.read_rows.append([*indices])
    return self.source.read(indices)

  def content_digest(self):
    return self.source.content_digest()


def _config(**changes):
  config = digits.get_config()
  config.model.name = "linear"
  config.sentinel.every = 0
  config.privacy.update(
    num_examples=_NUM_TRAIN,
    target_epsilon=None,
    noise_multiplier=2.0,
    expected_batch_size=60.0,
    num_steps=0,
    epochs=1.5,
    accountant="rdp",
    target_delta=0.01,
  )
  config.update_from_flattened_dict(changes)
  return config


def _arrays(num, seed):
  rng = np.random.default_rng(seed)
  return {
    "inputs": rng.normal(size=(num, 4)).astype(np.float32),
    "targets": (np.arange(num) % 3).astype(np.int32),
  }


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
  """What was found, what was read, the phases, what was told, and where."""
  folder = tmp_path_factory.mktemp("nothing")
  test, train = _arrays(_NUM_TEST, 0), _arrays(_NUM_TRAIN, 1)
  # Of the labels that are held out none is 7, and of these all but one are.
  train["targets"][1:] = 7
  train["inputs"][1] = test["inputs"][7]
  train["targets"][1] = test["targets"][7]
  rows, phases, told = [], [], []
  parts = parts_lib.of(
    dataset=dataset_lib.Dataset(
      _Watched(arrays.ArraySource(train), rows), arrays.ArraySource(test)
    )
  )
  facts = rehearsal.rehearse(
    _config(),
    parts,
    workdir=folder / "run",
    progress=progress_lib.Progress(phases.append),
    tell=told.append,
  )
  return facts, rows, phases, told, folder


def test_it_says_what_it_found(rehearsed):
  facts, _, phases, _, _ = rehearsed
  json.dumps(facts)
  assert facts["data"]["num_train"] == _NUM_TRAIN
  assert facts["data"]["num_test"] == _NUM_TEST
  assert facts["data"]["arrays"]["inputs"] == {"shape": [4], "dtype": "float32"}
  assert facts["model"]["parameters"] == 4 * 10
  plan = facts["plan"]
  assert (plan["num_steps"], plan["epochs"]) == (15, 1.5)
  assert plan["delta_times_examples"] == pytest.approx(6.0)
  assert facts["run"]["action"] == outlook.BEGINS
  assert facts["run"]["epsilon"] == pytest.approx(plan["epsilon"])
  assert facts["budget"] is None
  assert facts["sensitivity"]["num_examples"] >= 8
  memory, disk = facts["memory"], facts["disk"]
  assert {"initial state", "chunk", "update"} == {*memory["programs"]}
  # The parameters at least.
  assert 4 * 40 < memory["most"] < memory["free"]
  assert disk["kept"] == 3
  assert 4 * 40 <= disk["checkpoint"] < 4 * 40 * 3
  assert disk["needed"] == 4 * disk["checkpoint"] < disk["free"]
  time = facts["time"]
  assert 0 < time["chunk"] < time["step"] < time["all_steps"] < 60
  assert time["all_steps"] == pytest.approx(15 * time["step"])
  assert phases == [
    *("loading", "planning", "compiling", "starting", "checking", "measuring"),
    "starting",
  ]


def test_signal_and_noise_are_those_of_the_page_on_tuning(rehearsed):
  signal = rehearsed[0]["signal"]
  assert signal["step"] == pytest.approx(60 / (2 * math.sqrt(40)))
  assert signal["all_steps"] == pytest.approx(signal["step"] * math.sqrt(15))
  assert signal["advice"].startswith("enough")


def test_a_delta_above_one_over_the_examples_is_warned_of(rehearsed):
  (warning,) = rehearsed[0]["warnings"]
  assert "delta 0.01 is not below 1 over the number of examples" in warning


def test_nothing_is_written(rehearsed):
  assert [*rehearsed[4].iterdir()] == []


def test_of_a_training_example_no_value_is_in_what_it_returns(rehearsed):
  facts, rows, _, told, _ = rehearsed
  # The first row, for shapes, and once all, to be compared with the held-out
  # part: of that only the owner hears.
  assert {tuple(x) for x in rows} == {(0,), tuple(range(_NUM_TRAIN))}
  assert "1 of the first 40 held-out examples" in told[0]
  assert facts["labels"] == {
    "num_classes": 3,
    "smallest": 0,
    "largest": 2,
    "share_of_the_most_frequent": 14 / 40,
  }
  assert "equal to" not in json.dumps(facts)


def test_a_schedule_counts_by_its_phases():
  config = _config(
    **{
      "privacy.epochs": None,
      "privacy.num_steps": 10,
      "privacy.batch_size_schedule": ((4, 120.0),),
      "privacy.noise_schedule": ((8, 4.0),),
    }
  )
  plan = config_lib.privacy_config(config)
  job = types.SimpleNamespace(plan=plan_lib.make_plan(plan))
  assert rehearsal._phases(job) == [(4, 2.0, 60.0), (4, 2.0, 120.0)] + [
    (2, 4.0, 120.0)
  ]


def test_wrong_settings_are_refused_as_by_a_run(tmp_path):
  with pytest.raises(ValueError, match="num_examples must be the number of"):
    rehearsal.rehearse(_config(**{"privacy.num_examples": 700}))


class _StopError(Exception):
  pass


def _stop(self, step):
  if step == 3:
    raise _StopError
  return np.arange(3)


def _digests(folder):
  return {
    path: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


@pytest.mark.slow
def test_it_says_what_would_become_of_the_run_that_is_there(
  tmp_path, monkeypatch
):
  """Nothing is written, whatever would happen, and what is said does happen."""
  dataset = dataset_lib.Dataset(
    arrays.ArraySource(_arrays(_NUM_TRAIN, 1)),
    arrays.ArraySource(_arrays(_NUM_TEST, 0)),
  )
  workdir = tmp_path / "run"
  changes = {
    "checkpoint_every": 2,
    "privacy.epochs": None,
    "privacy.num_steps": 6,
    "data_budget.location": str(tmp_path / "budgets"),
    "data_budget.epsilon": 3.0,
    "data_budget.delta": 0.01,
  }

  def look(**more):
    before = _digests(tmp_path)
    try:
      return rehearsal.rehearse(
        _config(**changes | more),
        parts_lib.of(dataset=dataset),
        workdir=workdir,
      )
    finally:
      assert _digests(tmp_path) == before

  new = look()
  assert new["run"]["action"] == outlook.BEGINS
  assert not [*tmp_path.iterdir()]
  assert new["budget"]["share_reserved"] == 0
  share = new["budget"]["share_of_this_run"]
  assert 0 < share < 1
  with pytest.raises(ValueError, match="would be exceeded"):
    look(**{"privacy.noise_multiplier": 0.5})
  with monkeypatch.context() as patch:
    patch.setattr(poisson.PoissonSampler, "__call__", _stop)
    with pytest.raises(_StopError):
      dpdist.train(_config(**changes), workdir, dataset=dataset)
  stopped = look()
  assert stopped["run"]["action"] == outlook.GOES_ON
  assert stopped["run"]["start_step"] == 2
  assert stopped["run"]["steps_spent"] + stopped["run"]["steps_to_charge"] == 6
  assert stopped["budget"]["share_reserved"] == pytest.approx(share)
  assert stopped["budget"]["share_of_this_run"] == pytest.approx(0)
  other = look(**{"optimizer.learning_rate": 0.25})["run"]
  assert other["action"] == outlook.BRANCHES
  assert other["last_step"] < 6
  more = look(**{"privacy.num_steps": 8})
  assert more["run"]["action"] == outlook.CHANGES
  assert more["budget"]["share_of_this_run"] > 0
  with pytest.raises(ValueError, match="cannot change on the way"):
    look(**{"privacy.target_delta": 0.001})
  result = dpdist.train(_config(**changes), workdir, dataset=dataset)
  assert result["epsilon"] == stopped["run"]["epsilon"]
  over = look()["run"]
  assert (over["action"], over["last_step"]) == (outlook.ENDED, 6)
