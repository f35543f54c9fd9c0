"""Writes one page of what a run learned and spent, and one of its speed.

Pages open without a network: styles and plots are inside, fonts are the
reader's own, and nothing is fetched. The first draws released metrics alone, so
it may be shown wherever the result may. The second is for the run's owner only.
"""

from collections.abc import Mapping, Sequence
import html
import os
import pathlib
from typing import Any

from dpdist.files import atomic
from dpdist.files import json_fields
from dpdist.privacy import statement as statement_lib
from dpdist.reporting import metrics as metrics_lib
from dpdist.reporting import plots
from dpdist.reporting import rows as rows_lib

_FILE = "report.html"
_SPEED_FILE = "speed.html"
_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff;
  --text: #1c2330; --muted: #5d6778; --grid: #e4e7ec; --first: #2563eb;
  --second: #0d9488; --limit: #c4271b; --bad: #fef3f2; --warn: #fffaeb;
  --warn-edge: #b54708; --good: #ecfdf3; --good-edge: #067647; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1319; --card: #181e27;
  --text: #e6e9ef; --muted: #98a2b3; --grid: #2b3442; --first: #7aa7ff;
  --second: #4fd1c0; --limit: #ff8a80; --bad: #35191a; --warn: #33270f;
  --warn-edge: #fdb022; --good: #0f2a1c; --good-edge: #6ce9a6; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem;
  margin-bottom: 1.25rem; }
.about { flex-basis: 100%; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 2.5rem 0 .75rem; }
p { max-width: 44rem; margin: 0; }
.badge { border-radius: 999px; padding: .15rem .75rem; font-size: .875rem;
  font-weight: 600; color: var(--good-edge); background: var(--good);
  border: 1px solid currentColor; }
.badge.red { color: var(--limit); background: var(--bad); }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(4, minmax(0, 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
}
.card { background: var(--card); border: 1px solid var(--grid);
  border-radius: 12px; padding: 1rem 1.15rem; min-width: 0; }
.figure { font-size: clamp(1.35rem, 3vw, 1.9rem); line-height: 1.3;
  font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.label { color: var(--muted); font-size: .875rem; overflow-wrap: anywhere; }
.void .figure { text-decoration: line-through; color: var(--limit); }
.notices { border-radius: 12px; padding: .85rem 1.15rem; margin: 1rem 0 0;
  border: 1px solid var(--warn-edge); background: var(--warn); }
.notices.red { border-color: var(--limit); background: var(--bad); }
.notices strong { color: var(--warn-edge); }
.notices.red strong { color: var(--limit); }
.notices p { margin: .3rem 0; overflow-wrap: anywhere; }
.statement { box-shadow: inset 4px 0 0 var(--first);
  padding-left: 1.5rem; }
.statement p { white-space: pre-line; overflow-wrap: anywhere;
  max-width: 50rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45rem 0;
  border-top: 1px solid var(--grid); overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; }
th { font-weight: 400; color: var(--muted); width: 40%; padding-right: 1rem; }
td { font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.columns th, .columns td { width: auto; padding-right: 1.25rem;
  min-width: 4.5rem; overflow-wrap: normal; }
.digest { font: .8rem/1.6 ui-monospace, Menlo, Consolas, monospace; }
figure { margin: 0; }
figure .label { margin-top: .5rem; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .35rem; }
figcaption span { font-weight: 400; color: var(--muted); font-size: .85rem;
  margin-left: .75rem; display: inline-block; overflow-wrap: anywhere;
  max-width: calc(100% - .75rem); }
figcaption .limit { border-top-style: dashed; }
figcaption i { display: inline-block; width: 1.1em; vertical-align: .25em;
  margin-right: .35em; border-top: 2.5px solid; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: .75rem 0 0; font: .8rem/1.5 ui-monospace, Menlo, Consolas,
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 600px) { main { padding: 1.5rem 1rem 3rem; }
  .grid { gap: .75rem; } .card { padding: .85rem 1rem; }
  .statement { padding-left: 1.25rem; }
  .grid:not(.plots) { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .columns, .columns tbody, .columns tr { display: block; }
  .columns tr:first-child { display: none; }
  .columns tr { padding: .5rem 0; border-top: 1px solid var(--grid); }
  .columns tr:nth-child(2) { border-top: 0; }
  .columns td { display: flex; justify-content: space-between; gap: 1rem;
    padding: .1rem 0; border: 0; overflow-wrap: anywhere; text-align: right; }
  .columns td::before { content: attr(data-name); color: var(--muted);
    flex: none; }
  .columns td:first-child { font-weight: 600; text-align: left; }
  .columns td:first-child::before { content: none; } }
"""

_SPEED = (
  "How fast the run was is not on this page: how long a step takes tells how"
  " many examples were drawn, and that is private. It is in the run's"
  f" directory, in operations/{_SPEED_FILE}, which is not for others."
)
_NOT_FOR_OTHERS = (
  "How long a step takes tells how many examples were drawn, which no noise"
  " covers: keep this page as you keep the data."
)


def write(
  workdir: str | os.PathLike[str],
  *,
  result: Mapping[str, Any],
  statement: str,
  rows: Sequence[tuple[str, str]],
  notices: Sequence[str],
  epsilon_budget: float | None = None,
  about: str = "",
) -> pathlib.Path:
  """Writes `report.html`, a function of its arguments and the metrics alone.

  The contents of `result.json` must have epsilon, delta, num_steps, test and
  guarantee. The statement is plain text of what the run guarantees, and rows
  are (name, value) pairs of the plan. An epsilon_budget of None stands for
  result["epsilon"]. `about` says which run it is. Returns the page's path, and
  raises ValueError if the metrics are damaged.
  """
  if epsilon_budget is None:
    epsilon_budget = result["epsilon"]
  drawn = plots.plots(metrics_lib.read(workdir), epsilon_budget)
  body = "\n".join(
    (
      _headline(result, about),
      _notices(result, notices),
      f"<h2>Over the run's steps</h2>\n{drawn}" if drawn else "",
      f"<h2>Privacy statement{' (void)' * _is_void(result)}</h2>\n"
      "<div class='card statement'>"
      f"<p>{_text(statement)}</p></div>",
      f"<h2>Plan</h2>\n<div class='card'>{table(rows)}</div>",
      f"<h2>Provenance</h2>\n<div class='card'>{table(_origin(result))}</div>",
      f"<h2>Speed</h2>\n<p class='label'>{_text(_SPEED)}</p>",
      f"<h2>Result</h2>\n<div class='card'>{_numbers(result)}</div>",
    )
  )
  return put(pathlib.Path(workdir) / _FILE, "Private training report", body)


def write_speed(folder: pathlib.Path) -> pathlib.Path:
  """Writes `speed.html` to a run's `telemetry.FOLDER`, for its owner alone."""
  # Imported here, since it imports jax, which the other page does not need.
  from dpdist.reporting import telemetry

  rows = [
    _largest_of_processes(row) for row in rows_lib.read(folder / telemetry.FILE)
  ]
  body = (
    "<header><h1>Speed of a private training run</h1>"
    "<span class='badge red'>Not for others</span></header>\n"
    "<section class='notices red' role='alert'><strong>As private as the data"
    f"</strong><p>{_text(_NOT_FOR_OTHERS)}</p></section>\n"
    "<h2>Over the run's steps</h2>\n" + plots.speed(rows)
  )
  return put(folder / _SPEED_FILE, "Speed of a private training run", body)


def _largest_of_processes(row: Mapping[str, float]) -> dict[str, float]:
  """Returns a row of telemetry by names without processes, bytes as GiB."""
  largest: dict[str, float] = {}
  for name, value in row.items():
    name = name.rpartition("/")[-1]
    if name.endswith("_bytes"):
      name, value = name.removesuffix("_bytes") + "_gib", value / 2**30
    largest[name] = max(value, largest.get(name, value))
  return largest


def put(path: pathlib.Path, title: str, body: str) -> pathlib.Path:
  """Writes a page of HTML with this style; returns its path."""
  page = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{title}</title>\n<style>{_STYLE}</style>\n"
    f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
  )
  atomic.write(path, page.encode())
  return path


def _text(value: object) -> str:
  return html.escape(str(value))


def _is_void(result: Mapping[str, Any]) -> bool:
  # Anything but "holds" counts as void.
  return result["guarantee"] != "holds"


def _headline(result: Mapping[str, Any], about: str) -> str:
  void = _is_void(result)
  note = " (void)" if void else ""
  scores = [
    (f"{label} {name}", f"{value:.4g}", False)
    for key, label in (("test", "held-out"), ("test_ema", "held-out, EMA:"))
    for name, value in result.get(key, {}).items()
  ]
  cards = [
    *scores[:1],
    ("epsilon" + note, statement_lib.rounded_up(result["epsilon"]), void),
    ("delta" + note, f"{result['delta']:.3g}", void),
    ("steps", f"{result['num_steps']:,}", False),
    *scores[1:],
  ]
  badge = "No guarantee" if void else "Guarantee holds"
  useless = ""
  if result.get("held_out_problem"):
    useless = "<span class='badge red'>Model of no use shown</span>"
  inner = "\n".join(
    f"<div class='card{' void' if crossed else ''}'>"
    f"<div class='figure'>{_text(value)}</div>"
    f"<div class='label'>{_text(label)}</div></div>"
    for label, value, crossed in cards
  )
  return (
    "<header><h1>Private training report</h1>"
    f"<span class='badge{' red' if void else ''}'>{badge}</span>{useless}"
    + (f"<p class='label about'>{_text(about)}</p>" if about else "")
    + f"</header>\n<section class='grid'>\n{inner}\n</section>"
  )


def _notices(result: Mapping[str, Any], notices: Sequence[str]) -> str:
  void = _is_void(result)
  lines = list(notices)
  if result.get("held_out_problem"):
    lines.insert(0, result["held_out_problem"])
  if not void and not lines:
    return ""
  title = "Notices"
  if void:
    title = "No privacy guarantee"
    reason = str(result["guarantee"]).removeprefix("void:").strip()
    lines = [reason] + [line for line in lines if line != reason]
  return banner(title, lines, is_red=void)


def banner(title: str, lines: Sequence[str], *, is_red: bool) -> str:
  """Returns a box that cannot be missed."""
  inner = "".join(f"<p>{_text(line)}</p>" for line in lines)
  return (
    f"<section class='notices{' red' if is_red else ''}' role='alert'>"
    f"<strong>{_text(title)}</strong>{inner}</section>"
  )


def table(rows: Sequence[tuple[str, str]]) -> str:
  """Returns a table of names and values."""
  inner = "\n".join(
    f"<tr><th scope='row'>{_text(name)}</th><td"
    f"{' class=digest' if len(value) == 64 else ''}>{_text(value)}</td></tr>"
    for name, value in rows
  )
  return f"<table>\n{inner}\n</table>"


def _origin(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns what the result came from, as far as it is recorded."""
  environment = result.get("environment", {})
  packages = environment.get("packages", {})
  rows = [
    ("parameters, SHA-256", result.get("params_sha256")),
    ("ledger's head", result.get("ledger_head")),
    ("dpdist's code, SHA-256", environment.get("code_sha256")),
    ("packages", ", ".join(f"{k} {v}" for k, v in packages.items())),
    ("Python", environment.get("python")),
    ("devices", environment.get("device_kind")),
    ("processes", environment.get("num_processes")),
    ("to check it", "dpdist verify --workdir=DIR, with the run's directory"),
  ]
  return [(name, str(value)) for name, value in rows if value]


def _numbers(result: Mapping[str, Any]) -> str:
  """Returns the result without the machines, whose paths are private."""
  kept = {k: v for k, v in result.items() if k != "environment"}
  return (
    "<details><summary>All numbers, for programs</summary>"
    f"<pre>{_text(json_fields.text(kept))}</pre></details>"
  )
