"""Leaves out cells of a test in most runs, as slow tests are left out."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cells(every: Iterable[Any], *, always: Collection[Any]) -> list[Any]:
  """Returns all cells; those not in `always` come in turn, as slow ones.

  A cell of several values is a tuple.
  """
  found = [*every]
  assert all(cell in found for cell in always), always
  return [
    pytest.param(
      *(cell if isinstance(cell, tuple) else (cell,)),
      marks=[] if cell in always else pytest.mark.slow,
    )
    for cell in found
  ]
