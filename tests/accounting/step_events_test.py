"""Pairs of distributions, and both accountants, against integrals of them."""

import itertools
import math

from dp_accounting.pld import privacy_loss_distribution as pld_lib
from dp_accounting.rdp import rdp_privacy_accountant
import numpy as np
import pytest
from scipy import special

import dpdist
from dpdist.accounting import accountants
from dpdist.accounting import calibration
from dpdist.accounting import gaussian_events
from dpdist.accounting import step_events

_SIGMA, _Q = 0.8, 0.1
_X = np.linspace(-14, 14, 40_001)


def _event(sigma=_SIGMA, q=_Q, sampling="poisson", **numbers):
  phases = (step_events.Phase(0, sigma, q),)
  ((event, _),) = step_events.steps(
    step_events.Numbers(phases=phases, num_steps=1, **numbers),
    sampling=sampling,
  )
  return event


def _exchange(sigma=_SIGMA, q=_Q):
  return _event(sigma, q, "fixed_size", neighboring_relation="replace_one")


def _density(*parts):
  """Of a mixture, at _X: (weight, mean) each, of deviation _SIGMA."""
  scale = _SIGMA * math.sqrt(2 * math.pi)
  return sum(
    weight * np.exp(-0.5 * ((_X - mean) / _SIGMA) ** 2) / scale
    for weight, mean in parts
  )


def _hockey_stick(p, q, epsilon):
  return np.sum(np.maximum(p - math.exp(epsilon) * q, 0)) * (_X[1] - _X[0])


# What the sum has without the unit, with it, and with another in its place: in
# units of the exchange all of them lie within half a unit of 0.
_WORLDS = [*itertools.product((-0.5, 0.0, 0.5), (-0.5, 0.5), (-0.5, 0.0, 0.5))]


@pytest.mark.parametrize("world", _WORLDS)
def test_no_exchange_is_worse_than_its_pair(world):
  without, mine, other = world
  p = _density((1 - _Q, without), (_Q, mine))
  q = _density((1 - _Q, without), (_Q, other))
  steps = [(_exchange(), 1)]
  orders, divergences = _exchange().rdp()
  for one, two in ((p, q), (q, p)):
    for epsilon in (0.0, 0.1, 0.5, 1.0):
      true = _hockey_stick(one, two, epsilon)
      assert accountants.delta(steps, epsilon, "pld") >= true - 1e-9
    for order in (2, 4, 16):
      logs = order * np.log(one) + (1 - order) * np.log(two)
      moment = np.sum(np.exp(logs)) * (_X[1] - _X[0])
      true = math.log(moment) / (order - 1)
      assert divergences[orders == order][0] >= true - 1e-6


@pytest.mark.parametrize(
  "kind",
  [
    gaussian_events.AddRemove,
    gaussian_events.Replace,
    gaussian_events.ReplaceCoupled,
  ],
)
@pytest.mark.parametrize(
  ("sigma", "q", "wanted"),
  [(0.8, 0.1, (1.5, 2, 5.5, 11)), (4.0, 1e-3, (1.1, 2, 10, 63)),
   (1e4, 0.3, (2, 192, 3 * 2**11))],
)  # fmt: skip
def test_renyi_divergences_are_those_of_the_pair(kind, sigma, q, wanted):
  """By sums over a fine line, of the worse one at every order."""
  orders, divergences = kind(sigma, q).rdp()
  for order in wanted:
    low = 0.5 if kind is gaussian_events.ReplaceCoupled else -10 * sigma
    x = np.arange(low, 2 * order + 10 * sigma, sigma / 2000)
    if kind is gaussian_events.ReplaceCoupled:
      x += sigma / 4000  # Middles of cells from where the losses are 0.
    plain = np.exp(-0.5 * (x / sigma) ** 2)
    logs = [np.log1p(q * np.expm1((m * x - 0.5) / sigma**2)) for m in (1, -1)]
    loss = logs[0] - logs[1] if kind is gaussian_events.Replace else logs[0]
    base = plain * np.exp(logs[1]) if kind is gaussian_events.Replace else plain
    # The moment less 1, and less what adds up to nothing to the first order.
    excess = lambda w, a, loss: np.where(
      a * loss < 300,
      w * (np.expm1(np.minimum(a * loss, 300)) - a * np.expm1(loss)),
      np.exp(np.log(np.maximum(w, 1e-300)) + a * loss),
    )
    total = np.sum(excess(base, order, loss))
    if kind is gaussian_events.ReplaceCoupled:
      total += np.sum(excess(base * np.exp(loss), order, -loss))
    total *= (x[1] - x[0]) / (sigma * math.sqrt(2 * math.pi))
    true = math.log1p(total) / (order - 1)
    found = divergences[orders == order][0]
    assert found == pytest.approx(true, rel=1e-4)
    assert found >= true * (1 - 1e-6)


def _optimistic(adjacency, count):
  """A lower bound of what a true way of exchanging composes to."""
  replace = adjacency == "replace"
  loss = pld_lib.from_gaussian_mechanism(
    _SIGMA * (2 if replace else 1),
    sampling_prob=_Q,
    pessimistic_estimate=False,
    use_connect_dots=False,
    neighboring_relation=(
      pld_lib.NeighborRel.REPLACE_ONE
      if replace
      else pld_lib.NeighborRel.ADD_OR_REMOVE_ONE
    ),
  )
  one, two = loss._pmf_remove, loss._pmf_add
  if adjacency == "in turn":
    return one.self_compose(count // 2).compose(two.self_compose(count // 2))
  return {"remove": one, "add": two, "replace": one}[adjacency].self_compose(
    count
  )


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 40])
def test_composed_exchanges_are_bounded_and_not_loosely(count):
  ours = {
    kind: accountants.epsilon([(_exchange(), count)], 1e-5, kind)
    for kind in ("pld", "rdp")
  }
  true = {
    # "in turn" is what the larger one of adding and removing does not bound.
    name: _optimistic(name, count).get_epsilon_for_delta(1e-5)
    for name in ("remove", "add", "replace", "in turn")
  }
  worst = max(true.values())
  assert worst < ours["pld"] < 1.4 * worst
  assert ours["pld"] < ours["rdp"] < 3 * ours["pld"]


def test_composed_exchanges_are_those_of_the_larger_divergence_at_every_order():
  """The same by integrals, dots connected by hand, and plain convolution."""
  h, count = 0.02, 40
  mixed, plain = _density((1 - _Q, 0.0), (_Q, 1.0)), _density((1.0, 0.0))
  grid = np.arange(-30, 301)  # Nearly all losses of one step.
  deltas = np.array(
    [
      max(
        _hockey_stick(mixed, plain, h * i), _hockey_stick(plain, mixed, h * i)
      )
      for i in grid
    ]
  )
  # Mass so that the divergence is a chord between the orders of the grid.
  rise = np.diff(deltas)
  mass = np.empty_like(deltas)
  mass[0] = 1 - deltas[0] + rise[0] / math.expm1(h)
  mass[1:-1] = (rise[1:] - rise[:-1] * math.exp(h)) / math.expm1(h)
  mass[-1] = rise[-1] / math.expm1(-h)
  total = np.array([1.0])
  for _ in range(count):
    total = np.convolve(total, np.maximum(mass, 0))
  losses = h * (np.arange(total.size) + count * grid[0])
  infinite = 1 - (1 - deltas[-1]) ** count
  spent = lambda e: (
    infinite + np.sum(np.maximum(0, -np.expm1(e - losses)) * total)
  )
  ours = accountants.epsilon([(_exchange(), count)], 1e-5, "pld")
  assert spent(0.99 * ours) > 1e-5 > spent(1.02 * ours)


def test_without_sampling_the_doubled_sensitivity_is_in_the_noise():
  """Figures of dp_accounting for sigma=2 over the clip norm, delta=1e-6."""
  run = {"sampling_probability": 1.0, "num_steps": 1, "delta": 1e-6}
  spent = lambda sigma, **more: calibration.epsilon(
    noise_multiplier=sigma, **run, **more
  )
  assert spent(2.0) == pytest.approx(2.2541, abs=1e-3)
  # Noise of twice the clip norm is as much as the sensitivity of replacing.
  replaced = {"neighboring_relation": "replace_one"}
  assert spent(1.0, **replaced) == pytest.approx(4.8866, abs=1e-3)
  assert spent(1.0, **replaced, accountant="rdp") > 4.8866
  groups = {"group_size": 8, "neighboring_relation": "zero_out"}
  assert spent(2.0, **groups) == pytest.approx(4.8866, abs=1e-3)
  assert spent(2.0, neighboring_relation="zero_out") == spent(2.0)


def test_several_rows_are_a_binomial_mixture():
  run = {"noise_multiplier": 2.0, "num_steps": 10, "delta": 1e-5}
  one = calibration.epsilon(sampling_probability=0.05, **run)
  two = calibration.epsilon(
    sampling_probability=0.05, examples_per_user=2, **run
  )
  assert one < two
  # Never worse than if they were always drawn together, twice as heavy.
  together = calibration.epsilon(
    sampling_probability=0.1, **{**run, "noise_multiplier": 1.0}
  )
  assert two < together
  # All of them at every step: a Gaussian of sensitivity 2.
  always = calibration.epsilon(
    sampling_probability=1.0, examples_per_user=2, **run
  )
  gaussian = calibration.epsilon(
    sampling_probability=1.0, **{**run, "noise_multiplier": 1.0}
  )
  assert always == pytest.approx(gaussian, rel=1e-3)


def test_the_tiniest_probability_of_several_rows_is_not_none():
  """One step's total variation is 1.15e-9, where dp_accounting finds none."""
  run = {"noise_multiplier": 1.0, "sampling_probability": 1e-9, "num_steps": 1}
  assert calibration.epsilon(**run, examples_per_user=3, delta=1.1e-9) > 0
  # And where it finds no end.
  much = {**run, "noise_multiplier": 1e8, "sampling_probability": 1e-3}
  assert calibration.delta(epsilon=0, **much, examples_per_user=3) >= 1.1e-11


def _truncated_worlds(size, limit):
  """With the unit, without it, and with nothing in its place."""
  alone = [math.comb(size - 1, k) * _Q**k * (1 - _Q) ** (size - 1 - k)
           for k in range(size)]  # fmt: skip
  for others in (-1.0, 0.0, 1.0):
    present, nothing = [], []
    for k, weight in enumerate(alone):
      kept = min(1, limit / (k + 1))
      whole, shared = min(k, limit) * others, min(k, limit - 1) * others
      present += [(weight * (1 - _Q * kept), whole)]
      present += [(weight * _Q * kept, shared + 1)]
      nothing += [(weight * (1 - _Q * kept), whole)]
      nothing += [(weight * _Q * kept, shared)]
    absent = [(w, min(k, limit) * others) for k, w in enumerate(alone)]
    yield present, absent
    yield present, nothing


@pytest.mark.slow
@pytest.mark.parametrize(("size", "limit"), [(3, 1), (9, 1), (6, 2)])
def test_no_cut_is_worse_than_its_pair(size, limit):
  event = _event(
    sampling="truncated_poisson",
    num_examples=size,
    truncated_batch_size=limit,
  )
  for world in _truncated_worlds(size, limit):
    one, two = (_density(*mixture) for mixture in world)
    for epsilon in (0.0, 0.2, 1.0, 3.0):
      true = max(_hockey_stick(one, two, epsilon),
                 _hockey_stick(two, one, epsilon))  # fmt: skip
      assert accountants.delta([(event, 1)], epsilon, "pld") >= true - 1e-9
      orders, divergences = event.rdp()
      bound, _ = rdp_privacy_accountant.compute_delta(
        orders, divergences, epsilon
      )
      assert bound >= true - 1e-9


@pytest.mark.parametrize("log_delta", [-5, -12, -60, -200])
def test_what_rounding_may_hide_is_small_beside_the_smallest_delta(log_delta):
  """All but never is anyone left out, so that a formula is the truth."""
  run = {"noise_multiplier": 20.0, "num_steps": 1000}
  drawn = {**run, "sampling_probability": 1 - 1e-9}
  delta = 10.0**log_delta
  epsilon = calibration.epsilon(delta=delta, **drawn)
  mu = math.sqrt(1000) / 20
  above, below = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
  logs = special.log_ndtr([above, below]) + [0, epsilon]
  true = logs[0] + math.log(-math.expm1(logs[1] - logs[0]))
  # The true one is a few millionths smaller, of the noise that is left out.
  assert math.log(delta) - 1e-2 < true < math.log(delta) + 1e-5
  assert calibration.delta(epsilon=epsilon, **drawn) >= math.exp(true - 1e-5)


def test_a_cut_is_dear_unless_it_is_far_out():
  """60,000 examples, batch 256, sigma 1.1; 2.3796 without a cut."""
  run = {
    "noise_multiplier": 1.1,
    "sampling_probability": 256 / 60_000,
    "num_steps": 14_040,
    "delta": 1e-5,
  }
  cut = lambda limit: calibration.epsilon(
    **run,
    sampling="truncated_poisson",
    num_examples=60_000,
    truncated_batch_size=limit,
  )
  whole = calibration.epsilon(**run)
  assert whole == pytest.approx(2.3796, abs=2e-3)
  assert cut(256) == pytest.approx(10.27, abs=0.01)
  assert cut(256 + 5 * 16) == pytest.approx(2.3801, abs=3e-3)
  assert cut(60_000) == whole


def test_turns_are_counted():
  run = {"noise_multiplier": 1.0, "delta": 1e-5, "sampling_probability": 0.4}
  cyclic = {
    "sampling": "cyclic_poisson",
    "cycle_length": 4,
    "neighboring_relation": "zero_out",
  }
  spent = lambda count: calibration.epsilon(num_steps=count, **run, **cyclic)
  assert spent(8) == calibration.epsilon(num_steps=2, **run)
  assert spent(9) == calibration.epsilon(num_steps=3, **run)


_KINDS = {
  "fixed_size": {
    "sampling": "fixed_size",
    "neighboring_relation": "replace_one",
  },
  "cyclic": {
    "sampling": "cyclic_poisson",
    "cycle_length": 2,
    "neighboring_relation": "zero_out",
  },
  "groups": {"group_size": 4, "neighboring_relation": "zero_out"},
}


@pytest.mark.parametrize("kind", _KINDS)
def test_calibrators_never_overspend_and_waste_nothing(kind):
  settings = {"delta": 1e-5, **_KINDS[kind]}
  target = 3.0
  run = {"sampling_probability": 0.1, "num_steps": 20}
  spent = lambda **change: calibration.epsilon(**settings, **run | change)
  sigma = calibration.calibrate_noise_multiplier(
    target_epsilon=target, **settings, **run
  )
  assert spent(noise_multiplier=sigma) <= target
  assert spent(noise_multiplier=sigma * (1 - 2e-5)) > target
  del run["num_steps"]
  steps = calibration.calibrate_num_steps(
    target_epsilon=target, noise_multiplier=sigma, **settings, **run
  )
  at = lambda count: spent(num_steps=count, noise_multiplier=sigma)
  assert at(steps) <= target < at(steps + 1)
  turns = settings.get("cycle_length", 1)
  size = calibration.calibrate_batch_size(
    target_epsilon=target,
    noise_multiplier=sigma,
    num_steps=20,
    num_examples=1000,
    **settings,
  )
  by = lambda size: calibration.epsilon(
    sampling_probability=size * turns / 1000,
    num_steps=20,
    noise_multiplier=sigma,
    **settings,
  )
  assert by(size) <= target < by(size + 1)
  assert size == 100 // turns
  with pytest.raises(ValueError, match=r"target_epsilon must be at least"):
    calibration.calibrate_num_steps(
      target_epsilon=1e-6, noise_multiplier=1.0, **settings, **run
    )


@pytest.mark.slow
def test_noise_for_several_rows_is_calibrated():
  run = {
    "delta": 1e-5,
    "sampling_probability": 0.1,
    "num_steps": 1,
    "examples_per_user": 2,
  }
  sigma = calibration.calibrate_noise_multiplier(target_epsilon=3.0, **run)
  assert calibration.epsilon(noise_multiplier=sigma, **run) <= 3.0
  less = sigma * (1 - 2e-5)
  assert calibration.epsilon(noise_multiplier=less, **run) > 3.0


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_delta_is_the_inverse_of_epsilon(accountant):
  run = {
    "noise_multiplier": 1.2,
    "sampling_probability": 0.02,
    "num_steps": 200,
    "accountant": accountant,
  }
  epsilon = calibration.epsilon(delta=1e-5, **run)
  assert calibration.delta(epsilon=epsilon, **run) == pytest.approx(
    1e-5, rel=1e-2
  )
  assert calibration.delta(epsilon=0.0, **run) < 1
  nothing = {**run, "num_steps": 0}
  assert calibration.delta(epsilon=0.0, **nothing) == 0


@pytest.mark.parametrize("epsilon", [-1, math.inf, math.nan, "1", None, True])
def test_a_bad_epsilon_is_named(epsilon):
  with pytest.raises(ValueError, match=r"^epsilon must be finite and >= 0"):
    calibration.delta(
      epsilon=epsilon,
      noise_multiplier=1.0,
      sampling_probability=0.1,
      num_steps=1,
    )


@pytest.mark.parametrize(
  ("cycle_length", "right"),
  [*[(x, "an integer >= 1") for x in (0, -1, "2", None)],
   (101, "at most num_examples=100")],
)  # fmt: skip
def test_a_bad_cycle_is_named_when_batches_are_calibrated(cycle_length, right):
  with pytest.raises(ValueError, match=rf"^cycle_length must be {right}"):
    calibration.calibrate_batch_size(
      target_epsilon=1.0,
      delta=1e-5,
      noise_multiplier=5.0,
      num_steps=10,
      num_examples=100,
      sampling="cyclic_poisson",
      cycle_length=cycle_length,
      neighboring_relation="zero_out",
    )


def test_settings_without_a_proof_are_refused_for_no_step_too():
  with pytest.raises(ValueError, match=r"^sampling must be one of"):
    calibration.calibrate_noise_multiplier(
      target_epsilon=1.0,
      delta=1e-5,
      sampling_probability=0.1,
      num_steps=0,
      sampling="shuffled",
    )


def test_a_curve_falls():
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=1000,
      expected_batch_size=50,
      num_steps=100,
      l2_clip_norm=1.0,
      target_delta=1e-5,
      noise_multiplier=1.0,
    )
  )
  curve = plan.curve([1e-3, 1e-5, 1e-7])
  assert curve[1] == plan.epsilon()
  assert curve == sorted(curve)
  assert curve[0] < curve[-1]
  with pytest.raises(ValueError, match=r"deltas must be in \(0, 1\), got 1"):
    plan.curve([1])
  with pytest.raises(ValueError, match=r"deltas must be .* got '1e-5'"):
    plan.curve(["1e-5"])


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"sampling": "shuffled"}, "sampling must be one of .* got 'shuffled'"),
    ({"sampling": "fixed_size"}, "must be 'replace_one' with .*'fixed_size'"),
    ({"truncated_batch_size": 5}, "truncated_batch_size must be None with"),
    ({"sampling": "truncated_poisson"}, "truncated_batch_size must be given"),
    (
      {"sampling": "truncated_poisson", "truncated_batch_size": 5},
      "num_examples must be given",
    ),
    ({"cycle_length": 2}, "cycle_length must be 1 with sampling='poisson'"),
    (
      {"group_size": 2},
      "'zero_out' or 'replace_one' with group_size above 1",
    ),
    (
      {"sampling": "cyclic_poisson", "cycle_length": 2},
      "'zero_out' or 'replace_one' with cycle_length above 1",
    ),
    ({"examples_per_user": 0}, "examples_per_user must be .* >= 1, got 0"),
    (
      {
        "examples_per_user": 2,
        "group_size": 2,
        "neighboring_relation": "zero_out",
      },
      "group_size must be 1 with examples_per_user",
    ),
    (
      {"examples_per_user": 2, "neighboring_relation": "replace_one"},
      "must be 'add_or_remove_one' or 'zero_out'",
    ),
    (
      {"examples_per_user": 2, "accountant": "rdp"},
      "accountant must be 'pld' with examples_per_user above 1, got 'rdp'",
    ),
  ],
)
def test_settings_without_a_proof_are_refused(settings, message):
  run = {
    "noise_multiplier": 1.0,
    "sampling_probability": 0.1,
    "num_steps": 2,
    "delta": 1e-5,
  }
  with pytest.raises(ValueError, match=message):
    calibration.epsilon(**run | settings)
