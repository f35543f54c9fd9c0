"""Shows a run on the console: its plan, its progress, and how it ended.

On a terminal these are tables and a bar; anywhere else (a file, a cluster's
log) they are plain lines that are never wrapped. Console output counts as
released like any other output, so metrics pass the same check here as in
`dpdist.reporting.metrics`.
"""

from collections.abc import Iterable, Mapping, Sequence
import sys
import time
from typing import Self

import rich.box
import rich.console
import rich.panel
import rich.progress
import rich.table
import rich.text

from dpdist.privacy import statement
from dpdist.reporting import metrics as metrics_lib

_REFRESH_SECONDS = 0.2


def human_count(number: float) -> str:
  """Writes a count with thousands separators: `3,456`."""
  return f"{number:,.0f}"


def human_bytes(number: float) -> str:
  """Writes a number of bytes with a binary unit: `13.4 MiB`."""
  if abs(number) < 1024:
    return f"{number:.0f} B"
  for unit in ("KiB", "MiB", "GiB", "TiB"):
    number /= 1024
    # 1023.96 would round to a four-digit 1024.0.
    if abs(number) < 1023.95:
      return f"{number:.1f} {unit}"
  return f"{number / 1024:,.1f} PiB"


def show_start(
  rows: Sequence[tuple[str, str]],
  notices: Sequence[str] = (),
  *,
  console: rich.console.Console | None = None,
) -> None:
  """Prints what the run is bound to, then notices that must not be missed."""
  console = console or _console()
  show_table("Private training", rows, console=console)
  for notice in notices:
    if console.is_interactive:
      console.print(
        rich.panel.Panel(
          rich.text.Text(notice),
          title="WARNING",
          title_align="left",
          style="bold red",
        )
      )
    else:
      _print_plain(console, f"WARNING: {notice}")


def show_table(
  title: str,
  rows: Sequence[tuple[str, str]],
  *,
  console: rich.console.Console | None = None,
) -> None:
  """Prints (name, value) pairs under a title, in their order."""
  console = console or _console()
  if not console.is_interactive:
    width = max((len(name) for name, _ in rows), default=0)
    _print_plain(console, title)
    for name, value in rows:
      _print_plain(console, f"  {name:<{width}}  {value}")
    return
  table = rich.table.Table(
    title=title,
    title_justify="left",
    title_style="bold",
    box=rich.box.SIMPLE_HEAD,
    show_header=False,
  )
  table.add_column(style="dim", no_wrap=True)
  table.add_column(overflow="fold")
  for name, value in rows:
    # Text, not str: "[8, 1]" in a value is no markup.
    table.add_row(rich.text.Text(name), rich.text.Text(value))
  console.print(table)


def show_text(text: str) -> None:
  """Prints lines after an empty one; none is wrapped, since one is a link."""
  print(f"\n{text}", flush=True)


def warn(line: str) -> None:
  """Prints a warning; works in any thread and while a bar is shown."""
  # Not with rich: a bar that is shown lets lines pass above it.
  print(f"WARNING: {line}", file=sys.stderr, flush=True)


_PHASES = {
  "loading": "loading data",
  "planning": "planning",
  "compiling": "compiling",
  "checking": "checking the step",
  "measuring": "measuring the step",
}


class Phases:
  """Shows what a run does before its first step; a context manager.

  On a terminal it is a line that counts seconds; elsewhere a line when a phase
  begins. Either way, one that took a second or longer leaves a line with its
  time, as "compiling 6 s".
  """

  def __init__(self, *, console: rich.console.Console | None = None):
    """Shows nothing yet."""
    self._console = console or _console()
    self._phase, self._since = "", 0.0
    self._line: rich.progress.Progress | None = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self.enter("")

  def enter(self, phase: str) -> None:
    """Ends the phase before, and shows the next one if it is in `_PHASES`."""
    name = _PHASES.get(phase, "")
    if name == self._phase:
      return
    if self._line is not None:
      self._line.stop()
      self._line = None
    seconds = time.monotonic() - self._since
    if self._phase and seconds >= 1.0:
      _print_plain(self._console, f"{self._phase} {seconds:.0f} s")
    self._phase, self._since = name, time.monotonic()
    if not name:
      return
    if not self._console.is_interactive:
      _print_plain(self._console, name)
      return
    self._line = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"),
      rich.progress.TimeElapsedColumn(),
      console=self._console,
      transient=True,
      refresh_per_second=2,
    )
    self._line.add_task(name, total=None)
    self._line.start()


class _Bar(rich.progress.Progress):
  """A bar with a line of facts below it, so that both fit 80 columns."""

  facts = ""

  def get_renderables(self) -> Iterable[rich.console.RenderableType]:
    yield self.make_tasks_table(self.tasks)
    yield rich.text.Text(self.facts, no_wrap=True, overflow="ellipsis")


class Progress:
  """Shows how far a run is; a context manager.

  Each `update` with metrics is a line. On a terminal there is a bar below them
  that is drawn at most five times a second. The first held-out metric is shown
  throughout. An epsilon_budget of None is not bounded.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    epsilon_budget: float | None = None,
    *,
    held_out: Sequence[str] = metrics_lib.HELD_OUT,
    console: rich.console.Console | None = None,
  ) -> None:
    self._total_steps = total_steps
    self._epsilon_budget = epsilon_budget
    self._console = console or _console()
    self._held_out = held_out
    self._spent = self._speed = self._score = ""
    self._next_refresh = 0.0
    self._bar: _Bar | None = None
    if self._console.is_interactive:
      self._bar = _Bar(
        rich.progress.BarColumn(bar_width=None),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(compact=True),
        console=self._console,
        # Drawn from `update`: no thread takes the interpreter from a step.
        auto_refresh=False,
        expand=True,
      )
      self._task = self._bar.add_task(
        "", total=total_steps, completed=start_step
      )

  def __enter__(self) -> Self:
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *unused: object) -> None:
    if self._bar is not None:
      self._bar.stop()

  def update(
    self,
    step: int,
    *,
    epsilon: float | None = None,
    examples_per_second: float | None = None,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Shows that `step` steps are made; cheap enough for every step.

    None keeps the last epsilon and the last examples_per_second, which count
    the expected batch size. Raises ValueError if a metric is not released.
    """
    metrics = metrics or {}
    metrics_lib.check_released(metrics, self._held_out)
    if epsilon is not None:
      self._spent = f"epsilon {statement.rounded_up(epsilon, 3)}"
      if self._epsilon_budget is not None:
        self._spent += f"/{statement.rounded_up(self._epsilon_budget, 3)}"
    if examples_per_second is not None:
      self._speed = f"{human_count(examples_per_second)} examples/s"
    for name in (f"test/{x}" for x in self._held_out):
      if name in metrics:
        self._score = _show_metric(name, metrics[name])
        break
    if metrics:
      # Above a bar, which lets lines pass: the history stays on the screen.
      self._print_line(step, metrics)
    if self._bar is None:
      return
    now = time.monotonic()
    if metrics or step >= self._total_steps or now >= self._next_refresh:
      self._next_refresh = now + _REFRESH_SECONDS
      facts = filter(None, (self._spent, self._speed, self._score))
      self._bar.facts = "  ".join(facts)
      self._bar.update(self._task, completed=step)
      self._bar.refresh()

  def _print_line(self, step: int, metrics: Mapping[str, float]) -> None:
    shown = (_show_metric(name, value) for name, value in metrics.items())
    # Without the speed: logs are kept, and the speed reveals how many were
    # drawn.
    parts = (f"step {step}/{self._total_steps}", self._spent)
    _print_plain(self._console, "  ".join(filter(None, (*parts, *shown))))


def _show_metric(name: str, value: float) -> str:
  return f"{name.replace('/', ' ').replace('_', ' ')} {value:,.3f}"


def _console() -> rich.console.Console:
  # Ask the stream itself: FORCE_COLOR, common in CI, would otherwise turn a log
  # file into a terminal and fill it with redrawn bars.
  return rich.console.Console(force_terminal=sys.stdout.isatty())


def _print_plain(console: rich.console.Console, line: str) -> None:
  """Prints a line as it is: no markup, no colors, no wrapping."""
  console.print(rich.text.Text(line), soft_wrap=True)
