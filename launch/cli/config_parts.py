"""Reads the parts of a run that a config file defines beside get_config().

    def get_task(config): ...       # Returns a dpdist.Task.
    def get_dataset(config): ...    # Returns a dpdist.Dataset.
    def get_optimizer(config): ...  # Returns an optax.GradientTransformation.

Each may be left out: then the part is what the config names.

They run before anything is charged. What get_dataset computes from training
rows, as a scaler's mean, is not private, and no epsilon counts it: see
`public_statistics` and `private_statistics` of `dpdist.data.Options`.
"""

import functools
import importlib.util
import pathlib
import sys
import traceback
import types
from typing import TYPE_CHECKING, Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from dpdist import config as config_lib
from dpdist import errors

if TYPE_CHECKING:
  from dpdist.tasks import parts as parts_lib

_KINDS = ("task", "dataset", "optimizer")


def load(flag: str) -> "parts_lib.Parts":
  """Returns what the file of a config flag defines, made from its settings.

  Without the flag nothing is given. Raises SettingsError, which names the file,
  if a function returns what is no such part.
  """
  # Imported here, since it imports jax: flags are parsed without.
  from dpdist.tasks import parts as parts_lib

  holder = flags.FLAGS[flag]
  if holder.value is None:
    return parts_lib.NAMED
  path = config_flags.get_config_filename(holder).split(":", 1)[0]
  module = _module(pathlib.Path(path).resolve())
  try:
    # A schedule counts steps, also where the config counts epochs.
    config = config_lib.resolve(holder.value)
    return parts_lib.of(
      **{
        kind: _called(module, kind, config)
        for kind in _KINDS
        if hasattr(module, f"get_{kind}")
      }
    )
  except errors.ArgumentError as error:
    hint = error.hint or errors.Hint(flags=("--traceback",))
    raise errors.SettingsError(f"{path}: {error}", hint=hint) from error


def _called(
  module: types.ModuleType, kind: str, config: ml_collections.ConfigDict
) -> Any:
  """Returns what a function of the file returns."""
  name = f"get_{kind}(config)"
  try:
    part = getattr(module, f"get_{kind}")(config)
  except (errors.Hinted, OSError, MemoryError):
    raise
  except Exception as error:
    # A user's function may raise anything.
    frames = traceback.extract_tb(error.__traceback__)
    lines = [x.lineno for x in frames if x.filename == module.__file__]
    where = f", in line {lines[-1]}" if lines else ""
    raise errors.ArgumentError(
      f"{name} must return the {kind}, and raises"
      f" {errors.in_a_line(error)}{where}"
    ) from error
  if part is None:
    raise errors.ArgumentError(f"{name} must return the {kind}, got None")
  return part


@functools.cache
def _module(path: pathlib.Path) -> types.ModuleType:
  """Imports a file, once, by a name that does not depend on its folder."""
  name = f"config_file_{path.stem}"
  spec = importlib.util.spec_from_file_location(name, path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  # So that the digest of its code finds it by the name of its functions' home.
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module
