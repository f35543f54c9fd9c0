"""Nowhere is a person told of an epsilon that is less than the run's."""

import math
import re
import types

import pytest

from dpdist.export import model_card
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import statement
from dpdist.reporting import console
from dpdist.reporting import report
from dpdist.training import summary


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
  with console.Progress(2, 0, epsilon) as progress:
    progress.update(1, epsilon=epsilon, metrics={"test/accuracy": 0.9})
  (line,) = capsys.readouterr().out.splitlines()
  return line.split("epsilon ")[1].split()[0].split("/")


def _statement(epsilon, tmp_path, capsys):
  return [statement.rounded_up(epsilon), statement.rounded_up(epsilon, 4)]


def _card(epsilon, tmp_path, capsys):
  part = plan_lib.PlanUse(_PLAN, 10)
  ledger = types.SimpleNamespace(spent=[part], planned=[part])
  facts = {"epsilon": epsilon, "delta": 1e-5, "guarantee": "holds"}
  text = model_card._privacy(ledger, facts)
  return re.findall(r"\*\*epsilon = (\S+),", text)


_PLAN = plan_lib.make_plan(
  plan_lib.PrivacyConfig(
    **{"num_examples": 1000, "expected_batch_size": 10, "num_steps": 10},
    **{"l2_clip_norm": 1.0, "target_delta": 1e-5, "noise_multiplier": 2.0},
    accountant="rdp",
  )
)


@pytest.mark.parametrize("of", [_page, _end, _progress, _statement, _card])
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
