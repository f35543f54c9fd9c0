"""A run's directory under a training loop of someone else's."""

import shutil

import jax
import numpy as np
import pytest

from dpdist import errors
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from dpdist.privacy import plan as plan_lib
from dpdist.workdir import run as run_lib

_DATA = "d" * 64
_STATE = {"w": np.zeros(2)}


def _config(**changes):
  settings = {
    "num_examples": 1000,
    "expected_batch_size": 10,
    "num_steps": 100,
    "l2_clip_norm": 1.0,
    "target_delta": 1e-5,
    "noise_multiplier": 2.0,
  }
  return plan_lib.PrivacyConfig(**settings | changes)


def _step(run, data=_DATA):
  """Makes one update; what its keys are."""
  with run.session(data) as session:
    session.charge(run.step + 1)
    session.begin(run.step)
    found = session.streams
    session.save(_STATE, run.step + 1)
  return found


def _keys(streams):
  """All that is random in a step, in bytes."""
  names = ("noise", "sampling", "model_rng")
  return {streams.key_data(name, 1).tobytes() for name in names}


def test_who_has_lost_track_of_a_run_is_refused_and_charges_nothing(tmp_path):
  one, other = (run_lib.Run(tmp_path, _config()) for _ in range(2))
  _step(one)
  with pytest.raises(errors.LedgerError, match="open it anew"):
    _step(other)
  anew = run_lib.Run(tmp_path, _config())
  _step(anew)
  with pytest.raises(errors.LedgerError, match="open it anew"):
    _step(one)
  assert anew.step == anew.spent_steps == one.spent_steps == 2


def test_no_stretch_and_no_copy_of_a_run_has_the_keys_of_another(tmp_path):
  original = tmp_path / "original"
  found = [_step(run_lib.Run(original, _config()))]
  # From one checkpoint, under one secret, by the same charges.
  for name in ("copy", "another"):
    shutil.copytree(original, tmp_path / name)
  for name in ("original", "copy", "another", "another"):
    run = run_lib.Run(tmp_path / name, _config())
    run.restore(_STATE)
    found.append(_step(run))
  assert len({streams.secret for streams in found}) == 1
  keys = [key for streams in found for key in _keys(streams)]
  assert len(set(keys)) == len(keys) == 15


def test_a_directory_is_of_one_plan_and_one_data_set(tmp_path):
  run = run_lib.Run(tmp_path, _config())
  _step(run)
  with pytest.raises(ValueError, match="training data: digest"):
    _step(run, "e" * 64)
  (tmp_path / "secret").unlink()
  with pytest.raises(ValueError, match="secret_file must be"):
    _step(run)
  with pytest.raises(ValueError, match=r"noise_multiplier: 2.0 -> 1.0"):
    run_lib.Run(tmp_path, _config(noise_multiplier=1.0))
  assert run.spent_steps == 1


def test_nothing_is_saved_once_another_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(records, "PATIENCE_SECONDS", 0.0)
  run = run_lib.Run(tmp_path, _config())

  def shut_out():
    with run.session(_DATA) as session:
      session.charge(2)
      session.begin(0)
      with ledger_lib.Ledger(tmp_path / "ledger") as other:
        other.acquire()
      with pytest.raises(errors.ShutOutError):
        session.save(_STATE, 1)

  with pytest.warns(UserWarning, match="stays charged"):
    shut_out()
  assert not list(tmp_path.glob("checkpoints/*/1"))


def _spent(tmp_path, calls, error=KeyboardInterrupt):
  """Steps that are charged after a session that ended in an error."""
  run = run_lib.Run(tmp_path, _config())

  def live():
    with run.session(_DATA) as session:
      calls(session)
      raise error

  with pytest.raises(error):
    live()
  return run.spent_steps


def test_a_loop_that_says_nothing_of_its_steps_is_given_nothing_back(tmp_path):
  assert _spent(tmp_path, lambda session: session.charge(5)) == 5


def test_what_was_begun_stays_begun(tmp_path):
  def calls(session):
    session.charge(10)
    session.begin(8)
    session.begin(1)

  assert _spent(tmp_path, calls) == 9


def test_no_step_begins_and_none_is_saved_before_its_charge(tmp_path):
  run = run_lib.Run(tmp_path, _config())
  with run.session(_DATA) as session:
    session.charge(1)
    session.begin(0)
    with pytest.raises(errors.LedgerError, match="below 1, got 1"):
      session.begin(1)
    with pytest.raises(errors.LedgerError, match=r"at most 1, .* got 2"):
      session.save(_STATE, 2)
  assert not list(tmp_path.glob("checkpoints/*/2"))


def test_a_job_of_several_processes_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="must be of one process here"):
    run_lib.Run(tmp_path, _config())
