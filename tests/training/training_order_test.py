"""The order of things in a run: checks, charges and what is told of them.

On a model and data so small that a run takes about two seconds.
"""

import dataclasses
import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest

import dpdist
from dpdist import config as config_lib
from dpdist import errors
from dpdist import sampling
from dpdist.data import array_record
from dpdist.distributed import collectives
from dpdist.distributed import preemption
from dpdist.keys import keys
from dpdist.ledger import data_budget
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import plan as plan_lib
from dpdist.reporting import metrics
from dpdist.training import job as job_lib
from dpdist.training import step as step_lib
from dpdist.training import step_sentinel
from dpdist.workdir import fingerprint
from dpdist.workdir import session
from dpdist.workdir import verify

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  for part in ("train", "test"):
    rows = [
      {"inputs": rng.random(4, np.float32), "targets": np.int32(i % 2)}
      for i in range(32)
    ]
    array_record.write_array_record(folder / f"{part}.array_record", rows)
  return folder


def _config(data, **changes):
  config = config_lib.default()
  config.data.name, config.data.path = "array_record", str(data)
  config.model.name, config.model.num_outputs = "linear", 2
  config.privacy.num_examples = 32
  config.privacy.expected_batch_size = 8
  config.privacy.num_steps = 6
  config.privacy.noise_multiplier = 1.0
  config.privacy.accountant = "rdp"
  config.checkpoint_every, config.eval_every = 2, 1
  config.update_from_flattened_dict(changes)
  return config


def _at_step(monkeypatch, number, do):
  """Does something as a step's examples are drawn."""
  sample = sampling.PoissonSampler.__call__

  def changed(self, step):
    if step == number:
      do()
    return sample(self, step)

  monkeypatch.setattr(sampling.PoissonSampler, "__call__", changed)


def test_files_that_are_changed_stop_the_run_and_void_it(
  data, tmp_path, monkeypatch
):
  """And nothing leaves it that may have come of them."""
  path = data / "train.array_record"
  with monkeypatch.context() as patch:
    # Drawn ahead of time, so while a step before it is computed.
    _at_step(patch, 3, lambda: os.utime(path, ns=(0, 0)))
    with pytest.raises(errors.ChangedError, match="cannot vouch") as stopped:
      dpdist.train(_config(data), tmp_path)
  assert str(path) in str(stopped.value)
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  told = [row["step"] for row in metrics.read(tmp_path)]
  saved = [saved.step for saved in ledger.checkpoints]
  assert max([*told, *saved], default=0) <= 3
  assert not (tmp_path / "result.json").exists()
  assert ledger.guarantee == (
    "void: files of the training data were changed while the run read them"
  )
  assert "/" not in ledger.guarantee
  problems = [f for f in verify.verify(tmp_path, ledger) if f.problem]
  (problem,) = problems
  assert (problem.what, problem.problem) == ("guarantee", ledger.unsound[0])
  # Whoever goes on with it all the same is told so to the end.
  result = dpdist.train(_config(data), tmp_path)
  assert result["guarantee"] == ledger.guarantee
  assert "No guarantee" in (tmp_path / "report.html").read_text()
  assert json.loads((tmp_path / "result.json").read_text())["guarantee"] == (
    ledger.guarantee
  )


@pytest.mark.parametrize("here", [[], ["/data/train.array_record"]])
def test_files_that_another_process_saw_change_stop_this_one_too(
  here, tmp_path, monkeypatch
):
  with ledger_lib.Ledger(tmp_path) as ledger:
    ledger.acquire()
    config = config_lib.default()
    config.update_from_flattened_dict(
      {
        "privacy.num_examples": 32,
        "privacy.expected_batch_size": 8,
        "privacy.num_steps": 6,
        "privacy.noise_multiplier": 1.0,
      }
    )
    ledger.open(
      config={},
      plan=dpdist.make_plan(config_lib.privacy_config(config)),
      data="d" * 64,
      secret_hash="5" * 64,
      run="a run",
    )
    ledger.resume(step=0, digest="", ledger_head="", fingerprint="f")
    live = session.Session(
      ledger, None, bytes(32), session.Position.of(ledger), start_step=0
    )
    monkeypatch.setattr(collectives, "any_process", lambda flag: True)
    with pytest.raises(errors.ChangedError, match="cannot vouch"):
      live.check_data(lambda: here)
    assert ledger.unsound
    assert not any("/data" in text for text in ledger.notices)
    monkeypatch.setattr(collectives, "any_process", lambda flag: False)
    live.check_data(lambda: here)


class _StopError(Exception):
  pass


def test_a_run_is_told_apart_by_all_that_its_steps_are_made_of(
  data, tmp_path, monkeypatch
):
  """By settings, plan, data, every process and every digest of the job."""
  made_of = {"weights_sha256": "1", "task_code_sha256": "2"}
  prepare, given = job_lib.prepare, []
  monkeypatch.setattr(
    job_lib,
    "prepare",
    lambda *args, **kwargs: dataclasses.replace(
      prepare(*args, **kwargs), made_of=made_of
    ),
  )

  def stop(*args):
    given.extend(args)
    raise _StopError

  monkeypatch.setattr(fingerprint, "fingerprint", stop)
  config = _config(data)
  with pytest.raises(_StopError):
    dpdist.train(config, tmp_path)
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  # How large chunks are may be chosen on the way.
  settings = config.to_dict() | {"chunk_size": given[0]["chunk_size"]}
  assert given[:3] == [
    settings,
    ledger.plan.fingerprint(),
    ledger.segment.data,
  ]
  assert [environment["num_processes"] for environment in given[3]] == [1]
  assert given[4] == made_of
  assert ledger.spent_steps == 0


def test_a_run_that_goes_on_between_two_charges_is_charged_first(
  data, tmp_path, monkeypatch
):
  """It was stopped there, and goes on with other keys."""
  notices = []
  make = preemption.Notice.__enter__
  monkeypatch.setattr(
    preemption.Notice,
    "__enter__",
    lambda self: notices.append(self) or make(self),
  )
  config = _config(data, checkpoint_every=4, eval_every=4)

  def stop():
    notices[-1].received = True

  with monkeypatch.context() as patch:
    _at_step(patch, 3, stop)
    with pytest.raises(errors.Preempted) as stopped:
      dpdist.train(config, tmp_path)
  start = stopped.value.step
  assert start % 4
  charged = []
  compile_apply = step_lib.Step.apply.func

  def watch(self):
    compiled = compile_apply(self)

    def apply(state, *args):
      if not np.any(jax.random.key_data(args[1])):
        # Of zeros, under a key that everybody knows.
        return compiled(state, *args)
      ledger = ledger_lib.Ledger(tmp_path / "ledger")
      charged.append((int(state.step), ledger.branches[-1].stop_step))
      return compiled(state, *args)

    return apply

  watched = functools.cached_property(watch)
  watched.__set_name__(step_lib.Step, "apply")
  monkeypatch.setattr(step_lib.Step, "apply", watched)
  environment = fingerprint.environment
  monkeypatch.setattr(
    fingerprint, "environment", lambda mesh: environment(mesh) | {"new": True}
  )
  dpdist.train(config, tmp_path)
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  assert [branch.start_step for branch in ledger.branches] == [0, start]
  assert charged[0][0] == start
  for step, stop_step in charged:
    assert stop_step > step


@pytest.fixture(scope="module")
def noted(data, tmp_path_factory):
  """What each chunk of a run draws by, and what its processes agree on."""
  charge, agree = ledger_lib.Ledger.reserve_through, collectives.assert_equal
  make = step_lib.Step.accumulate.func
  charged, used, agreed = [], [], {}

  def reserve_through(self, stop_step):
    charged.append(stop_step)
    return charge(self, stop_step)

  def noting(self):
    compiled = make(self)

    def accumulate(params, accumulator, batch, padding, key, first_row, *more):
      if charged:  # What comes before is of zeros and made-up examples.
        used.append((*jax.random.key_data(key).tolist(), int(first_row)))
      return compiled(
        params, accumulator, batch, padding, key, first_row, *more
      )

    return accumulate

  def agreeing(**facts):
    assert not charged
    agreed.update(facts)
    agree(**facts)

  replaced = functools.cached_property(noting)
  replaced.__set_name__(step_lib.Step, "accumulate")
  workdir = tmp_path_factory.mktemp("noted")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_lib.Step, "accumulate", replaced)
    patch.setattr(ledger_lib.Ledger, "reserve_through", reserve_through)
    patch.setattr(collectives, "assert_equal", agreeing)
    dpdist.train(_config(data, chunk_size=8), workdir)
  return used, agreed, workdir


def test_no_two_chunks_of_a_run_share_their_randomness(noted):
  """What a model draws goes by row, which is sound of new keys alone."""
  used, _, _ = noted
  steps = sum(first_row == 0 for *_, first_row in used)
  assert 3 < steps <= 6
  assert len({tuple(key) for *key, _ in used}) == steps
  assert len(set(used)) == len(used)


def test_processes_agree_on_all_that_a_step_is_made_of_before_it_is_charged(
  noted,
):
  _, agreed, workdir = noted
  assert set(agreed) == {
    *(
      "settings",
      "code",
      "code_outside",
      "layer_rules",
      "packages",
      "jax_config",
    ),
    *("training_data", "training_features", "model_weights"),
    *("plan", "secret_file"),
  }
  secret = (workdir / "secret").read_bytes()
  assert agreed["secret_file"] == keys.secret_hash(secret)
  ledger = ledger_lib.Ledger(workdir / "ledger")
  assert agreed["training_data"] == ledger.segment.data
  assert agreed["plan"] == ledger.plan.fingerprint()


def _fail():
  raise errors.ReadError("the disk is away")


def test_what_was_charged_and_never_begun_is_given_back(
  data, tmp_path, monkeypatch
):
  """In the data set's budget too; and then it is charged as if never before."""
  config = _config(data, checkpoint_every=6, eval_every=6)
  config.data_budget.location = str(tmp_path / "budgets")
  config.data_budget.epsilon, config.data_budget.delta = 50.0, 1e-4
  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    _at_step(patch, 3, _fail)
    with pytest.raises(errors.ReadError, match="the disk is away"):
      dpdist.train(config, workdir)
  # All six were charged before the first; three were computed.
  ledger = ledger_lib.Ledger(workdir / "ledger")
  assert ledger.spent_steps == 3
  assert not [f for f in verify.verify(workdir, ledger) if f.problem]
  (allocation,) = ledger.allocations
  budget = data_budget.DataBudget(allocation["root"], allocation["data"])
  # It knows of the newest record, so that a copy from before pays by itself.
  assert budget.allocations[allocation["stake"]].head == ledger.head
  # Other code could not go on for free: now it may make the three that are
  # left, and no more.
  copy = tmp_path / "ended"
  shutil.copytree(workdir, copy)
  environment = fingerprint.environment
  with monkeypatch.context() as patch:
    patch.setattr(
      fingerprint, "environment", lambda mesh: environment(mesh) | {"new": True}
    )
    dpdist.train(config, workdir)
  gone_on = ledger_lib.Ledger(workdir / "ledger")
  charged = [(b.start_step, b.stop_step, b.charged) for b in gone_on.branches]
  assert charged == [(0, 3, 0), (0, 3, 3)]
  assert gone_on.spent_steps == 6
  # What is ended instead has spent the three, and the rest is given back.
  budget = data_budget.DataBudget(allocation["root"], allocation["data"])
  with ledger_lib.Ledger(copy / "ledger") as ended:
    ended.acquire()
    budget.allocate(
      ended, [plan_lib.PlanUse(ended.plan, 6)], label="a copy, which pays"
    )
    before = budget.reserved
    ended.end()
    budget.refund(ended)
  expected = budget.cost([plan_lib.PlanUse(ended.plan, 3)])
  assert before - budget.reserved == pytest.approx(expected)


def test_a_step_whose_computation_failed_is_not_given_back(
  data, tmp_path, monkeypatch
):
  calls = []
  accumulate = step_sentinel.Sentinel.accumulate

  def interrupted(self, *args):
    calls.append(True)
    got = accumulate(self, *args)
    if len(calls) == 3:
      raise KeyboardInterrupt  # It was computed by then.
    return got

  monkeypatch.setattr(step_sentinel.Sentinel, "accumulate", interrupted)
  # One chunk a step, whatever is drawn.
  config = _config(data, checkpoint_every=6, eval_every=6, chunk_size=32)
  with pytest.raises(KeyboardInterrupt):
    dpdist.train(config, tmp_path)
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  (record,) = (r for r in ledger.records if r["kind"] == "unstarted")
  # An empty draw has no chunk.
  assert record["stop_step"] >= 3
  assert ledger.spent_steps == record["stop_step"] < 6


def test_several_processes_give_nothing_back(tmp_path, monkeypatch):
  """One of them may be further on than another."""
  with ledger_lib.Ledger(tmp_path) as ledger:
    ledger.acquire()
    config = config_lib.privacy_config(_config(tmp_path))
    ledger.open(
      config={},
      plan=dpdist.make_plan(config),
      data="d" * 64,
      secret_hash="5" * 64,
      run="a run",
    )
    ledger.resume(step=0, digest="", ledger_head="", fingerprint="f")
    position = session.Position.of(ledger)
    make = lambda: session.Session(
      ledger, None, bytes(32), position, start_step=0
    )
    with make() as live:
      live.charge(4)
      live.begin(1)
      monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert ledger.spent_steps == 4
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with make() as live:
      live.begin(1)
    assert ledger.spent_steps == 2
