"""Draws what a run wrote over its steps, as plots inside a page.

Fonts are the reader's own and colors follow the page's, light or dark, so that
nothing is fetched. `plots` draws released metrics alone; `speed` draws values
that are as private as the data.
"""

from collections.abc import Mapping, Sequence
import html
import io
import os
import pathlib
import re
from typing import Any

import matplotlib
from matplotlib import backend_bases
from matplotlib import figure
from matplotlib.backends import backend_svg
import numpy as np

from dpdist import _validation
from dpdist.privacy import statement

_MAX_POINTS = 400

# Matplotlib writes fixed colors. Each is replaced in the finished plot by a
# color that follows the reader's light or dark scheme.
_COLORS = {
  "text": "#010203",
  "grid": "#010204",
  "first": "#010205",
  "second": "#010206",
  "limit": "#010207",
}

_CSS_STYLES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}

_Rows = Sequence[Mapping[str, Any]]


def check_path(path: str | os.PathLike[str]) -> None:
  """Raises ArgumentError if no picture can be written to a file."""
  path = pathlib.Path(path)
  kinds = sorted(backend_bases.FigureCanvasBase.get_supported_filetypes())
  _validation.require(
    path.suffix.lower().lstrip(".") in kinds
    and path.absolute().parent.is_dir(),
    "plot",
    f"a file that ends in one of {kinds}, in a directory that is there",
    str(path),
  )


def plots(rows: _Rows, epsilon_budget: float) -> str:
  """Returns plots of `metrics.read`, each a <figure>; "" if there are none."""
  spent = [{"step": 0, "epsilon": 0.0}, *rows]
  figures = (
    *_held_out(rows),
    _plot(
      "Epsilon spent",
      spent if any("epsilon" in row for row in rows) else [],
      {"epsilon": "spent"},
      limit=epsilon_budget,
    ),
    _plot(
      "Noise against signal",
      rows,
      {"noisy_gradient_norm": "both", "noise_norm": "noise"},
      from_zero=True,
      note=_signal(rows),
    ),
    _plot("Learning rate", rows, {"learning_rate": ""}),
  )
  return _grid(figures)


def _held_out(rows: _Rows) -> list[str]:
  """Draws the metric that the run's task names first, and the loss."""
  names = [name for row in rows for name in row if name.startswith("test/")]
  first = [names[0].removeprefix("test/")] if names else []
  raw = (
    "raw" if any(f"test_ema/{x}" in row for x in first for row in rows) else ""
  )
  return [
    _plot(
      f"Held-out {metric}",
      rows,
      {f"test/{metric}": raw, f"test_ema/{metric}": "EMA"},
    )
    for metric in dict.fromkeys([*first, "loss"])
  ]


def speed(rows: _Rows) -> str:
  """Returns plots of times and memory. PRIVATE: not to be released.

  Each is a <figure>; "" if nothing was written. Beside "step", rows may have
  "examples_per_second", "step_seconds", "input_wait_seconds", "host_gib" and
  "device_peak_gib".
  """
  return _grid(
    (
      _plot(
        "Examples a second",
        rows,
        {"examples_per_second": ""},
        from_zero=True,
        note="Of the expected batch, without evaluation and saving.",
      ),
      _plot(
        "Seconds a step",
        rows,
        {"step_seconds": "all", "input_wait_seconds": "waiting for examples"},
        from_zero=True,
        note="Of the slowest process.",
      ),
      _plot(
        "Memory, GiB",
        rows,
        {"host_gib": "process", "device_peak_gib": "device, peak"},
        from_zero=True,
        note="Of the fullest process and device.",
      ),
    )
  )


def curves(
  title: str,
  x_label: str,
  lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
) -> str:
  """Returns a <figure> of several curves (name, points); "" without points.

  Their names stand beside them, so that they can be told apart without colors.
  """
  fig = figure.Figure(figsize=(4.6, 3.0), layout="constrained")
  axes = fig.add_subplot()
  key = []
  ends: list[tuple[float, float, str]] = []
  for number, (name, points) in enumerate(lines):
    shown = [point for point in points if np.isfinite(point).all()]
    if not shown:
      continue
    xs, ys = np.array(shown[:: -(-len(shown) // _MAX_POINTS)] + shown[-1:]).T
    color = ("first", "second", "limit")[number % 3]
    style = ("-", "--", ":", "-.")[number // 3 % 4]
    mark = "o" if len(shown) == 1 else None
    axes.plot(
      xs, ys, color=_COLORS[color], linestyle=style, linewidth=1.8, marker=mark
    )
    ends.append((float(xs[-1]), float(ys[-1]), str(number + 1)))
    key.append(
      f"<span><i class='{color}' style='color: var(--{color});"
      f" border-top-style: {_CSS_STYLES[style]}'></i>"
      f"{number + 1} {_text(name)}</span>"
    )
  if not key:
    return ""
  caption = f"<figcaption>{_text(title)}{''.join(key)}</figcaption>"
  _name_ends(axes, ends)
  axes.set_xlim(left=0)
  svg = _svg(fig, axes, title, x_label)
  return f"<figure class='card'>{caption}\n{svg}</figure>"


def _name_ends(axes: Any, ends: Sequence[tuple[float, float, str]]) -> None:
  """Writes the numbers of curves at their ends, of those that meet as one."""
  limits = axes.dataLim
  sizes = [max(size, 1e-30) for size in (limits.width, limits.height)]
  left = list(ends)
  while left:
    x, y, _ = left[0]
    is_near = lambda end, x=x, y=y: (
      abs(end[0] - x) < 0.06 * sizes[0] and abs(end[1] - y) < 0.06 * sizes[1]
    )
    names = ", ".join(end[2] for end in left if is_near(end))
    left = [end for end in left if not is_near(end)]
    is_long = len(names) > 2
    axes.annotate(
      names,
      (x, y),
      xytext=(0, 6) if is_long else (4, 0),
      textcoords="offset points",
      ha="right" if is_long else "left",
      fontsize=10,
      color=_COLORS["text"],
    )


def _grid(figures: Sequence[str]) -> str:
  inner = "\n".join(filter(None, figures))
  return f"<div class='grid plots'>\n{inner}\n</div>" if inner else ""


def _signal(rows: _Rows) -> str:
  """Says how much of the noisy gradient is signal, from released values.

  Noise and clipped mean are nearly at right angles, so the squares of their
  norms add up. The last quarter of the rows is used.
  """
  pairs = np.array(
    [
      (row["noisy_gradient_norm"], row["noise_norm"])
      for row in rows
      if {"noisy_gradient_norm", "noise_norm"} <= row.keys()
    ],
    dtype=float,
  )
  if not len(pairs) or not np.isfinite(pairs).all() or not pairs.all():
    return ""
  whole, noise = (pairs[len(pairs) * 3 // 4 :] ** 2).mean(axis=0)
  share = min(1.0, max(0.0, 1 - noise / whole))
  amount = "less than 1%" if share < 0.01 else f"about {share:.0%}"
  return (
    "Length of the mean gradient with its noise, and of the noise, by the plan."
    f" In the last quarter {amount} of the squared length is signal."
  )


def _plot(
  title: str,
  rows: _Rows,
  names: Mapping[str, str],
  *,
  limit: float | None = None,
  from_zero: bool = False,
  note: str = "",
) -> str:
  """Draws the named metrics over the steps; "" if none was written."""
  fig = figure.Figure(figsize=(4.6, 2.5), layout="constrained")
  axes = fig.add_subplot()
  key = []
  most = -np.inf
  for color, (name, label) in zip(
    ("first", "second"), names.items(), strict=False
  ):
    points = np.array(
      [(row["step"], row[name]) for row in rows if name in row], dtype=float
    )
    is_finite = np.isfinite(points).all(axis=-1) if len(points) else []
    ends_early = len(points) and not is_finite[-1]
    points = points[is_finite] if len(points) else points
    if not len(points):
      continue
    # The page is for reading and not an archive: thin out long runs, but keep
    # the last point.
    stride = -(-len(points) // _MAX_POINTS)
    steps, values = points[::-1][::stride][::-1].T
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, values, color=_COLORS[color], linewidth=1.8, marker=marker)
    last = f"{values[-1]:.4g}"
    if ends_early:
      last += f", no number after step {steps[-1]:,.0f}"
    key.append((color, f"{label} {last}".strip()))
    most = max(most, float(values.max()))
  if not key:
    return ""
  if limit is not None and np.isfinite(limit):
    axes.axhline(limit, color=_COLORS["limit"], linewidth=1.3, linestyle="--")
    from_zero = True
    key.append(("limit", f"budget {statement.rounded_up(limit)}"))
  if from_zero:
    # Room above the highest value, which a limit may be.
    most = (
      max(most, limit) if limit is not None and np.isfinite(limit) else most
    )
    axes.set_ylim(0, 1.1 * most if most > 0 else 1.0)
  legend = "".join(
    f"<span><i class='{color}' style='color: var(--{color})'></i>"
    f"{_text(label)}</span>"
    for color, label in key
  )
  axes.set_xlim(0, max(rows[-1]["step"], 1))
  below = f"<p class='label'>{_text(note)}</p>" if note else ""
  return (
    f"<figure class='card'><figcaption>{_text(title)}{legend}</figcaption>\n"
    f"{_svg(fig, axes, title)}{below}</figure>"
  )


def _text(value: object) -> str:
  return html.escape(str(value))


def _svg(
  fig: figure.Figure, axes: Any, title: str, x_label: str = "step"
) -> str:
  """Returns the plot as an <svg> element that fits into a page."""
  fig.patch.set_visible(False)
  axes.patch.set_visible(False)
  axes.margins(y=0.1)
  axes.grid(axis="y", color=_COLORS["grid"], linewidth=0.8)
  axes.set_axisbelow(True)
  axes.locator_params(axis="both", nbins=5)
  if x_label == "step":
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
  axes.ticklabel_format(axis="y", useOffset=False)
  axes.set_xlabel(x_label, fontsize=10, color=_COLORS["text"])
  axes.tick_params(length=0, labelsize=10, labelcolor=_COLORS["text"], pad=6)
  for side, spine in axes.spines.items():
    spine.set_visible(side == "bottom")
    spine.set_color(_COLORS["grid"])
  stream = io.StringIO()
  # Text stays text, in the page's font; the salt makes names of clip paths a
  # function of the plot, and no date is written.
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
    backend_svg.FigureCanvasSVG(fig).print_svg(
      stream,
      metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
  svg = stream.getvalue()
  svg = svg[svg.index("<svg") :]
  # Group names repeat from one plot to the next, and would clash in a page.
  svg = re.sub(r'<g id="[^"]*"', "<g", svg)
  svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
  for name, color in _COLORS.items():
    svg = svg.replace(color, f"var(--{name})")
  return svg.replace("<svg", f"<svg role='img' aria-label='{_text(title)}'", 1)
