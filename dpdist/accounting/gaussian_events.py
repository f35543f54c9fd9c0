"""The events of our proofs: pairs of Gaussian mixtures that dominate a step.

For each sampling and neighboring relation, a dominating pair of distributions
bounds what a step can tell (Zhu, Dong & Wang 2022, arXiv:2106.08567). There are
five kinds of pairs here. All are mixtures of Gaussians on a line whose unit is
the clip norm C. The noise has standard deviation sigma. Proofs that are in no
paper are in docs/accounting.md.

Imports no jax. Accountants and scipy are imported when an epsilon is computed,
so that a plan can be read without waiting for them.
"""

import abc
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, ClassVar

from dpdist.accounting import search

if TYPE_CHECKING:
  import dp_accounting
  import numpy as np

  from dpdist.accounting import mixtures

# Outside these ranges the losses of a step overflow or drown in rounding.
_NOISE, _LEAST_PROBABILITY = (0.02, 1e12), 1e-15
# With more steps, rounding dominates.
_MOST_STEPS = 10**11


@dataclasses.dataclass(frozen=True)
class SampledGaussian(abc.ABC):
  """What the kinds have in common; see `step_events.StepEvent`."""

  sigma: float  # Standard deviation of the noise, in the kind's unit.
  q: float  # The probability that a row takes part, in (0, 1].

  loose_rdp: ClassVar[str] = ""
  # How many units the sum can move by, and how far it can move on average
  # where a row takes part.
  _reach: ClassVar[int] = 1
  _mean_shift: ClassVar[int] = 1

  @property
  def is_noisy(self) -> bool:
    return self.sigma >= search.NO_NOISE

  @property
  def _num_rows(self) -> int:
    return 1

  @property
  def _is_plain(self) -> bool:
    """Returns whether it is a Gaussian that is not mixed."""
    return self.q == 1

  def has_grid(self, count: int) -> bool:
    return self._is_plain or (  # Then nothing is convolved.
      count <= _MOST_STEPS
      and self.q >= _LEAST_PROBABILITY
      and _NOISE[0] * self._num_rows <= self.sigma <= _NOISE[1]
    )

  def total_variation(self, count: int) -> float:
    # The two data sets differ in a step only where the row is drawn. They are
    # then no easier to tell apart than two Gaussians as far apart as the sum
    # can move.
    apart = math.erf(self._reach / (2 * math.sqrt(2) * self.sigma))
    return count * self._num_rows * self.q * apart

  def pld(self) -> "tuple[mixtures.Direction, ...]":
    return _directions(self)

  def rdp(self) -> "tuple[np.ndarray, np.ndarray]":
    from dpdist.accounting import rdp

    ((side,), *_) = self.pld()
    return rdp.step_divergences(side, self.q * self._mean_shift)

  def dp_event(self) -> "dp_accounting.DpEvent":
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(self.sigma)
    if self.q == 1.0:
      return gaussian
    return dp_accounting.PoissonSampledDpEvent(self.q, gaussian)

  @abc.abstractmethod
  def _directions(self) -> "tuple[mixtures.Direction, ...]":
    """Returns what `pld` does, which keeps it."""


class AddRemove(SampledGaussian):
  """Only one data set has the unit, which is drawn with probability q.

  The pair is q N(1) + (1-q) N(0) against N(0) (Mironov, Talwar & Zhang 2019,
  arXiv:1908.10530).
  """

  def _directions(self) -> "tuple[mixtures.Direction, ...]":
    from dpdist.accounting import mixtures

    side = mixtures.shifted(self.sigma, self.q)
    return (side,), (mixtures.reversed_side(side),)


class Replace(SampledGaussian):
  """Both data sets have the unit, with other data.

  The pair is q N(1) + (1-q) N(0) against q N(-1) + (1-q) N(0). The unit
  contributes to the sum with probability q, whatever the rest of the sample is.
  The event for dp_accounting is meant for its PLD accountant under REPLACE_ONE,
  which takes the noise in units of the clip norm.
  """

  _reach = 2
  _mean_shift = 2

  def _directions(self) -> "tuple[mixtures.Direction, ...]":
    from dpdist.accounting import mixtures

    return ((mixtures.opposite(self.sigma, self.q),),)


class ReplaceCoupled(SampledGaussian):
  """As `Replace`, but the rest of the sum may change if the unit is drawn.

  It does where all samples have the same size. Lengths here are in units of the
  l2 distance of the two gradients, twice the clip norm.

  Amplification by advanced joint convexity bounds the hockey-stick divergence
  of order a >= 1 by that of q N(1) + (1-q) N(0) against N(0), and that of order
  a < 1 by the same with the distributions exchanged (Balle, Barthe & Gaboardi
  2018, arXiv:1807.01647; Zhu, Dong & Wang 2022). One could compose adding and
  removing separately and take the larger, but that need not be a bound (Lebeda
  et al. 2024, arXiv:2405.20769).

  The event for dp_accounting is meant for its RDP accountant under REPLACE_ONE,
  which takes the noise in units of that distance. Its PLD accountant takes it
  in half that unit.
  """

  def _directions(self) -> "tuple[mixtures.Direction, ...]":
    from dpdist.accounting import mixtures

    return ((mixtures.folded(self.sigma, self.q),),)

  def dp_event(self) -> "dp_accounting.DpEvent":
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(self.sigma)
    if self.q == 1.0:
      return gaussian
    return dp_accounting.SampledWithoutReplacementDpEvent(1, self.q, gaussian)


@dataclasses.dataclass(frozen=True)
class Binomial(SampledGaussian):
  """The sum has K of a unit's rows, K from Binomial(num_rows, q)."""

  num_rows: int  # How many rows the unit has.

  loose_rdp = "examples_per_user above 1"

  @property
  def _num_rows(self) -> int:
    return self.num_rows

  def _directions(self) -> "tuple[mixtures.Direction, ...]":
    from dpdist.accounting import mixtures

    side = mixtures.binomial(self.sigma, self.q, self.num_rows)
    return (side,), (mixtures.reversed_side(side),)

  def rdp(self) -> "tuple[np.ndarray, np.ndarray]":
    # All rows take part or none, with at least the probability that any does.
    q = min(1.0, self.num_rows * self.q)
    return AddRemove(self.sigma / self.num_rows, q).rdp()

  def dp_event(self) -> "dp_accounting.DpEvent":
    from dp_accounting import dp_event

    rows = range(self.num_rows + 1)
    weights = [
      math.comb(self.num_rows, k)
      * self.q**k
      * (1 - self.q) ** (self.num_rows - k)
      for k in rows
    ]
    return dp_event.MixtureOfGaussiansDpEvent(
      self.sigma, [float(k) for k in rows], weights
    )


@dataclasses.dataclass(frozen=True)
class Truncated(SampledGaussian):
  """As `AddRemove`, but a sample of more rows than a limit is cut to the limit.

  Where it is cut, a unit that is kept takes another's place. That happens with
  a probability of less than q and moves the sum by at most 2 (after "Tighter
  Privacy Analysis for Truncated Poisson Sampling", 2025, arXiv:2508.15089). The
  event for dp_accounting is that of the pair with more rows.
  """

  num_examples: int  # How many rows the larger data set has.
  limit: int  # The most rows of a sample.
  is_in_place: bool  # Whether a missing row leaves its place empty.
  # Whether the larger data set may also have num_examples - 1 rows. Which of
  # the two is worse depends on the limit, so both are computed.
  is_either: bool

  loose_rdp = "sampling='truncated_poisson'"
  _reach = 2

  @property
  def _is_plain(self) -> bool:
    return False

  def _directions(self) -> "tuple[mixtures.Direction, ...]":
    from dpdist.accounting import mixtures

    sizes = [self.num_examples, self.num_examples - 1][: 1 + self.is_either]
    return tuple(
      direction
      for size in sizes
      for direction in mixtures.truncated(
        self.sigma, self.q, size, self.limit, is_in_place=self.is_in_place
      )
    )

  def rdp(self) -> "tuple[np.ndarray, np.ndarray]":
    # However the rest is cut, the unit is kept with probability at most q, and
    # without it another may be in its place.
    return ReplaceCoupled(self.sigma / 2, self.q).rdp()

  def dp_event(self) -> "dp_accounting.DpEvent":
    import dp_accounting

    return dp_accounting.TruncatedSubsampledGaussianDpEvent(
      self.num_examples, self.q, self.limit, self.sigma
    )


@functools.lru_cache(maxsize=256)
def _directions(event: SampledGaussian) -> "tuple[mixtures.Direction, ...]":
  return event._directions()
