"""A model that is no better than a constant is called so, wherever it is shown.

What it costs in privacy is as it was: the guarantee is another matter.
"""

import numpy as np
import pytest

from dpdist.reporting import report
from dpdist.tasks import chance
from dpdist.training import summary

_TARGETS = np.array([0, 0, 0, 1])
_ENTROPY = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)


@pytest.mark.parametrize(
  ("accuracy", "loss", "part"),
  [
    (0.5, float("nan"), "loss is nan"),
    (1.0, float("inf"), "loss is inf"),
    (0.75, _ENTROPY, "accuracy 0.7500, where always"),
    (0.1, 9.0, "loss 9.0000, where the labels' frequencies have 0.5623"),
  ],
)
def test_no_better_than_a_constant_guess_is_said(accuracy, loss, part):
  assert part in chance.problem({"accuracy": accuracy, "loss": loss}, _TARGETS)


@pytest.mark.parametrize(
  ("accuracy", "loss"), [(0.76, 9.0), (0.1, 0.56), (1.0, 0.0)]
)
def test_better_in_one_is_better(accuracy, loss):
  scores = {"accuracy": accuracy, "loss": loss}
  assert chance.problem(scores, _TARGETS) == ""


def test_padding_is_no_label():
  padded = np.array([[0, 0, -1, -1], [0, 1, -1, -1]])
  scores = {"accuracy": 0.75, "loss": _ENTROPY}
  assert "0.7500, and loss" in chance.problem(scores, padded)
  assert chance.problem(scores, np.full((2, 3), -1)) == ""


def _result(problem):
  return {
    **{"epsilon": 1.0, "delta": 1e-5, "num_steps": 9, "guarantee": "holds"},
    "test": {"accuracy": 0.1, "loss": 9.0},
    "held_out_problem": problem,
  }


@pytest.mark.parametrize("problem", ["", "no better than a guess"])
def test_the_report_and_the_end_table_say_it(tmp_path, problem):
  path = report.write(
    tmp_path, result=_result(problem), statement="", rows=[], notices=[]
  )
  page = path.read_text()
  assert "Guarantee holds" in page
  assert ("Model of no use shown" in page) == bool(problem)
  assert ("<p>no better than a guess</p>" in page) == bool(problem)
  rows = dict(summary.end_rows(_result(problem), tmp_path))
  assert rows["guarantee"] == "holds"
  assert rows.get("WARNING", "") == problem
