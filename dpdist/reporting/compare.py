"""Writes one page that compares runs by what they learned and spent.

It is of released metrics and results alone, so it may be shown wherever the
runs' reports may. A choice among runs is a choice made by looking at the data,
which no run's own epsilon covers, and the page says so.
"""

from collections.abc import Mapping, Sequence
import html
import json
import os
import pathlib
from typing import Any, NamedTuple

from dpdist import errors
from dpdist.privacy import statement
from dpdist.reporting import metrics
from dpdist.reporting import plots
from dpdist.reporting import report

MOST = 12
"""The most runs on a page: curves of more cannot be told apart."""

_SELECTION = (
  "Each epsilon is that of its run alone. If these runs trained on the same"
  " data, all of them together spent more; and to keep the best by its held-out"
  " score is a choice that looks at the data. A shared data budget counts both:"
  " see launch.reserve."
)


_NOTHING_IN_COMMON = (
  "No held-out metric is in all of these runs, so there is nothing to draw."
)


class Run(NamedTuple):
  """A run that is compared."""

  name: str  # How the page calls it.
  # The contents of its result.json; empty while it trains.
  result: Mapping[str, Any]
  rows: Sequence[Mapping[str, Any]]  # Its released metrics, by step.


def read(directories: Sequence[str | os.PathLike[str]]) -> list[Run]:
  """Reads runs, named by the parts of their paths in which they differ."""
  paths = [pathlib.Path(x).resolve() for x in directories]
  if not 1 <= len(paths) <= MOST or len(set(paths)) < len(paths):
    raise errors.ArgumentError(
      f"give 1 to {MOST} directories of runs, each once, got"
      f" {[str(x) for x in directories]}"
    )
  common = pathlib.Path(os.path.commonpath([x.parent for x in paths]))
  runs = []
  for path in paths:
    rows = metrics.read(path)
    try:
      result = json.loads((path / "result.json").read_text())
    except FileNotFoundError:
      result = {}
    if not rows and not result:
      raise errors.ArgumentError(
        f"{path} must be the directory of a run, and has neither result.json"
        " nor metrics.jsonl"
      )
    runs.append(Run(str(path.relative_to(common)), result, rows))
  return runs


def metric_of(runs: Sequence[Run]) -> str:
  """Returns the first held-out metric that all runs have; "" if none."""
  names = [
    [
      name.removeprefix("test/")
      for name in dict.fromkeys(name for row in run.rows for name in row)
      if name.startswith("test/")
    ]
    for run in runs
  ]
  return next((name for name in names[0] if all(name in x for x in names)), "")


def table(runs: Sequence[Run], metric: str) -> list[tuple[str, ...]]:
  """Returns a heading and a row for each run, as texts."""
  heading = ("run", metric or "held out", "epsilon", "delta", "steps")
  rows: list[tuple[str, ...]] = [(*heading, "noise multiplier", "guarantee")]
  for number, run in enumerate(runs, start=1):
    result = run.result
    last = [row for row in run.rows if f"test/{metric}" in row][-1:]
    score = last[0][f"test/{metric}"] if last else None
    ema = result.get("test_ema", {}).get(metric)
    epsilons = [row["epsilon"] for row in run.rows if "epsilon" in row]
    spent = result.get("epsilon", max(epsilons, default=None))
    last_step = int(run.rows[-1]["step"]) if run.rows else 0
    shown = {
      "score": score if ema is None else ema,
      "delta": result.get("delta"),
      "noise": result.get("noise_multiplier"),
    }
    numbers = {k: "-" if x is None else f"{x:.4g}" for k, x in shown.items()}
    rows.append(
      (
        f"{number} {run.name}",
        numbers["score"],
        "-" if spent is None else statement.rounded_up(spent),
        numbers["delta"],
        f"{result.get('num_steps', last_step):,}",
        numbers["noise"],
        result.get("guarantee", "has not ended"),
      )
    )
  return rows


def write(runs: Sequence[Run], path: pathlib.Path) -> pathlib.Path:
  """Writes the page; returns its path."""
  metric = metric_of(runs)
  score = f"test/{metric}"
  by_epsilon = [
    (
      run.name,
      [(row["epsilon"], row[score]) for row in _both(run, "epsilon", score)],
    )
    for run in runs
  ]
  by_step = [
    (run.name, [(row["step"], row[score]) for row in _both(run, "step", score)])
    for run in runs
  ]
  drawn = "\n".join(
    (
      plots.curves(
        f"Held-out {metric} by epsilon", "epsilon spent", by_epsilon
      ),
      plots.curves(f"Held-out {metric} by step", "step", by_step),
    )
  )
  body = (
    "<header><h1>Private training runs, side by side</h1></header>\n"
    f"<p class='label'>{html.escape(_SELECTION)}</p>\n{_banner(runs)}\n"
    f"<h2>Results</h2>\n<div class='card wide'>{_html(table(runs, metric))}"
    "</div>\n"
    "<h2>Curves</h2>\n"
    + (
      f"<div class='grid plots'>{drawn}</div>"
      if metric
      else f"<p class='label'>{_NOTHING_IN_COMMON}</p>"
    )
  )
  return report.put(path, "Private training runs", body)


def _banner(runs: Sequence[Run]) -> str:
  """Returns a box on runs that have no guarantee or are of no use; or ""."""
  lines, is_void = [], False
  for number, run in enumerate(runs, start=1):
    guarantee = str(run.result.get("guarantee", "holds"))
    problem = str(run.result.get("held_out_problem", ""))
    is_void = is_void or guarantee != "holds"
    if guarantee != "holds":
      why = f"no guarantee: {guarantee.removeprefix('void: ')}"
      problem = "; ".join(filter(None, [why, problem]))
    lines += [f"{number} {run.name}: {problem}"] if problem else []
  if not lines:
    return ""
  return report.banner("Not to be relied on", lines, is_red=is_void)


def _both(run: Run, *names: str) -> list[Mapping[str, Any]]:
  return [row for row in run.rows if all(name in row for name in names)]


def _html(rows: Sequence[Sequence[str]]) -> str:
  heading = [html.escape(x, quote=True) for x in rows[0]]
  lines = [f"<tr>{''.join(f'<th>{x}</th>' for x in heading)}</tr>"]
  for row in rows[1:]:
    # On a phone each cell has its column's name beside it.
    cells = (
      f"<td data-name='{name}'>{html.escape(x)}</td>"
      for name, x in zip(heading, row, strict=True)
    )
    lines.append(f"<tr>{''.join(cells)}</tr>")
  return f"<table class='columns'>{''.join(lines)}</table>"
