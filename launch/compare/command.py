"""Puts runs side by side on one page, and prints their table. Imports no jax.

dpdist compare runs/a runs/b --out=compare.html
"""

import argparse
import pathlib

from ..cli import exit_codes
from ..cli import messages
from ..cli import words


def parser() -> argparse.ArgumentParser:
  """Returns what reads the command line."""
  parser = argparse.ArgumentParser(
    prog=words.shown("dpdist compare"),
    description="Puts runs side by side on one page: accuracy against epsilon.",
  )
  parser.add_argument("workdir", nargs="+", help="the directory of a run")
  parser.add_argument(
    "--out", default="compare.html", help="the page (default: %(default)s)"
  )
  return parser


def main() -> int:
  """Returns an exit code."""
  arguments = parser().parse_args()
  # Imported here: plots take longer than to read a command line.
  from dpdist.reporting import compare

  out = pathlib.Path(arguments.out)
  if not out.absolute().parent.is_dir():
    parser().error(f"--out must be in a directory that is there, got {out}")
  try:
    runs = compare.read(arguments.workdir)
  except ValueError as error:
    return messages.show(messages.Message(str(error), exit_codes.USAGE))
  rows = compare.table(runs, compare.metric_of(runs))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    cells = (x.ljust(width) for x, width in zip(row, widths, strict=True))
    print("  ".join(cells).rstrip())
  print(f"page: {compare.write(runs, out)}")
  return exit_codes.DONE
