"""Computes before training what another epsilon, batch or length would cost.

A plan has three numbers that can be traded for one another: noise, batch and
steps. All results are for the same data set, sampling, unit and delta, by the
plan's own accountant. They follow from public numbers alone, so computing them
spends nothing. Imports no jax.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

from dpdist.accounting import accountants
from dpdist.accounting import search
from dpdist.privacy import plan as plan_lib

# The table's batch sizes, as multiples of the plan's.
_FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16)
_MOST_STEPS = 10**9
_POINTS = 13
_SPAN = 4.0  # A curve goes from the plan's value / 4 to 4 times that value.


def row(plan: plan_lib.PrivacyPlan) -> dict[str, Any]:
  """Returns a plan's epsilon and other numbers, JSON-able.

  "examples_processed" is their mean number, "epochs" that divided by the rows,
  and "noise_on_mean_gradient" the standard deviation of an entry of the noise
  that is added to the mean gradient, if the sensitivity is one clip norm.
  """
  processed = plan.expected_batch_size * plan.num_steps
  size = plan.expected_batch_size / plan.group_size
  return {
    "noise_multiplier": plan.noise_multiplier,
    "expected_batch_size": plan.expected_batch_size,
    "num_steps": plan.num_steps,
    "epsilon": plan.epsilon(),
    "examples_processed": processed,
    "epochs": processed / plan.num_examples,
    "noise_on_mean_gradient": plan.noise_multiplier * plan.l2_clip_norm / size,
  }


def answers(
  config: plan_lib.PrivacyConfig, target_epsilon: float
) -> list[dict[str, Any]]:
  """Returns three ways to another epsilon, each changing one number.

  There are four dicts like those of `row`: the plan ("as planned"), and the
  same with more noise, another batch and another number of steps. "change" says
  which. A way that does not reach the target has only "change" and "problem".
  Raises ArgumentError for a bad target, or a plan with a schedule.
  """
  _check(config, target_epsilon)
  plan = plan_lib.make_plan(config)
  found = [{"change": "as planned", **row(plan)}]
  ways: dict[str, Callable[[], plan_lib.PrivacyPlan]] = {
    "noise_multiplier": lambda: with_noise_for(config, target_epsilon),
    "expected_batch_size": lambda: _largest(
      plan,
      "expected_batch_size",
      plan.num_examples // plan.cycle_length,
      target_epsilon,
      slope=1.0,
    ),
    "num_steps": lambda: _largest(
      plan, "num_steps", _MOST_STEPS, target_epsilon, slope=0.5
    ),
  }
  for name, way in ways.items():
    try:
      found.append({"change": name, **row(way())})
    except ValueError as error:
      found.append({"change": name, "problem": str(error)})
  return found


def batches(
  config: plan_lib.PrivacyConfig, target_epsilon: float | None = None
) -> list[dict[str, Any]]:
  """Returns the noise that each batch size needs for the same epsilon.

  It is that of as many steps, too: dicts as of `row`, for batches from a
  quarter to sixteen times the planned one. Without a target, epsilon is the
  config's own.
  """
  target = target_epsilon or config.target_epsilon
  target = target or plan_lib.make_plan(config).epsilon()
  _check(config, target)
  most = config.num_examples / config.cycle_length
  if config.truncated_batch_size is not None:
    most = min(most, config.truncated_batch_size)
  sizes = {min(most, _whole(config.expected_batch_size * x)) for x in _FACTORS}
  return [
    row(with_noise_for(_with(config, expected_batch_size=size), target))
    for size in sorted(sizes)
  ]


def curves(
  plan: plan_lib.PrivacyPlan,
) -> dict[str, tuple[list[float], list[float]]]:
  """Returns values of each number and their epsilons, with the others fixed."""
  found = {}
  for name, most in (
    ("noise_multiplier", math.inf),
    ("expected_batch_size", plan.num_examples / plan.cycle_length),
    ("num_steps", math.inf),
  ):
    middle = float(getattr(plan, name))
    values = {
      min(most, middle * _SPAN ** (2 * i / (_POINTS - 1) - 1))
      for i in range(_POINTS)
    }
    if name != "noise_multiplier":
      values = {float(_whole(value)) for value in values}
    xs = sorted(values)
    found[name] = (xs, [_with_number(plan, name, x).epsilon() for x in xs])
  return found


def with_noise_for(
  config: plan_lib.PrivacyConfig, target_epsilon: float
) -> plan_lib.PrivacyPlan:
  """Returns the plan with the least noise that spends at most a target."""
  return plan_lib.make_plan(
    _with(config, target_epsilon=target_epsilon, noise_multiplier=None)
  )


def _largest(
  plan: plan_lib.PrivacyPlan,
  name: str,
  most: int,
  target: float,
  *,
  slope: float,
) -> plan_lib.PrivacyPlan:
  """Returns the plan with the largest `name` that spends at most a target."""

  def spent(n: int, kind: str) -> float:
    steps = _with_number(plan, name, n).steps()
    return accountants.epsilon(steps, plan.delta, kind)

  kinds: Sequence[str] = accountants.in_turn(plan.steps(), plan.accountant)
  best = search.calibrate(
    search.Grid(1, most), spent, target, kinds, slope=slope
  )
  if best is None:
    least = spent(1, plan.accountant)
    raise ValueError(f"even {name}=1 spends epsilon {least:.4g}")
  return _with_number(plan, name, best)


def _with_number(
  plan: plan_lib.PrivacyPlan, name: str, value: float
) -> plan_lib.PrivacyPlan:
  number: float = int(value) if name == "num_steps" else float(value)
  changes: dict[str, Any] = {name: number, "target_epsilon": None}
  return dataclasses.replace(plan, **changes)


def _with(
  config: plan_lib.PrivacyConfig, **changes: Any
) -> plan_lib.PrivacyConfig:
  return dataclasses.replace(config, **changes)


def _whole(x: float) -> int:
  return max(1, round(x))


def _check(config: plan_lib.PrivacyConfig, target_epsilon: float) -> None:
  if not 0 < target_epsilon < math.inf:
    raise ValueError(
      f"target_epsilon must be finite and above 0, got {target_epsilon}"
    )
  if config.noise_schedule or config.batch_size_schedule:
    raise ValueError(
      "noise_schedule and batch_size_schedule must be empty to ask what another"
      " epsilon would cost, which changes one number for all steps"
    )
