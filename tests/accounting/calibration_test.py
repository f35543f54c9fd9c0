"""Epsilon against published numbers, and calibration that never overspends."""

import math
import subprocess
import sys

import dp_accounting
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import optimize
from scipy import stats

from dpdist.accounting import accountants
from dpdist.accounting import calibration
from dpdist.accounting import loss_grid
from dpdist.accounting import pld as pld_lib
from dpdist.accounting import rdp as rdp_lib
from dpdist.accounting import step_events

# (sampling probability, noise multiplier, steps, delta), epsilon by RDP and by
# PLD to four decimals. All were computed apart from this project. The last but
# one is a setting of De et al. 2022 for CIFAR-10; the last has a closed form.
_KNOWN = [
  ((256 / 60_000, 1.1, 14_040, 1e-5), 2.5944, 2.3796),
  ((256 / 60_000, 1.3, 3_510, 1e-5), 0.9538, 0.8638),
  ((150 / 60_000, 1.3, 6_000, 1e-5), 0.7242, 0.6400),
  ((100 / 100_000, 1.0, 30_000, 1e-7), 1.4155, 1.0977),
  ((0.01, 0.7, 120, 1e-5), 3.2392, 2.4612),
  ((0.04, 1.5, 2_250, 1e-5), 7.3291, 6.7688),
  ((0.1, 3, 512, 1e-6), 4.0510, 3.7697),
  ((4_096 / 50_000, 10, 875, 1e-5), 0.9877, 0.9028),
  ((1, 1, 1, 1e-5), 4.7285, 4.3772),
]

# Small enough that a query costs milliseconds.
_RUN = {"sampling_probability": 0.08, "num_steps": 500, "delta": 1e-5}
_BOTH = pytest.mark.parametrize("accountant", ["pld", "rdp"])


def _epsilon(run=None, **changes):
  return calibration.epsilon(
    **{"noise_multiplier": 8.0, **(run or _RUN), **changes}
  )


def _event(noise_multiplier, sampling_probability, num_steps):
  phase = step_events.Phase(0, noise_multiplier, sampling_probability)
  numbers = step_events.Numbers(phases=(phase,), num_steps=num_steps)
  return accountants.event(step_events.steps(numbers))


def _gaussian_epsilon(sigma, delta):
  """Epsilon of one Gaussian mechanism: Balle & Wang 2018, Theorem 8."""

  def excess(epsilon):
    a, b = 1 / (2 * sigma), epsilon * sigma
    return (
      stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b) - delta
    )

  return optimize.brentq(excess, 0, 100, xtol=1e-12)


@pytest.mark.parametrize(("run", "rdp", "pld"), _KNOWN)
def test_known_values(run, rdp, pld):
  names = "sampling_probability", "noise_multiplier", "num_steps", "delta"
  kwargs = dict(zip(names, run, strict=True))
  assert round(calibration.epsilon(**kwargs, accountant="rdp"), 4) == rdp
  assert round(calibration.epsilon(**kwargs, accountant="pld"), 4) == pld
  assert calibration.epsilon(**kwargs) == calibration.epsilon(
    **kwargs, accountant="pld"
  )


@pytest.mark.parametrize(
  ("sigma", "num_steps", "delta"),
  [(1, 1, 1e-5), (4, 1, 1e-5), (5, 100, 1e-6), (0.3, 1, 1e-3), (30, 9, 1e-9)],
)
def test_without_sampling_pld_is_the_closed_form(sigma, num_steps, delta):
  exact = _gaussian_epsilon(sigma / math.sqrt(num_steps), delta)
  run = {"sampling_probability": 1, "num_steps": num_steps, "delta": delta}
  pld = _epsilon(run, noise_multiplier=sigma)
  rdp = _epsilon(run, noise_multiplier=sigma, accountant="rdp")
  assert pld == pytest.approx(exact, rel=1e-4)
  assert pld >= exact * (1 - 1e-9)
  assert rdp > exact


def test_closed_form_of_the_textbook_case():
  assert _gaussian_epsilon(1, 1e-5) == pytest.approx(4.37718, abs=5e-6)


def test_event_means_the_same_to_dp_accounting():
  event = _event(8.0, 0.08, num_steps=500)
  rdp = dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(1e-5)
  pld = dp_accounting.pld.PLDAccountant().compose(event).get_epsilon(1e-5)
  assert _epsilon(accountant="rdp") == pytest.approx(rdp, rel=1e-12)
  assert _epsilon(accountant="pld") == pytest.approx(pld, rel=1e-4)


def test_events():
  gaussian = dp_accounting.GaussianDpEvent(2.0)
  sampled = dp_accounting.PoissonSampledDpEvent(0.5, gaussian)
  for q, event in ((0.5, sampled), (1, gaussian)):
    repeated = dp_accounting.SelfComposedDpEvent(event, 3)
    assert _event(2.0, q, num_steps=3) == repeated
  assert _event(2.0, 1, num_steps=0) == dp_accounting.NoOpDpEvent()


@_BOTH
def test_no_step_spends_nothing_and_no_noise_spends_all(accountant):
  for sigma in (0, 0.0, 1e-200, 1):
    assert _epsilon(
      num_steps=0, noise_multiplier=sigma, accountant=accountant
    ) == (0.0)
  for sigma in (0, 0.0, 1e-200):
    assert _epsilon(noise_multiplier=sigma, accountant=accountant) == math.inf


def test_plain_floats_whatever_comes_in():
  changes = {
    "noise_multiplier": np.float32(8),
    "num_steps": np.int32(500),
    "delta": np.float64(1e-5),
  }
  for accountant in ("pld", "rdp"):
    found = _epsilon(**changes, accountant=accountant)
    assert type(found) is float
    assert found == _epsilon(accountant=accountant)
    assert type(_epsilon(accountant=accountant, num_steps=0)) is float


def test_pld_is_never_above_rdp():
  # Where the grid of losses is too coarse, out of range, or far too long.
  for run in (
    {"sampling_probability": 1.6e-5, "num_steps": 344_853, "delta": 2e-5},
    {"sampling_probability": 0.01, "num_steps": 100, "delta": 1e-17},
    {"sampling_probability": 0.5, "num_steps": 10**9, "delta": 1e-5},
  ):
    pld, rdp = _epsilon(run), _epsilon(run, accountant="rdp")
    assert 0 < pld <= rdp < math.inf


def test_vanishing_divergences_are_not_taken_for_none():
  # One step's divergences are 2e-23, where dp_accounting computes -2e-22 and
  # then reports epsilon 0. The sum of the steps is that of one Gaussian.
  spent = _epsilon(
    {"sampling_probability": 1e-9, "num_steps": 10**20, "delta": 1e-9},
    noise_multiplier=100.0,
    accountant="rdp",
  )
  sigma = 100.0 / (1e-9 * 1e10)
  assert spent == pytest.approx(
    calibration.epsilon(
      noise_multiplier=sigma,
      sampling_probability=1,
      num_steps=1,
      delta=1e-9,
      accountant="rdp",
    ),
    rel=1e-3,
  )


@pytest.mark.parametrize(
  # So near to the smallest delta that the grid can tell, rounding shows.
  ("delta", "tolerance"),
  [(1e-6, 1e-4), (2e-13, 0.02)],
)
def test_long_runs_compose_like_short_ones(delta, tolerance):
  # 100,000 steps are composed at once and one more in two stages.
  run = {"sampling_probability": 1e-3, "delta": delta}
  near, far = (
    _epsilon(run, noise_multiplier=10.0, num_steps=10**5 + extra)
    for extra in (0, 1)
  )
  assert far == pytest.approx(near, rel=tolerance)
  assert far != near


def test_queries_leave_each_other_alone():
  runs = [
    (steps, delta, accountant)
    for accountant in ("pld", "rdp")
    for steps in (1, 500, 7, 250)
    for delta in (1e-5, 1e-7)
  ]
  spent = lambda steps, delta, accountant: _epsilon(
    num_steps=steps, delta=delta, accountant=accountant
  )
  forwards = [spent(*run) for run in runs]
  for cache in (
    accountants._epsilon,
    rdp_lib.step_divergences,
    loss_grid.summed,
    pld_lib._roughly,
    pld_lib._rough_moments,
  ):
    cache.cache_clear()
  backwards = [spent(*run) for run in reversed(runs)]
  assert forwards == backwards[::-1]


@pytest.mark.slow
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
  sigma=st.floats(4, 30),
  q=st.floats(0.01, 0.5),
  steps=st.integers(1, 1000),
  log_delta=st.floats(-8, -3),
  accountant=st.sampled_from(["pld", "rdp"]),
)
def test_epsilon_is_monotone(sigma, q, steps, log_delta, accountant):
  run = {
    "noise_multiplier": sigma,
    "sampling_probability": q,
    "num_steps": steps,
    "delta": 10**log_delta,
    "accountant": accountant,
  }
  base = calibration.epsilon(**run)
  for change in (
    {"noise_multiplier": 0.9 * sigma},
    {"sampling_probability": 1.1 * q},
    {"num_steps": steps + 1 + steps // 10},
    {"delta": 0.5 * 10**log_delta},
  ):
    assert calibration.epsilon(**{**run, **change}) >= base


# --- Calibration --------------------------------------------------------------

_TARGETS = [0.3, 1.0, 3.0]


@_BOTH
@pytest.mark.parametrize("target", _TARGETS)
@pytest.mark.parametrize("q", [0.08, 1.0])
def test_noise_multiplier_is_the_least_that_fits(target, q, accountant):
  run = {**_RUN, "sampling_probability": q, "accountant": accountant}
  sigma = calibration.calibrate_noise_multiplier(target_epsilon=target, **run)
  assert type(sigma) is float
  assert float(f"{sigma:.6g}") == sigma
  less = sigma - 10.0 ** (math.floor(math.log10(sigma)) - 5)
  spent = calibration.epsilon(noise_multiplier=sigma, **run)
  assert target * (1 - 1e-4) < spent <= target
  assert calibration.epsilon(noise_multiplier=less, **run) > target


@_BOTH
@pytest.mark.parametrize("target", _TARGETS)
def test_num_steps_is_the_largest_that_fits(target, accountant):
  run = {
    "noise_multiplier": 6.0,
    "sampling_probability": 0.05,
    "delta": 1e-5,
    "accountant": accountant,
  }
  steps = calibration.calibrate_num_steps(target_epsilon=target, **run)
  assert type(steps) is int
  assert calibration.epsilon(num_steps=steps, **run) <= target
  assert calibration.epsilon(num_steps=steps + 1, **run) > target


@_BOTH
@pytest.mark.parametrize("target", _TARGETS)
def test_batch_size_is_the_largest_that_fits(target, accountant):
  run = {
    "noise_multiplier": 9.0,
    "num_steps": 400,
    "delta": 1e-5,
    "accountant": accountant,
  }
  batch = calibration.calibrate_batch_size(
    target_epsilon=target, num_examples=3000, **run
  )
  assert type(batch) is int
  at = lambda size: calibration.epsilon(sampling_probability=size / 3000, **run)
  assert at(batch) <= target < at(batch + 1)


@_BOTH
def test_calibration_finds_its_way_back(accountant):
  run = {**_RUN, "noise_multiplier": 8.0, "accountant": accountant}
  target = calibration.epsilon(**run)
  without = lambda *names: {k: v for k, v in run.items() if k not in names}
  assert (
    calibration.calibrate_noise_multiplier(
      target_epsilon=target, **without("noise_multiplier")
    )
    == 8.0
  )
  assert (
    calibration.calibrate_num_steps(
      target_epsilon=target, **without("num_steps")
    )
    == 500
  )
  assert (
    calibration.calibrate_batch_size(
      target_epsilon=target,
      num_examples=1000,
      **without("sampling_probability"),
    )
    == 80
  )


@_BOTH
def test_the_whole_data_set_may_fit(accountant):
  kwargs = {
    "target_epsilon": 5.0,
    "delta": 1e-5,
    "noise_multiplier": 50.0,
    "num_examples": 1000,
    "accountant": accountant,
  }
  assert calibration.calibrate_batch_size(**kwargs, num_steps=10) == 1000
  assert calibration.calibrate_batch_size(**kwargs, num_steps=0) == 1000


@_BOTH
def test_a_data_set_too_small_by_one(accountant):
  kwargs = {
    "delta": 1e-5,
    "noise_multiplier": 20.0,
    "num_steps": 100,
    "accountant": accountant,
  }
  target = calibration.epsilon(**kwargs, sampling_probability=0.95)
  assert (
    calibration.calibrate_batch_size(
      target_epsilon=target, num_examples=10, **kwargs
    )
    == 9
  )


@_BOTH
def test_no_step_needs_no_noise(accountant):
  run = {**_RUN, "num_steps": 0, "accountant": accountant}
  assert calibration.calibrate_noise_multiplier(target_epsilon=1, **run) == 0.0


@_BOTH
@pytest.mark.parametrize("sigma", [0, 0.5])
def test_a_single_step_or_example_that_overspends(sigma, accountant):
  kwargs = {
    "target_epsilon": 0.01,
    "delta": 1e-9,
    "noise_multiplier": sigma,
    "accountant": accountant,
  }
  with pytest.raises(ValueError, match=r"target_epsilon .* one step .* 0\.01"):
    calibration.calibrate_num_steps(**kwargs, sampling_probability=0.5)
  with pytest.raises(ValueError, match=r"target_epsilon .* batch .* 0\.01"):
    calibration.calibrate_batch_size(**kwargs, num_examples=2, num_steps=9)


@_BOTH
def test_more_steps_than_anyone_takes(accountant):
  with pytest.raises(ValueError, match=r"target_epsilon .* 1000000000 steps"):
    calibration.calibrate_num_steps(
      target_epsilon=8,
      delta=1e-5,
      noise_multiplier=100,
      sampling_probability=1e-6,
      accountant=accountant,
    )


def test_runs_too_long_for_convolutions_have_the_other_bound():
  given = {
    "noise_multiplier": 10.0,
    "sampling_probability": 1e-6,
    "num_steps": 10**13,
    "delta": 0.01,
  }
  bounds = [
    calibration.epsilon(**given, accountant=name) for name in ("pld", "rdp")
  ]
  assert bounds[0] == bounds[1]
  assert 0 < bounds[0] < calibration.epsilon(**given, examples_per_user=2)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [1e-99, 1e-3, 0.05, 1e15])
@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"neighboring_relation": "replace_one"},
    {"sampling": "fixed_size", "neighboring_relation": "replace_one"},
    {"examples_per_user": 3},
    {
      "sampling": "truncated_poisson",
      "num_examples": 50,
      "truncated_batch_size": 10,
    },
  ],
)
def test_there_is_a_bound_at_the_ends_of_all_ranges(settings, sigma):
  for q, num_steps in ((1e-300, 1), (1e-12, 10**20), (1.0, 1)):
    run = {"noise_multiplier": sigma, "sampling_probability": q}
    run |= {"num_steps": num_steps, **settings}
    assert calibration.epsilon(delta=1e-6, **run) >= 0
    assert 0 <= calibration.delta(epsilon=1.0, **run) <= 1


def test_no_noise_is_enough():
  with pytest.raises(ValueError, match=r"target_epsilon .* noise_multiplier"):
    calibration.calibrate_noise_multiplier(
      target_epsilon=1e-20,
      delta=1e-30,
      sampling_probability=1,
      num_steps=10**6,
      accountant="rdp",
    )


# --- Arguments ----------------------------------------------------------------

_BAD = [
  *[("noise_multiplier", x) for x in (-1, math.inf, math.nan, "1", None, True)],
  *[("sampling_probability", x) for x in (0, -0.1, 1.1, math.nan, True, None)],
  *[("num_steps", x) for x in (-1, 1.0, math.nan, "3", True, None)],
  *[("delta", x) for x in (0, 1, -1e-5, 1.5, math.nan, math.inf, "x", None)],
  *[("target_epsilon", x) for x in (0, -1, math.inf, math.nan, None, False)],
  *[("num_examples", x) for x in (0, -5, 10.0, math.nan, True, None)],
  *[("accountant", x) for x in ("prv", "PLD", "", None, 1)],
]

_GOOD = {
  "noise_multiplier": 1.0,
  "sampling_probability": 0.1,
  "num_steps": 10,
  "delta": 1e-5,
  "target_epsilon": 1.0,
  "num_examples": 100,
  "accountant": "pld",
}
_ARGUMENTS = {
  calibration.epsilon: _GOOD.keys() - {"target_epsilon", "num_examples"},
  calibration.calibrate_noise_multiplier: _GOOD.keys()
  - {"noise_multiplier", "num_examples"},
  calibration.calibrate_num_steps: _GOOD.keys() - {"num_steps", "num_examples"},
  calibration.calibrate_batch_size: _GOOD.keys() - {"sampling_probability"},
}


@pytest.mark.parametrize(
  ("function", "name", "value"),
  [
    (function, name, value)
    for function, names in _ARGUMENTS.items()
    for name, value in _BAD
    if name in names
  ],
)
def test_bad_arguments_are_named(function, name, value):
  kwargs = {n: _GOOD[n] for n in _ARGUMENTS[function]}
  with pytest.raises(ValueError, match=rf"^{name} must be ") as caught:
    function(**{**kwargs, name: value})
  assert str(caught.value).endswith(f"got {value!r}")


def test_never_imports_jax():
  code = (
    "import sys; sys.modules['jax'] = None;"
    "from dpdist.accounting import calibration;"
    "from dpdist.privacy import plan"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
