"""Every config says, in its docstring, what its plan spends."""

import importlib
import pathlib
import re

import pytest

import configs
from dpdist import config as config_lib
from dpdist import plan as plan_lib

_NAMES = sorted(
  path.stem for path in pathlib.Path(configs.__file__).parent.glob("[!_]*.py")
)
_SPENT = re.compile(r"[Ee]psilon\s+([\d.]+),\s+delta\s+([\d.e-]*\d)")


@pytest.mark.parametrize("name", _NAMES)
def test_epsilon_and_delta_are_as_stated(name):
  module = importlib.import_module(f"configs.{name}")
  assert module.__doc__ is not None
  stated = _SPENT.search(module.__doc__)
  privacy = config_lib.privacy_config(module.get_config())
  if stated is None:
    # What was not trained says so, and has nothing to state.
    assert "nothing was\ntrained" in module.__doc__ or (
      "nothing was trained" in module.__doc__
    )
    return
  epsilon, delta = float(stated[1]), float(stated[2])
  assert privacy.target_delta == delta
  digits = len(stated[1].partition(".")[2])
  if privacy.target_epsilon is not None:
    # A plan never spends more than its target; plan_test holds it to that.
    assert privacy.target_epsilon == epsilon
    return
  spent = plan_lib.make_plan(privacy).epsilon()
  assert epsilon - 0.5 * 10**-digits <= spent <= epsilon + 0.5 * 10**-digits
