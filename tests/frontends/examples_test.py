"""The examples run as they stand."""

import importlib

import pytest

pytestmark = pytest.mark.slow

NAMES = ("plain", "linen", "nnx", "equinox", "autoencoder", "keras")


@pytest.mark.parametrize("name", NAMES)
def test_trains_within_its_budget(name, capsys):
  example = importlib.import_module(f"dpdist.examples.{name}")
  accuracy = example.main(40)
  spent, told = capsys.readouterr().out.splitlines()[-2:]
  # Far better than a guess among ten.
  assert 0.5 < accuracy <= 1
  assert float(told.split()[2]) == pytest.approx(accuracy, abs=1e-3)
  assert 1.9 < float(spent.split()[1]) <= 2
