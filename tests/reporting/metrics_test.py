import json
import math

import pytest
from tensorboardX.proto import event_pb2

from dpdist.reporting import metrics
from dpdist.reporting import tensorboard
from tests.support import tensorboard_files

FILE = "metrics.jsonl"


def _events(workdir):
  return tensorboard_files.read(workdir / "tensorboard")


def _scalars(workdir):
  return tensorboard_files.scalars(workdir / "tensorboard")


def test_the_two_sets_are_exactly_these():
  assert set(metrics.RELEASED) == {
    "epsilon",
    "learning_rate",
    "noisy_gradient_norm",
    "noise_norm",
  }
  assert set(metrics.SENSITIVE) == {
    "train_loss",
    "batch_size",
    "clip_fraction",
    "num_nonfinite",
  }


_RELEASED = [*sorted(metrics.RELEASED), "test/loss", "test_ema/accuracy"]


@pytest.mark.parametrize("name", _RELEASED)
def test_released_is_written_but_never_as_sensitive(tmp_path, name):
  with metrics.Writer(tmp_path, unsafe_metrics=True) as writer:
    writer.write(1, {name: 0.5})
    with pytest.raises(ValueError, match=f"'{name}' is no sensitive metric"):
      writer.write_sensitive(1, {name: 0.5})
  assert metrics.read(tmp_path) == [{"step": 1, name: 0.5}]
  assert _scalars(tmp_path) == {(name, 1): 0.5}


@pytest.mark.parametrize("unsafe_metrics", [False, True])
@pytest.mark.parametrize("name", sorted(metrics.SENSITIVE))
def test_sensitive_is_never_written_as_released(tmp_path, name, unsafe_metrics):
  match = rf"'{name}' is sensitive.*--config\.unsafe_metrics"
  with (
    metrics.Writer(tmp_path, unsafe_metrics=unsafe_metrics) as writer,
    pytest.raises(ValueError, match=match),
  ):
    # The row is refused as a whole, whichever name comes first.
    writer.write(1, {"epsilon": 1.0, name: 0.5})
  assert metrics.read(tmp_path) == []
  assert _scalars(tmp_path) == {}


@pytest.mark.parametrize("name", sorted(metrics.SENSITIVE))
def test_sensitive_needs_unsafe_metrics(tmp_path, name):
  with (
    metrics.Writer(tmp_path / "safe", unsafe_metrics=False) as writer,
    pytest.raises(ValueError, match=rf"{name}.*--config\.unsafe_metrics"),
  ):
    writer.write_sensitive(1, {name: 0.5})
  assert metrics.read(tmp_path / "safe") == []
  assert _scalars(tmp_path / "safe") == {}
  with metrics.Writer(tmp_path / "unsafe", unsafe_metrics=True) as writer:
    writer.write_sensitive(1, {name: 0.5})
  assert metrics.read(tmp_path / "unsafe") == [{"step": 1, name: 0.5}]
  assert _scalars(tmp_path / "unsafe") == {(f"PRIVATE/{name}", 1): 0.5}


@pytest.mark.parametrize(
  "name",
  [
    "step",
    "loss",
    "train/accuracy",
    "test/",
    "test/x",
    "xtest/loss",
    "Epsilon",
  ],
)
def test_unknown_names_are_refused_by_both(tmp_path, name):
  with metrics.Writer(tmp_path, unsafe_metrics=True) as writer:
    with pytest.raises(ValueError, match=f"'{name}' is no known metric"):
      writer.write(1, {name: 0.5})
    with pytest.raises(ValueError, match=f"'{name}' is no sensitive metric"):
      writer.write_sensitive(1, {name: 0.5})
  assert metrics.read(tmp_path) == []


def test_rows_are_readable_while_the_run_goes_on(tmp_path):
  with metrics.Writer(tmp_path, unsafe_metrics=False) as writer:
    writer.write(1, {"epsilon": 0.25})
    assert metrics.read(tmp_path) == [{"step": 1, "epsilon": 0.25}]


def test_one_step_in_two_writes_is_one_row(tmp_path):
  with metrics.Writer(tmp_path, unsafe_metrics=True) as writer:
    writer.write(1, {"epsilon": 0.25})
    writer.write(1, {"test/accuracy": 0.5})
    writer.write_sensitive(1, {"train_loss": 2.0})
  assert metrics.read(tmp_path) == [
    {"step": 1, "epsilon": 0.25, "test/accuracy": 0.5, "train_loss": 2.0}
  ]


def test_nothing_written_reads_as_no_rows(tmp_path):
  assert metrics.read(tmp_path / "missing") == []
  (tmp_path / FILE).touch()
  assert metrics.read(tmp_path) == []


@pytest.mark.parametrize(
  "torn", ['{"step": 2, "eps', '{"step"', '{"step": 2, "epsilon": ', "\0\0"]
)
def test_a_torn_last_line_is_ignored_then_healed(tmp_path, torn):
  (tmp_path / FILE).write_text('{"step": 1, "epsilon": 0.1}\n' + torn)
  whole = {"step": 1, "epsilon": 0.1}
  assert metrics.read(tmp_path) == [whole]
  with metrics.Writer(tmp_path, unsafe_metrics=False, start_step=1) as writer:
    writer.write(2, {"epsilon": 0.2})
  assert metrics.read(tmp_path) == [whole, {"step": 2, "epsilon": 0.2}]


@pytest.mark.parametrize(
  "line", ["garbage", "[]", "{}", '{"step": "1"}', '{"step": 1, "epsilon": []}']
)
def test_damage_before_the_last_line_is_an_error(tmp_path, line):
  (tmp_path / FILE).write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
  with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a row"):
    metrics.read(tmp_path)


def test_a_replayed_step_replaces_the_earlier_row(tmp_path):
  rows = [
    {"step": 1, "epsilon": 0.1},
    {"step": 2, "epsilon": 0.2, "test/loss": 9.0},
    {"step": 4, "epsilon": 0.4},
    {"step": 2, "epsilon": 0.25},
    {"step": 3, "epsilon": 0.3},
  ]
  (tmp_path / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert metrics.read(tmp_path) == [rows[0], rows[3], rows[4], rows[2]]


def test_resuming_drops_the_rows_after_start_step(tmp_path):
  with metrics.Writer(tmp_path, unsafe_metrics=False) as writer:
    for step in range(1, 6):
      writer.write(step, {"epsilon": step / 8})
  with metrics.Writer(tmp_path, unsafe_metrics=False, start_step=3) as writer:
    # Already gone from the file, not only from what `read` makes of it.
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    writer.write(4, {"epsilon": 4.0})
  assert metrics.read(tmp_path) == [
    {"step": 1, "epsilon": 0.125},
    {"step": 2, "epsilon": 0.25},
    {"step": 3, "epsilon": 0.375},
    {"step": 4, "epsilon": 4.0},
  ]
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    FILE,
    "tensorboard",
  ]


def test_resuming_purges_tensorboard_and_keeps_the_earlier_file(tmp_path):
  with metrics.Writer(tmp_path, unsafe_metrics=False) as writer:
    writer.write(3, {"epsilon": 0.5})
  with metrics.Writer(tmp_path, unsafe_metrics=False, start_step=3) as writer:
    writer.write(4, {"epsilon": 0.75})
  assert _scalars(tmp_path) == {("epsilon", 3): 0.5, ("epsilon", 4): 0.75}
  starts = [
    event.step
    for event in _events(tmp_path)
    if event.session_log.status == event_pb2.SessionLog.START
  ]
  # TensorBoard hides the events at or after this step.
  assert starts == [1, 4]


def test_a_failed_rewrite_leaves_the_old_rows(tmp_path, monkeypatch):
  with metrics.Writer(tmp_path, unsafe_metrics=False) as writer:
    for step in (1, 2):
      writer.write(step, {"epsilon": step / 8})
  before = metrics.read(tmp_path)

  def full_disk(fileno):
    raise OSError("no space left")

  monkeypatch.setattr(metrics.os, "fsync", full_disk)
  with pytest.raises(OSError, match="no space left"):
    metrics.Writer(tmp_path, unsafe_metrics=False, start_step=1)
  assert metrics.read(tmp_path) == before


def test_values_that_are_not_finite_are_strict_json(tmp_path):
  values = {
    "epsilon": math.inf,
    "test/loss": math.nan,
    "learning_rate": -math.inf,
  }
  with metrics.Writer(tmp_path, unsafe_metrics=False) as writer:
    writer.write(1, values)

  def refuse(constant):
    raise AssertionError(constant)

  text = (tmp_path / FILE).read_text()
  assert json.loads(text, parse_constant=refuse) == {
    "step": 1,
    "epsilon": "Infinity",
    "test/loss": "NaN",
    "learning_rate": "-Infinity",
  }
  (row,) = metrics.read(tmp_path)
  assert row["epsilon"] == math.inf
  assert math.isnan(row["test/loss"])
  assert row["learning_rate"] == -math.inf
  assert math.isnan(_scalars(tmp_path)["test/loss", 1])


def test_steps_may_not_go_back(tmp_path):
  with metrics.Writer(tmp_path, unsafe_metrics=True, start_step=5) as writer:
    with pytest.raises(ValueError, match=r"step must be at least 5, .* got 4"):
      writer.write(4, {"epsilon": 1.0})
    writer.write(7, {"epsilon": 1.0})
    with pytest.raises(ValueError, match=r"step must be at least 7, .* got 6"):
      writer.write_sensitive(6, {"train_loss": 1.0})
  with pytest.raises(ValueError, match=r"start_step must be .* got -1"):
    metrics.Writer(tmp_path, unsafe_metrics=True, start_step=-1)


def test_a_clock_that_is_set_back_stops_nothing(tmp_path, monkeypatch):
  now = tensorboard.time.time
  with metrics.Writer(tmp_path, unsafe_metrics=False) as writer:
    writer.write(1, {"epsilon": 0.5})
    monkeypatch.setattr(
      tensorboard.time, "time", lambda: now() - 365 * 24 * 3600
    )
    for step in range(2, 50):
      writer.write(step, {"epsilon": 0.5})
  assert len(_scalars(tmp_path)) == len(metrics.read(tmp_path)) == 49


def test_released_metrics_tell_no_time_between_two_steps(tmp_path, monkeypatch):
  seconds = iter(range(10**9, 10**9 + 1000, 7))
  monkeypatch.setattr(tensorboard.time, "time", lambda: next(seconds))
  with metrics.Writer(tmp_path, unsafe_metrics=False) as writer:
    for step in range(1, 5):
      writer.write(step, {"epsilon": 0.5})
  found = _events(tmp_path)
  assert len(found) >= 5
  # But for the file's own head, which is there before the first step.
  assert len({event.wall_time for event in found[1:]}) == 1
