import html.parser
import json
import math
import re

import pytest

from dpdist.reporting import metrics
from dpdist.reporting import plots
from dpdist.reporting import report
from dpdist.reporting import telemetry

RESULT = {
  "epsilon": 1.98213,
  "delta": 1e-5,
  "noise_multiplier": 1.1043,
  "sampling_probability": 0.0355,
  "num_steps": 40,
  "accountant": "pld",
  "params_sha256": "9f" * 32,
  "test": {"accuracy": 0.9241},
  "guarantee": "holds",
}
VOID = {**RESULT, "guarantee": "void: insecure_seed is set"}
PLOTS = {
  "Held-out accuracy": ["test/accuracy", "test_ema/accuracy"],
  "Epsilon spent": ["epsilon"],
  "Noise against signal": ["noisy_gradient_norm", "noise_norm"],
  "Learning rate": ["learning_rate"],
}
NO_END = {"meta", "link", "br", "hr", "img", "input", "!doctype"}


class _Page(html.parser.HTMLParser):
  """Keeps tags, text by enclosing tag, and the ids; checks the nesting."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.ids, self.plots, self._open = [], [], {}, []
    self.text = ""
    self.feed(text)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append((tag, attrs))
    if "id" in attrs:
      self.ids.append(attrs["id"])
    if tag == "svg":
      self.plots[attrs["aria-label"]] = []
    if tag == "path" and "svg" in self._open:
      list(self.plots.values())[-1].append(attrs)
    if tag not in NO_END:
      self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    self.handle_endtag(tag)

  def handle_endtag(self, tag):
    if tag not in NO_END:
      assert self._open.pop() == tag

  def handle_data(self, data):
    if "style" not in self._open:
      self.text += data


def _write(workdir, **changes):
  arguments = {
    "result": RESULT,
    "statement": "The parameters are differentially private.",
    "rows": [("examples", "1,437"), ("mesh", "data=8")],
    "notices": [],
  }
  return report.write(workdir, **{**arguments, **changes})


def _run(workdir, steps=40, **changes):
  with metrics.Writer(workdir, unsafe_metrics=True) as writer:
    for step in range(1, steps + 1):
      row = {
        "epsilon": math.sqrt(step / steps),
        "learning_rate": 0.1,
        "noisy_gradient_norm": 1.0 + 1.0 / step,
        "noise_norm": 1.0,
        "test/accuracy": step / (step + 9.0),
        "test_ema/accuracy": step / (step + 12.0),
      }
      writer.write(step, {**row, **changes})
      writer.write_sensitive(step, {"train_loss": 1.0})


def _lines(page, title, color):
  """Gives the points of the curve of that colour in a plot."""
  return [
    re.findall(r"[ML] (\S+) (\S+)", path["d"])
    for path in page.plots[title]
    if f"stroke: var(--{color})" in path.get("style", "")
    and "clip-path" in path
  ]


def test_page_says_what_the_result_says(tmp_path):
  _run(tmp_path)
  path = _write(tmp_path)
  assert path == tmp_path / "report.html"
  page = _Page(path.read_text(encoding="utf-8"))
  for text in (
    "1.983",
    "1e-05",
    "0.9241",
    "held-out accuracy",
    "The parameters are differentially private.",
    "examples",
    "1,437",
    "data=8",
    "9f" * 32,
    '"noise_multiplier": 1.1043',
    '"guarantee": "holds"',
  ):
    assert text in page.text, text
  assert "EMA:" not in page.text
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "metrics.jsonl",
    "report.html",
    "tensorboard",
  ]


def test_page_is_self_contained(tmp_path):
  _run(tmp_path)
  text = _write(tmp_path).read_text(encoding="utf-8")
  assert "http" not in text
  assert "//" not in text.replace("</", "")
  assert "@import" not in text
  assert "src=" not in text
  assert re.findall(r"url\((?!#)", text) == []
  page = _Page(text)
  tags = {tag for tag, _ in page.tags}
  assert not tags & {"script", "link", "img", "iframe", "image", "object"}
  for _, attrs in page.tags:
    for name, value in attrs.items():
      if name in ("href", "xlink:href"):
        # Only markers of the same drawing.
        assert value[1:] in page.ids
  assert len(page.ids) == len(set(page.ids))


def test_page_follows_phone_and_colour_scheme(tmp_path):
  _run(tmp_path)
  text = _write(tmp_path).read_text(encoding="utf-8")
  assert "prefers-color-scheme: dark" in text
  assert (
    "meta",
    {
      "name": "viewport",
      "content": "width=device-width, initial-scale=1",
    },
  ) in _Page(text).tags
  # No colour of a drawing is fixed.
  drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
  assert "var(--grid)" in drawings
  assert re.findall(r"#[0-9a-f]{6}\b", drawings) == []


@pytest.mark.parametrize("title", PLOTS)
def test_each_metric_has_its_plot(tmp_path, title):
  _run(tmp_path)
  page = _Page(_write(tmp_path).read_text(encoding="utf-8"))
  assert list(page.plots) == list(PLOTS)
  colors = ["first", "second"]
  for color, _ in zip(colors, PLOTS[title], strict=False):
    (points,) = _lines(page, title, color)
    assert len(points) >= 2
    assert float(points[0][0]) < float(points[-1][0])
  for color in colors[len(PLOTS[title]) :]:
    assert _lines(page, title, color) == []


@pytest.mark.parametrize("title", PLOTS)
def test_a_metric_that_was_not_written_has_no_plot(tmp_path, title):
  with metrics.Writer(tmp_path, unsafe_metrics=False) as writer:
    for step in (1, 2):
      names = [name for key in PLOTS if key != title for name in PLOTS[key]]
      writer.write(step, dict.fromkeys(names, float(step)))
  page = _Page(_write(tmp_path).read_text(encoding="utf-8"))
  assert list(page.plots) == [key for key in PLOTS if key != title]


def test_a_run_without_metrics_has_no_plots(tmp_path):
  page = _Page(_write(tmp_path).read_text(encoding="utf-8"))
  assert page.plots == {}
  assert "1.983" in page.text


def test_epsilon_is_drawn_below_its_budget(tmp_path):
  _run(tmp_path)
  path = _write(tmp_path, epsilon_budget=2.0)
  page = _Page(path.read_text(encoding="utf-8"))
  assert "budget 2" in page.text
  ((left, right),) = _lines(page, "Epsilon spent", "limit")
  (spent,) = _lines(page, "Epsilon spent", "first")
  assert left[1] == right[1]
  # The axis of a drawing points down; the run ends at half its budget.
  assert all(float(y) > float(left[1]) for _, y in spent)
  assert "budget 1.983" in _write(tmp_path).read_text(encoding="utf-8")


def test_values_that_are_not_finite_leave_the_page_whole(tmp_path):
  _run(
    tmp_path,
    learning_rate=math.nan,
    noisy_gradient_norm=math.inf,
    noise_norm=math.nan,
  )
  result = {**RESULT, "epsilon": math.inf, "test": {"accuracy": math.nan}}
  page = _Page(_write(tmp_path, result=result).read_text(encoding="utf-8"))
  assert list(page.plots) == ["Held-out accuracy", "Epsilon spent"]
  assert _lines(page, "Epsilon spent", "limit") == []
  assert "inf" in page.text


def test_a_metric_that_ends_in_no_number_says_so(tmp_path):
  with metrics.Writer(tmp_path, unsafe_metrics=False) as writer:
    for step in range(1, 9):
      value = 0.25 if step < 4 else math.nan
      writer.write(step, {"test/accuracy": value})
  text = _write(tmp_path).read_text(encoding="utf-8")
  assert "0.25, no number after step 3</span>" in text


def test_signal_is_what_the_noise_leaves_of_the_squared_length():
  rows = [
    {"step": s, "noisy_gradient_norm": g, "noise_norm": 3.0}
    for s, g in ((1, 90.0), (2, 80.0), (3, 70.0), (4, 5.0))
  ]
  assert "about 64% of the squared length is signal" in plots.plots(rows, 1)
  rows[3]["noisy_gradient_norm"] = 2.9
  assert "less than 1% of the squared length" in plots.plots(rows, 1)


def test_the_page_says_where_the_speed_is_and_why_not_there(tmp_path):
  _run(tmp_path)
  page = _Page(_write(tmp_path).read_text(encoding="utf-8"))
  assert "tells how many examples were drawn" in page.text
  assert "operations/speed.html" in page.text
  with pytest.raises(ValueError, match="examples_per_second"):
    _run(tmp_path / "b", examples_per_second=1.0)


def _measure(workdir, rates, start_step=0):
  machines = [
    json.dumps(
      {
        "step_seconds": 2.0 + process,
        "input_wait_seconds": 0.5,
        "own_seconds": 1.0,
        "host_bytes": 2.0**30 * (3 - process),
      }
    )
    for process in (0, 1)
  ]
  with telemetry.Writer(workdir, start_step=start_step) as writer:
    for step, rate in enumerate(rates, start=start_step + 1):
      writer.write(step, machines, {"examples_per_second": rate})
  return workdir / telemetry.FOLDER


def test_the_owner_s_page_has_the_speed_and_says_that_it_is_private(tmp_path):
  _measure(tmp_path, [100.0, 101.0, 7000.0, 7000.0, 7000.0])
  # Stopped behind the second step, and gone on.
  folder = _measure(tmp_path, [102.0, 103.0], start_step=2)
  path = report.write_speed(folder)
  assert path == folder / "speed.html"
  page = _Page(path.read_text(encoding="utf-8"))
  assert set(page.plots) == {
    "Examples a second",
    "Seconds a step",
    "Memory, GiB",
  }
  assert "Not for others" in page.text
  assert "keep this page as you keep the data" in page.text
  # A mark of the scale, if the hidden steps were drawn.
  assert "2000" not in page.text
  for title, color, count in (
    ("Examples a second", "first", 4),
    ("Seconds a step", "first", 4),
    ("Seconds a step", "second", 4),
    ("Memory, GiB", "first", 4),
  ):
    (line,) = _lines(page, title, color)
    assert len(line) == count


def test_of_several_processes_the_slowest_and_the_fullest_are_drawn(
  tmp_path, monkeypatch
):
  drawn = _drawn_rows(_measure(tmp_path, [100.0]), monkeypatch)
  assert drawn == [
    {
      "step": 1,
      "examples_per_second": 100.0,
      "step_seconds": 3.0,
      "input_wait_seconds": 0.5,
      "own_seconds": 1.0,
      "host_gib": 3.0,
      "straggler_ratio": 1.0,
    }
  ]


def _drawn_rows(folder, monkeypatch):
  drawn = []
  monkeypatch.setattr(plots, "speed", lambda rows: drawn.append(rows) or "")
  report.write_speed(folder)
  (rows,) = drawn
  return rows


@pytest.mark.parametrize(
  "spoil", [lambda x: x[:-5], lambda x: x[:-60] + b"\xff" * 60]
)
def test_a_row_that_a_kill_spoilt_is_left_out(tmp_path, monkeypatch, spoil):
  folder = _measure(tmp_path, [1.0, 2.0])
  path = folder / telemetry.FILE
  path.write_bytes(spoil(path.read_bytes()))
  drawn = _drawn_rows(folder, monkeypatch)
  assert [row["examples_per_second"] for row in drawn] == [1.0]


def test_provenance_keeps_the_machine_s_own_paths_to_itself(tmp_path):
  environment = {
    "packages": {"jax": "0.10.2"},
    "code_sha256": "5c" * 32,
    "variables": {"TF_CONFIG": "/home/me/config"},
  }
  result = {**RESULT, "ledger_head": "ab" * 32, "environment": environment}
  page = _Page(_write(tmp_path, result=result).read_text(encoding="utf-8"))
  for text in ("jax 0.10.2", "5c" * 32, "ab" * 32, "dpdist verify"):
    assert text in page.text, text
  assert "/home/me" not in page.text


def test_long_runs_are_thinned_but_keep_their_end(tmp_path):
  rows = [{"step": s, "learning_rate": float(s % 2)} for s in range(1, 10_001)]
  text = plots.plots(rows, 1.0)
  page = _Page(text)
  (points,) = _lines(page, "Learning rate", "first")
  # Clipping to the axes may add a point or two.
  assert 300 < len(points) <= 410
  assert len(text) < 40_000
  short = _Page(plots.plots(rows[-2:], 1.0))
  (end,) = _lines(short, "Learning rate", "first")
  assert points[-1][0] == end[-1][0]


def test_sensitive_metrics_are_not_drawn(tmp_path):
  _run(tmp_path)
  assert "train_loss" not in _write(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("place", ["notice", "statement", "row", "result"])
def test_everything_is_escaped(tmp_path, place):
  evil = "<script>alert('x')</script>&amp;\"<b>"
  changes = {
    "notice": {"notices": [evil]},
    "statement": {"statement": evil},
    "row": {"rows": [(evil, evil)]},
    "result": {
      "result": {
        **RESULT,
        "guarantee": f"void: {evil}",
        "test": {evil: 0.5},
        "accountant": evil,
      }
    },
  }
  text = _write(tmp_path, **changes[place]).read_text(encoding="utf-8")
  page = _Page(text)
  assert not {"script", "b"} & {tag for tag, _ in page.tags}
  assert evil in page.text


def _boxes(text):
  return [
    attrs["class"]
    for tag, attrs in _Page(text).tags
    if "notices" in attrs.get("class", "").split()
  ]


def test_notices_are_red_only_if_the_guarantee_is_void(tmp_path):
  sound = _write(tmp_path).read_text(encoding="utf-8")
  assert _boxes(sound) == []
  noted = _write(tmp_path, notices=["slow disk"]).read_text(encoding="utf-8")
  assert _boxes(noted) == ["notices"]
  assert "slow disk" in noted
  assert "No privacy guarantee" not in noted
  void = _write(tmp_path, result=VOID).read_text(encoding="utf-8")
  assert _boxes(void) == ["notices red"]
  page = _Page(void)
  assert "No privacy guarantee" in page.text
  # The reason follows its title, without the word that the title says.
  assert "No privacy guaranteeinsecure_seed is set" in page.text
  assert "epsilon (void)" in page.text
  assert "Privacy statement (void)" in page.text
  assert "delta (void)" in page.text


@pytest.mark.parametrize("guarantee", ["void", "", "Holds", "unknown"])
def test_any_word_but_holds_is_void(tmp_path, guarantee):
  result = {**RESULT, "guarantee": guarantee}
  text = _write(tmp_path, result=result).read_text(encoding="utf-8")
  assert _boxes(text) == ["notices red"]


def test_ema_is_in_the_headline(tmp_path):
  result = {**RESULT, "test_ema": {"accuracy": 0.9317}}
  page = _Page(_write(tmp_path, result=result).read_text(encoding="utf-8"))
  assert "held-out, EMA: accuracy" in page.text
  assert "0.9317" in page.text


def test_same_run_gives_the_same_page(tmp_path):
  pages = []
  for name in ("a", "b"):
    _run(tmp_path / name)
    pages.append(_write(tmp_path / name).read_bytes())
  assert pages[0] == pages[1]
