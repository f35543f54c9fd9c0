"""Draws the examples of a step, as a pure function of (seed, step)."""

from dpdist.sampling.cyclic import CyclicPoissonSampler as CyclicPoissonSampler
from dpdist.sampling.fixed_size import FixedSizeSampler as FixedSizeSampler
from dpdist.sampling.poisson import PoissonSampler as PoissonSampler
from dpdist.sampling.truncated_poisson import (
  TruncatedPoissonSampler as TruncatedPoissonSampler,
)
