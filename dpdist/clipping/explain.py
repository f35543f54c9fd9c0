"""Describes in a table what the engines do with each parameter."""

from collections.abc import Sequence
import math

from dpdist.clipping.layers.rules import Form
from dpdist.clipping.layers.rules import Rule
from dpdist.clipping.trace.program import WeightUse


def table(
  method: str,
  reason: str,
  platform: str,
  rules: Sequence[Rule],
  names: Sequence[str],
  frozen: Sequence[str] = (),
) -> str:
  """Returns the text that `ClippedGrad.explain` prints."""
  lines = [f"method: {method} ({reason}); costs of: {platform}"]
  if method == "vmap":
    lines.append("every gradient of every example is formed and kept")
    return "\n".join(lines)
  head = ("parameters", "where", "rule", "flops", "bytes", "kept")
  rows = [head]
  for rule in rules:
    by_parameter = " (by parameter)" if rule.form is Form.PARAMETERS else ""
    rows.append(
      (
        ", ".join(names[i] for i in sorted(rule.leaves)),
        " + ".join(_place(use) for use in rule.uses),
        rule.strategy.text + by_parameter,
        f"{rule.cost.flops:.2g}",
        f"{rule.cost.bytes:.2g}",
        f"{rule.cost.kept:.2g}",
      )
    )
  used = frozenset().union(*(rule.leaves for rule in rules))
  rows.extend(
    (name, "-", "not used by the loss", "0", "0", "0")
    for i, name in enumerate(names)
    if i not in used
  )
  rows.extend((name, "-", "frozen", "0", "0", "0") for name in frozen)
  widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
  lines.extend(
    "  ".join(
      cell.ljust(width) if i < 3 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  )
  return "\n".join(lines)


def ways(
  method: str, rules: Sequence[Rule], names: Sequence[str]
) -> dict[str, str]:
  """Returns a phrase for each named parameter that says how it is clipped."""
  if method == "vmap":
    return dict.fromkeys(names, "every gradient formed and kept (vmap)")
  phrases = dict.fromkeys(names, "not used by the loss")
  for rule in rules:
    places = " + ".join(_place(use) for use in rule.uses)
    for i in rule.leaves:
      phrases[names[i]] = f"{rule.strategy.text}, {places} ({method})"
  return phrases


def _place(use: WeightUse) -> str:
  shape = "x".join(map(str, use.weight_shape)) or "scalar"
  loops = math.prod(use.lengths)
  return f"{use.name} {shape}" + (
    f" in {loops} iterations" if loops > 1 else ""
  )
