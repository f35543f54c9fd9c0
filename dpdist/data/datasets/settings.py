"""Reads the settings that several data sets have."""

import os

import ml_collections

from dpdist.assets import fetch


def slots(config: ml_collections.ConfigDict) -> int:
  """Returns the slots of a user; 0: the unit is an example."""
  return int(config.get("examples_per_unit", 0))


def fetched(config: ml_collections.ConfigDict) -> str:
  """Returns the path of a fetched data set: as configured, or in the cache."""
  return config.path or os.fspath(fetch.find(config.name))
