"""Loads a released checkpoint, and writes it as safetensors."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dpdist.export.export import load as load
  from dpdist.export.export import write as write

__all__ = [
  "load",
  "write",
]


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module("dpdist.export.export"), name)
