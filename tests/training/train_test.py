"""One run, end to end: interrupted, changed, damaged, and what leaves it."""

import functools
import gc
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import digits
import dpdist
from dpdist import config as config_lib
from dpdist import errors
from dpdist import sampling
from dpdist.distributed import preemption
from dpdist.keys import keys
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.privacy import composition
from dpdist.reporting import metrics
from dpdist.training import job as job_lib
from dpdist.training import step as step_lib
from dpdist.training import step_sentinel
from dpdist.workdir import fingerprint
from dpdist.workdir import resume
from dpdist.workdir import session
from dpdist.workdir import verify
from tests.keys import needles

pytestmark = pytest.mark.usefixtures("quick_compiles")


def _config(**changes):
  config = digits.get_config()
  config.model.width = 64
  config.privacy.expected_batch_size = 64
  config.privacy.num_steps = 12
  config.checkpoint_every = 4
  config.eval_every = 4
  config.ema_decay = 0.9
  config.insecure_seed = 7
  # Given, so that nothing has to be calibrated.
  config.privacy.target_epsilon = None
  config.privacy.noise_multiplier = 1.0
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("finished")
  return workdir, dpdist.train(_config(), workdir)


def test_no_step_holds_more_than_the_one_that_was_tried_out(
  tmp_path, monkeypatch
):
  """A chunk that fitted before any charge fits in every step."""
  held = []
  accumulate = step_sentinel.Sentinel.accumulate

  def counted(self, *args):
    gc.collect()
    shards = [s for x in jax.live_arrays() for s in x.addressable_shards]
    held.append(sum({id(s.data): s.data.nbytes for s in shards}.values()))
    return accumulate(self, *args)

  monkeypatch.setattr(step_sentinel.Sentinel, "accumulate", counted)
  # Wide, so that a sum is more than all that is small and comes and goes.
  dpdist.train(
    _config(
      **{
        "model.width": 1024,
        "privacy.num_steps": 2,
        "eval_every": 1,
        "chunk_size": 128,
      }
    ),
    tmp_path,
  )
  one_sum = 4 * 10 * 1024
  assert max(held[1:]) < held[0] + one_sum


def _plan():
  return dpdist.make_plan(config_lib.privacy_config(_config()))


class _Crash(Exception):  # noqa: N818
  pass


def _crash_at(monkeypatch, crash_step):
  """Ends the process's work, as if it were killed, inside a step."""
  sample = sampling.PoissonSampler.__call__

  def crash(self, step):
    if step == crash_step:
      raise _Crash
    return sample(self, step)

  monkeypatch.setattr(sampling.PoissonSampler, "__call__", crash)
  # Who is killed gives nothing back.
  monkeypatch.setattr(session.Session, "__exit__", lambda *args: None)


def _change_environment(monkeypatch):
  environment = fingerprint.environment
  monkeypatch.setattr(
    fingerprint, "environment", lambda mesh: environment(mesh) | {"new": True}
  )


def _prepare(config, workdir):
  with resume.open_ledger(config, workdir) as ledger:
    return job_lib.prepare(config, workdir, ledger)


def test_a_run_leaves_its_result_and_report(finished):
  workdir, result = finished
  head = ledger_lib.Ledger(workdir / "ledger").head
  again = json.loads((workdir / "result.json").read_text())
  assert again == result | {"ledger_head": head}
  assert result["epsilon"] == _plan().epsilon()
  assert result["num_steps"] == 12
  assert result["test"]["accuracy"] > 0.5
  assert result["test_ema"]["accuracy"] > 0.5
  assert "<svg" in (workdir / "report.html").read_text()
  assert list((workdir / "tensorboard").iterdir())
  rows = metrics.read(workdir)
  assert [row["step"] for row in rows] == [4, 8, 12]
  # Of all updates that the parameters of that step have seen.
  for row in rows:
    (reading,) = _plan().curve([_plan().delta], row["step"])
    assert row["epsilon"] >= reading
  assert ledger_lib.Ledger(workdir / "ledger").spent_steps == 12


def test_insecure_seed_voids_the_guarantee_everywhere(finished, capsys):
  workdir, result = finished
  assert result["guarantee"].startswith("void: insecure_seed")
  assert "insecure_seed" in (workdir / "report.html").read_text()
  assert "insecure_seed" in ledger_lib.Ledger(workdir / "ledger").guarantee
  # A finished run started again trains no further, and says the same: all that
  # is new is the record that it was started.
  again = dpdist.train(_config(), workdir)
  assert again | {"ledger_head": ""} == result | {"ledger_head": ""}
  assert "WARNING: insecure_seed" in capsys.readouterr().out


def test_training_loss_batch_size_and_clip_fraction_stay_inside(finished):
  workdir, _ = finished
  names = {name for row in metrics.read(workdir) for name in row} - {"step"}
  # Spelt out, so that nothing is let through by a change of the sets alone.
  assert names == {
    *("epsilon", "learning_rate", "noisy_gradient_norm", "noise_norm"),
    *("test/accuracy", "test/loss", "test_ema/accuracy", "test_ema/loss"),
  }
  for file in workdir.rglob("*"):
    if file.is_file() and "checkpoints" not in file.parts:
      text = file.read_bytes()
      for name in metrics.SENSITIVE - {"batch_size"}:
        assert name.encode() not in text, file
      assert b'"batch_size"' not in text, file


@pytest.mark.slow
def test_unsafe_metrics_show_them_and_say_so(tmp_path, capsys):
  result = dpdist.train(_config(unsafe_metrics=True), tmp_path)
  assert "unsafe_metrics" in result["guarantee"]
  assert "WARNING: unsafe_metrics" in capsys.readouterr().out
  last = metrics.read(tmp_path)[-1]
  assert last["batch_size"] == int(last["batch_size"])
  assert 0 <= last["clip_fraction"] <= 1
  assert last["num_nonfinite"] == 0


@pytest.mark.parametrize(
  "crash_step", [*(pytest.param(t, marks=pytest.mark.slow) for t in (0, 6)), 11]
)
def test_a_crashed_run_ends_with_the_same_parameters(
  finished, tmp_path, monkeypatch, crash_step
):
  _, expected = finished
  with monkeypatch.context() as patch:
    _crash_at(patch, crash_step)
    with pytest.raises(_Crash):
      dpdist.train(_config(), tmp_path)
  result = dpdist.train(_config(), tmp_path)
  assert result["params_sha256"] == expected["params_sha256"]
  assert result["epsilon"] == expected["epsilon"]
  assert result["steps_charged"] == 12
  assert metrics.read(tmp_path)[-1]["step"] == 12


_EXACT = {"clipping.exact_sum": True, "clipping.exact_group_size": 8}
_ON_OTHER_DEVICES = """
import sys

import pytest

import dpdist
from tests.training import train_test

with pytest.MonkeyPatch.context() as patch:
  if sys.argv[2]:
    train_test._crash_at(patch, int(sys.argv[2]))
  dpdist.train(train_test._config(**train_test._EXACT), sys.argv[1])
"""


def _on_other_devices(num_devices, workdir, crash_step=""):
  """Goes on in a process of its own; returns what it says as it fails."""
  # Of a flag given twice, the last counts.
  flags = (
    os.environ["XLA_FLAGS"]
    + f" --xla_force_host_platform_device_count={num_devices}"
  )
  return subprocess.run(
    [sys.executable, "-c", _ON_OTHER_DEVICES, workdir, str(crash_step)],
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ | {"XLA_FLAGS": flags},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  ).stderr


@pytest.mark.slow
def test_exact_sums_go_on_for_free_on_fewer_devices(tmp_path, monkeypatch):
  """Eight devices, then four, then one: as two that nothing interrupted."""
  whole, workdir = tmp_path / "whole", tmp_path / "run"
  result = lambda path: json.loads((path / "result.json").read_text())
  assert _on_other_devices(2, whole) == ""
  expected = result(whole)
  with monkeypatch.context() as patch:
    _crash_at(patch, 6)
    with pytest.raises(_Crash):
      dpdist.train(_config(**_EXACT), workdir)
  assert "_Crash" in _on_other_devices(4, workdir, 9)
  assert _on_other_devices(1, workdir) == ""
  got = result(workdir)
  assert got["environment"]["mesh"]["data"] == 1
  assert expected["environment"]["mesh"]["data"] == 2
  assert got["params_sha256"] == expected["params_sha256"]
  assert got["steps_charged"] == got["num_steps"] == 12
  assert len(ledger_lib.Ledger(workdir / "ledger").branches) == 1


@pytest.mark.slow
def test_a_run_whose_mesh_divides_the_parameters_goes_on_on_another(
  tmp_path, monkeypatch
):
  divided = {"mesh.data": 2, "mesh.fsdp": 4}
  whole = dpdist.train(_config(**divided), tmp_path / "whole")
  workdirs = [tmp_path / "same", tmp_path / "other"]
  for workdir in workdirs:
    with monkeypatch.context() as patch:
      _crash_at(patch, 6)
      with pytest.raises(_Crash):
        dpdist.train(_config(**divided), workdir)
  # On the same mesh it is the same run.
  again = dpdist.train(_config(**divided), workdirs[0])
  assert again["params_sha256"] == whole["params_sha256"]
  assert again["steps_charged"] == again["num_steps"] == 12
  # On another its sums round otherwise: the steps after the checkpoint are
  # charged again, and the budget holds.
  other = dpdist.train(_config(**{"mesh.data": 4, "mesh.fsdp": 2}), workdirs[1])
  assert other["epsilon"] == whole["epsilon"] == _plan().epsilon()
  assert other["steps_charged"] == 12
  assert other["num_steps"] == 8
  assert other["test"]["accuracy"] > 0.5


def test_every_step_is_charged_before_it_is_computed(tmp_path, monkeypatch):
  charged, tried = [], []
  make = step_lib.Step.apply.func

  def watch(self):
    compiled = make(self)

    def apply(state, *args):
      on_disk = ledger_lib.Ledger(tmp_path / "ledger").spent_steps
      if not np.any(jax.random.key_data(args[1])):
        # Of zeros, under a key that everybody knows.
        tried.append(on_disk)
        return compiled(state, *args)
      charged.append(on_disk)
      assert on_disk > int(state.step)
      return compiled(state, *args)

    return apply

  watched = functools.cached_property(watch)
  watched.__set_name__(step_lib.Step, "apply")
  monkeypatch.setattr(step_lib.Step, "apply", watched)
  dpdist.train(_config(), tmp_path)
  assert len(charged) == 12
  assert tried == [0]


@pytest.mark.slow
def test_changed_code_or_devices_open_a_branch_and_stay_in_budget(
  tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    _crash_at(patch, 6)
    with pytest.raises(_Crash):
      dpdist.train(_config(), tmp_path)
  assert ledger_lib.Ledger(tmp_path / "ledger").spent_steps == 8
  _change_environment(monkeypatch)
  derived = set()
  derive = keys.derive

  def watch(secret, stream, *, branch=""):
    derived.add((stream, branch))
    return derive(secret, stream, branch=branch)

  monkeypatch.setattr(keys, "derive", watch)
  result = dpdist.train(_config(), tmp_path)
  # Every key of the second branch is new, and none of the first is used.
  sentinel = ("sentinel_direction", "sentinel_step")
  assert derived - {("init", "")} == {
    (stream, "1") for stream in ("noise", "sampling", "model_rng", *sentinel)
  }
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  # Steps 4 to 8 were charged on the first branch and may have been seen; the
  # second goes on from the checkpoint of step 4 and has 4 steps left.
  assert [b.start_step for b in ledger.branches] == [0, 4]
  assert ledger.spent_steps == result["steps_charged"] == 12
  assert result["num_steps"] == 8
  assert result["epsilon"] == _plan().epsilon()


def test_empty_draws_train_on_noise_alone_and_count(tmp_path):
  config = _config(
    **{"privacy.expected_batch_size": 1e-6, "privacy.num_steps": 3}
  )
  job = _prepare(config, tmp_path)
  sampler = mechanism.Streams(job.secret, "0").sampler(job.plan)
  assert all(sampler(step).size == 0 for step in range(3))
  result = dpdist.train(config, tmp_path)
  assert result["num_steps"] == result["steps_charged"] == 3
  rows = metrics.read(tmp_path)
  assert rows[-1]["noisy_gradient_norm"] > 0
  initial = fingerprint.params_sha256(job.init().params)
  assert result["params_sha256"] != initial


@pytest.mark.slow
def test_chunks_of_any_size_make_the_same_update(finished, tmp_path):
  workdir, _ = finished
  dpdist.train(_config(chunk_size=8), tmp_path)
  for row, same in zip(
    metrics.read(workdir), metrics.read(tmp_path), strict=True
  ):
    for name in ("noisy_gradient_norm", "test/loss"):
      np.testing.assert_allclose(row[name], same[name], rtol=1e-3)


def test_branches_share_no_key(tmp_path):
  job = _prepare(_config(), tmp_path)
  one, two = (mechanism.Streams(job.secret, branch) for branch in ("0", "1"))
  for stream in ("noise", "model_rng"):
    a, b = (jax.random.key_data(s.key(stream, 3)) for s in (one, two))
    assert not np.array_equal(a, b)
  words = {
    bytes(np.asarray(jax.random.key_data(one.key(stream, 3))))
    for stream in ("noise", "model_rng", "init")
  }
  assert len(words) == 3
  draws = [s.sampler(job.plan)(0) for s in (one, two)]
  assert not np.array_equal(*draws)


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_and_ends_the_same(finished, tmp_path):
  workdir, expected = finished
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  files = (copy / "checkpoints" / "writer_000001" / "12" / "state").rglob("*")
  victim = max(
    (p for p in files if p.is_file()), key=lambda p: p.stat().st_size
  )
  bad = bytearray(victim.read_bytes())
  bad[len(bad) // 2] ^= 1
  victim.write_bytes(bytes(bad))
  result = dpdist.train(_config(), copy)
  assert result["params_sha256"] == expected["params_sha256"]
  assert result["steps_charged"] == 12


@pytest.mark.parametrize("remove", [False, True], ids=["older", "removed"])
def test_a_ledger_that_the_checkpoints_are_ahead_of_is_refused(
  finished, tmp_path, remove
):
  """Though its own head agrees with it; and nothing is written."""
  old, run = tmp_path / "old", tmp_path / "run"
  _prepare(_config(), old)
  shutil.copytree(finished[0], run)
  shutil.rmtree(run / "ledger")
  if not remove:
    shutil.copytree(old / "ledger", run / "ledger")
  for _ in range(2):
    with pytest.raises(errors.LedgerError, match="rolled back"):
      dpdist.train(_config(), run)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"privacy.l2_clip_norm": 2.0}, "num_steps must be more than the 12"),
    ({"privacy.target_delta": 1e-6}, "target_delta: .* -> 1e-06"),
    ({"insecure_seed": 8}, "secret: hash"),
  ],
)
def test_changes_that_no_segment_can_take_up_are_refused(
  finished, changes, message
):
  workdir, _ = finished
  before = ledger_lib.Ledger(workdir / "ledger").head
  with pytest.raises(ValueError, match=message):
    dpdist.train(_config(**changes), workdir)
  assert ledger_lib.Ledger(workdir / "ledger").head == before


@pytest.mark.slow
def test_changed_settings_open_a_segment(tmp_path, monkeypatch, capsys):
  with monkeypatch.context() as patch:
    _crash_at(patch, 6)
    with pytest.raises(_Crash):
      dpdist.train(_config(), tmp_path)
  changes = {
    "privacy.noise_multiplier": 2.0,
    "privacy.expected_batch_size": 32,
  }
  result = dpdist.train(_config(**changes), tmp_path)
  assert "noise_multiplier: 1.0 -> 2.0" in capsys.readouterr().out
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  # Eight steps were charged when it stopped; it goes on from the fourth.
  assert [segment.charged for segment in ledger.segments] == [8, 8]
  assert ledger.segments[1].start_step == 4
  assert result["num_steps"] == 12
  assert result["epsilon"] == composition.guaranteed(ledger.bounds)
  assert result["epsilon_spent"] == composition.epsilon(ledger.spent)
  assert result["accountant"] == "rdp"
  assert result["noise_multiplier"] == 2.0
  # The same settings once more are no change.
  again = dpdist.train(_config(**changes), tmp_path)
  assert again["params_sha256"] == result["params_sha256"]
  assert len(ledger_lib.Ledger(tmp_path / "ledger").segments) == 2
  findings = verify.verify(tmp_path, ledger_lib.Ledger(tmp_path / "ledger"))
  assert not [finding for finding in findings if finding.problem]
  assert "changed on the way" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_changed_data_set_is_refused_unless_declared(tmp_path):
  rng = np.random.default_rng(0)

  def write(directory, seed):
    directory.mkdir()
    for name, size in (("train", 64), ("test", 8)):
      inputs = np.random.default_rng(seed).random((size, 4), np.float32)
      targets = rng.integers(0, 3, size)
      np.savez(directory / f"{name}.npz", inputs=inputs, targets=targets)

  def config(path, **changes):
    return _config(
      **{
        "data.name": "npz",
        "data.path": str(path),
        "model.width": 8,
        "privacy.num_examples": 64,
        "privacy.expected_batch_size": 16,
      }
      | changes
    )

  write(tmp_path / "one", 1)
  write(tmp_path / "two", 2)
  run = tmp_path / "run"
  dpdist.train(config(tmp_path / "one", **{"privacy.num_steps": 4}), run)
  before = ledger_lib.Ledger(run / "ledger").head
  longer = {"privacy.num_steps": 6}
  with pytest.raises(ValueError, match="training data: digest") as refused:
    dpdist.train(config(tmp_path / "two", **longer), run)
  assert ledger_lib.Ledger(run / "ledger").head == before
  declared = re.search("changed_to=([0-9a-f]{12})", str(refused.value))[1]
  longer["data.changed_to"] = declared[:11]
  with pytest.raises(ValueError, match="declare it"):
    dpdist.train(config(tmp_path / "two", **longer), run)
  longer["data.changed_to"] = declared
  result = dpdist.train(config(tmp_path / "two", **longer), run)
  ledger = ledger_lib.Ledger(run / "ledger")
  assert [segment.charged for segment in ledger.segments] == [4, 2]
  assert result["num_steps"] == 6
  assert ledger.segments[0].data != ledger.segments[1].data


def test_without_checkpoint_or_budget_nothing_is_made_up(
  finished, tmp_path, monkeypatch
):
  """The result of a run is not replaced by its initial parameters."""
  run = tmp_path / "run"
  shutil.copytree(finished[0], run)
  for file in run.glob("checkpoints/*/*/dpdist_manifest.json"):
    file.write_text("?")
  _change_environment(monkeypatch)
  with pytest.raises(
    errors.LedgerError, match="plan is spent; checkpoint of step 12"
  ):
    dpdist.train(_config(), run)
  assert json.loads((run / "result.json").read_text())["num_steps"] == 12


def test_a_changed_optimizer_that_does_not_fit_is_named(finished):
  workdir, _ = finished
  with pytest.raises(errors.MismatchError, match="optimizer"):
    dpdist.train(_config(**{"optimizer.name": "adam"}), workdir)


def test_a_lost_secret_is_not_replaced(tmp_path):
  config = _config()
  with config.unlocked():
    config.insecure_seed = None
  config.privacy.num_steps = 1
  dpdist.train(config, tmp_path)
  (tmp_path / "secret").unlink()
  with pytest.raises(ValueError, match="secret_file must be the secret"):
    dpdist.train(config, tmp_path)
  assert not (tmp_path / "secret").exists()


@pytest.mark.slow
def test_a_changed_data_set_is_refused(tmp_path):
  rng = np.random.default_rng(0)

  def write(value):
    for name in ("train", "test"):
      inputs = rng.random((40, 4), np.float32)
      inputs[0, 0] = value
      np.savez(
        tmp_path / f"{name}.npz",
        inputs=inputs,
        targets=np.arange(40, dtype=np.int32) % 10,
      )

  settings = {
    "data.name": "npz",
    "data.path": str(tmp_path),
    "privacy.num_examples": 40,
    "privacy.expected_batch_size": 10,
    "privacy.num_steps": 1,
  }
  write(0.25)
  dpdist.train(_config(**settings), tmp_path / "run")
  write(0.5)
  with pytest.raises(ValueError, match="training data: digest"):
    dpdist.train(_config(**settings), tmp_path / "run")


def test_a_signal_saves_and_the_run_goes_on(finished, tmp_path, monkeypatch):
  _, expected = finished
  sample = sampling.PoissonSampler.__call__
  notices = []
  make = preemption.Notice.__enter__
  monkeypatch.setattr(
    preemption.Notice,
    "__enter__",
    lambda self: notices.append(self) or make(self),
  )

  def signalled(self, step):
    if step == 9:
      notices[-1].received = True
    return sample(self, step)

  with monkeypatch.context() as patch:
    patch.setattr(sampling.PoissonSampler, "__call__", signalled)
    with pytest.raises(errors.Preempted) as stopped:
      dpdist.train(_config(), tmp_path)
  assert 0 < stopped.value.step < 12
  result = dpdist.train(_config(), tmp_path)
  assert result["params_sha256"] == expected["params_sha256"]
  assert result["steps_charged"] == 12


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"privacy.num_examples": 1437}, r"num_examples must .* 1438, got 1437"),
    ({"privacy.target_epsilon": 1.0}, r"target_epsilon.*noise_multiplier"),
    ({"privacy.target_delta": 1.0}, r"target_delta .* 1\.0"),
    ({"privacy.expected_batch_size": 9999}, r"expected_batch_size .* 9999"),
    ({"model.name": "magic"}, r"model.name .* 'magic'"),
    ({"model.dtype": "int8"}, r"model.dtype .* 'int8'"),
    ({"optimizer.name": "magic"}, r"optimizer.name .* 'magic'"),
    ({"optimizer.learning_rate": -1.0}, r"learning_rate .* -1\.0"),
    ({"optimizer.warmup_steps": 12}, r"warmup_steps .* 12"),
    ({"optimizer.schedule": "magic"}, r"optimizer.schedule .* 'magic'"),
    ({"mesh.data": 3}, "mesh must use all 8 devices"),
    ({"mesh.fsdp": 0}, "mesh must give each axis"),
    (
      {"mesh.model": 2},
      "mesh.model must be 1 for model.name='random_features'.* got 2",
    ),
    (
      {"mesh.model": 2, "clipping.exact_sum": True},
      "mesh.model must be 1 with clipping.exact_sum, got 2",
    ),
    ({"chunk_size": 12}, r"chunk_size .* 8 .* 12"),
    (
      {"chunk_size": 64, "clipping.exact_sum": True},
      r"chunk_size .* 256 .*exact_group_size.* 64",
    ),
    (
      {"clipping.exact_sum": True, "clipping.microbatch_size": 5},
      "microbatch_size must divide .* 32, got 5",
    ),
    ({"clipping.method": "magic"}, r"method .* 'magic'"),
    ({"ema_decay": 1.0}, r"ema_decay .* 1\.0"),
    ({"max_checkpoints": 1}, r"max_checkpoints .* 1"),
    ({"eval_every": -1}, r"eval_every .* -1"),
    ({"checkpoint_every": -1}, r"checkpoint_every .* -1"),
    ({"data.num_threads": -1}, r"num_threads .* -1"),
    ({"privacy.noise_multiplier": 1e-150}, r"noise_multiplier .* 1e-150"),
    ({"data.name": "magic"}, r"data.name .*'magic'"),
    (
      {"model.name": "bert", "model.first_block": 2},
      "first_block must be 0, .*data.features='', got 2",
    ),
    (
      {"model.name": "bert", "data.features": "minilm_5"},
      "first_block must be 5, .*data.features='minilm_5', got 0",
    ),
  ],
)
def test_bad_settings_are_named_and_cost_nothing(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    dpdist.train(_config(**changes), tmp_path / "run")
  assert not (tmp_path / "run" / "ledger").exists()


def test_a_setting_that_nothing_reads_is_refused(tmp_path):
  config = _config()
  with config.unlocked():
    config.privacy.target_epsilom = 1.0
  with pytest.raises(errors.SettingsError, match="target_epsilom: did you"):
    dpdist.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_the_secret_is_in_its_file_alone(tmp_path, capfd, monkeypatch):
  config = _config()
  others_secret = "hunter2-of-somebody"
  for name in ("TF_TOKEN_app_terraform_io", "JAX_SERVICE_TOKEN"):
    monkeypatch.setenv(name, others_secret)
  flags = f" --xla_dump_hlo_as_dot=false --xla_dump_to={tmp_path}/hunter2"
  # Read by nobody any more: the backend is there.
  monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + flags)
  with config.unlocked():
    config.insecure_seed = None
  result = dpdist.train(config, tmp_path)
  assert result["guarantee"] == "holds"
  file = tmp_path / "secret"
  assert file.stat().st_mode & 0o777 == 0o600
  secret = file.read_bytes()
  assert len(secret) >= 16
  branches = ledger_lib.Ledger(tmp_path / "ledger").branches
  searched = needles.of_run(
    secret, [branch.identity for branch in branches], steps=12
  )
  assert searched.in_files([file])
  others = {path for path in tmp_path.rglob("*") if path.is_file()} - {file}
  assert not searched.in_files(sorted(others))
  for path in others:
    assert b"hunter2" not in path.read_bytes(), path
  shown = "".join(capfd.readouterr())
  assert "epsilon" in shown
  assert secret.hex() not in shown.lower()
