"""Flags of the commands: what can be set by one can be unset by one."""

import pathlib
import sys
import warnings

from absl import flags
from ml_collections import config_flags
import pytest

from dpdist import config as config_lib
from launch.cli import flag_parsing
from tests.support import commands

_DIGITS = f"--config={pathlib.Path(__file__).parents[2]}/configs/digits.py"


def _parse(monkeypatch, *args):
  """The config, and its changes, of a command line."""
  values = flags.FlagValues()
  argv = ["launch/any.py", _DIGITS, *args]
  monkeypatch.setattr(sys, "argv", argv)
  monkeypatch.setattr(flags, "FLAGS", values)
  config_flags.DEFINE_config_file(
    "config", None, "", flag_values=values, sys_argv=[]
  )
  with warnings.catch_warnings():
    # Of a library, as it loads the file.
    warnings.simplefilter("ignore")
    flag_parsing._parse(False, argv)
  changes = config_flags.get_override_values(values["config"])
  return values.config, dict(changes)


def _get(config, name):
  for part in name.split("."):
    config = config[part]
  return config


@pytest.mark.parametrize("name", sorted(config_lib.optional()))
@pytest.mark.parametrize("value", ["None", "none", ""])
def test_every_setting_that_may_be_none_is_unset_by_its_flag(
  name, value, monkeypatch
):
  config, changes = _parse(
    monkeypatch, f"--config.{name}=3", f"--config.{name}={value}"
  )
  assert _get(config, name) is None
  # What is submitted to a cluster is told by these.
  assert changes == {name: None}


def test_of_several_flags_of_a_setting_the_last_counts(monkeypatch):
  name = "privacy.target_epsilon"
  config, changes = _parse(
    monkeypatch, f"--config.{name}=None", f"--config.{name}", "3"
  )
  assert config.privacy.target_epsilon == 3.0
  assert changes == {name: 3.0}
  config, _ = _parse(monkeypatch, f"--config.{name}", "none")
  assert config.privacy.target_epsilon is None


def test_a_setting_that_may_not_be_none_is_not():
  done = commands.run("budget", _DIGITS, "--config.privacy.num_steps=None")
  assert done.code == 2
  assert "privacy.num_steps must be an integer, got 'None'" in done.err


def test_a_noise_multiplier_can_take_the_place_of_a_target():
  done = commands.run(
    *("budget", _DIGITS, "--config.privacy.accountant=rdp"),
    *("--config.privacy.target_epsilon=None", "--json"),
    "--config.privacy.noise_multiplier=0.5",
  )
  assert done.code == 0, done.err
  assert '"noise_multiplier": 0.5' in done.out
