"""Draws epsilon against noise multiplier, batch size and steps."""

from collections.abc import Mapping
import os

import matplotlib
from matplotlib import figure
from matplotlib import ticker

from dpdist.privacy import plan as plan_lib
from dpdist.reporting import plots

_LABELS = {
  "noise_multiplier": "noise multiplier",
  "expected_batch_size": "expected batch size",
  "num_steps": "steps",
}
_BLUE, _RED, _GREY = "#2563eb", "#d92d20", "#667085"


def draw(
  path: str | os.PathLike[str],
  plan: plan_lib.PrivacyPlan,
  curves: Mapping[str, tuple[list[float], list[float]]],
  target_epsilon: float | None = None,
) -> None:
  """Writes a picture of `planning.curves`, with the plan marked on each.

  The target epsilon is drawn as a line; None takes the plan's own, if it has
  one. See `plots.check_path` for the path.
  """
  plots.check_path(path)
  fig = figure.Figure(figsize=(11, 3.8), layout="constrained", dpi=150)
  target = plan.target_epsilon if target_epsilon is None else target_epsilon
  epsilon = plan.epsilon()
  all_axes = fig.subplots(1, len(curves), sharey=True)
  for axes, (name, (xs, epsilons)) in zip(
    all_axes, curves.items(), strict=True
  ):
    axes.loglog(xs, epsilons, color=_BLUE, linewidth=2)
    value = getattr(plan, name)
    axes.plot(
      [value], [epsilon], "o", color=_BLUE, markeredgecolor="white", ms=9
    )
    axes.annotate(
      f"{value:,.4g}: epsilon {epsilon:.3g}",
      (value, epsilon),
      textcoords="offset points",
      # Towards the side where the curve does not go.
      xytext=(8, 8) if name == "noise_multiplier" else (8, -16),
      fontsize=9,
    )
    if target is not None:
      axes.axhline(target, color=_RED, linewidth=1.2, linestyle="--")
    axes.set_xlabel(_LABELS[name])
    axes.grid(which="major", color="#e4e7ec")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY, which="both")
    plain = ticker.FuncFormatter(lambda x, _: f"{x:,.4g}")
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=20))
      axis.set_major_formatter(plain)
      axis.set_minor_locator(ticker.NullLocator())
  all_axes[0].set_ylabel(f"epsilon at delta {plan.delta:g}")
  others = "the other two as planned"
  if target is not None:
    others += f"; dashed: epsilon {target:g}"
  fig.suptitle(
    f"What each number spends, {others}", x=0.01, ha="left", fontsize=11
  )
  with matplotlib.rc_context({"svg.hashsalt": "dpdist"}):
    fig.savefig(path)
