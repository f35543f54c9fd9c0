"""Differentially private training in JAX, from a laptop to a pod.

  train a model     train, Task, tasks, Dataset, data, config
  plan its privacy  PrivacyConfig, DPConfig, make_plan, PrivacyPlan, accounting,
                    privacy
  draw examples     PoissonSampler, TruncatedPoissonSampler,
                    CyclicPoissonSampler, FixedSizeSampler, sampling
  own loops         Session, private_gradients, clipped_grad, ClippedGrads,
                    with_state, gaussian_noise, clipping, noise
  look for faults   check_model, check_sensitivity, sensitivity, errors
  other frameworks  frontends: keras, linen, nnx, equinox
  afterwards        ledger, export

On the command line: `dpdist --help`. Names with a capital letter are classes,
and dpdist.train tells of itself by help(dpdist.train).

All names are imported when they are first used, so that accounting, plans,
ledgers and samplers work where jax cannot be imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dpdist import accounting as accounting
  from dpdist import clipping as clipping
  from dpdist import config as config
  from dpdist import data as data
  from dpdist import errors as errors
  from dpdist import export as export
  from dpdist import frontends as frontends
  from dpdist import ledger as ledger
  from dpdist import noise as noise
  from dpdist import privacy as privacy
  from dpdist import sampling as sampling
  from dpdist import sensitivity as sensitivity
  from dpdist import tasks as tasks
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
  from dpdist.own_loop.session import Session as Session
  from dpdist.privacy.plan import PrivacyConfig as PrivacyConfig
  from dpdist.privacy.plan import PrivacyPlan as PrivacyPlan
  from dpdist.privacy.plan import make_plan as make_plan
  from dpdist.sampling import CyclicPoissonSampler as CyclicPoissonSampler
  from dpdist.sampling import FixedSizeSampler as FixedSizeSampler
  from dpdist.sampling import PoissonSampler as PoissonSampler
  from dpdist.sampling import TruncatedPoissonSampler as TruncatedPoissonSampler
  from dpdist.sensitivity.sentinel import check_sensitivity as check_sensitivity
  from dpdist.tasks.task import Task as Task
  from dpdist.training.train import train as train

__version__ = "0.1.0"

# Packages and modules that are public by their own names.
_MODULES = (
  "accounting",
  "clipping",
  "config",
  "data",
  "errors",
  "export",
  "frontends",
  "ledger",
  "noise",
  "privacy",
  "sampling",
  "sensitivity",
  "tasks",
)
# The modules that are home to a public name.
_HOME = {
  "ClippedGrads": "clipping",
  "CyclicPoissonSampler": "sampling",
  "DPConfig": "frontends.dp_config",
  "Dataset": "data.dataset",
  "FixedSizeSampler": "sampling",
  "PoissonSampler": "sampling",
  "PrivacyConfig": "privacy.plan",
  "PrivacyPlan": "privacy.plan",
  "Session": "own_loop.session",
  "Task": "tasks.task",
  "TruncatedPoissonSampler": "sampling",
  "check_model": "frameworks.model_check",
  "check_sensitivity": "sensitivity.sentinel",
  "clipped_grad": "clipping",
  "gaussian_noise": "noise.noise",
  "make_plan": "privacy.plan",
  "private_gradients": "mechanism.private_gradients",
  "train": "training.train",
  "with_state": "clipping.stateful",
}

if not TYPE_CHECKING:  # A checker knows the names above, and no other.

  def __getattr__(name: str) -> Any:
    if name in _MODULES:
      return importlib.import_module(f"dpdist.{name}")
    if name not in _HOME:
      raise AttributeError(f"module 'dpdist' has no attribute {name!r}")
    module = importlib.import_module(f"dpdist.{_HOME[name]}")
    value = globals()[name] = getattr(module, name)
    return value


# There is no __all__: with it, help(dpdist) would be hundreds of lines.
def __dir__() -> list[str]:
  return sorted({"__version__", *_HOME, *_MODULES})
