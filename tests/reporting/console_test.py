import io

import pytest
import rich.console

from dpdist.reporting import console as console_lib

ROWS = [
  ("examples", "1,437"),
  ("mesh", "[bold]data=8[/bold]"),
  ("clipping method", "bookkeeping " * 12 + "end"),
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
  for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("TERM", "xterm-256color")
  # CI sets it, and a log file is no terminal all the same.
  monkeypatch.setenv("FORCE_COLOR", "1")


def _terminal(width=80):
  return rich.console.Console(
    file=io.StringIO(), force_terminal=True, width=width
  )


def test_plain_table_is_one_line_a_row(capsys):
  console_lib.show_start(ROWS, ["insecure_seed is set: the guarantee is void"])
  assert capsys.readouterr().out.splitlines() == [
    "Private training",
    "  examples         1,437",
    "  mesh             [bold]data=8[/bold]",
    "  clipping method  " + "bookkeeping " * 12 + "end",
    "WARNING: insecure_seed is set: the guarantee is void",
  ]


def test_plain_end(capsys):
  path = "/results/" + "x" * 120 + "/report.html"
  console_lib.show_table("Finished", [("report", path)])
  assert capsys.readouterr().out == f"Finished\n  report  {path}\n"


def test_tables_of_nothing(capsys):
  console_lib.show_start([], [])
  console_lib.show_table("Finished", [])
  assert capsys.readouterr().out == "Private training\nFinished\n"


def test_terminal_table_holds_every_row_and_notice():
  console = _terminal()
  console_lib.show_start(
    ROWS, ["[red]the guarantee is void[/red]"], console=console
  )
  out = console.file.getvalue()
  for name, _ in ROWS:
    assert name in out
  assert "[bold]data=8[/bold]" in out
  assert "[red]the guarantee is void[/red]" in out
  assert "WARNING" in out
  assert "\x1b[1;31m" in out
  assert "end" in out


def test_terminal_respects_no_color(monkeypatch):
  monkeypatch.setenv("NO_COLOR", "1")
  console = _terminal()
  console_lib.show_start(ROWS, ["void"], console=console)
  assert "void" in console.file.getvalue()
  assert "31m" not in console.file.getvalue()


def _entered(monkeypatch, console=None):
  """Phases as a run enters them, each for as many seconds."""
  now = [0.0]
  monkeypatch.setattr(console_lib.time, "monotonic", lambda: now[0])
  with console_lib.Phases(console=console) as phases:
    for phase, seconds in (
      *(("loading", 0.4), ("planning", 2.6), ("starting", 9.0)),
      *(("compiling", 6.2), ("compiling", 0.0), ("reading", 1.0)),
    ):
      phases.enter(phase)
      now[0] += seconds


def test_plain_phases_are_a_line_at_their_beginning(capsys, monkeypatch):
  _entered(monkeypatch)
  assert capsys.readouterr().out.splitlines() == [
    *("loading data", "planning", "planning 3 s", "compiling", "compiling 6 s")
  ]


def test_terminal_phases_leave_a_line_if_they_took_long(monkeypatch):
  console = _terminal()
  _entered(monkeypatch, console)
  out = console.file.getvalue()
  assert "loading data" in out
  assert "planning 3 s\n" in out
  assert "compiling 6 s\n" in out
  assert "loading data 0 s" not in out
  # The cursor is shown again.
  assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")


def test_plain_progress_is_one_line_per_metrics(capsys):
  with console_lib.Progress(600, 100, 2.0) as progress:
    progress.update(119, epsilon=1.2, examples_per_second=10.0)
    progress.update(
      120,
      epsilon=1.2341,
      examples_per_second=3456.4,
      metrics={"test/accuracy": 0.912},
    )
    progress.update(121)
    # What is not given again is what was last known.
    progress.update(122, metrics={"test_ema/loss": 1234.5})
  assert capsys.readouterr().out.splitlines() == [
    "step 120/600  epsilon 1.235/2.000  test accuracy 0.912",
    "step 122/600  epsilon 1.235/2.000  test ema loss 1,234.500",
  ]


def test_plain_progress_is_never_wrapped(capsys):
  names = ("accuracy", "loss", "perplexity")
  metrics = {
    f"{data}/{name}": 0.5 for data in ("test", "test_ema") for name in names
  }
  with console_lib.Progress(10, held_out=names) as progress:
    progress.update(10, metrics=metrics)
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("step 10/10  test accuracy 0.500  test loss 0.500")
  assert line.endswith("test ema perplexity 0.500")


def test_progress_without_a_budget(capsys):
  with console_lib.Progress(10) as progress:
    progress.update(1, epsilon=0.5, metrics={"test/accuracy": 1.0})
  assert capsys.readouterr().out == (
    "step 1/10  epsilon 0.500  test accuracy 1.000\n"
  )


@pytest.mark.parametrize("name", ["train_loss", "batch_size", "unknown"])
def test_progress_shows_only_released_metrics(capsys, name):
  with (
    console_lib.Progress(10) as progress,
    pytest.raises(ValueError, match=name),
  ):
    progress.update(1, metrics={name: 1.0})
  assert capsys.readouterr().out == ""


def _last_frame(console):
  return console.file.getvalue().rpartition("\x1b[2K")[2]


def test_terminal_progress_fits_80_columns():
  console = _terminal()
  with console_lib.Progress(120_000, 100, 8.0, console=console) as progress:
    progress.update(
      60_000,
      epsilon=2.0,
      examples_per_second=1_234_567.0,
      metrics={"test/accuracy": 0.9, "test_ema/accuracy": 0.8},
    )
  out = console.file.getvalue()
  assert "60000/120000" in out
  facts = "epsilon 2.000/8.000  1,234,567 examples/s  test accuracy 0.900"
  assert facts in _last_frame(console)


def test_terminal_progress_stays_two_lines_when_narrow():
  console = _terminal(width=40)
  with console_lib.Progress(120_000, 0, 8.0, console=console) as progress:
    progress.update(
      60_000,
      epsilon=2.0,
      examples_per_second=1_234_567.0,
      metrics={"test/accuracy": 0.9},
    )
  assert "epsilon 2.000/8.000" in _last_frame(console)
  assert "…" in _last_frame(console)


def test_terminal_progress_starts_where_the_run_resumes():
  console = _terminal()
  with console_lib.Progress(600, 120, console=console):
    pass
  assert "120/600" in console.file.getvalue()


def test_terminal_progress_is_not_redrawn_at_every_step(monkeypatch):
  clock = [100.0]
  monkeypatch.setattr(console_lib.time, "monotonic", lambda: clock[0])
  console = _terminal()
  with console_lib.Progress(10_000, console=console) as progress:
    drawn = []
    monkeypatch.setattr(
      progress._bar, "refresh", lambda: drawn.append(progress._bar.facts)
    )
    for step in range(1, 1001):
      clock[0] += 0.001
      progress.update(step, epsilon=step / 1000)
    assert 5 <= len(drawn) <= 6
    assert drawn[0] == "epsilon 0.001"
    # Metrics and the last step are shown whenever they come.
    progress.update(1001, metrics={"test/accuracy": 0.25})
    assert drawn[-1] == "epsilon 1.000  test accuracy 0.250"
    progress.update(10_000, epsilon=3.0)
    assert drawn[-1] == "epsilon 3.000  test accuracy 0.250"


@pytest.mark.parametrize(
  ("number", "text"),
  [
    (0, "0 B"),
    (1023, "1023 B"),
    (1024, "1.0 KiB"),
    (1024**2 - 1, "1.0 MiB"),
    (13.4 * 1024**2, "13.4 MiB"),
    (80 * 1024**3, "80.0 GiB"),
    (1.5 * 1024**4, "1.5 TiB"),
    (2048 * 1024**5, "2,048.0 PiB"),
  ],
)
def test_human_bytes(number, text):
  assert console_lib.human_bytes(number) == text


@pytest.mark.parametrize(
  ("number", "text"), [(0, "0"), (999.6, "1,000"), (1234567, "1,234,567")]
)
def test_human_count(number, text):
  assert console_lib.human_count(number) == text
