"""Private statistics are released once they are charged, and once only."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from dpdist import config as config_lib
from dpdist import data
from dpdist import errors
from dpdist.data import queries
from dpdist.data import sources
from dpdist.data.datasets import datasets
from dpdist.distributed import progress
from dpdist.keys import keys
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from dpdist.privacy import plan as plan_lib
from dpdist.training import job as job_lib
from dpdist.training import train
from dpdist.workdir import manifest
from dpdist.workdir import session as session_lib
from dpdist.workdir import statistics

_SECRET = bytes(range(32))
_DATA = "d" * 64
_ROWS = 200


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
  """Takes over from writers of the same test."""
  monkeypatch.setattr(records, "PATIENCE_SECONDS", 0.0)


def _dataset(at_least=None, seed=0, **changes):
  rng = np.random.default_rng(seed)
  columns = {
    "age": rng.normal(50, 10, _ROWS),
    "job": rng.choice(["cook", "nurse"], _ROWS),
  }
  return data.from_arrays(
    columns,
    test={"age": [50.0, 60.0], "job": ["cook", "cook"]},
    **{
      "inputs": ["age", "job"],
      "categories": {"job": ["cook", "nurse", "pilot"]},
      "private_statistics": {
        "age": data.Standardized(0, 120),
        "job": data.Counts(at_least=at_least),
      },
      **changes,
    },
  )


def _plan(sigma=2.0, **changes):
  return plan_lib.make_plan(
    plan_lib.PrivacyConfig(
      **{
        "num_examples": _ROWS,
        "expected_batch_size": 10,
        "num_steps": 50,
        "l2_clip_norm": 1.0,
        "target_delta": 1e-5,
        "noise_multiplier": 1.0,
        "accountant": "rdp",
        "statistics_noise_multiplier": sigma,
        **changes,
      }
    )
  )


def _ledger(path, plan, asked, *, run="a run", charge=1, known=_DATA):
  ledger = ledger_lib.Ledger(path)
  ledger.acquire()
  settings = {"private_statistics": asked.digest()}
  if ledger.is_new:
    ledger.open(
      config=settings, plan=plan, data=known, secret_hash="5" * 64, run=run
    )
  elif ledger.segment.plan != plan or ledger.segment.config != settings:
    ledger.open_segment(config=settings, plan=plan, data=known, start_step=0)
  ledger.resume(step=0, digest="", ledger_head="", fingerprint="f")
  if charge:
    ledger.reserve_through(charge)
  return ledger


class _Counted:
  """Counts how often rows are read for statistics."""

  def __init__(self, source):
    self._source, self.count = source, 0

  def __getattr__(self, name):
    return getattr(self._source, name)

  def __len__(self):
    return len(self._source)

  def measured(self, indices):
    self.count += 1
    return self._source.measured(indices)


def _release(
  path, *, train=None, plan=None, known=_DATA, secret=_SECRET, **options
):
  """A release under a ledger of its own, in a new folder or a known one."""
  train = _dataset().train if train is None else train
  plan = _plan() if plan is None else plan
  asked = sources.private_statistics(train)
  with _ledger(path, plan, asked, known=known, **options) as ledger:
    return statistics.release(
      ledger, secret, statistics=asked, source=train, plan=plan, data=known
    )


def _noise(released, train, plan):
  """The noise on the counts, which are linear, in standard deviations."""
  asked = sources.private_statistics(train)
  sums = asked.sums(train.measured, len(train))
  exact = asked.answers(sums, num_units=_ROWS, stddev=1.0)
  got, wanted = (x["job"]["counts"] for x in (released["columns"], exact))
  noise = (np.array(got) - wanted) * asked.share
  return noise / (plan.statistics_noise_multiplier * queries.UNIT)


def test_nothing_is_read_before_a_step_is_charged(tmp_path):
  train, plan = _Counted(_dataset().train), _plan()
  asked = sources.private_statistics(train)
  release = lambda ledger, **changes: statistics.release(
    ledger,
    _SECRET,
    **{
      "statistics": asked,
      "source": train,
      "plan": plan,
      "data": _DATA,
      **changes,
    },
  )
  with _ledger(tmp_path / "a", plan, asked, charge=0) as ledger:
    with pytest.raises(errors.LedgerError, match="must be charged before"):
      release(ledger)
    assert not train.count
    ledger.reserve_through(1)
    # Nor for other data, another plan or another question than were charged.
    other = sources.private_statistics(_dataset(at_least=1).train)
    for change in (
      {"data": "e" * 64},
      {"plan": _plan(2.5)},
      {"statistics": other},
    ):
      with pytest.raises(errors.LedgerError, match="plan without these"):
        release(ledger, **change)
    assert not train.count
    head = ledger.head
    release(ledger)
    assert train.count == 1
    assert ledger.head == head  # It needs no record.


def test_a_restart_releases_the_same_and_charges_nothing_more(tmp_path):
  first = _release(tmp_path / "a")
  with ledger_lib.Ledger(tmp_path / "a") as ledger:
    charged = ledger.segment.charged
  again = _release(tmp_path / "a")
  assert json.dumps(again) == json.dumps(first)
  # On another branch too.
  asked = sources.private_statistics(_dataset().train)
  with _ledger(tmp_path / "a", _plan(), asked) as ledger:
    assert ledger.segment.charged == charged == 1
    ledger.resume(step=0, digest="", ledger_head="", fingerprint="g")
    assert len(ledger.branches) == 2
    third = statistics.release(
      ledger,
      _SECRET,
      statistics=asked,
      source=_dataset().train,
      plan=_plan(),
      data=_DATA,
    )
  assert third == first


def test_rows_that_change_under_one_digest_are_not_released_twice(tmp_path):
  first = _release(tmp_path)
  asked = sources.private_statistics(_dataset().train)
  with _ledger(tmp_path, _plan(), asked) as ledger:
    again = lambda seed, earlier: statistics.release(
      ledger,
      _SECRET,
      statistics=asked,
      source=_dataset(seed=seed).train,
      plan=_plan(),
      data=_DATA,
      earlier=earlier,
    )
    assert again(0, first) == first
    with pytest.raises(errors.LedgerError, match="must be those that this run"):
      again(1, first)
    # What another plan, or other data, had released says nothing.
    for change in ({"data": "e" * 64}, {"query": "0"}, {"noise_multiplier": 9}):
      assert again(1, first | change) != first


def test_a_key_meets_one_input_only(tmp_path):
  """Its noise is another if anything is: also where the exact sums are not."""
  train, plan = _dataset().train, _plan()
  noise = [_noise(_release(tmp_path / "a"), train, plan)]
  # A question of the same sums.
  asked = _dataset(at_least=50).train
  sums = [
    sources.private_statistics(x).sums(x.measured, _ROWS)
    for x in (train, asked)
  ]
  assert sums[0] == sums[1]
  noise.append(_noise(_release(tmp_path / "b", train=asked), asked, plan))
  # More noise of the same key would tell the sums.
  more = _plan(4.0)
  noise.append(_noise(_release(tmp_path / "c", plan=more), train, more))
  # Other sums, under whatever digest.
  other = _dataset(seed=1).train
  noise.append(_noise(_release(tmp_path / "d", train=other), other, plan))
  for place, changes in (
    ("e", {"run": "another"}),
    ("f", {"known": "e" * 64}),
    ("g", {"secret": _SECRET[::-1]}),
  ):
    released = _release(tmp_path / place, **changes)
    noise.append(_noise(released, train, plan))
  replaced = _plan(neighboring_relation="replace_one")
  noise.append(_noise(_release(tmp_path / "h", plan=replaced), train, replaced))
  for i, one in enumerate(noise):
    for other in noise[:i]:
      assert not np.isclose(one, other, rtol=1e-3).any()
      assert not np.isclose(one, 2 * other, rtol=1e-3).any()


@pytest.mark.parametrize(
  ("relation", "reach"),
  [("add_or_remove_one", 1), ("zero_out", 1), ("replace_one", 2)],
)
def test_noise_is_in_proportion_to_what_one_row_can_move(
  tmp_path, monkeypatch, relation, reach
):
  asked = []
  monkeypatch.setattr(
    statistics.decimal_gaussian,
    "integers",
    lambda key, count, stddev: asked.append(stddev) or [0] * count,
  )
  _release(tmp_path, plan=_plan(3.0, neighboring_relation=relation))
  assert asked == [3.0 * reach * queries.UNIT]


@pytest.mark.parametrize("unit", ["user", "example"])
def test_users_are_units_and_groups_of_rows_are_not(
  tmp_path, monkeypatch, unit
):
  """Exactly, without noise: counts add up to the number of units."""
  monkeypatch.setattr(
    statistics.decimal_gaussian,
    "integers",
    lambda key, count, stddev: [0] * count,
  )
  owners = np.arange(_ROWS) % (20 if unit == "user" else _ROWS // 2)
  made = dataclasses.replace(
    _dataset(), train_users=owners, test_users=np.array([-1, -1])
  )
  train = made.over_users(4, name="who").train
  units = 20 if unit == "user" else _ROWS
  plan = _plan(
    unit=unit,
    num_examples=units,
    group_size=1 if unit == "user" else 2,
    neighboring_relation="zero_out",
  )
  released = _release(tmp_path, train=train, plan=plan)
  counts = released["columns"]["job"]["counts"]
  assert sum(counts) == pytest.approx(units)


def _job(ledger, made, plan):
  fields = dict.fromkeys(x.name for x in dataclasses.fields(job_lib.Job))
  return job_lib.Job(
    **fields
    | {
      "ledger": ledger,
      "plan": plan,
      "secret": _SECRET,
      "train_source": made.train,
      "test_source": made.test,
      "train_digest": _DATA,
      "statistics": sources.private_statistics(made.train),
      "found": manifest.ResumePoint(None, []),
      "evaluate": _Evaluator(),
    }
  )


class _Evaluator:
  test = None

  def on(self, test):
    made = _Evaluator()
    made.test = test
    return made


def _start(ledger, made, plan, workdir, start=0):
  """What a run does before its first step, as far as statistics go."""
  session = session_lib.Session(
    ledger,
    None,
    _SECRET,
    session_lib.Position.of(ledger),
    start_step=start,
    warn=pytest.fail,
  )
  with session:
    return train._release_statistics(
      workdir,
      _job(ledger, made, plan),
      session,
      start,
      ledger.last_step,
      progress.Progress(),
    )


def test_a_run_charges_before_it_reads_and_gives_nothing_back(tmp_path, capsys):
  made, plan = _dataset(), _plan()
  charged = []

  class Spy(type(made.train)):
    def measured(self, indices):
      # What is on disk, as anyone else sees it.
      with ledger_lib.Ledger(tmp_path / "ledger") as seen:
        charged.append(seen.segment.charged)
      return super().measured(indices)

  object.__setattr__(made.train, "__class__", Spy)
  asked = sources.private_statistics(made.train)
  with _ledger(tmp_path / "ledger", plan, asked, charge=0) as ledger:
    job, released = _start(ledger, made, plan, tmp_path)
    assert charged == [1]
    # The session has ended, no step of it has run, and the charge stays.
    assert ledger.segment.charged == 1
    assert ledger.spent[-1].plan.steps(1)[-1][1] == 1
    # Held-out data and training data are both made with what was released.
    age = released["columns"]["age"]
    for source, read in (
      (job.train_source, job.train_source.read(np.arange(2))),
      (job.test_source, job.test),
    ):
      raw = source.measured(np.arange(2))["age"]
      expected = (raw - age["mean"]) / age["deviation"]
      np.testing.assert_allclose(read["inputs"][:, 0], expected, rtol=1e-5)
    assert job.evaluate.test is job.test
    # And once the plan is spent.
    ledger.reserve_through(plan.num_steps)
    head = ledger.head
    assert _start(ledger, made, plan, tmp_path, plan.num_steps)[1] == released
    assert ledger.head == head
  kept = json.loads((tmp_path / statistics.FILE).read_text())
  assert kept == released
  assert "private statistics of age" in capsys.readouterr().out


def test_data_that_changed_is_not_released(tmp_path):
  made, plan = _dataset(), _plan()

  class Changed(type(made.train)):
    def changed_files(self):
      return ["people.csv"]

  object.__setattr__(made.train, "__class__", Changed)
  asked = sources.private_statistics(made.train)
  with _ledger(tmp_path / "ledger", plan, asked, charge=0) as ledger:
    with pytest.raises(errors.ChangedError, match=r"people\.csv"):
      _start(ledger, made, plan, tmp_path)
    assert ledger.unsound
  assert not (tmp_path / statistics.FILE).exists()


@pytest.mark.parametrize(
  ("sigma", "asked", "message"),
  [
    (0.0, {}, "must be above 0 for a data set with private_statistics, got 0"),
    (
      2.0,
      {"private_statistics": {}},
      "must be 0 for a data set without private_statistics, got 2",
    ),
  ],
)
def test_settings_pay_for_what_is_asked_and_for_nothing_else(
  sigma, asked, message
):
  config = config_lib.default()
  config.privacy.statistics_noise_multiplier = sigma
  with pytest.raises(errors.ArgumentError, match=message):
    statistics.asked(config, _dataset(**asked).train)


def test_what_is_asked_is_among_the_settings_that_the_ledger_compares():
  config = config_lib.default()
  config.update_from_flattened_dict(
    {
      "privacy.num_examples": _ROWS,
      "privacy.expected_batch_size": 10.0,
      "privacy.num_steps": 5,
      "privacy.noise_multiplier": 1.0,
      "privacy.statistics_noise_multiplier": 2.0,
    }
  )
  asked, settings = statistics.asked(config, _dataset().train)
  assert settings == config_lib.privacy_dict(config) | {
    "private_statistics": asked.digest()
  }


def test_features_are_refused():
  config = config_lib.default().data
  config.features = "scattering"
  with pytest.raises(
    errors.ArgumentError, match="features must be '' with private_statistics"
  ):
    datasets.load(config, _dataset())


def test_held_out_data_is_made_with_the_statistics_of_the_checkpoint(tmp_path):
  made = _dataset()
  released = _release(tmp_path)
  test = statistics.of_test(made.test, released, "here")
  expected = sources.with_statistics(made.test, released["columns"])
  rows = np.arange(2)
  assert np.array_equal(
    test.read(rows)["inputs"], expected.read(rows)["inputs"]
  )
  for source, there in (
    (_dataset(at_least=3).test, released),
    (_dataset(private_statistics={}).test, released),
    (made.test, None),
  ):
    with pytest.raises(errors.ArgumentError, match="must be those of the run"):
      statistics.of_test(source, there, "here")


def test_no_exact_sum_and_no_key_is_in_what_is_released(tmp_path):
  train = _dataset().train
  asked = sources.private_statistics(train)
  sums = asked.sums(train.measured, len(train))
  exact = asked.answers(sums, num_units=_ROWS, stddev=1.0)
  released = _release(tmp_path)
  text = json.dumps(released)
  assert asked.digest() in text
  assert not [x for x in sums if x and str(x) in text]
  for column, names in (("age", ["mean", "deviation"]), ("job", ["counts"])):
    for name in names:
      got, value = released["columns"][column][name], exact[column][name]
      assert (np.array(got) != value).all()
  assert keys.secret_hash(_SECRET) not in text
  assert hashlib.sha256(_SECRET).hexdigest() not in text
