"""Noise mechanisms."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dpdist.noise.noise import gaussian_noise as gaussian_noise

__all__ = ["gaussian_noise"]


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module("dpdist.noise.noise"), name)
