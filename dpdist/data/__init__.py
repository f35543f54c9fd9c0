"""Data sets, read by index into the padded chunks of a step.

The functions `from_*` make a data set of what people have. Names are imported
when they are first used, and so are the packages that a format needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dpdist.data.builders.array_records import (
    from_array_record as from_array_record,
  )
  from dpdist.data.builders.huggingface import (
    from_huggingface as from_huggingface,
  )
  from dpdist.data.builders.images import from_images as from_images
  from dpdist.data.builders.items import from_tfds as from_tfds
  from dpdist.data.builders.items import from_torch as from_torch
  from dpdist.data.builders.memory import from_arrays as from_arrays
  from dpdist.data.builders.memory import from_csv as from_csv
  from dpdist.data.builders.options import Options as Options
  from dpdist.data.builders.parquet_files import from_parquet as from_parquet
  from dpdist.data.dataset import Dataset as Dataset
  from dpdist.data.pipeline import padded as padded
  from dpdist.data.queries import Counts as Counts
  from dpdist.data.queries import Quantiles as Quantiles
  from dpdist.data.queries import Standardized as Standardized

_HOME = {
  "Counts": "queries",
  "Dataset": "dataset",
  "Options": "builders.options",
  "Quantiles": "queries",
  "Standardized": "queries",
  "from_array_record": "builders.array_records",
  "from_arrays": "builders.memory",
  "from_csv": "builders.memory",
  "from_huggingface": "builders.huggingface",
  "from_images": "builders.images",
  "from_parquet": "builders.parquet_files",
  "from_tfds": "builders.items",
  "from_torch": "builders.items",
  "padded": "pipeline",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"{__name__}.{_HOME[name]}")
  value = globals()[name] = getattr(module, name)
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_HOME})
