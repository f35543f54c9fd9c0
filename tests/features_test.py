"""Features are computed once, kept, and told when they are damaged."""

import numpy as np
import pytest

from dpdist import features
from dpdist import fetch
from dpdist import scattering
from dpdist import sources


@pytest.fixture
def source(tmp_path, monkeypatch):
  monkeypatch.setenv("DPDIST_CACHE", str(tmp_path))
  rng = np.random.default_rng(0)
  return sources.ArraySource(
    {
      "inputs": rng.random((5, 8, 8, 1), np.float32),
      "targets": rng.integers(0, 10, 5, np.int32),
    }
  )


def test_each_row_is_of_its_own_example(source, monkeypatch):
  monkeypatch.setattr(features, "_BLOCK", 2)
  got = features.of(source, "scattering")
  rows = np.array([4, 0, 3])
  batch, examples = got.read(rows), source.read(rows)
  np.testing.assert_array_equal(
    batch["inputs"],
    scattering.transform(examples["inputs"]).astype(np.float16),
  )
  np.testing.assert_array_equal(batch["targets"], examples["targets"])
  assert len(got) == len(source)
  # They are of the same data, whose budget they spend.
  assert got.manifest() == source.manifest()


def test_they_are_computed_once(source, monkeypatch):
  features.of(source, "scattering")
  monkeypatch.setattr(scattering, "transform", None)
  monkeypatch.setitem(
    features._FEATURES, "scattering", (None, scattering.VERSION)
  )
  features.of(source, "scattering")
  # Another version of the function is computed anew.
  monkeypatch.setitem(
    features._FEATURES, "scattering", (None, scattering.VERSION + 1)
  )
  with pytest.raises(TypeError):
    features.of(source, "scattering")
  # What failed left nothing behind.
  assert [path.name[:11] for path in fetch.cache().iterdir()] == ["scattering-"]


def test_other_examples_have_other_features(source):
  features.of(source, "scattering")
  batch = source.read(np.arange(5))
  batch["inputs"] = 1 - batch["inputs"]
  other = features.of(sources.ArraySource(batch), "scattering")
  expected = scattering.transform(batch["inputs"]).astype(np.float16)
  got = other.read(np.arange(5))["inputs"]
  np.testing.assert_array_equal(got, expected)


def test_damage_is_told(source):
  features.of(source, "scattering")
  (path,) = fetch.cache().glob("*/inputs.npy")
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"inputs\.npy is damaged: delete"):
    features.of(source, "scattering")


def test_an_unknown_name_lists_the_known_ones(source):
  with pytest.raises(
    ValueError, match=r"data\.features .*'scattering'.* got 'x'"
  ):
    features.of(source, "x")
