"""Per-example gradient clipping for any JAX loss of one example."""

from dpdist.clipping.freezing import merge
from dpdist.clipping.freezing import partition
from dpdist.clipping.transform import ClippedGrad
from dpdist.clipping.transform import ClippedGrads
from dpdist.clipping.transform import clipped_grad

__all__ = ["ClippedGrad", "ClippedGrads", "clipped_grad", "merge", "partition"]
