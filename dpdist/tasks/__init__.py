"""The public names of tasks, which are imported when they are first used.

A task says what is trained, and by which loss and metrics it is judged.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dpdist.tasks.cross_entropy import classification as classification
  from dpdist.tasks.cross_entropy import language_model as language_model
  from dpdist.tasks.task import Task as Task

_HOME = {
  "Task": "task",
  "classification": "cross_entropy",
  "language_model": "cross_entropy",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f"module 'dpdist.tasks' has no attribute {name!r}")
  return getattr(importlib.import_module(f"dpdist.tasks.{_HOME[name]}"), name)
