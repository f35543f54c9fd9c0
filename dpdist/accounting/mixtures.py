"""The pairs of distributions that dominate a step, and their privacy losses.

An event of `dpdist.accounting.step_events` has one direction, or two where
adding a unit and removing it differ. A direction is a mixture of sides; an
observer may be assumed to know which side a step is on. A side is P against Q:
two mixtures of Gaussians on a line, whose likelihood ratio rises along it.
Steps compose by the distribution under P of the loss log P/Q.

Here that distribution is made of atoms. The line is cut into bins, and the mass
of P and Q in a bin is moved to the losses at its ends, so that both masses are
kept. That spreads the ratio within a bin, which makes P and Q no harder to tell
apart at any order (Doroshenko et al. 2022, arXiv:2207.04380). So atoms are an
upper bound.

Imports no jax.
"""

import functools
import math
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy import special
from scipy import stats

# The most bins of a side. Where these are too few, losses are rounded up.
_MOST_BINS = 2**18
# In a bin with losses further apart, three nodes are too few: round them up.
_FAR = 0.1
# Smaller weights of `binomial` are left out: they are below anyone's delta.
_TINY = 1e-300
# SciPy's binomial tails: a bound on their relative error; the smallest used.
_UP, _RARE = 1 + 1e-11, 1e-280
_NODES = np.array([-math.sqrt(0.6), 0.0, math.sqrt(0.6)])
_WEIGHTS = np.array([5.0, 8.0, 5.0]) / 18

Mixture: TypeAlias = tuple[tuple[float, float], ...]  # Weights and means.


class Side(NamedTuple):
  """Two mixtures of Gaussians, P against Q."""

  share: float  # The probability of the side, in (0, 1].
  p: Mixture  # Weights and means of P; no mean is below any of Q's.
  q: Mixture  # Weights and means of Q.
  sigma: float  # Standard deviation of every Gaussian.
  # Whether every order takes the larger divergence of the two directions, which
  # for orders above 1 is that of P against Q.
  is_folded: bool = False

  @property
  def reach(self) -> float:
    """Returns the largest distance of two means."""
    return max(m for _, m in self.p) - min(m for _, m in self.q)


Direction: TypeAlias = tuple[Side, ...]


class Atoms(NamedTuple):
  """A discrete distribution of losses."""

  losses: np.ndarray  # [n] float64.
  masses: np.ndarray  # [n] float64.
  infinite: float  # Mass of an infinite loss.


def _two(q: float, mean: float) -> Mixture:
  return ((1 - q, 0.0), (q, mean)) if q < 1 else ((1.0, mean),)


def shifted(sigma: float, q: float, mean: float = 1.0) -> Side:
  """Returns noise that is moved with probability q, against noise alone."""
  return Side(1.0, _two(q, mean), ((1.0, 0.0),), sigma)


def folded(sigma: float, q: float, mean: float = 1.0) -> Side:
  """Returns `shifted`, of which every order takes the worse direction."""
  return shifted(sigma, q, mean)._replace(is_folded=True)


def opposite(sigma: float, q: float) -> Side:
  """Returns noise that is moved to one side, against the other side."""
  return Side(1.0, _two(q, 1.0), _two(q, -1.0), sigma)


def binomial(sigma: float, q: float, num_rows: int) -> Side:
  """Returns noise on as many of the rows as are drawn, against noise alone."""
  rows = range(num_rows + 1)
  weights = stats.binom.pmf(rows, num_rows, q).tolist()
  mixture = tuple(
    (w, float(k)) for w, k in zip(weights, rows, strict=True) if w > _TINY
  )
  return Side(1.0, mixture, ((1.0, 0.0),), sigma)


def reversed_side(side: Side) -> Side:
  """Returns Q against P, with the line reversed."""
  p, q = (
    tuple((w, 0.0 - m) for w, m in mixture) for mixture in (side.q, side.p)
  )
  return side._replace(p=p, q=q)


def truncated(
  sigma: float, q: float, size: int, limit: int, *, is_in_place: bool
) -> tuple[Direction, ...]:
  """Returns the directions of a sample of `size` rows that is cut to a limit.

  is_in_place says whether a missing row leaves its place empty.
  """
  whole = shifted(sigma, q)
  # At least as many other rows are drawn as are kept.
  is_cut = stats.binom.sf(limit - 1, size - 1, q)
  if not is_cut > 0:
    return (whole,), (reversed_side(whole),)
  # Do not divide by what is rarer than anyone's delta: it may underflow.
  kept_q = q
  if is_cut > _RARE:
    kept = stats.binom.sf(limit, size, q) * limit / size
    kept_q = min(q, _UP * kept / is_cut)
  directions = []
  for turn in (lambda side: side, reversed_side):
    if is_in_place:
      cut = folded(sigma, kept_q, 2.0)
    else:
      cut = turn(shifted(sigma, kept_q, 2.0))
    sides = [cut._replace(share=min(1.0, _UP * is_cut))]
    if is_cut < 1:
      sides.append(turn(whole)._replace(share=min(1.0, _UP * (1 - is_cut))))
    directions.append(tuple(sides))
  return tuple(directions)


def loss(side: Side, x: np.ndarray) -> np.ndarray:
  """Returns the logarithm of the ratio of the densities of P and Q."""
  p, q = (_log_ratio(mixture, side.sigma, x) for mixture in (side.p, side.q))
  return p - q


def log_density(mixture: Mixture, sigma: float, x: np.ndarray) -> np.ndarray:
  """Returns the logarithm of a mixture's density."""
  alone = -0.5 * (x / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))
  return _log_ratio(mixture, sigma, x) + alone


def _log_ratio(mixture: Mixture, sigma: float, x: np.ndarray) -> np.ndarray:
  """Returns the log ratio of a mixture to its noise at 0, exact where tiny."""
  if all(mean == 0 for _, mean in mixture):
    return np.zeros_like(x)
  exponents = [(m / sigma) * ((x - m / 2) / sigma) for _, m in mixture]
  peak = functools.reduce(np.maximum, exponents)
  scaled = sum(
    w * np.exp(a - peak) for (w, _), a in zip(mixture, exponents, strict=True)
  )
  found = peak + np.log(scaled)
  rise = np.zeros_like(x)
  for (w, _), a in zip(mixture, exponents, strict=True):
    rise += w * np.expm1(np.minimum(a, 500.0))
  is_near = (peak < 500) & (rise > -0.5)
  found[is_near] = np.log1p(rise[is_near])
  return found


def atoms(
  direction: Direction, tiny: float, order: float, *, fineness: int = 400
) -> Atoms:
  """Returns an upper bound on a direction's losses.

  About `tiny` mass may get an infinite loss. The bound is tight for moments
  e^(order * loss); `fineness` is bins in a standard deviation of the noise.
  """
  found = [
    (side.share, *_of_side(side, tiny, order, fineness)) for side in direction
  ]
  return Atoms(
    np.concatenate([losses for _, losses, _, _ in found]),
    np.concatenate([share * masses for share, _, masses, _ in found]),
    math.fsum(share * infinite for share, _, _, infinite in found),
  )


def _of_side(side: Side, tiny: float, order: float, fineness: int) -> Atoms:
  sigma = side.sigma
  means = [m for _, m in side.p]
  low = side.reach / 2 if side.is_folded else min(means) - 9 * sigma
  high = max(means) + sigma * float(stats.norm.isf(tiny))
  width = min(
    sigma / fineness, sigma * (sigma / side.reach) / (20 * (order + 1))
  )
  count = int(min(_MOST_BINS, max(64, math.ceil((high - low) / width))))
  ends = np.linspace(low, high, count + 1)
  middles, half = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / 2
  nodes = middles + half * _NODES[:, np.newaxis]
  at_ends, at_nodes = loss(side, ends), loss(side, nodes)
  masses, left, right = _masses(side.p, sigma, ends)
  up = _part_above(
    _near_density(side.p, sigma, nodes, middles),
    at_nodes,
    at_ends[:-1],
    at_ends[1:],
  )
  found = np.zeros(count + 1)
  found[:-1] += masses * (1 - up)
  found[1:] += masses * up
  if not side.is_folded:
    found[0] += left
    return Atoms(at_ends, found, right)
  # Losses below 0 are the other direction's; the rest of the mass goes to 0.
  masses, _, below = _masses(side.q, sigma, ends)
  up = _part_above(
    _near_density(side.q, sigma, nodes, middles),
    -at_nodes,
    -at_ends[1:],
    -at_ends[:-1],
  )
  other = np.zeros(count + 1)
  other[1:] += masses * (1 - up)
  other[:-1] += masses * up
  other[-1] += below
  rest = max(0.0, 1 - right - math.fsum(found) - math.fsum(other))
  return Atoms(
    np.concatenate([at_ends, -at_ends, [0.0]]),
    np.concatenate([found, other, [rest]]),
    right,
  )


def _masses(
  mixture: Mixture, sigma: float, ends: np.ndarray
) -> tuple[np.ndarray, float, float]:
  """Returns a mixture's mass in each bin, below all bins and above them."""
  masses, left, right = np.zeros(len(ends) - 1), 0.0, 0.0
  for weight, mean in mixture:
    z = (ends - mean) / sigma
    below, above = special.ndtr(z), special.ndtr(-z)
    masses += weight * np.where(
      z[1:] <= 0, below[1:] - below[:-1], above[:-1] - above[1:]
    )
    left += weight * float(below[0])
    right += weight * float(above[-1])
  return np.maximum(masses, 0.0), left, right


def _near_density(
  mixture: Mixture, sigma: float, nodes: np.ndarray, middles: np.ndarray
) -> np.ndarray:
  """Returns a mixture's density divided by that at the middle of the bin."""
  rise = _log_ratio(mixture, sigma, nodes) - _log_ratio(mixture, sigma, middles)
  fall = (nodes - middles) * (nodes + middles) / (2 * sigma**2)
  return np.exp(rise - fall)


def _part_above(
  density: np.ndarray, losses: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
  """Returns the part of P's mass that goes to a bin's upper end to keep Q's."""
  with np.errstate(divide="ignore", invalid="ignore"):
    weights = _WEIGHTS[:, np.newaxis] * density
    fall = np.sum(weights * np.expm1(low - losses), axis=0)
    part = fall / (np.sum(weights, axis=0) * np.expm1(low - high))
  part[~(high - low < _FAR) | ~np.isfinite(part)] = 1.0
  return np.clip(part, 0.0, 1.0)


def log_moments(found: Atoms, orders: np.ndarray) -> np.ndarray:
  """Returns log moments, of e^(order * loss), without infinite losses."""
  is_there = found.masses > 0
  logs, losses = np.log(found.masses[is_there]), found.losses[is_there]
  moments = []
  for order in orders:
    terms = logs + order * losses
    top = np.max(terms)
    moments.append(top + np.log(np.sum(np.exp(terms - top))))
  return np.array(moments)
