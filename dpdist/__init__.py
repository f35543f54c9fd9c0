"""dpdist: differentially private training in JAX, from a laptop to a pod.

This module holds the public API. Names are imported when they are first used,
so that accounting, plans, ledgers and samplers work where jax cannot be
imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import dpdist.accounting as accounting  # noqa: F401
  from dpdist.clipping import ClippedGrads as ClippedGrads
  from dpdist.clipping import clipped_grad as clipped_grad
  from dpdist.clipping.stateful import with_state as with_state
  from dpdist.data.dataset import Dataset as Dataset
  from dpdist.frameworks.model_check import check_model as check_model
  from dpdist.frontends.dp_config import DPConfig as DPConfig
  from dpdist.mechanism.private_gradients import (
    private_gradients as private_gradients,
  )
  from dpdist.noise.noise import gaussian_noise as gaussian_noise
  from dpdist.privacy.plan import PrivacyConfig as PrivacyConfig
  from dpdist.privacy.plan import PrivacyPlan as PrivacyPlan
  from dpdist.privacy.plan import make_plan as make_plan
  from dpdist.sampling import CyclicPoissonSampler as CyclicPoissonSampler
  from dpdist.sampling import FixedSizeSampler as FixedSizeSampler
  from dpdist.sampling import PoissonSampler as PoissonSampler
  from dpdist.sampling import TruncatedPoissonSampler as TruncatedPoissonSampler
  from dpdist.sensitivity.sentinel import check_sensitivity as check_sensitivity
  import dpdist.tasks as tasks  # noqa: F401
  from dpdist.tasks.task import Task as Task
  from dpdist.training.train import train as train

_HOME = {
  "ClippedGrads": "clipping",
  "CyclicPoissonSampler": "sampling",
  "DPConfig": "frontends.dp_config",
  "Dataset": "data.dataset",
  "FixedSizeSampler": "sampling",
  "PoissonSampler": "sampling",
  "PrivacyConfig": "privacy.plan",
  "PrivacyPlan": "privacy.plan",
  "Task": "tasks.task",
  "TruncatedPoissonSampler": "sampling",
  "accounting": "",
  "check_model": "frameworks.model_check",
  "check_sensitivity": "sensitivity.sentinel",
  "clipped_grad": "clipping",
  "gaussian_noise": "noise.noise",
  "make_plan": "privacy.plan",
  "private_gradients": "mechanism.private_gradients",
  "tasks": "",
  "train": "training.train",
  "with_state": "clipping.stateful",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f"module 'dpdist' has no attribute {name!r}")
  home = _HOME[name]
  module = importlib.import_module(f"dpdist.{home or name}")
  value = getattr(module, name) if home else module
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_HOME})
