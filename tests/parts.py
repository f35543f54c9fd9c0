"""Which quarter of what takes long is run with a commit.

Tests of clusters, slow tests and known bugs take hours together and rarely
break. `.ci/run` runs a quarter of each, another one with each commit;
`--part=all`, the default everywhere else, runs them all.
"""

from collections.abc import Sequence
import pathlib
import subprocess
from typing import TypeVar

COUNT = 4
CHOICES = ("all", "commit", *map(str, range(COUNT)))

_T = TypeVar("_T")


def number(part: str, root: pathlib.Path) -> int | None:
  """The number of a part, below COUNT.

  Args:
    part: one of CHOICES.
    root: of the project, whose last commit decides where part is "commit".

  Returns:
    None for all parts together.
  """
  if part == "all":
    return None
  if part != "commit":
    return int(part)
  done = subprocess.run(
    ["git", "rev-parse", "HEAD"],
    cwd=root,
    capture_output=True,
    text=True,
    check=True,
  )
  return int(done.stdout.strip(), 16) % COUNT


def of(things: Sequence[_T], which: int | None) -> Sequence[_T]:
  """Every COUNT-th of some things, from a number on; all of them for None."""
  return things if which is None else things[which::COUNT]
