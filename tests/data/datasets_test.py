"""Tests of dpdist.data.datasets.datasets."""

import gzip
from pydoc_data import topics
import struct
import sys

import ml_collections
import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from dpdist.assets import fetch
from dpdist.data import array_record
from dpdist.data.datasets import datasets
from dpdist.data.datasets import idx
from dpdist.data.features import scattering

# The idx format: type code, big-endian struct letter, NumPy name.
IDX_TYPES = [
  (0x08, "B", "uint8"),
  (0x09, "b", "int8"),
  (0x0B, "h", "int16"),
  (0x0C, "i", "int32"),
  (0x0D, "f", "float32"),
  (0x0E, "d", "float64"),
]


def _parts(dataset):
  return dataset.train, dataset.test


def config(**fields):
  return ml_collections.ConfigDict({"path": "", **fields})


def everything(source):
  return source.read(np.arange(len(source)))


def idx_bytes(values, code=0x08, letter="B"):
  values = np.asarray(values)
  header = struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim,
                       *values.shape)  # fmt: skip
  return header + struct.pack(f">{values.size}{letter}", *values.ravel())


def write_idx_directory(directory, *, compress=()):
  """Four tiny files; returns the train and test arrays."""
  generator = np.random.default_rng(0)
  splits = {}
  for prefix, count in (("train", 7), ("t10k", 4)):
    images = generator.integers(0, 256, (count, 28, 28), np.uint8)
    images[0, 0, :2] = 0, 255
    labels = generator.integers(0, 10, count)
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
      name, data = f"{prefix}-{kind}-ubyte", idx_bytes(values)
      if prefix in compress:
        name, data = name + ".gz", gzip.compress(data)
      (directory / name).write_bytes(data)
    splits[prefix] = images, labels
  return splits["train"], splits["t10k"]


def test_digits():
  splits = datasets.load(config(name="digits"))
  assert (len(splits.train), len(splits.test)) == (1438, 359)
  for source in _parts(splits):
    batch = everything(source)
    assert batch["inputs"].shape[1:] == (8, 8, 1)
    assert batch["inputs"].dtype == np.float32
    assert batch["inputs"].min() == 0
    assert batch["inputs"].max() == 1
    assert batch["targets"].dtype == np.int32
    assert set(batch["targets"]) == set(range(10))


def test_digits_hold_out_every_fifth():
  from sklearn import datasets as sklearn_datasets

  original = sklearn_datasets.load_digits()
  splits = datasets.load(config(name="digits"))
  test, train = everything(splits.test), everything(splits.train)
  held_out = np.arange(4, 1797, 5)
  for batch, images, targets in (
    (test, original.images[held_out], original.target[held_out]),
    (
      train,
      np.delete(original.images, held_out, axis=0),
      np.delete(original.target, held_out),
    ),
  ):
    np.testing.assert_array_equal(batch["inputs"][..., 0] * 16, images)
    np.testing.assert_array_equal(batch["targets"], targets)


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  with pytest.raises(ModuleNotFoundError, match=r"dpdist\[examples\]"):
    datasets.load(config(name="digits"))


def text_config(path, **fields):
  fields = {"sequence_length": 3, "num_train": 2, "num_test": 2} | fields
  return config(name="text", **(fields | {"path": path}))


def test_text_is_cut_into_pieces_that_do_not_overlap(tmp_path):
  path = tmp_path / "text"
  path.write_bytes(b"abcdEFGHijklMNOPqrstUV")  # Five pieces of 4; UV is left.
  splits = datasets.load(text_config(str(path)))
  train, test = everything(splits.train), everything(splits.test)
  assert [bytes(r.tolist()) for r in train["inputs"]] == [b"abc", b"EFG"]
  assert [bytes(r.tolist()) for r in train["targets"]] == [b"bcd", b"FGH"]
  assert [bytes(r.tolist()) for r in test["inputs"]] == [b"MNO", b"qrs"]
  assert [bytes(r.tolist()) for r in test["targets"]] == [b"NOP", b"rst"]
  for batch in (train, test):
    assert {a.dtype for a in batch.values()} == {np.dtype(np.int32)}


def test_text_that_ships_with_python():
  splits = datasets.load(
    text_config("", sequence_length=64, num_train=5000, num_test=500)
  )
  assert (len(splits.train), len(splits.test)) == (5000, 500)
  batch = splits.train.read(np.arange(200))
  assert batch["inputs"].shape == batch["targets"].shape == (200, 64)
  np.testing.assert_array_equal(
    batch["inputs"][:, 1:], batch["targets"][:, :-1]
  )
  assert b"assert" in batch["inputs"].astype(np.uint8).tobytes()
  assert splits.train.content_digest() != splits.test.content_digest()


def test_text_that_ships_with_python_is_in_order_of_topic(monkeypatch):
  monkeypatch.setattr(topics, "topics", {"b": "EFGH", "a": "abcd"})
  splits = datasets.load(text_config("", num_train=1, num_test=1))
  inputs = everything(splits.train)["inputs"]
  assert bytes(inputs[0].tolist()) == b"abc"


def test_too_short_text_says_how_many_pieces_it_has(tmp_path):
  path = tmp_path / "text"
  path.write_bytes(b"x" * 23)
  assert len(datasets.load(text_config(str(path), num_train=3)).train) == 3
  with pytest.raises(ValueError, match="at most 5, the pieces of 4 bytes"):
    datasets.load(text_config(str(path), num_train=4))


@pytest.mark.parametrize("field", ["sequence_length", "num_train", "num_test"])
def test_text_sizes_are_checked(field):
  with pytest.raises(
    ValueError, match=f"{field} must be an integer >= 1, got 0"
  ):
    datasets.load(text_config("", **{field: 0}))


@pytest.mark.parametrize("compress", [(), ("train",), ("train", "t10k")])
def test_idx_directory(tmp_path, compress):
  expected = write_idx_directory(tmp_path, compress=compress)
  splits = datasets.load(config(name="idx", path=str(tmp_path)))
  for source, (images, labels) in zip(_parts(splits), expected, strict=True):
    batch = everything(source)
    assert batch["inputs"].shape == (len(images), 28, 28, 1)
    assert batch["inputs"].dtype == np.float32
    np.testing.assert_array_equal(
      batch["inputs"][..., 0], images.astype(np.float32) / np.float32(255)
    )
    assert batch["inputs"].max() == 1
    assert batch["targets"].dtype == np.int32
    np.testing.assert_array_equal(batch["targets"], labels)
    assert source.read(np.array([], np.int64))["inputs"].shape == (0, 28, 28, 1)


def test_idx_manifest_is_over_decoded_content(tmp_path):
  digests = []
  for name, compress in (("plain", ()), ("gz", ("train", "t10k"))):
    (tmp_path / name).mkdir()
    write_idx_directory(tmp_path / name, compress=compress)
    splits = datasets.load(config(name="idx", path=str(tmp_path / name)))
    digests.append([source.content_digest() for source in _parts(splits)])
  assert digests[0] == digests[1]
  path = tmp_path / "plain" / "train-labels-idx1-ubyte"
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)
  splits = datasets.load(config(name="idx", path=str(tmp_path / "plain")))
  assert splits.train.content_digest() != digests[0][0]
  assert splits.test.content_digest() == digests[0][1]


@pytest.mark.parametrize("missing", ["train-images-idx3", "t10k-labels-idx1"])
def test_missing_idx_file_names_the_path_and_a_way_out(tmp_path, missing):
  write_idx_directory(tmp_path)
  (tmp_path / f"{missing}-ubyte").unlink()
  with pytest.raises(ValueError, match="dataset-fashion-mnist") as caught:
    datasets.load(config(name="idx", path=str(tmp_path)))
  assert str(tmp_path) in str(caught.value)
  assert missing in str(caught.value)


@pytest.mark.parametrize(("code", "letter", "name"), IDX_TYPES)
def test_read_idx_types(tmp_path, code, letter, name):
  values = np.array([[1, 2, 3], [100, 5, 6]])
  (tmp_path / "a").write_bytes(idx_bytes(values.astype(name), code, letter))
  array = idx.read(tmp_path / "a")
  np.testing.assert_array_equal(array, values)
  assert array.dtype == np.dtype(name)
  assert array.dtype.isnative


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "magic"),
    (b"\0\0\x08", "magic"),
    (b"\1\0\x08\1" + b"\0\0\0\2ab", "magic"),
    (b"\0\0\x0a\1" + b"\0\0\0\2ab", "magic"),
    (b"\0\0\x08\2" + b"\0\0\0\2", "header"),
    (b"\0\0\x08\1" + b"\0\0\0\2a", "must hold 10 bytes .* got 9"),
    (b"\0\0\x08\1" + b"\0\0\0\2abc", "must hold 10 bytes .* got 11"),
    (gzip.compress(idx_bytes([1, 2]), mtime=0)[:-9], "gzip"),
    (gzip.compress(idx_bytes([1, 2]), mtime=0)[:-8] + bytes(8), "gzip"),
    (gzip.compress(idx_bytes([1, 2]), mtime=0)[:10] + b"\xff" * 20, "gzip"),
    (b"\x1f\x8bnonsense", "gzip"),
  ],
  ids=[
    "empty",
    "short_magic",
    "first_byte",
    "type",
    "short_header",
    "short",
    "long",
    "gzip_short",
    "gzip_checksum",
    "gzip_deflate",
    "gzip_header",
  ],
)
def test_read_idx_refuses_damaged_files(tmp_path, data, message):
  (tmp_path / "a").write_bytes(data)
  with pytest.raises(ValueError, match=message) as caught:
    idx.read(tmp_path / "a")
  assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize(
  ("images", "labels", "culprit"),
  [
    (idx_bytes(np.zeros((2, 3), int)), idx_bytes([1, 2]), "images"),
    (
      idx_bytes(np.zeros((2, 3, 3), int), 0x0C, "i"),
      idx_bytes([1, 2]),
      "images",
    ),
    (idx_bytes(np.zeros((2, 3, 3), int)), idx_bytes([1, 2, 3]), "labels"),
    (
      idx_bytes(np.zeros((2, 3, 3), int)),
      idx_bytes([1, 2], 0x0D, "f"),
      "labels",
    ),
  ],
  ids=["2d", "int32", "count", "float_labels"],
)
def test_idx_refuses_what_are_not_images_and_labels(
  tmp_path, images, labels, culprit
):
  (tmp_path / "images").write_bytes(images)
  (tmp_path / "labels").write_bytes(labels)
  with pytest.raises(ValueError, match=f"{culprit} must hold"):
    idx.load(tmp_path / "images", tmp_path / "labels")


def rows(start, stop):
  numbers = np.arange(start, stop)
  return {
    "inputs": np.stack([numbers, -numbers], axis=1).astype(np.float32),
    "targets": numbers % 3,
  }


def check_rows(splits, num_train, num_test):
  expected = rows(0, num_train), rows(num_train, num_train + num_test)
  for source, arrays in zip(_parts(splits), expected, strict=True):
    batch = everything(source)
    assert batch.keys() == arrays.keys()
    for name, array in arrays.items():
      np.testing.assert_array_equal(batch[name], array)


def test_npz(tmp_path):
  np.savez(tmp_path / "train.npz", **rows(0, 6))
  np.savez(tmp_path / "test.npz", **rows(6, 9))
  check_rows(datasets.load(config(name="npz", path=str(tmp_path))), 6, 3)


FILES = {
  "train-00001-of-00002": (4, 6),
  "train-00000-of-00002": (0, 4),
  "test": (6, 9),
}


def test_array_record(tmp_path):
  for name, (start, stop) in FILES.items():
    arrays = rows(start, stop)
    array_record.write_array_record(
      tmp_path / f"{name}.array_record",
      [{n: a[i] for n, a in arrays.items()} for i in range(stop - start)],
    )
  splits = datasets.load(config(name="array_record", path=str(tmp_path)))
  check_rows(splits, 6, 3)


def test_parquet(tmp_path):
  directory = tmp_path / "day=1 [a]"  # Neither a partition nor a pattern.
  directory.mkdir()
  for name, (start, stop) in FILES.items():
    arrays = rows(start, stop)
    table = pyarrow.table(
      {
        "unused": ["text"] * (stop - start),
        "label": arrays["targets"],
        "features": arrays["inputs"].tolist(),
      }
    )
    parquet.write_table(table, directory / f"{name}.parquet")
  splits = datasets.load(
    config(
      name="parquet",
      path=str(directory),
      inputs_column="features",
      targets_column="label",
    )
  )
  check_rows(splits, 6, 3)


@pytest.mark.parametrize("name", ["npz", "array_record", "parquet", "idx"])
def test_directory_without_files_is_refused(tmp_path, name):
  fields = {"inputs_column": "inputs", "targets_column": "targets"}
  with pytest.raises(ValueError, match="path must be a directory with train"):
    datasets.load(config(name=name, **(fields | {"path": str(tmp_path)})))


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(ValueError, match=r"digits.*text.*got 'digts'"):
    datasets.load(config(name="digts"))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_what_was_fetched_is_found_by_its_name(tmp_path, monkeypatch, name):
  monkeypatch.setenv("DPDIST_CACHE", str(tmp_path / "cache"))
  with pytest.raises(ValueError, match=rf"dpdist fetch --name={name}"):
    datasets.load(config(name=name))
  # As `fetch` leaves it; or where a path says.
  sha256 = fetch.PACKAGES[name].sha256
  folder = tmp_path / "cache" / f"{name}-{sha256[:12]}"
  folder.mkdir(parents=True)
  (images, _), _ = write_idx_directory(folder)
  for path in "", str(folder):
    splits = datasets.load(config(name=name, path=path))
    got = everything(splits.train)["inputs"][..., 0]
    np.testing.assert_allclose(got * 255, images, atol=1e-4)


def test_features_take_the_place_of_inputs(tmp_path, monkeypatch):
  monkeypatch.setenv("DPDIST_CACHE", str(tmp_path / "cache"))
  write_idx_directory(tmp_path)
  plain = datasets.load(config(name="idx", path=str(tmp_path)))
  splits = datasets.load(
    config(name="idx", path=str(tmp_path), features="scattering")
  )
  for source, of in zip(_parts(splits), _parts(plain), strict=True):
    batch = everything(source)
    expected = scattering.transform(everything(of)["inputs"])
    np.testing.assert_array_equal(batch["inputs"], expected.astype(np.float16))
    np.testing.assert_array_equal(batch["targets"], everything(of)["targets"])


def test_features_are_not_of_users(tmp_path):
  for name, users in ("train", [0, 1]), ("test", [2, 3]):
    arrays = {"inputs": np.zeros((2, 8, 8, 1)), "targets": np.zeros(2)}
    np.savez(tmp_path / name, user=np.array(users), **arrays)
  settings = config(
    name="npz",
    path=str(tmp_path),
    unit_column="user",
    examples_per_unit=2,
    features="scattering",
  )
  with pytest.raises(ValueError, match=r"data\.features must be '' .*=2"):
    datasets.load(settings)


def test_options_are_for_data_sets_from_outside(tmp_path, monkeypatch):
  config = ml_collections.ConfigDict(
    {"name": "digits", "path": "", "options": {"size": 3}}
  )
  with pytest.raises(ValueError, match=r"data\.options must be empty for"):
    datasets.load(config)
  (tmp_path / "outside_data.py").write_text(
    "import dpdist\n"
    "import numpy as np\n\n\n"
    "def load(config):\n"
    "  part = {'x': np.zeros(config.options.size)}\n"
    "  return dpdist.Dataset(train=part, test=part)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  config.name = "outside_data:load"
  assert len(datasets.load(config).train) == 3
