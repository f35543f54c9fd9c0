"""One page that says what a run learned and what it spent.

The page opens without a network: styles and plots are inside it, letters are
the reader's own, and nothing is fetched. Only released metrics are drawn, so
the page may be shown wherever the result may.
"""

from collections.abc import Mapping, Sequence
import html
import io
import json
import os
import pathlib
import re
from typing import Any

import matplotlib
from matplotlib import figure
from matplotlib.backends import backend_svg
import numpy as np

from dpdist import metrics as metrics_lib

_FILE = "report.html"
_MAX_POINTS = 400

# Matplotlib writes fixed colours; each stands for one that follows the
# reader's light or dark scheme, and is exchanged in the finished drawing.
_COLORS = {
  "text": "#010203",
  "grid": "#010204",
  "first": "#010205",
  "second": "#010206",
  "limit": "#010207",
}

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff;
  --text: #1c2330; --muted: #667085; --grid: #e4e7ec; --first: #2563eb;
  --second: #0d9488; --limit: #d92d20; --bad: #fef3f2; --warn: #fffaeb;
  --warn-edge: #b54708; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1319; --card: #181e27;
  --text: #e6e9ef; --muted: #98a2b3; --grid: #2b3442; --first: #7aa7ff;
  --second: #4fd1c0; --limit: #ff8a80; --bad: #35191a; --warn: #33270f;
  --warn-edge: #fdb022; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1.25rem;
  letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 2.25rem 0 .75rem; }
p { max-width: 44rem; }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 9rem), 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
}
.card { background: var(--card); border: 1px solid var(--grid);
  border-radius: 12px; padding: 1rem 1.15rem; min-width: 0; }
.figure { font-size: clamp(1.2rem, 2.6vw, 1.6rem); line-height: 1.4;
  font-weight: 650;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.label { color: var(--muted); font-size: .875rem; }
.void .figure { text-decoration: line-through; color: var(--limit); }
.notices { border-radius: 12px; padding: .85rem 1.15rem; margin: 1rem 0 0;
  border: 1px solid var(--warn-edge); background: var(--warn); }
.notices.red { border-color: var(--limit); background: var(--bad); }
.notices strong { color: var(--warn-edge); }
.notices.red strong { color: var(--limit); }
.notices p { margin: .3rem 0; overflow-wrap: anywhere; }
.statement { white-space: pre-line; margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45rem 0;
  border-top: 1px solid var(--grid); overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; }
th { font-weight: 400; color: var(--muted); width: 40%; padding-right: 1rem; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .35rem; }
figcaption span { font-weight: 400; color: var(--muted); font-size: .85rem;
  margin-left: .75rem; white-space: nowrap; }
figcaption .limit { border-top-style: dashed; }
figcaption i { display: inline-block; width: 1.1em; vertical-align: .25em;
  margin-right: .35em; border-top: 2.5px solid; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
pre { margin: 0; overflow-x: auto; font: .8rem/1.5 ui-monospace, Menlo,
  Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def write(
  workdir: str | os.PathLike[str],
  *,
  result: Mapping[str, Any],
  statement: str,
  rows: Sequence[tuple[str, str]],
  notices: Sequence[str],
  epsilon_budget: float | None = None,
) -> pathlib.Path:
  """Writes `report.html`, a function of its arguments and the metrics alone.

  Args:
    workdir: the run's directory; its metrics are drawn.
    result: what `result.json` holds: epsilon, delta, noise_multiplier,
      sampling_probability, num_steps, accountant, params_sha256, test,
      test_ema (may be missing) and guarantee ("holds" or "void: why").
    statement: what the run guarantees, in plain text.
    rows: (name, value) pairs of the plan.
    notices: warnings, shown first.
    epsilon_budget: what the whole run may spend; None for result["epsilon"].

  Returns:
    The page's path.

  Raises:
    KeyError: if `result` lacks epsilon, delta, test or guarantee.
    ValueError: if the metrics are damaged.
  """
  if epsilon_budget is None:
    epsilon_budget = result["epsilon"]
  body = "\n".join(
    (
      _headline(result),
      _notices(result, notices),
      f"<h2>Privacy statement</h2>\n<div class='card'>"
      f"<p class='statement'>{_text(statement)}</p></div>",
      f"<h2>Plan</h2>\n<div class='card'>{_table(rows)}</div>",
      _plots(metrics_lib.read(workdir), epsilon_budget),
      "<h2>Result</h2>\n<div class='card'><pre>"
      f"{_text(json.dumps(result, indent=2))}</pre></div>",
    )
  )
  page = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>Private training report</title>\n<style>{_STYLE}</style>\n"
    f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
  )
  path = pathlib.Path(workdir) / _FILE
  # Renamed into place, so that a reader never opens half a page.
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(page, encoding="utf-8")
  os.replace(temporary, path)
  return path


def _text(value: object) -> str:
  return html.escape(str(value))


def _is_void(result: Mapping[str, Any]) -> bool:
  # Anything but the one good word is bad news.
  return result["guarantee"] != "holds"


def _headline(result: Mapping[str, Any]) -> str:
  void = _is_void(result)
  note = " (void)" if void else ""
  cards = [
    ("epsilon" + note, f"{result['epsilon']:.4g}", void),
    ("delta" + note, f"{result['delta']:.3g}", void),
  ]
  for key, label in (("test", "test"), ("test_ema", "EMA test")):
    for name, value in result.get(key, {}).items():
      cards.append((f"{label} {name}", f"{value:.4g}", False))
  inner = "\n".join(
    f"<div class='card{' void' if crossed else ''}'>"
    f"<div class='figure'>{_text(value)}</div>"
    f"<div class='label'>{_text(label)}</div></div>"
    for label, value, crossed in cards
  )
  return (
    "<h1>Private training report</h1>\n"
    f"<section class='grid'>\n{inner}\n</section>"
  )


def _notices(result: Mapping[str, Any], notices: Sequence[str]) -> str:
  void = _is_void(result)
  lines = list(notices)
  if not void and not lines:
    return ""
  title = "Notices"
  if void:
    title = "No privacy guarantee"
    reason = str(result["guarantee"]).removeprefix("void:").strip()
    lines = [reason] + [line for line in lines if line != reason]
  inner = "".join(f"<p>{_text(line)}</p>" for line in lines)
  return (
    f"<section class='notices{' red' if void else ''}' role='alert'>"
    f"<strong>{title}</strong>{inner}</section>"
  )


def _table(rows: Sequence[tuple[str, str]]) -> str:
  inner = "\n".join(
    f"<tr><th scope='row'>{_text(name)}</th><td>{_text(value)}</td></tr>"
    for name, value in rows
  )
  return f"<table>\n{inner}\n</table>"


def _plots(rows: Sequence[Mapping[str, Any]], epsilon_budget: float) -> str:
  plots = (
    _plot(
      "Held-out accuracy",
      rows,
      {"test/accuracy": "raw", "test_ema/accuracy": "EMA"},
    ),
    _plot("Epsilon spent", rows, {"epsilon": "spent"}, limit=epsilon_budget),
    _plot("Norm of the noised gradient", rows, {"noisy_gradient_norm": ""}),
    _plot("Learning rate", rows, {"learning_rate": ""}),
  )
  inner = "\n".join(filter(None, plots))
  if not inner:
    return ""
  return (
    f"<h2>Over the run's steps</h2>\n<div class='grid plots'>\n{inner}\n</div>"
  )


def _plot(
  title: str,
  rows: Sequence[Mapping[str, Any]],
  names: Mapping[str, str],
  *,
  limit: float | None = None,
) -> str:
  """Draws the named metrics over the steps; "" if none was written."""
  fig = figure.Figure(figsize=(4.6, 2.5), layout="constrained")
  axes = fig.add_subplot()
  key = []
  for color, (name, label) in zip(
    ("first", "second"), names.items(), strict=False
  ):
    points = np.array(
      [(row["step"], row[name]) for row in rows if name in row], dtype=float
    )
    points = points[np.isfinite(points).all(axis=-1)] if len(points) else points
    if not len(points):
      continue
    # A page for reading, not an archive: thin long runs, keep the last point.
    stride = -(-len(points) // _MAX_POINTS)
    steps, values = points[::-1][::stride][::-1].T
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, values, color=_COLORS[color], linewidth=1.8, marker=marker)
    key.append((color, label))
  if not key:
    return ""
  if limit is not None and np.isfinite(limit):
    axes.axhline(limit, color=_COLORS["limit"], linewidth=1.3, linestyle="--")
    axes.set_ylim(bottom=0)
    key.append(("limit", f"budget {limit:.4g}"))
  legend = "".join(
    f"<span><i class='{color}' style='color: var(--{color})'></i>"
    f"{_text(label)}</span>"
    for color, label in key
    if len(key) > 1
  )
  axes.set_xlim(0, max(rows[-1]["step"], 1))
  return (
    f"<figure class='card'><figcaption>{_text(title)}{legend}</figcaption>\n"
    f"{_svg(fig, axes, title)}</figure>"
  )


def _svg(fig: figure.Figure, axes: Any, title: str) -> str:
  """Gives the drawing as an <svg> element that fits into a page."""
  fig.patch.set_visible(False)
  axes.patch.set_visible(False)
  axes.margins(y=0.1)
  axes.grid(axis="y", color=_COLORS["grid"], linewidth=0.8)
  axes.set_axisbelow(True)
  axes.locator_params(axis="both", nbins=5)
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.ticklabel_format(useOffset=False)
  axes.tick_params(length=0, labelsize=9, labelcolor=_COLORS["text"], pad=6)
  for side, spine in axes.spines.items():
    spine.set_visible(side == "bottom")
    spine.set_color(_COLORS["grid"])
  stream = io.StringIO()
  # Letters stay letters, in the page's font; the salt makes names of clip
  # paths a function of the drawing, and no date is written.
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
    backend_svg.FigureCanvasSVG(fig).print_svg(
      stream,
      metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
  svg = stream.getvalue()
  svg = svg[svg.index("<svg") :]
  # Group names repeat from one drawing to the next; in one page they clash.
  svg = re.sub(r'<g id="[^"]*"', "<g", svg)
  svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
  for name, color in _COLORS.items():
    svg = svg.replace(color, f"var(--{name})")
  return svg.replace("<svg", f"<svg role='img' aria-label='{_text(title)}'", 1)
