"""Samples that are cut, against every draw there can be, one by one."""

import itertools
import math

import numpy as np
import pytest

from dpdist.accounting import calibration
from dpdist.privacy import plan as plan_lib

_X = np.linspace(-40, 40, 16_001)


def _plan(num_examples, q, limit, sigma, **changes):
  return plan_lib.make_plan(
    plan_lib.PrivacyConfig(
      **{
        "num_examples": num_examples,
        "expected_batch_size": q * num_examples,
        "num_steps": 1,
        "l2_clip_norm": 1.0,
        "target_delta": 1e-5,
        "noise_multiplier": sigma,
        "sampling": "truncated_poisson",
        "truncated_batch_size": limit,
        **changes,
      }
    )
  )


def _sums(gradients, q, limit):
  """What may be summed, and how probably, by going through all draws."""
  found = {}
  rows = range(len(gradients))
  for drawn in itertools.product((False, True), repeat=len(gradients)):
    chosen = [i for i in rows if drawn[i]]
    weight = q ** len(chosen) * (1 - q) ** (len(gradients) - len(chosen))
    kept = list(itertools.combinations(chosen, min(limit, len(chosen))))
    for rest in kept if weight else ():
      total = sum(gradients[i] for i in rest)
      found[total] = found.get(total, 0) + weight / len(kept)
  return found


def _delta(one, two, sigma, epsilon):
  """The hockey-stick divergence of two mixtures, summed over a line."""
  p, q = (
    sum(
      weight * np.exp(-0.5 * ((_X - mean) / sigma) ** 2)
      for mean, weight in mixture.items()
    )
    for mixture in (one, two)
  )
  scale = (_X[1] - _X[0]) / (sigma * math.sqrt(2 * math.pi))
  return scale * np.sum(np.maximum(p - math.exp(epsilon) * q, 0))


@pytest.mark.parametrize(
  ("num_examples", "q", "limit", "sigma"),
  [(4, 1.0, 4, 1.0), (5, 0.9, 5, 2.0), (5, 0.5, 2, 1.0), (4, 0.9, 1, 1.0),
   (6, 0.95, 7, 1.0)],
)  # fmt: skip
def test_no_neighbour_of_a_row_more_or_less_is_told_apart_better_than_stated(
  num_examples, q, limit, sigma
):
  plan = _plan(num_examples, q, limit, sigma)
  stated = plan.epsilon()
  for size in (num_examples, num_examples + 1):
    for others in (-1.0, 0.0, 1.0):
      most = _sums([1.0] + [others] * (size - 1), q, limit)
      least = _sums([others] * (size - 1), q, limit)
      for one, two in ((most, least), (least, most)):
        assert _delta(one, two, sigma, stated) <= plan.delta * (1 + 1e-4)


def test_a_batch_is_calibrated_for_a_neighbour_of_a_row_more():
  run = {"noise_multiplier": 4.0, "num_steps": 3, "delta": 1e-5}
  cut = {"sampling": "truncated_poisson", "truncated_batch_size": 10}
  target = _plan(10, 0.7, 10, 4.0, num_steps=3).epsilon()
  size = calibration.calibrate_batch_size(
    target_epsilon=target, num_examples=10, **run, **cut
  )
  assert size == 7
