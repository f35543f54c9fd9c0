"""Which examples take part in a step: pure functions of (seed, step)."""

from dpdist.sampling.cyclic import CyclicPoissonSampler as CyclicPoissonSampler
from dpdist.sampling.poisson import PoissonSampler as PoissonSampler
from dpdist.sampling.subsets import FixedSizeSampler as FixedSizeSampler
from dpdist.sampling.subsets import (
  TruncatedPoissonSampler as TruncatedPoissonSampler,
)
