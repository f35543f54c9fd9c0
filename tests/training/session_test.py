"""A loop of one's own on the life of a run, its keys and its charges."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist import errors
from dpdist.data import arrays as arrays_lib
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.own_loop import commitments
from dpdist.own_loop import release
from dpdist.workdir import session as workdir_session
from dpdist.workdir import verify
from tests.support import jobs

pytestmark = pytest.mark.usefixtures("quick_compiles")

_ROWS, _STEPS = 32, 9


def _data() -> dict[str, np.ndarray]:
  x = np.random.default_rng(0).normal(size=(_ROWS, 2)).astype(np.float32)
  return {"x": x, "y": x.sum(axis=1)}


def _loss(params, example, key):
  del key
  return (example["x"] @ params["w"] - example["y"]) ** 2


def _config(**changes: Any) -> dpdist.PrivacyConfig:
  settings = {
    "num_examples": _ROWS,
    "expected_batch_size": 8.0,
    "num_steps": _STEPS,
    "l2_clip_norm": 1.0,
    "target_delta": 1e-3,
    "noise_multiplier": 1.0,
    "accountant": "rdp",
  }
  return dpdist.PrivacyConfig(**settings | changes)


def _session(workdir, **changes: Any) -> dpdist.Session:
  given = {
    "loss": _loss,
    "dataset": _data(),
    "checkpoint_every": 3,
    "sentinel_every": 0,
  }
  return dpdist.Session(workdir, _config(), **given | changes)


class _StopError(Exception):
  """The loop was stopped, as by a kill."""


def _loop(workdir, *, stop_after=_STEPS, rate=0.1, seen=None, **changes):
  """Runs the loop; without an orderly end if it is to stop on the way."""
  params = {"w": jnp.zeros(2)}
  session = _session(workdir, **changes)
  session.__enter__()
  params = session.restore(params)
  for step in session:
    gradients = step.gradients(params)
    if seen is not None:
      seen.append((step.number, np.asarray(gradients["w"])))
    params = {"w": params["w"] - rate * gradients["w"]}
    session.save(params)
    if step.number + 1 == stop_after and stop_after < _STEPS:
      _die(session)
      return np.asarray(params["w"])
  epsilon = session.epsilon_spent()
  session.__exit__(None, None, None)
  return np.asarray(params["w"]), epsilon


def _die(session: dpdist.Session) -> None:
  """Leaves a session as a killed process does: files are closed, no more."""
  session._stack.close()


def _ledger(workdir) -> ledger_lib.Ledger:
  return ledger_lib.Ledger(workdir / "ledger")


def _problems(workdir) -> list[str]:
  with _ledger(workdir) as ledger:
    return [x.problem for x in verify.verify(workdir, ledger) if x.problem]


@pytest.mark.slow
def test_a_run_is_made_once_and_can_be_read_by_the_commands(tmp_path):
  seen: list[Any] = []
  _, spent = _loop(tmp_path, seen=seen)
  assert [number for number, _ in seen] == [*range(_STEPS)]
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["guarantee"] == "holds"
  assert result["num_steps"] == _STEPS
  assert result["steps_charged"] == _STEPS
  assert result["epsilon_spent"] == spent
  assert (tmp_path / "report.html").exists()
  assert not _problems(tmp_path)
  # A run that is at its end makes nothing more.
  again: list[Any] = []
  _loop(tmp_path, seen=again)
  assert not again
  assert not _problems(tmp_path)


def test_steps_that_run_again_are_free_and_have_the_same_bits(tmp_path):
  first: list[Any] = []
  again: list[Any] = []
  _loop(tmp_path, stop_after=5, seen=first)  # Two steps after a checkpoint.
  _, spent = _loop(tmp_path, seen=again)
  assert [number for number, _ in again] == [*range(3, _STEPS)]
  for (_, one), (_, other) in zip(first[3:], again, strict=False):
    np.testing.assert_array_equal(one, other)
  # As without an interruption.
  assert spent == dpdist.make_plan(_config()).epsilon()
  with _ledger(tmp_path) as ledger:
    assert len(ledger.branches) == 1
    assert ledger.spent_steps == _STEPS
  assert not _problems(tmp_path)


def test_what_a_changed_loop_makes_of_a_step_has_new_keys_and_is_charged(
  tmp_path,
):
  first: list[Any] = []
  again: list[Any] = []
  _loop(tmp_path, stop_after=5, seen=first)
  # Nothing that a session is given changes: the optimizer is not its business.
  _loop(tmp_path, rate=0.2, seen=again)
  # The checkpoint's next step is made of the same parameters, those after not.
  np.testing.assert_array_equal(first[3][1], again[0][1])
  assert not np.array_equal(first[4][1], again[1][1])
  with _ledger(tmp_path) as ledger:
    one, other = ledger.branches
    assert one.stop_step == 6
    assert other.start_step == 4
    assert len({one.identity, other.identity}) == 2
    # Six were charged before, so three are left.
    assert [number for number, _ in again] == [3, 4, 5, 6]
    assert ledger.spent_steps == _STEPS
  assert not _problems(tmp_path)


def test_a_step_gives_gradients_once_and_in_its_turn(tmp_path):
  with _session(tmp_path) as session:
    steps = iter(session)
    step = next(steps)
    params = {"w": jnp.ones(2)}
    step.gradients(params)
    with pytest.raises(ValueError, match="each is charged once"):
      step.gradients(params)
    with pytest.raises(ValueError, match=r"one of \[''\], got 'critic'"):
      step.gradients(params, "critic")
    next(steps)
    with pytest.raises(ValueError, match="after its turn"):
      step.gradients(params)
    with pytest.raises(ValueError, match="must keep their structure"):
      session._present.gradients({"w": jnp.ones(2), "more": jnp.ones(2)})
  # What was refused is not begun, and given back with what was charged ahead.
  with _ledger(tmp_path) as ledger:
    assert ledger.spent_steps == 1
  assert not _problems(tmp_path)


def test_an_error_in_the_loop_gives_back_what_did_not_begin(tmp_path):
  def loop():
    with _session(tmp_path) as session:
      for step in session:
        step.gradients({"w": jnp.ones(2)})
        if step.number == 1:
          raise _StopError

  with pytest.raises(_StopError):
    loop()
  with _ledger(tmp_path) as ledger:
    assert (ledger.spent_steps, ledger.refunded_steps) == (2, 1)
  assert not (tmp_path / "result.json").exists()
  assert not _problems(tmp_path)


@pytest.mark.slow
def test_gradients_are_those_of_the_mechanism_under_the_steps_keys(tmp_path):
  params = {"w": jnp.array([0.5, -0.25])}
  with _session(tmp_path) as session:
    step = next(iter(session))
    got = step.gradients(params)
    streams, plan = session._life.streams(0), session.plan
    rows = step.indices
  made = mechanism.make(plan, lambda *x: (_loss(*x), None))
  data = _data()
  size = 16
  batch = {k: np.zeros((size, *x.shape[1:]), x.dtype) for k, x in data.items()}
  for name, x in data.items():
    batch[name][: len(rows)] = x[rows]
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    streams.key("model_rng", 0), jnp.arange(size)
  )
  summed = made.clipped_sum(
    params, batch, is_padding_example=np.arange(size) >= len(rows), rng=keys
  )
  noisy, state = made.add_noise(
    mechanism.compensated.of(summed.sum, summed.low),
    made.init(params),
    streams.key("noise"),
  )
  right, _ = made.finish(noisy, state)
  np.testing.assert_allclose(got["w"], right["w"], rtol=1e-6)
  # On eight devices, in chunks that are divided over them.
  assert len(got["w"].sharding.device_set) == 8


@pytest.mark.slow
def test_a_loader_of_ones_own_reads_what_was_drawn(tmp_path):
  params, data = {"w": jnp.ones(2)}, _data()
  options = {"dataset": None, "data_digest": "d" * 64, "insecure_seed": 1}
  (tmp_path / "one").mkdir()
  with _session(tmp_path / "one", **options) as session:
    step = next(iter(session))
    rows = step.indices
    with pytest.raises(ValueError, match="a row for each of the step's ind"):
      step.gradients(params, batch={k: x[rows[1:]] for k, x in data.items()})
    with pytest.raises(ValueError, match="batch must be given"):
      step.gradients(params)
    got = step.gradients(params, batch={k: x[rows] for k, x in data.items()})
  with _session(tmp_path / "other", insecure_seed=1) as session:
    right = next(iter(session)).gradients(params)
  np.testing.assert_array_equal(got["w"], right["w"])


def test_examples_that_changed_meanwhile_make_no_replay(tmp_path):
  params, data = {"w": jnp.ones(2)}, _data()
  options = {"dataset": None, "data_digest": "d" * 64}

  def made(scale):
    session = _session(tmp_path, **options)
    session.__enter__()
    step = next(iter(session))
    rows = step.indices
    batch = {name: scale * x[rows] for name, x in data.items()}
    try:
      return rows, np.asarray(step.gradients(params, batch=batch)["w"])
    finally:
      _die(session)

  rows, first = made(1.0)
  again, same = made(1.0)
  np.testing.assert_array_equal(rows, again)
  np.testing.assert_array_equal(first, same)
  # It has seen which examples were drawn: other noise alone is not enough.
  with pytest.raises(errors.ReplayError, match="start again"):
    made(2.0)
  others, other = made(2.0)
  assert not np.array_equal(rows, others)
  assert not np.array_equal(first, other)
  with _ledger(tmp_path) as ledger:
    assert len({branch.identity for branch in ledger.branches}) == 3
    assert ledger.spent_steps == 6
  assert not _problems(tmp_path)


def test_losses_draw_and_are_charged_by_themselves(tmp_path):
  losses = {
    "one": _loss,
    "other": lambda params, example, key, given: (
      given["scale"] * jnp.abs(example["x"] @ params["w"])
    ),
  }
  with pytest.raises(ValueError, match="num_steps must be a multiple of 2"):
    _session(tmp_path, loss=losses)
  config = _config(num_steps=4)
  params, noises = {"w": jnp.ones(2)}, []
  with dpdist.Session(
    tmp_path, config, loss=losses, dataset=_data(), sentinel_every=0
  ) as session:
    for step in session:
      given = {"scale": jnp.zeros(())}
      # No example moves the sum: it is noise alone.
      noises.append(step.gradients(params, "other", given=given)["w"])
      one = step.gradients(params, "one")
      assert not np.array_equal(
        step.indices_for("one"), step.indices_for("other")
      )
      session.save((one, noises[-1]))
  assert len(noises) == 2
  assert not np.array_equal(*noises)
  with _ledger(tmp_path) as ledger:
    assert ledger.spent_steps == 4
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["num_steps"] == 2
  assert result["steps_charged"] == 4
  assert not _problems(tmp_path)


def _of_three(workdir, num_steps, **changes: Any) -> dpdist.Session:
  return dpdist.Session(
    workdir,
    _config(num_steps=num_steps),
    loss=dict.fromkeys("abc", _loss),
    dataset=_data(),
    **{"checkpoint_every": 1, "sentinel_every": 0} | changes,
  )


@pytest.mark.parametrize(
  "num_steps", [6, pytest.param(9, marks=pytest.mark.slow)]
)
def test_a_branch_in_the_middle_of_a_step_is_paid_to_the_steps_end(
  tmp_path, num_steps
):
  """As of a critic and an actor; or else nothing of the branch is released."""
  params = {"w": jnp.ones(2)}
  # Two steps of the plan are spent on a branch of other settings.
  with _of_three(tmp_path, num_steps, chunk_size=8) as session:
    next(iter(session)).indices_for("b")
  with _of_three(tmp_path, num_steps) as session:
    step = next(iter(session))
    first = step.gradients(params, "b")["w"]
    step.indices_for("c")
  with _ledger(tmp_path) as ledger:
    assert ledger.spent_steps == 5
  lines = (tmp_path / "releases.jsonl").read_text()
  with _of_three(tmp_path, num_steps) as session:
    step = next(iter(session))
    other = {"w": jnp.zeros(2)}
    if num_steps == 6:  # One is left, and two are needed.
      with pytest.raises(errors.RefusedError, match="is spent, got 3"):
        step.gradients(other, "b")
    else:
      assert not np.array_equal(step.gradients(other, "b")["w"], first)
      with _ledger(tmp_path) as ledger:
        assert ledger.branches[-1].start_step == 1
        assert ledger.branches[-1].stop_step >= 3
      step.indices_for("c")
  with _ledger(tmp_path) as ledger:
    assert ledger.spent_steps == (5 if num_steps == 6 else 7)
  if num_steps == 6:
    assert (tmp_path / "releases.jsonl").read_text() == lines
  assert not _problems(tmp_path)


def test_a_charge_that_failed_is_made_again(tmp_path, monkeypatch):
  """As where a data set's budget says that a copy went on in this place."""
  charge, failed = workdir_session.Session.charge, []

  def failing(self, stop):
    if not failed:
      failed.append(stop)
      raise errors.LedgerError("a copy of this run went on")
    charge(self, stop)

  monkeypatch.setattr(workdir_session.Session, "charge", failing)
  with _session(tmp_path) as session:
    with pytest.raises(errors.LedgerError, match="a copy"):
      next(iter(session))
    with _ledger(tmp_path) as ledger:
      assert ledger.spent_steps == 0
    next(iter(session)).gradients({"w": jnp.ones(2)})
    with _ledger(tmp_path) as ledger:
      assert ledger.spent_steps > 0


def test_a_loss_before_the_one_that_opened_a_branch_is_not_free(tmp_path):
  """Losses may be asked in any order; the branch pays from the first on."""
  released = []

  def fails(value):
    """A loop that fails before it saves, and begins with other parameters."""
    with _of_three(tmp_path, 30) as session:
      session.restore({"w": jnp.zeros(2)})
      params = {"w": jnp.full(2, float(value))}
      step = next(iter(session))
      released.append(step.gradients(params, "b")["w"])
      released.append(step.gradients(params, "a")["w"])
      raise KeyError

  with pytest.raises(KeyError):
    fails(0)
  with pytest.raises(errors.LedgerError, match=r"at least 1 on this branch"):
    fails(1)
  with pytest.raises(KeyError):
    fails(2)
  with _ledger(tmp_path) as ledger:
    assert ledger.spent_steps >= len(released)


def test_metrics_are_released_ones_alone(tmp_path):
  with _session(tmp_path) as session:
    next(iter(session))
    with pytest.raises(ValueError, match="'train_loss' is sensitive"):
      session.log(train_loss=1.0)
    with pytest.raises(ValueError, match="no known metric"):
      session.log(batch_size_of_mine=1.0)
    session.log(accuracy=0.5, learning_rate=0.1)
  (row,) = [
    json.loads(line)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
  ]
  assert row["test/accuracy"] == 0.5
  assert row["learning_rate"] == 0.1
  assert row["epsilon"] > 0


def test_a_request_to_stop_is_followed_when_the_state_is_saved(tmp_path):
  def loop():
    with _session(tmp_path) as session:
      for step in session:
        gradients = step.gradients({"w": jnp.ones(2)})
        if step.number == 1:
          signal.raise_signal(signal.SIGTERM)
          assert session.stop_requested
        session.save(gradients)

  with pytest.raises(errors.Preempted) as stopped:
    loop()
  assert stopped.value.step == 2
  with _session(tmp_path) as session:
    with pytest.raises(ValueError, match=r"call session\.restore"):
      next(iter(session))
    session.restore({"w": jnp.ones(2)})
    assert next(iter(session)).number == session.step == 2
  with _ledger(tmp_path) as ledger:
    assert ledger.spent_steps == 2


def test_a_state_of_another_structure_is_refused(tmp_path):
  with _session(tmp_path) as session:
    for step in session:
      session.save({"w": step.gradients({"w": jnp.ones(2)})["w"]}, now=True)
      break
  with _session(tmp_path) as session:
    with pytest.raises(errors.MismatchError, match="state must have the str"):
      session.restore({"v": jnp.ones(2)})
    with pytest.raises(errors.MismatchError, match="does not fit"):
      session.restore({"w": jnp.ones(3)})


def _keys(session, number=0):
  """All that is random in a step, in bytes."""
  streams = session._life.streams(number)
  names = ("noise", "sampling", "model_rng")
  return {streams.key_data(name, number).tobytes() for name in names}


def test_copies_and_processes_share_no_keys_but_those_of_a_replay(tmp_path):
  original = tmp_path / "original"
  params = {"w": jnp.ones(2)}
  found = []
  with _session(original) as session:
    steps = iter(session)
    next(steps).gradients(params)
    next(steps)
    made, found = _keys(session), [_keys(session, 1)]
  for name in ("copy", "another"):
    shutil.copytree(original, tmp_path / name)
  with _session(original) as session:
    next(iter(session))
    # The first step was made: it is made again, of the same.
    assert _keys(session) == made
    # The second was not, and may become another.
    found.append(_keys(session, 1))
  for name in ("copy", "another"):
    with _session(tmp_path / name) as session:
      next(iter(session))
      # What the original made since is not in a copy.
      found += [_keys(session), _keys(session, 1)]
      assert session._life.ledger.spent_steps > _STEPS // 3
  keys = [key for one in found for key in one]
  assert len({*keys, *made}) == len(keys) + 3 == 21


def test_a_copy_beside_a_ledger_elsewhere_is_charged_for_what_it_makes(
  tmp_path,
):
  """The ledger says what was charged, and not to which directory."""
  shared = {"ledger": str(tmp_path / "ledger")}
  shared |= {"secret_file": str(tmp_path / "secret"), "checkpoint_every": 6}
  params, found = {"w": jnp.ones(2)}, []
  for name, count in (("a", 2), ("a", 4), ("copy of a", 4)):
    if name == "copy of a":
      shutil.copytree(tmp_path / "early", tmp_path / name)
    session = _session(tmp_path / name, **shared)
    session.__enter__()
    for step in session:
      step.gradients(params)
      if step.number + 1 == count:
        break
    found.append([_keys(session, number) for number in range(count)])
    charged = session._life.ledger.spent_steps
    _die(session)
    if not (tmp_path / "early").exists():
      shutil.copytree(tmp_path / name, tmp_path / "early")
  first, second, copied = found
  assert second[:2] == first
  assert not {key for one in copied for key in one} & {
    key for one in second for key in one
  }
  # Six, and all that the plan has left.
  assert charged == _STEPS


def test_what_was_digested_runs_whatever_jax_traces_later(tmp_path):
  scale = 1.0

  def loss(params, example, key):
    return scale * _loss(params, example, key)

  params = {"w": jnp.zeros(2)}
  made = []
  for later in (1.0, 0.01):
    scale = 1.0
    session = _session(tmp_path, loss=loss)
    session.__enter__()
    for step in session:
      if step.number == 1:
        scale = later
        jax.clear_caches()
      gradients = step.gradients(params)["w"]
      if step.number == 1:
        break
    made.append(np.asarray(gradients).tobytes())
    _die(session)
  assert made[0] == made[1]


def test_a_step_is_of_one_thread_and_of_one_process(tmp_path):
  params = {"w": jnp.ones(2)}
  entered = []

  def read(indices):
    # While a step is computed, from another thread.
    if entered:
      with pytest.raises(errors.ArgumentError, match="one thread at a time"):
        entered[0].gradients(params)
      entered.append("refused")
    return {name: x[indices] for name, x in _data().items()}

  class Source(arrays_lib.ArraySource):
    def read(self, indices):
      return read(indices)

  with _session(tmp_path, dataset=Source(_data())) as session:
    step = next(iter(session))
    entered.append(step)
    step.gradients(params)
    assert "refused" in entered
    session._pid = -1
    for call in (lambda: step.indices, lambda: step.gradients(params)):
      with pytest.raises(errors.ArgumentError, match="a fork of it"):
        call()
    session._pid = os.getpid()
  with pytest.raises(errors.ArgumentError, match="must be a new one"):
    session.__enter__()


@pytest.mark.slow
def test_a_bare_array_may_be_given_and_a_state_is_saved_once(tmp_path):
  def loss(params, example, key, offset):
    return _loss(params, example, key) + jnp.sum(offset * params["w"])

  params = {"w": jnp.ones(2)}
  with _session(tmp_path, loss=loss) as session:
    for step in session:
      assert session.epsilon_spent() == pytest.approx(
        session._life.present.epsilon(step.number)
      )
      step.gradients(params, given=jnp.ones(2))
      assert session.epsilon_spent() == session._life.present.epsilon(
        step.number + 1
      )
      assert session.save(params, now=True)
      assert not session.save(params, now=True)
      if step.number == 1:
        break


def test_nothing_is_released_after_clipping_was_found_wrong(
  tmp_path, monkeypatch
):
  """Also where the loop catches the error."""
  gradients = release.Program.gradients
  monkeypatch.setattr(
    release.Program,
    "gradients",
    lambda self, *args, **more: (gradients(self, *args, **more)[0], [0]),
  )
  params = {"w": jnp.ones(2)}
  with _session(tmp_path) as session:
    steps = iter(session)
    with pytest.raises(errors.SensitivityError):
      next(steps).gradients(params)
    monkeypatch.undo()
    step = next(steps)
    with pytest.raises(errors.SensitivityError, match="nothing more is"):
      step.gradients(params)
    assert session._life.ledger.guarantee != "holds"


@pytest.mark.slow
def test_an_error_after_the_last_save_leaves_the_result(tmp_path):
  params = {"w": jnp.zeros(2)}

  def run():
    with _session(tmp_path) as session:
      for step in session:
        step.gradients(params)
        session.save(params)
        if step.number + 1 == _STEPS:
          raise _StopError

  with pytest.raises(_StopError):
    run()
  assert json.loads((tmp_path / "result.json").read_text())["num_steps"] == 9
  assert not _problems(tmp_path)


def test_nothing_is_made_once_another_process_makes_steps(tmp_path):
  params = {"w": jnp.ones(2)}
  session = _session(tmp_path)
  session.__enter__()
  steps = iter(session)
  next(steps).gradients(params)
  step = next(steps)
  session._life.ledger.close()  # As where its lock is lost.
  with _session(tmp_path) as other:
    other_steps = iter(other)
    next(other_steps).gradients(params)
    next(other_steps).gradients(params)
  with pytest.raises(errors.ShutOutError, match="another process"):
    step.gradients({"w": jnp.zeros(2)})
  session._stack.close()


def test_steps_whose_record_is_gone_are_charged_again(tmp_path):
  params = {"w": jnp.ones(2)}
  with _session(tmp_path) as session:
    for step in session:
      step.gradients(params)
      if step.number == 1:
        break
  (tmp_path / "releases.jsonl").unlink()
  with _session(tmp_path) as session:
    next(iter(session)).gradients(params)
    assert "charged again" in session._life.notices[-1]
  with _ledger(tmp_path) as ledger:
    assert len(ledger.branches) == 2
    assert ledger.spent_steps == 3
  assert not _problems(tmp_path)


@contextlib.contextmanager
def _lines(workdir, *, is_new=False):
  with _ledger(workdir) as ledger:
    ledger.acquire()
    with commitments.Commitments(
      workdir, b"s" * 32, ledger, is_new=is_new
    ) as found:
      yield found


@pytest.mark.parametrize("damage", ["removed", "cut", "altered", "head"])
def test_lines_that_were_altered_or_removed_are_found(tmp_path, damage):
  line = commitments.Line("branch", 0, "start", "inputs")
  with _lines(tmp_path, is_new=True) as one:
    assert one.commit(line)
    assert one.commit(line._replace(release=1))
  path = tmp_path / "releases.jsonl"
  first, second = path.read_text().splitlines(keepends=True)
  if damage == "removed":
    path.unlink()
  elif damage == "cut":
    path.write_text(first)
  elif damage == "head":
    (tmp_path / "releases.head").unlink()
  else:
    path.write_text(first + second.replace("1, ", "2, ", 1))
  with pytest.raises(errors.LedgerError), _lines(tmp_path):
    pass


def test_lines_that_were_cut_off_with_their_head_set_back_are_found(tmp_path):
  path, head = tmp_path / "releases.jsonl", tmp_path / "releases.head"
  session = _session(tmp_path)
  session.__enter__()
  session._life.charge(2)
  assert session._life.commit(0, "digest of the first")
  size, said = path.stat().st_size, head.read_text()
  assert session._life.commit(1, "digest of the second")
  made = [_keys(session, number) for number in range(2)]
  _die(session)
  for is_cut in (False, True):
    if is_cut:  # In place, so that the file is the same one.
      with open(path, "r+b") as file:
        file.truncate(size)
      head.write_text(said)
    session = _session(tmp_path)
    session.__enter__()
    again = [_keys(session, number) for number in range(2)]
    session._life.charge(2)
    told = session._life.notices
    spent = session._life.ledger.spent_steps
    _die(session)
    assert (again == made) != is_cut
    assert bool(told) == is_cut
    # Three are charged ahead.
    assert spent == (6 if is_cut else 3)


def test_a_line_that_was_written_in_part_made_no_step(tmp_path):
  line = commitments.Line("branch", 0, "start", "inputs")
  with _lines(tmp_path, is_new=True) as one:
    assert one.commit(line)
  with open(tmp_path / "releases.jsonl", "a") as file:
    file.write('["branch", 1, "st')
  with _lines(tmp_path) as one:
    assert one.find("branch") == {0: "start"}
    assert one.commit(line)
    assert not one.commit(line._replace(inputs="others"))
    assert one.commit(line._replace(release=1))
  with _lines(tmp_path) as one:
    assert one.find("branch") == {0: "start", 1: "start"}


_CHILD = """
import os, signal, sys
import jax.numpy as jnp
from tests.training import session_test
seen = []
params = {"w": jnp.zeros(2)}
with session_test._session(sys.argv[1], insecure_seed=3) as session:
  params = session.restore(params)
  for step in session:
    gradients = step.gradients(params)
    params = {"w": params["w"] - 0.1 * gradients["w"]}
    session.save(params)
    if step.number == int(sys.argv[2]):
      os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path):
  root = pathlib.Path(__file__).parents[2]

  def run(name, kill_at):
    done = subprocess.run(
      [sys.executable, "-c", _CHILD, str(tmp_path / name), str(kill_at)],
      cwd=root,
      capture_output=True,
      text=True,
      check=False,
      env=os.environ | {"PYTHONPATH": str(root)},
    )
    return done

  for kill_at in (1, 4, 7):
    assert run("killed", kill_at).returncode == -signal.SIGKILL
  for name in ("killed", "whole"):
    done = run(name, -1)
    assert done.returncode == 0, done.stderr
  one, other = (
    json.loads((tmp_path / name / "result.json").read_text())
    for name in ("killed", "whole")
  )
  for name in ("params_sha256", "epsilon_spent", "steps_charged"):
    assert one[name] == other[name]
  assert not _problems(tmp_path / "killed")


def test_a_step_is_charged_and_written_down_before_it_is_computed(
  tmp_path, monkeypatch
):
  seen = []
  compute = release.Program.gradients

  def spy(program, *given, **more):
    with _ledger(tmp_path) as ledger:
      charged = ledger.branches[-1].stop_step
    lines = (tmp_path / "releases.jsonl").read_text().splitlines()
    seen.append((more["number"], charged, len(lines)))
    return compute(program, *given, **more)

  monkeypatch.setattr(release.Program, "gradients", spy)
  with _session(tmp_path) as session:
    for step in session:
      step.gradients({"w": jnp.ones(2)})
      if step.number == 3:
        break
  assert seen == [(0, 3, 1), (1, 3, 2), (2, 3, 3), (3, 6, 4)]


_PROCESS = """
import os, signal, sys
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
import jax.numpy as jnp
from tests.training import session_test
params = {"w": jnp.zeros(2)}
with session_test._session(sys.argv[1]) as session:
  params = session.restore(params)
  for step in session:
    gradients = step.gradients(params)
    params = {"w": params["w"] - 0.1 * gradients["w"]}
    session.log(loss=1.0)
    session.save(params)
    if step.number == int(sys.argv[4]):
      os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_two_processes_make_a_run_together_and_again(tmp_path):
  root = pathlib.Path(__file__).parents[2]

  def run(kill_at):
    address = jobs.address()
    both = [
      subprocess.Popen(
        [sys.executable, "-c", _PROCESS, str(tmp_path)]
        + [address, str(number), str(kill_at)],
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
      )
      for number in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    return [process.returncode for process in both], said

  assert run(4)[0] == [-signal.SIGKILL] * 2
  codes, said = run(-1)
  assert codes == [0, 0], said
  with _ledger(tmp_path) as ledger:
    assert len(ledger.branches) == 1
    assert ledger.spent_steps == _STEPS
  assert not _problems(tmp_path)
