"""The public names of tasks, which are imported when they are first used.

A task says what is trained, and by which loss and metrics it is judged. All of
these take a model of any framework:

  * a Flax Linen module;
  * a Flax NNX module, or a function that makes one of nothing or of rngs;
  * an Equinox module, or a function that makes one of nothing or of a key;
  * (init, apply), two functions: init(key, inputs) -> params, and
    apply(params, inputs) -> outputs, which may also take `rng`.

A model takes the inputs of one example, without a batch axis, unless
`has_batch_axis=True`. Before a run, `dpdist.check_model` checks it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dpdist.tasks.build import Options as Options
  from dpdist.tasks.build import with_params as with_params
  from dpdist.tasks.contrastive import contrastive as contrastive
  from dpdist.tasks.cross_entropy import classification as classification
  from dpdist.tasks.cross_entropy import language_model as language_model
  from dpdist.tasks.cross_entropy import (
    masked_language_model as masked_language_model,
  )
  from dpdist.tasks.supervised import binary as binary
  from dpdist.tasks.supervised import from_functions as from_functions
  from dpdist.tasks.supervised import multilabel as multilabel
  from dpdist.tasks.supervised import regression as regression
  from dpdist.tasks.task import Task as Task

_HOME = {
  "Options": "build",
  "Task": "task",
  "binary": "supervised",
  "classification": "cross_entropy",
  "contrastive": "contrastive",
  "from_functions": "supervised",
  "language_model": "cross_entropy",
  "masked_language_model": "cross_entropy",
  "multilabel": "supervised",
  "regression": "supervised",
  "with_params": "build",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f"module 'dpdist.tasks' has no attribute {name!r}")
  home = importlib.import_module(f"dpdist.tasks.{_HOME[name]}")
  value = globals()[name] = getattr(home, name)
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_HOME})
