"""Nowhere is a person told of an epsilon that is less than the run's."""

import math
import re

import pytest

from dpdist import report
from dpdist import screen
from dpdist import statements
from dpdist import summary


def _result(epsilon):
  return {
    **{"epsilon": epsilon, "delta": 1e-5, "num_steps": 9},
    **{"guarantee": "holds", "test": {"accuracy": 0.9, "loss": 0.1}},
  }


def _page(epsilon, tmp_path, capsys):
  path = report.write(
    tmp_path, result=_result(epsilon), statement="", rows=[], notices=[]
  )
  label = r"<div class='figure'>(\S+)</div><div class='label'>epsilon</div>"
  return re.findall(label, path.read_text())


def _end(epsilon, tmp_path, capsys):
  return [dict(summary.end_rows(_result(epsilon), tmp_path))["epsilon"]]


def _progress(epsilon, tmp_path, capsys):
  with screen.Progress(2, 0, epsilon) as progress:
    progress.update(1, epsilon=epsilon, metrics={"test/accuracy": 0.9})
  (line,) = capsys.readouterr().out.splitlines()
  return line.split("epsilon ")[1].split()[0].split("/")


def _statement(epsilon, tmp_path, capsys):
  return [statements.rounded_up(epsilon), statements.rounded_up(epsilon, 4)]


@pytest.mark.parametrize("of", [_page, _end, _progress, _statement])
@pytest.mark.parametrize(
  "epsilon", [2.00004, 1.99996, 2.0, 0.12345678, 37.00001, 0.0, math.inf]
)
def test_what_is_told_of_an_epsilon_is_no_less_than_it(
  of, epsilon, tmp_path, capsys
):
  told = [float(text.split()[0]) for text in of(epsilon, tmp_path, capsys)]
  assert told
  for number in told:
    assert epsilon <= number <= max(1.001 * epsilon, epsilon + 1.001e-3)
