"""Draws an audit: the canaries' scores, the bounds and the claim."""

import os

from matplotlib import figure
import numpy as np

from dpdist.audit import audit
from dpdist.reporting import plots

_IN, _OUT, _CLAIM = "#c2410c", "#0369a1", "#1f2937"
# Percentiles of the scores; a single outlier would compress all the others.
_SHOWN = (0.5, 99.5)


def draw(result: audit.Result, path: str | os.PathLike[str]) -> None:
  """Writes the picture; for the path see `plots.check_path`."""
  plots.check_path(path)
  fig = figure.Figure(figsize=(9, 3.6), layout="constrained")
  left, right = fig.subplots(1, 2, width_ratios=(3, 2))
  finite = np.isfinite(result.scores)
  scores, is_in = result.scores[finite], result.is_in[finite]
  if len(scores):
    low, high = np.percentile(scores, _SHOWN)
    edges = np.linspace(low, max(high, low + 1e-9), 40)
    # Values beyond are shown at the edge, and not left out.
    scores = np.clip(scores, edges[0], edges[-1])
    for name, color, chosen in (("in", _IN, is_in), ("out", _OUT, ~is_in)):
      left.hist(
        scores[chosen],
        edges,
        color=color,
        alpha=0.55,
        label=f"canary {name} ({np.sum(chosen):,})",
      )
    left.legend(frameon=False)
  left.set_xlabel("score: log likelihood ratio of in against out")
  left.set_ylabel("canaries")
  names = list(result.bounds)
  right.bar(names, [result.bounds[name] for name in names], color=_OUT)
  right.axhline(result.epsilon_claimed, color=_CLAIM, linestyle="--")
  right.annotate(
    f"claimed {result.epsilon_claimed:.3g}",
    (0.02, result.epsilon_claimed),
    xycoords=("axes fraction", "data"),
    verticalalignment="bottom",
  )
  right.set_ylim(
    0, 1.15 * max(result.epsilon_claimed, *result.bounds.values(), 1e-9)
  )
  right.set_ylabel(f"epsilon at delta {result.delta:g}")
  right.set_title(f"lower bounds, confidence {result.confidence:g}", size=10)
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
  fig.savefig(path)
