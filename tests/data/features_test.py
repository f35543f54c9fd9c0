"""Features are computed once, kept, and told when they are damaged."""

import os
import shutil

import numpy as np
import pytest

import dpdist
from dpdist import config as config_lib
from dpdist import sampling
from dpdist.assets import fetch
from dpdist.data import arrays as arrays_lib
from dpdist.data import sources
from dpdist.data.features import features
from dpdist.data.features import scattering
from dpdist.ledger import ledger as ledger_lib
from dpdist.workdir import session


@pytest.fixture
def source(tmp_path, monkeypatch):
  monkeypatch.setenv("DPDIST_CACHE", str(tmp_path))
  rng = np.random.default_rng(0)
  return arrays_lib.ArraySource(
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
  assert got.content_digest() == source.content_digest()


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
  other = features.of(arrays_lib.ArraySource(batch), "scattering")
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


def test_kept_features_that_are_touched_are_hashed_again(source):
  """As after another mode, or where somebody set their time back."""
  got = features.of(source, "scattering")
  (path,) = fetch.cache().glob("*/inputs.npy")
  before = path.stat()
  while path.stat().st_ctime_ns == before.st_ctime_ns:
    path.chmod(0o640)
  assert sources.is_touched(got)
  assert sources.changed_files(got) == []
  assert not sources.is_touched(got)
  looked_at = path.stat().st_ctime_ns
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  with path.open("r+b") as file:
    file.write(content)
  while path.stat().st_ctime_ns == looked_at:
    path.chmod(0o640)
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert sources.changed_files(got) == [str(path)]


@pytest.mark.parametrize("name", ["inputs.npy", "sha256"])
def test_a_folder_that_is_not_whole_is_told(source, name):
  features.of(source, "scattering")
  (path,) = fetch.cache().glob(f"*/{name}")
  path.unlink()
  with pytest.raises(ValueError, match="is damaged: delete"):
    features.of(source, "scattering")


class _Crash(Exception):  # noqa: N818
  pass


@pytest.mark.slow
def test_a_step_run_again_on_other_features_has_new_keys(tmp_path, monkeypatch):
  # Features made anew may differ by a rounding. The same noise on both sums
  # would come out in their difference.
  monkeypatch.setenv("DPDIST_CACHE", str(tmp_path / "cache"))
  rng = np.random.default_rng(0)
  for part in ("train", "test"):
    np.savez(
      tmp_path / f"{part}.npz",
      inputs=rng.random((16, 8, 8, 1), np.float32),
      targets=rng.integers(0, 2, 16, np.int32),
    )
  config = config_lib.default()
  config.data.name, config.data.path = "npz", str(tmp_path)
  config.data.features = "scattering"
  config.model.name, config.model.num_outputs = "linear", 2
  config.privacy.num_examples = 16
  config.privacy.expected_batch_size = 8
  config.privacy.num_steps, config.checkpoint_every = 6, 2
  config.privacy.noise_multiplier = 1.0
  config.insecure_seed = 7
  sample = sampling.PoissonSampler.__call__

  def crash(self, step):
    if step == 1:
      raise _Crash
    return sample(self, step)

  def run_until_it_crashes():
    with monkeypatch.context() as patch:
      patch.setattr(sampling.PoissonSampler, "__call__", crash)
      # As if it were killed, which gives nothing back.
      patch.setattr(session.Session, "__exit__", lambda *args: None)
      with pytest.raises(_Crash):
        dpdist.train(config, tmp_path / "run")
    return ledger_lib.Ledger(tmp_path / "run/ledger").spent_steps

  assert run_until_it_crashes() == 2
  # Nothing was saved, and the same features are the same steps.
  assert run_until_it_crashes() == 2
  shutil.rmtree(tmp_path / "cache")
  monkeypatch.setitem(
    features._FEATURES,
    "scattering",
    (lambda x: scattering.transform(x) * (1 + 2**-9), scattering.VERSION),
  )
  # So many are left of the six.
  assert dpdist.train(config, tmp_path / "run")["num_steps"] == 4


def test_an_unknown_name_lists_the_known_ones(source):
  with pytest.raises(
    ValueError, match=r"data\.features .*'scattering'.* got 'x'"
  ):
    features.of(source, "x")


def test_what_features_are_read_from_is_watched(source, tmp_path):
  """Those that are kept, and the examples that they were made of."""
  path = tmp_path / "inputs.npy"
  np.save(path, source.read(np.arange(5))["inputs"])
  mapped = np.load(path, mmap_mode="r")
  targets = np.zeros(5, np.int32)
  examples = arrays_lib.ArraySource({"inputs": mapped, "targets": targets})
  got = features.of(examples, "scattering")
  assert sources.changed_files(got) == []
  (kept,) = tmp_path.glob("scattering-*/inputs.npy")
  os.utime(kept, ns=(0, 0))
  assert sources.changed_files(got) == [str(kept)]
  os.utime(path, ns=(0, 0))
  assert sources.changed_files(got) == [str(kept), str(path)]
