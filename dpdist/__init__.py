"""dpdist: differentially private training in JAX, from a laptop to a pod.

The public face. Names are resolved when they are first used, so that
accounting, plans, ledgers and samplers can be used where jax cannot be
imported.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import dpdist.accounting as accounting  # noqa: F401
  from dpdist.clipping import ClippedGrads as ClippedGrads
  from dpdist.clipping import clipped_grad as clipped_grad
  from dpdist.dp_config import DPConfig as DPConfig
  from dpdist.gradients import private_gradients as private_gradients
  from dpdist.model_check import check_model as check_model
  from dpdist.noise import gaussian_noise as gaussian_noise
  from dpdist.plan import PrivacyConfig as PrivacyConfig
  from dpdist.plan import PrivacyPlan as PrivacyPlan
  from dpdist.plan import make_plan as make_plan
  from dpdist.sampling import CyclicPoissonSampler as CyclicPoissonSampler
  from dpdist.sampling import FixedSizeSampler as FixedSizeSampler
  from dpdist.sampling import PoissonSampler as PoissonSampler
  from dpdist.sampling import TruncatedPoissonSampler as TruncatedPoissonSampler
  from dpdist.sentinel import check_sensitivity as check_sensitivity
  from dpdist.stateful import with_state as with_state
  from dpdist.train import train as train

_HOME = {
  "ClippedGrads": "clipping",
  "DPConfig": "dp_config",
  "CyclicPoissonSampler": "sampling",
  "FixedSizeSampler": "sampling",
  "TruncatedPoissonSampler": "sampling",
  "PoissonSampler": "sampling",
  "PrivacyConfig": "plan",
  "PrivacyPlan": "plan",
  "accounting": "",
  "check_model": "model_check",
  "check_sensitivity": "sentinel",
  "clipped_grad": "clipping",
  "gaussian_noise": "noise",
  "make_plan": "plan",
  "private_gradients": "gradients",
  "train": "train",
  "with_state": "stateful",
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


class _Face(types.ModuleType):
  """Keeps `dpdist.train` the function, after an `import dpdist.train` too."""

  def __setattr__(self, name: str, value: Any) -> None:
    # Python gives a package its submodules as attributes.
    if not (_HOME.get(name) == name and isinstance(value, types.ModuleType)):
      super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
