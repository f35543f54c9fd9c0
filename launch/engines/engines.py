"""Finds the engines, ours and those of installed packages, and their flags."""

from collections.abc import Mapping
import dataclasses

from dpdist import errors
from dpdist import registry

from . import job
from . import jobset
from . import ray
from . import slurm
from . import tpu_vm

_OURS: dict[str, job.Engine] = {
  "jobset": jobset,
  "ray": ray,
  "slurm": slurm,
  "tpu-vm": tpu_vm,
}
for _name, _engine in _OURS.items():
  registry.register("engine", _name)(_engine)


def load() -> dict[str, job.Engine]:
  """Returns all engines by name."""
  return {
    name: registry.resolve("engine", name, setting="--to")
    for name in registry.names("engine")
  }


@dataclasses.dataclass
class Flag:
  """A flag of one or more engines."""

  kind: type  # The type of its value: bool, int or str.
  # What it is for, by engine.
  help: dict[str, str] = dataclasses.field(default_factory=dict)

  def text(self, engines: Mapping[str, job.Engine]) -> str:
    """Returns the help, with names of engines unless all have the flag."""
    names: dict[str, list[str]] = {}
    for name, text in self.help.items():
      names.setdefault(text, []).append(name)
    if len(names) == 1 and self.help.keys() == engines.keys():
      return next(iter(names))
    return " ".join(f"{', '.join(on)}: {text}" for text, on in names.items())


def flags(engines: Mapping[str, job.Engine]) -> dict[str, Flag]:
  """Returns the flags that the engines' jobs are made from, by name."""
  found: dict[str, Flag] = {}
  for name, engine in engines.items():
    for field in dataclasses.fields(engine.Job):
      if "help" not in field.metadata:
        continue
      has_no_default = field.default is dataclasses.MISSING
      kind = str if has_no_default else type(field.default)
      flag = found.setdefault(field.name, Flag(kind))
      if flag.kind is not kind or kind not in (bool, int, str):
        raise errors.ArgumentError(
          f"the default of {field.name} of engine {name!r} must be a bool, an"
          " int or a str, as with other engines that have it, got"
          f" {field.default!r}"
        )
      flag.help[name] = field.metadata["help"]
  return dict(sorted(found.items()))
