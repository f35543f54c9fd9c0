"""Computes epsilon from a run's numbers; imports no jax, sampler or noise.

The public functions are imported when they are first used, so that a plan can
be read without waiting for scipy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dpdist.accounting.calibration import (
    calibrate_batch_size as calibrate_batch_size,
  )
  from dpdist.accounting.calibration import (
    calibrate_noise_multiplier as calibrate_noise_multiplier,
  )
  from dpdist.accounting.calibration import (
    calibrate_num_steps as calibrate_num_steps,
  )
  from dpdist.accounting.calibration import delta as delta
  from dpdist.accounting.calibration import epsilon as epsilon

__all__ = [
  "calibrate_batch_size",
  "calibrate_noise_multiplier",
  "calibrate_num_steps",
  "delta",
  "epsilon",
]


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module("dpdist.accounting.calibration"), name)
