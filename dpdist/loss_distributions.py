"""Privacy loss distributions of steps, and what they compose to.

Those of Koskela, Jalko & Honkela 2020 (arXiv:1906.03049), discretised
pessimistically by connecting the dots (Doroshenko et al. 2022,
arXiv:2207.04380), by dp_accounting. Arguments are taken as checked; see
`dpdist.accounting`.

Imports no jax.
"""

from collections.abc import Sequence
import functools
import math
from typing import TypeAlias

from dp_accounting.pld import pld_pmf
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld import privacy_loss_mechanism
import numpy as np
from scipy import stats

from dpdist import pairs as pairs_lib

# More steps than this are composed in two stages, because the bound that sizes
# the convolution grows with the steps where their square root would do.
_LONG_RUN = 10**5
_TAIL_MASS = 1e-15

Loss: TypeAlias = privacy_loss_distribution.PrivacyLossDistribution


def composed(
  steps: Sequence[tuple[pairs_lib.Pair, int]], epsilon_near: float
) -> Loss:
  """Returns the loss of all steps together, fixed before the first of them.

  Args:
    steps: pairs, and how often each is composed, at least once.
    epsilon_near: about what they come to; the grid follows.
  """
  steps = _gaussians_as_one(steps)
  interval = max(_grid_interval(p, epsilon_near) for p, _ in steps)
  # With many steps, rounding can make a total mass above 1 overflow; the NaN
  # that follows is the caller's to replace.
  with np.errstate(over="ignore", invalid="ignore"):
    losses = [_repeated(pair, count, interval) for pair, count in steps]
    return functools.reduce(lambda a, b: a.compose(b), losses)


def rounding(steps: Sequence[tuple[pairs_lib.Pair, int]]) -> float:
  """Returns by how much rounding may make a delta too small.

  A convolution of many steps is a power of a Fourier transform, whose relative
  error grows with the exponent. Where the transform is near 1 that is an error
  of the mass. A third of this was seen: -1.4e-11 after 10^5 steps.

  Args:
    steps: pairs, and how often each is composed, at least once.
  """
  num_steps = sum(count for _, count in _gaussians_as_one(steps))
  return 0.0 if num_steps == 1 else num_steps * 2.0**-51


def _gaussians_as_one(
  steps: Sequence[tuple[pairs_lib.Pair, int]],
) -> Sequence[tuple[pairs_lib.Pair, int]]:
  """Steps that compose exactly, with no convolution, as the one they are."""
  first = steps[0][0]
  if (
    first.q == 1.0
    and first.kind in ("presence", "exchange")
    and all(pair._replace(sigma=first.sigma) == first for pair, _ in steps)
  ):
    precision = math.fsum(count / pair.sigma**2 for pair, count in steps)
    return [(first._replace(sigma=1 / math.sqrt(precision)), 1)]
  return steps


def _repeated(pair: pairs_lib.Pair, count: int, interval: float) -> Loss:
  step = _step(pair, interval)
  if count == 1:
    return step
  if count <= _LONG_RUN:
    return step.self_compose(count, _TAIL_MASS)
  inner = math.isqrt(count)
  outer, rest = divmod(count, inner)
  # Each of the outer copies brings its own truncated tail.
  loss = step.self_compose(inner, _TAIL_MASS / outer).self_compose(outer)
  if rest:
    loss = loss.compose(step.self_compose(rest))
  return loss


@functools.lru_cache(maxsize=8)
def _step(pair: pairs_lib.Pair, interval: float) -> Loss:
  if pair.kind == "exchange" and pair.q < 1:
    return _exchange(pair.sigma, pair.q, interval)
  if pair.kind == "binomial" and not _has_binomial_loss(pair):
    pair = pair.with_renyi
  if pair.kind == "binomial":
    rows = range(pair.rows + 1)
    return privacy_loss_distribution.from_mixture_gaussian_mechanism(
      pair.sigma,
      [float(k) for k in rows],
      stats.binom.pmf(rows, pair.rows, pair.q).tolist(),
      value_discretization_interval=interval,
    )
  if pair.kind == "truncated":
    make = (
      privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism
    )
    return make(
      pair.num_examples,
      pair.q,
      pair.limit,
      pair.sigma,
      value_discretization_interval=interval,
    )
  return privacy_loss_distribution.from_gaussian_mechanism(
    pair.sigma, value_discretization_interval=interval, sampling_prob=pair.q
  )


def _has_binomial_loss(pair: pairs_lib.Pair) -> bool:
  """Whether dp_accounting can tell the losses of such a pair.

  It takes two losses that differ by less than 1e-8 for the same, so that with
  the tiniest probabilities nothing is left of them, and it looks for their
  places to within 1e-6 of the noise's unit, which much noise has no bits for.
  """
  return pair.rows * pair.q > 1e-7 and pair.sigma < 1e4


def _exchange(sigma: float, q: float, interval: float) -> Loss:
  """See `dpdist.pairs`: the larger of both divergences at every order.

  Of order e^epsilon, that is the one of removing from 0 on, and below 0 that of
  adding.
  """
  remove, add = (
    privacy_loss_mechanism.GaussianPrivacyLoss(
      sigma, sampling_prob=q, adjacency_type=adjacency
    )
    for adjacency in (
      privacy_loss_mechanism.AdjacencyType.REMOVE,
      privacy_loss_mechanism.AdjacencyType.ADD,
    )
  )
  top = math.ceil(remove.connect_dots_bounds().epsilon_upper / interval)
  bottom = math.floor(add.connect_dots_bounds().epsilon_lower / interval)
  epsilons = np.arange(bottom, top + 1) * interval
  deltas = np.maximum(
    remove.get_delta_for_epsilon(epsilons), add.get_delta_for_epsilon(epsilons)
  )
  return privacy_loss_distribution.PrivacyLossDistribution(
    pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
      interval, bottom, top, deltas
    )
  )


def _grid_interval(pair: pairs_lib.Pair, epsilon_near: float) -> float:
  """Returns the spacing of the grid of privacy losses.

  Rounding a loss to a grid of spacing h adds about h^2 / 6 to its variance,
  which is about (q / sigma)^2 or more, and epsilon grows as the root of the
  variance. A fortieth of q / sigma therefore costs about one part in twenty
  thousand, whatever the number of steps; 1e-4 alone costs ten at q=.001.
  Coarser grids are as valid. They are used where a finer one would lose mass
  to rounding (1e-5) or would not fit: a step's losses in 200,000 points, a
  run's in a few million.
  """
  sigma, q = pair.sigma, pair.q
  finest = 1e-4
  if pair.kind == "binomial":
    # Each point takes a search for where its loss is.
    finest = 1e-3
    sigma, q = sigma / pair.rows, min(1.0, q * pair.rows)
  if pair.kind == "truncated":
    sigma /= 2
  exponent = 0.5 / sigma**2 + 10 / sigma  # The loss ten deviations out.
  largest_loss = float(np.logaddexp(0.0, exponent + math.log(q)))
  return max(
    min(finest, pair.q / pair.sigma / 40),
    1e-5,
    largest_loss / 200_000,
    epsilon_near / 1e6,
  )
