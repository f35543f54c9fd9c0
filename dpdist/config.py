"""The settings of a run: their names, types, defaults and meanings.

A file in configs/ starts from `default()` and changes some settings; flags of
the form --config.a.b=value change more. docs/settings.md lists them, and so
does --settings of any command. Imports no jax, so that `launch.budget` can read
any config anywhere.
"""

from collections.abc import Mapping
from fractions import Fraction
import json
import math
import os
import pathlib
from typing import TYPE_CHECKING, Any

import ml_collections
from ml_collections import config_dict

from dpdist import _settings
from dpdist import _validation
from dpdist import errors
from dpdist.files import atomic

if TYPE_CHECKING:
  from dpdist.privacy import plan as plan_lib

_FILE = "config.json"
"""The file in a run directory that holds the settings of the last start."""


def default() -> ml_collections.ConfigDict:
  """Returns all settings with their defaults."""
  config = ml_collections.ConfigDict()
  for path, given in _settings.TABLE.items():
    section, _, name = path.rpartition(".")
    value: Any = ml_collections.ConfigDict()
    if isinstance(given, tuple) and not isinstance(given, _settings.Free):
      value = given[0]
      if isinstance(value, type):
        value = config_dict.placeholder(value)
    (config[section] if section else config)[name] = value
  return config


def optional() -> frozenset[str]:
  """Returns paths of settings that may be None, as "privacy.target_epsilon"."""
  return frozenset(x.path for x in _settings.settings() if x.default == "None")


def is_free(path: str) -> bool:
  """Returns whether a section's settings are not those of the default."""
  return isinstance(_settings.TABLE.get(path), _settings.Free)


def unknown(path: str) -> errors.ArgumentError:
  """Returns the error for a setting that there is not, with what is meant."""
  said = f"there is no setting config.{path}"
  meant = _settings.suggest(path)
  if meant:
    said += f": did you mean config.{meant}?"
    if path.rpartition(".")[2].startswith(("sample_rate", "sampling_prob")):
      said += " It is that rate times privacy.num_examples"
  return errors.ArgumentError(said, hint=errors.Hint(flags=("--settings",)))


def check(config: Any) -> None:
  """Checks the names of a config's settings.

  Raises:
    ValueError: a setting is missing or unknown, or is a section and should not
      be. Without this check an unknown setting would be ignored silently.
  """
  _check_section("", config, default())


def _check_section(
  path: str, section: Any, right: ml_collections.ConfigDict
) -> None:
  if not isinstance(section, ml_collections.ConfigDict):
    raise ValueError(
      f"{_named(path)} must be an ml_collections.ConfigDict, as of"
      f" dpdist.config.default(), got a {type(section).__name__}"
    )
  if path == "user":
    _check_user(section)
  if is_free(path):
    return
  for key in section:
    if key not in right:
      raise unknown(f"{path}.{key}" if path else key)
  missing = {*right} - {*section}
  if missing:
    raise ValueError(
      f"{_named(path)} must have the settings of dpdist.config.default(), got"
      f" {sorted(missing)} missing"
    )
  for key, value in right.items():
    below = f"{path}.{key}" if path else key
    if isinstance(value, ml_collections.ConfigDict):
      _check_section(below, section[key], value)
    elif isinstance(section[key], ml_collections.ConfigDict):
      raise ValueError(
        f"{_named(below)} must be no section, got {section[key]}"
      )


def _check_user(section: ml_collections.ConfigDict) -> None:
  try:
    json.dumps(section.to_dict())
  except TypeError as error:
    raise errors.ArgumentError(
      "config.user must hold numbers, strings and tuples of them, which can be"
      f" recorded with a run: {error}"
    ) from error


def _named(path: str) -> str:
  return f"config.{path}" if path else "config"


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns a config whose privacy.epochs are written as privacy.num_steps.

  Raises:
    ValueError: both are set, or the epochs cannot be counted.
  """
  privacy = config.privacy
  epochs = privacy.get("epochs")
  if epochs is None:
    return config
  if privacy.num_steps:
    raise errors.ArgumentError(
      "privacy.num_steps must be 0 where privacy.epochs is set, since exactly"
      f" one of them may be, got {privacy.num_steps} and {epochs:g}",
      hint=errors.Hint(flags=("--config.privacy.num_steps=0",)),
    )
  if privacy.batch_size_schedule:
    raise errors.ArgumentError(
      "privacy.epochs must be None with a privacy.batch_size_schedule: set"
      f" privacy.num_steps, got {epochs:g}"
    )
  numbers = (epochs, privacy.num_examples, privacy.expected_batch_size)
  if not all(0 < x < math.inf for x in numbers):
    raise errors.ArgumentError(
      "privacy.epochs, num_examples and expected_batch_size must be finite and"
      f" > 0, got {epochs:g}, {numbers[1]} and {numbers[2]:g}"
    )
  # Of the decimals as they were written, so that 0.1 is a tenth.
  epochs, rows, batch = (Fraction(str(x)) for x in numbers)
  config = ml_collections.ConfigDict(config.to_dict())
  num_steps = math.ceil(epochs * rows / batch)
  _validation.require(
    num_steps < 2**63,
    "privacy.epochs",
    "so few that they are fewer than 2**63 steps",
    numbers[0],
  )
  config.privacy.num_steps = num_steps
  config.privacy.epochs = None
  return config


def privacy_config(
  config: ml_collections.ConfigDict,
) -> "plan_lib.PrivacyConfig":
  """Returns the part of a config that the plan is made from."""
  # Imported here, since it takes longer than to read a command's flags.
  from dpdist.privacy import plan as plan_lib

  values = resolve(config).privacy.to_dict()
  if values["num_steps"] == 0:
    raise errors.ArgumentError(
      "privacy.num_steps must be an integer >= 1, or privacy.epochs be set in"
      " its place, got 0 and None"
    )
  values.pop("epochs", None)
  return plan_lib.PrivacyConfig(**values)


def privacy_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns that part as a JSON-able dict, as the ledger records it."""
  return privacy_config(config).to_dict()


def save(
  workdir: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> None:
  """Writes a run's settings to its directory, to be read by later commands."""
  text = json.dumps(config.to_dict(), indent=2) + "\n"
  atomic.write(pathlib.Path(workdir) / _FILE, text.encode())


def load(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
  """Reads the settings that `save` wrote; newer settings have their defaults.

  Raises:
    ValueError: there is no such file.
  """
  path = pathlib.Path(workdir) / _FILE
  if not path.exists():
    raise errors.ArgumentError(
      f"config must be given for a run without {_FILE}, as --config=FILE with"
      f" what was changed by flags; there is none in {str(workdir)!r}",
      hint=errors.Hint(flags=("--config=FILE",)),
    )
  merged: dict[str, Any] = default().to_dict()
  _merge(merged, json.loads(path.read_text()))
  return ml_collections.ConfigDict(merged)


def _merge(into: dict[str, Any], kept: Mapping[str, Any]) -> None:
  for name, value in kept.items():
    if isinstance(value, dict) and isinstance(into.get(name), dict):
      _merge(into[name], value)
    else:
      into[name] = value
