"""Per-example gradient clipping for any JAX loss of one example."""

from dpdist.clipping.accumulation import LogicalBatch
from dpdist.clipping.accumulation import VirtualStep
from dpdist.clipping.clipper import Clipped
from dpdist.clipping.clipper import Clipper
from dpdist.clipping.clipper import Extra
from dpdist.clipping.example_groups import into_groups
from dpdist.clipping.example_groups import mean_of_group
from dpdist.clipping.freezing import merge
from dpdist.clipping.freezing import partition
from dpdist.clipping.statistics import UnsafeStatistics
from dpdist.clipping.statistics import unsafe_statistics
from dpdist.clipping.transform import ClippedGrad
from dpdist.clipping.transform import ClippedGrads
from dpdist.clipping.transform import clipped_grad

__all__ = [
  "Clipped",
  "ClippedGrad",
  "ClippedGrads",
  "Clipper",
  "Extra",
  "LogicalBatch",
  "UnsafeStatistics",
  "VirtualStep",
  "clipped_grad",
  "into_groups",
  "mean_of_group",
  "merge",
  "partition",
  "unsafe_statistics",
]
