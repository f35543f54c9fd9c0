"""Per-example gradient clipping for any JAX loss of one example."""

from dpdist.clipping.freezing import merge
from dpdist.clipping.freezing import partition
from dpdist.clipping.groups import into_groups
from dpdist.clipping.groups import mean_of_group
from dpdist.clipping.statistics import UnsafeStatistics
from dpdist.clipping.statistics import unsafe_statistics
from dpdist.clipping.transform import ClippedGrad
from dpdist.clipping.transform import ClippedGrads
from dpdist.clipping.transform import clipped_grad
from dpdist.clipping.virtual_step import LogicalBatch
from dpdist.clipping.virtual_step import VirtualStep

__all__ = [
  "ClippedGrad",
  "ClippedGrads",
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
