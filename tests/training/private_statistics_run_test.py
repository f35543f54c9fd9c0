"""Runs on a CSV file whose columns are scaled by private statistics."""

import json

import numpy as np
import pytest

import dpdist
from dpdist import config as config_lib
from dpdist import data
from dpdist import errors
from dpdist import sampling
from dpdist.export import load_run
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.tasks import parts
from dpdist.workdir import statistics
from dpdist.workdir import verify

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures("quick_compiles"),
]


@pytest.fixture(name="path", scope="module")
def fixture_path(tmp_path_factory):
  rng = np.random.default_rng(0)
  path = tmp_path_factory.mktemp("data") / "people.csv"
  lines = []
  for i in range(400):
    pay = rng.normal(30_000, 10_000)
    ill = "yes" if pay + rng.normal(0, 3_000) < 30_000 else "no"
    lines.append(f"{pay},{('cook', 'nurse')[i % 2]},{ill},p{i}")
  path.write_text("\n".join(["pay,job,ill,who", *lines]))
  return path


def _dataset(path, high=100_000, users=False):
  return data.from_csv(
    path,
    inputs=["pay", "job"],
    targets="ill",
    classes=["no", "yes"],
    categories={"job": ["cook", "nurse", "pilot"]},
    private_statistics={
      "pay": data.Standardized(0, high),
      "job": data.Counts(at_least=40),
    },
    test_fraction=0.25,
    **({"users": "who"} if users else {"split_by": "who"}),
  )


def _config(dataset, **changes):
  config = config_lib.default()
  config.update_from_flattened_dict(
    {
      "model.name": "linear",
      "model.num_outputs": 2,
      "optimizer.name": "sgd",
      "optimizer.learning_rate": 2.0,
      "privacy.num_examples": len(dataset.train),
      "privacy.expected_batch_size": 60,
      "privacy.num_steps": 8,
      "privacy.noise_multiplier": 2.0,
      "privacy.statistics_noise_multiplier": 2.0,
      "checkpoint_every": 2,
      "insecure_seed": 1,
      **changes,
    }
  )
  return config


def _train(path, workdir, high=100_000, **changes):
  dataset = _dataset(path, high)
  return dpdist.train(_config(dataset, **changes), workdir, dataset=dataset)


def _sound(workdir):
  ledger = ledger_lib.Ledger(workdir / "ledger")
  assert not [x for x in verify.verify(workdir, ledger) if x.problem]
  return ledger


@pytest.fixture(name="whole", scope="module")
def fixture_whole(path, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, _train(path, workdir)


def test_a_run_learns_and_pays_and_is_evaluated_alike(path, whole, capsys):
  workdir, result = whole
  ledger = _sound(workdir)
  assert result["test"]["accuracy"] > 0.7
  plan = ledger.plan
  assert plan.statistics_noise_multiplier == 2.0
  assert (
    result["epsilon"] == plan.epsilon() == composition.epsilon(ledger.spent)
  )
  released = json.loads((workdir / statistics.FILE).read_text())
  assert released["noise_multiplier"] == 2.0
  assert 20_000 < released["columns"]["pay"]["mean"] < 40_000
  page = (workdir / "report.html").read_text()
  assert "private statistics of pay" in page
  assert "statistics of the training data are released once" in page
  dataset = _dataset(path)
  loaded = load_run.load(workdir, ledger, parts=parts.of(dataset=dataset))
  assert loaded.statistics == released
  assert load_run.evaluate(loaded)["test"] == pytest.approx(result["test"])
  other = _dataset(path, high=90_000)
  with pytest.raises(errors.ArgumentError, match="must be those of the run"):
    load_run.load(workdir, ledger, parts=parts.of(dataset=other))


def test_no_row_and_no_exact_answer_is_in_what_a_run_leaves(path, whole):
  workdir, _ = whole
  train = _dataset(path).train
  raw = train.measured(np.arange(len(train)))
  cooks = float(np.sum(raw["job"] == 0))
  exact = {repr(float(x)) for x in (raw["pay"].mean(), raw["pay"].std())}
  exact |= {repr(float(x)) for x in raw["pay"]}
  for file in workdir.rglob("*"):
    if not file.is_file() or file.name == "secret":
      continue
    text = file.read_bytes().decode("latin-1")
    assert not [x for x in exact if x in text], file
  released = json.loads((workdir / statistics.FILE).read_text())
  assert released["columns"]["job"]["counts"][0] != cooks


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
  path, whole, tmp_path, monkeypatch
):
  """Also if someone has written other statistics into its directory."""
  _, result = whole
  sample = sampling.PoissonSampler.__call__

  def fails(self, step):
    if step == 5:
      raise RuntimeError("the machine is gone")
    return sample(self, step)

  with monkeypatch.context() as patched:
    patched.setattr(sampling.PoissonSampler, "__call__", fails)
    with pytest.raises(RuntimeError, match="the machine is gone"):
      _train(path, tmp_path)
  file = tmp_path / statistics.FILE
  kept = file.read_text()
  file.write_text(kept.replace('"mean": ', '"mean": 9'))
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  problems = [x for x in verify.verify(tmp_path, ledger) if x.problem]
  assert [x.what for x in problems] == ["statistics"]
  again = _train(path, tmp_path)
  assert again["params_sha256"] == result["params_sha256"]
  assert again["epsilon"] == result["epsilon"]
  assert file.read_text() == kept
  assert len(_sound(tmp_path).segments) == 1


def test_another_question_opens_a_segment_that_pays_anew(path, tmp_path):
  first = _train(path, tmp_path, **{"privacy.num_steps": 2})
  kept = (tmp_path / statistics.FILE).read_text()
  (tmp_path / "result.json").unlink()
  changes = {"privacy.num_steps": 4}
  second = _train(path, tmp_path, high=90_000, **changes)
  ledger = _sound(tmp_path)
  assert len(ledger.segments) == 2
  one, other = (x.config["private_statistics"] for x in ledger.segments)
  assert one != other
  counts = [
    [count for event, count in use.plan.steps(use.num_steps)]
    for use in ledger.spent
  ]
  assert counts == [[2, 1], [2, 1]]
  assert second["epsilon"] > first["epsilon"]
  assert (tmp_path / statistics.FILE).read_text() != kept


def test_users_are_protected_as_a_whole(path, tmp_path):
  dataset = _dataset(path, users=True)
  users = len({*dataset.train_users})
  config = _config(
    dataset,
    **{
      "data.examples_per_unit": 2,
      "privacy.unit": "user",
      "privacy.num_examples": users,
      "privacy.num_steps": 2,
    },
  )
  dpdist.train(config, tmp_path, dataset=dataset)
  _sound(tmp_path)
  released = json.loads((tmp_path / statistics.FILE).read_text())
  assert (released["unit"], released["num_units"]) == ("user", users)
