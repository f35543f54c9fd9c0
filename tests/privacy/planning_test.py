"""What another epsilon would cost, held against the accountant."""

import dataclasses
import json

import pytest

from dpdist.privacy import plan as plan_lib
from dpdist.privacy import planning
from dpdist.reporting import planning_plot
from tests.support import without_jax

_CONFIG = plan_lib.PrivacyConfig(
  num_examples=5_000,
  expected_batch_size=100,
  num_steps=300,
  l2_clip_norm=0.5,
  target_delta=1e-5,
  target_epsilon=2.0,
  accountant="rdp",
)
_NUMBERS = ("noise_multiplier", "expected_batch_size", "num_steps")


def _epsilon(row, **changes):
  numbers = {name: row[name] for name in _NUMBERS} | changes
  config = dataclasses.replace(_CONFIG, target_epsilon=None, **numbers)
  return plan_lib.make_plan(config).epsilon()


@pytest.mark.parametrize(
  "target", [1.0, pytest.param(3.0, marks=pytest.mark.slow)]
)
def test_each_answer_changes_one_number_and_is_the_best_there_is(target):
  planned, *found = planning.answers(_CONFIG, target)
  assert planned["change"] == "as planned"
  assert [row["change"] for row in found] == list(_NUMBERS)
  # One more step, one more example, or one in the sixth digit less noise.
  more = {
    "noise_multiplier": lambda x: x - 1e-5 * 10 ** (x >= 10),
    "expected_batch_size": lambda x: x + 1,
    "num_steps": lambda x: x + 1,
  }
  for row in found:
    name = row["change"]
    for other in set(_NUMBERS) - {name}:
      assert row[other] == planned[other]
    assert row["epsilon"] == _epsilon(row) <= target
    assert _epsilon(row, **{name: more[name](row[name])}) > target


def test_a_way_that_does_not_reach_the_target_says_so():
  config = dataclasses.replace(
    _CONFIG, noise_multiplier=0.5, target_epsilon=None
  )
  found = {row["change"]: row for row in planning.answers(config, 0.1)}
  assert "num_steps=1 spends epsilon" in found["num_steps"]["problem"]
  assert found["noise_multiplier"]["epsilon"] <= 0.1


@pytest.mark.slow
def test_batches_spend_the_same_and_say_what_they_compute():
  rows = planning.batches(_CONFIG)
  sizes = [row["expected_batch_size"] for row in rows]
  assert sizes == [25, 50, 100, 200, 400, 800, 1600]
  for row in rows:
    assert 1.99 < row["epsilon"] <= 2.0
    assert row["examples_processed"] == row["expected_batch_size"] * 300
    assert row["epochs"] == row["examples_processed"] / 5_000
    assert row["noise_on_mean_gradient"] == pytest.approx(
      row["noise_multiplier"] * 0.5 / row["expected_batch_size"]
    )
  # A larger batch needs more noise, and less for each of its examples.
  for name, sign in (("noise_multiplier", 1), ("noise_on_mean_gradient", -1)):
    values = [sign * row[name] for row in rows]
    assert values == sorted(values)


def test_no_batch_is_larger_than_the_data():
  config = dataclasses.replace(
    _CONFIG, num_examples=2, expected_batch_size=2, num_steps=2
  )
  rows = planning.batches(config, 1.0)
  assert [row["expected_batch_size"] for row in rows] == [1, 2]
  assert all(row["epsilon"] <= 1.0 for row in rows)


@pytest.mark.slow
def test_curves_go_through_the_plan():
  plan = plan_lib.make_plan(_CONFIG)
  found = planning.curves(plan)
  assert list(found) == list(_NUMBERS)
  for name, (xs, epsilons) in found.items():
    rising = list(epsilons if name != "noise_multiplier" else epsilons[::-1])
    assert rising == sorted(rising)
    near = min(range(len(xs)), key=lambda i: abs(xs[i] - getattr(plan, name)))
    assert epsilons[near] == pytest.approx(plan.epsilon(), rel=1e-3)


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_target_is_refused(target):
  with pytest.raises(ValueError, match="target_epsilon must be finite"):
    planning.answers(_CONFIG, target)


def test_a_schedule_is_refused():
  config = dataclasses.replace(_CONFIG, batch_size_schedule=((5, 50.0),))
  with pytest.raises(ValueError, match="batch_size_schedule must be empty"):
    planning.batches(config)


def test_the_plot_is_of_the_format_that_its_name_says(tmp_path):
  plan = plan_lib.make_plan(_CONFIG)
  curves = {name: ([1.0, 2.0], [0.5, 4.0]) for name in _NUMBERS}
  planning_plot.draw(tmp_path / "a.png", plan, curves)
  assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
  planning_plot.draw(tmp_path / "a.svg", plan, curves, 3.0)
  assert "<svg" in (tmp_path / "a.svg").read_text()
  with pytest.raises(
    ValueError, match="plot must be a file that ends in one of"
  ):
    planning_plot.draw(tmp_path / "a.txt", plan, curves)


@pytest.mark.slow
def test_the_command_answers_without_jax(tmp_path):
  command = """
import runpy
sys.argv = ["launch.budget", *sys.argv[1:]]
runpy.run_module("launch.budget", run_name="__main__")
"""
  args = (
    "--config=configs/digits.py",
    "--config.privacy.accountant=rdp",
    "--target_epsilon=3",
    f"--plot={tmp_path / 'budget.png'}",
    "--json",
  )
  done = without_jax.run(command, *args)
  assert done.returncode == 0, done.stderr
  facts = json.loads(done.stdout)
  assert all(row["epsilon"] <= 3 for row in facts["answers"])
  assert (tmp_path / "budget.png").stat().st_size > 10_000
