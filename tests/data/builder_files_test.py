"""`dpdist.data.from_*` of every format: the same rows are the same data set."""

import gzip
import io
import json
import os
import sys
import threading
import types

import numpy as np
from PIL import Image
from PIL import features
import pyarrow
from pyarrow import parquet
import pytest

from dpdist import data
from dpdist import errors
from dpdist.data import array_record
from dpdist.data import sources
from dpdist.data.builders import parquet_files

_ROWS = 40
_CLASSES = ["no", "yes"]
_OPTIONS = {
  "inputs": ["age", "weight"],
  "targets": "label",
  "classes": _CLASSES,
  "users": "who",
  "test_fraction": 0.4,
}


def _columns():
  rng = np.random.default_rng(1)
  return {
    "age": rng.integers(18, 90, _ROWS).astype(np.float64),
    "weight": rng.normal(70, 10, _ROWS),
    "label": [_CLASSES[i % 2] for i in range(_ROWS)],
    "who": [f"u{i % 9}" for i in range(_ROWS)],
  }


def _write_csv(path, columns=None, delimiter=","):
  columns = columns or _columns()
  rows = zip(*columns.values(), strict=True)
  lines = [columns, *([str(x) for x in row] for row in rows)]
  text = "".join(delimiter.join(line) + "\n" for line in lines)
  if str(path).endswith(".gz"):
    path.write_bytes(gzip.compress(text.encode()))
  else:
    path.write_text(text)
  return path


def _write_parquet(path, columns=None, **options):
  parquet.write_table(pyarrow.table(columns or _columns()), path, **options)
  return path


def everything(source):
  return source.read(np.arange(len(source)))


def _is_same(one, other):
  """Whether two data sets have the same examples, digests and users."""
  for name in ("train", "test"):
    a, b = getattr(one, name), getattr(other, name)
    assert a.content_digest() == b.content_digest()
    assert everything(a).keys() == everything(b).keys()
    for key, values in everything(a).items():
      np.testing.assert_array_equal(values, everything(b)[key])
      assert values.dtype == everything(b)[key].dtype
  if one.train_users is not None:
    np.testing.assert_array_equal(one.train_users, other.train_users)
    np.testing.assert_array_equal(one.test_users, other.test_users)


def test_rows_are_the_same_data_set_in_every_format(tmp_path):
  """The same examples, parts, users and content digests."""
  import datasets

  wanted = data.from_arrays(_columns(), **_OPTIONS)
  _is_same(wanted, data.from_csv(_write_csv(tmp_path / "a.csv"), **_OPTIONS))
  path = _write_parquet(tmp_path / "a.parquet", row_group_size=7)
  _is_same(wanted, data.from_parquet(path, **_OPTIONS))
  stored = datasets.Dataset.from_dict(_columns())
  stored.save_to_disk(tmp_path / "hf")
  _is_same(wanted, data.from_huggingface(tmp_path / "hf", **_OPTIONS))
  rows = [dict(zip(_columns(), row, strict=True))
          for row in zip(*_columns().values(), strict=True)]  # fmt: skip
  _is_same(wanted, data.from_torch(rows, **_OPTIONS))


# CSV.


def test_csv_of_several_files_gzipped_with_another_delimiter(tmp_path):
  columns = _columns()
  halves = [
    {name: x[part] for name, x in columns.items()}
    for part in (slice(0, 11), slice(11, _ROWS))
  ]
  paths = [
    _write_csv(tmp_path / f"{i}.csv.gz", half, ";")
    for i, half in enumerate(halves)
  ]
  _is_same(
    data.from_arrays(columns, **_OPTIONS),
    data.from_csv(paths, delimiter=";", **_OPTIONS),
  )


def test_csv_of_spreadsheets_and_without_a_header(tmp_path):
  path = tmp_path / "a.csv"
  path.write_bytes(b'\xef\xbb\xbfx, t\r\n1, "a, b"\r\n\r\n2 ,c\r\n')
  read = lambda **options: everything(
    data.from_csv(
      path,
      test=path,
      inputs={"x": "x", "t": "t"},
      tokenizers={"t": lambda text: [len(text)]},
      sequence_length=1,
      **options,
    ).train
  )
  batch = read()
  assert batch["x"].tolist() == [1, 2]
  assert batch["t"].tolist() == [[4], [1]]
  path.write_bytes(b"1,abc\n2,d")
  assert read(header=["x", "t"])["t"].tolist() == [[3], [1]]


def test_csv_cells_decide_no_type(tmp_path):
  """One cell more, of another kind, changes nothing of another row."""
  parts = []
  for last in ("4", "4.5"):
    (tmp_path / "a.csv").write_text(f"x,y\n1,0\n2,1\n{last},1\n")
    parts.append(
      everything(
        data.from_csv(tmp_path / "a.csv", test=tmp_path / "a.csv").train
      )
    )
  for name in ("x", "y"):
    assert parts[0][name].dtype == parts[1][name].dtype
    np.testing.assert_array_equal(parts[0][name][:2], parts[1][name][:2])


def test_csv_fills_what_is_missing(tmp_path):
  (tmp_path / "a.csv").write_text("x\n1\n\nnan\n")
  (tmp_path / "a.csv").write_text("x,y\n1,2\n,3\nnan,4\n")
  path = tmp_path / "a.csv"
  with pytest.raises(errors.ArgumentError, match="'x' must hold a number in"):
    data.from_csv(path, test=path)
  batch = everything(data.from_csv(path, test=path, missing=-1).train)
  assert batch["x"].tolist() == [1, -1, -1]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "one header of different names, got"),
    ("x,y\n", "must hold a row or more"),
    ("x,x\n1,2\n", "one header of different names"),
    ("x,y\n1,2\n3\n", r"2 cells in each row.*got rows of \[1, 2\]"),
    ("x,y\n1,secret\n", "'y' must hold numbers; give categories"),
    ('x,y\n1,"2\n', "cannot be read"),
  ],
)
def test_bad_csv_gets_one_clear_sentence(tmp_path, text, message):
  (tmp_path / "a.csv").write_text(text)
  with pytest.raises(ValueError, match=message) as caught:
    data.from_csv(tmp_path / "a.csv", test_fraction=0.5)
  assert "secret" not in str(caught.value)


def test_files_that_are_not_there_are_named(tmp_path):
  with pytest.raises(ValueError, match=r"no\.csv"):
    data.from_csv(tmp_path / "no.csv", test_fraction=0.5)
  with pytest.raises(ValueError, match=r"no\.parquet"):
    data.from_parquet(tmp_path / "no.parquet", test_fraction=0.5)
  with pytest.raises(errors.ArgumentError, match="folder that save_to_disk"):
    data.from_huggingface(tmp_path / "no", test_fraction=0.5)
  with pytest.raises(errors.ArgumentError, match="folder with images in it"):
    data.from_images(tmp_path, test_fraction=0.5)


def test_csv_texts_are_left_to_the_map(tmp_path):
  (tmp_path / "a.csv").write_text("t,x\n3 4,1\n5 6,2\n")
  batch = everything(
    data.from_csv(
      tmp_path / "a.csv",
      test=tmp_path / "a.csv",
      text=["t"],
      map=lambda row: {"inputs": np.array([*row["t"].split()], float)},
    ).train
  )
  assert batch["inputs"].tolist() == [[3, 4], [5, 6]]


# Parquet.


def test_parquet_reads_row_groups_in_bounded_memory(tmp_path, monkeypatch):
  """What stays is bounded, and what is read is right in any order."""
  rows = 20_000
  columns = {
    "x": np.arange(rows, dtype=np.float64),
    "y": np.arange(rows, dtype=np.int64) % 7,
  }
  path = _write_parquet(tmp_path / "a.parquet", columns, row_group_size=1_000)
  group = 1_000 * 16
  dataset = data.from_parquet(
    path, inputs="x", targets="y", test_fraction=0.1, cache_bytes=3 * group
  )
  used = []
  monkeypatch.setattr(
    parquet_files.ParquetTable,
    "_group",
    _watched(parquet_files.ParquetTable._group, used),
  )
  held = everything(dataset.test)["inputs"]
  trained = np.setdiff1d(columns["x"], held)
  rng = np.random.default_rng(0)
  before = pyarrow.total_allocated_bytes()
  for _ in range(5):
    indices = np.sort(rng.choice(len(dataset.train), 200, replace=False))
    batch = dataset.train.read(indices)
    np.testing.assert_array_equal(batch["inputs"], trained[indices])
    np.testing.assert_array_equal(batch["targets"], trained[indices] % 7)
  # Three row groups that stay and the last one, with room for a page or two.
  assert pyarrow.total_allocated_bytes() - before < 2 * group
  assert pyarrow.total_allocated_bytes() < 8 * group
  assert max(used) <= 4
  whole = dataset.train.read(np.arange(len(dataset.train))[::-1])
  np.testing.assert_array_equal(whole["inputs"], trained[::-1])


def _watched(original, used):
  def group(self, *arguments):
    found = original(self, *arguments)
    used.append(len(self._kept) + (self._last[1] is not None))
    return found

  return group


def test_parquet_is_read_by_several_threads_at_once(tmp_path):
  columns = {"x": np.arange(3_000.0)}
  path = _write_parquet(tmp_path / "a.parquet", columns, row_group_size=100)
  source = data.from_parquet(path, test=path, cache_bytes=2_000).train
  failed = []

  def read(seed):
    rng = np.random.default_rng(seed)
    for _ in range(5):
      indices = rng.integers(0, 3_000, 50)
      if source.read(indices)["x"].tolist() != indices.tolist():
        failed.append(seed)

  threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not failed


def test_parquet_columns_of_every_kind(tmp_path):
  columns = pyarrow.table(
    {
      "list": [[1, 2], [3], []],
      "vector": pyarrow.array(
        [[1.0, 2], [3, 4], [5, 6]], pyarrow.list_(pyarrow.float32(), 2)
      ),
      "matrix": [[[1, 2], [3, 4]]] * 3,
      "bool": [True, False, True],
      "word": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
      "float": pyarrow.array([1.0, None, 3]),
      "whole": pyarrow.array([1, None, 3], pyarrow.int16()),
    }
  )
  path = tmp_path / "a.parquet"
  parquet.write_table(columns, path)
  batch = everything(
    data.from_parquet(
      path,
      test=path,
      sequence_length={"list": 2},
      categories={"word": ["b"]},
      missing=9,
      inputs={name: name for name in columns.column_names if name != "matrix"},
    ).train
  )
  assert {name: x.tolist() for name, x in batch.items()} == {
    "list": [[1, 2], [3, 0], [0, 0]],
    "vector": [[1, 2], [3, 4], [5, 6]],
    "bool": [True, False, True],
    "word": [[0], [1], [0]],
    "float": [1, 9, 3],
    "whole": [1, 9, 3],
  }
  batch = everything(data.from_parquet(path, test=path, inputs="matrix").train)
  assert batch["inputs"].tolist() == [[[1, 2], [3, 4]]] * 3


@pytest.mark.parametrize(
  ("column", "options", "message"),
  [
    (pyarrow.array([1, None]), {}, "'x' must hold no nulls; missing=NUMBER"),
    (pyarrow.array([1, None]), {"missing": 0.5}, "missing must be a number of"),
    (pyarrow.array(["a", None]), {"missing": 0}, "'x' must hold no nulls"),
    (pyarrow.array([[1], [2, 3]]), {}, "'inputs' must be an array of numbers"),
    (
      pyarrow.array([0, 1], pyarrow.timestamp("s")),
      {},
      "'x' must hold numbers, booleans, texts, .*got timestamp",
    ),
    (pyarrow.array([], pyarrow.int8()), {}, "must hold a row or more"),
  ],
)
def test_bad_parquet_gets_one_clear_sentence(
  tmp_path, column, options, message
):
  path = tmp_path / "a.parquet"
  parquet.write_table(pyarrow.table({"x": column}), path)
  with pytest.raises(ValueError, match=message):
    everything(data.from_parquet(path, test=path, inputs="x", **options).train)


def test_parquet_files_must_have_the_same_columns(tmp_path):
  one = _write_parquet(tmp_path / "a.parquet", {"x": [1.0]})
  other = _write_parquet(tmp_path / "b.parquet", {"x": [1]})
  with pytest.raises(errors.ArgumentError, match="same columns and types"):
    data.from_parquet([one, other], test_fraction=0.5)


def test_a_parquet_file_that_changes_is_noticed(tmp_path):
  columns = {"x": np.arange(100.0)}
  path = _write_parquet(tmp_path / "a.parquet", columns)
  dataset = data.from_parquet(path, test_fraction=0.5)
  assert not sources.changed_files(dataset.train)
  # Its mode alone changes no content.
  os.chmod(path, 0o600)
  assert sources.is_touched(dataset.train)
  assert not sources.changed_files(dataset.train)
  before = os.stat(path)
  columns["x"][::2] += 0.5
  _write_parquet(path, columns)
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert sources.changed_files(dataset.train) == [str(path)]


# ArrayRecord.


def test_array_record_reads_single_records(tmp_path):
  rng = np.random.default_rng(0)
  rows = [
    {"x": rng.normal(size=3), "y": np.int32(i), "who": np.int64(i % 5)}
    for i in range(30)
  ]
  path = tmp_path / "a.array_record"
  array_record.write_array_record(path, rows)
  options = {"inputs": "x", "targets": "y", "users": "who"}
  dataset = data.from_array_record(path, test_fraction=0.4, **options)
  columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  _is_same(dataset, data.from_arrays(columns, test_fraction=0.4, **options))
  array_record.write_array_record(path, rows[::-1])
  assert sources.changed_files(dataset.train) == [str(path)]


def test_array_record_of_another_format(tmp_path):
  """With records of several lengths, and texts."""
  from array_record.python import array_record_module

  path = tmp_path / "a.array_record"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  rows = [{"text": "a" * i, "tags": [i] * i, "y": i % 2} for i in range(9)]
  for row in rows:
    writer.write(json.dumps(row).encode())
  writer.close()
  options = {
    "inputs": {"text": "text", "tags": "tags"},
    "targets": "y",
    "tokenizers": {"text": lambda text: list(text.encode())},
    "sequence_length": {"text": 4, "tags": 3},
    "test_fraction": 0.4,
  }
  dataset = data.from_array_record(path, decode=json.loads, **options)
  batch = everything(dataset.train)
  assert batch["text"].shape[1:] == (4,)
  for row in range(len(dataset.train)):  # Whatever it is read together with.
    one = dataset.train.read(np.array([row]))
    np.testing.assert_array_equal(one["tags"][0], batch["tags"][row])
  _is_same(dataset, data.from_torch(rows, **options))


# Images.


def _picture(seed, size=(5, 4), mode="RGB"):
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (*size, 3), np.uint8)
  return Image.fromarray(pixels).convert(mode)


def _write_images(folder, names, **options):
  for seed, name in enumerate(names):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    _picture(seed, **options).save(path)


def test_images_of_a_folder_of_classes(tmp_path):
  names = [f"{'cat' if i % 2 else 'dog'}/{i}.png" for i in range(6)]
  _write_images(tmp_path / "a", names)
  options = {"targets": "label", "classes": ["cat", "dog"]}
  read = lambda folder: (
    data.from_images(tmp_path / folder, test=tmp_path / "a", **options).train
  )
  batch = everything(read("a"))
  assert batch["inputs"].shape == (6, 5, 4, 3)
  assert batch["inputs"].dtype == np.float32
  for image, target in zip(batch["inputs"], batch["targets"], strict=True):
    seeds = [i for i in range(6) if i % 2 == (target == 0)]
    assert any(
      np.array_equal(image * 255, np.asarray(_picture(seed))) for seed in seeds
    )
  # Other names of the files are the same examples in the same order.
  others = [f"{'cat' if i % 2 else 'dog'}/z{9 - i}.png" for i in range(6)]
  _write_images(tmp_path / "b", others)
  assert read("b").content_digest() == read("a").content_digest()


def test_images_of_a_manifest_with_several_labels(tmp_path):
  names = [f"all/{i}.png" for i in range(8)]
  _write_images(tmp_path, names)
  text = "file,cat,dog,who\n" + "".join(
    f"{name},{i % 2},{i // 4},u{i % 4}\n" for i, name in enumerate(names)
  )
  (tmp_path / "list.csv").write_text(text)
  dataset = data.from_images(
    tmp_path / "list.csv",
    image="file",
    targets=["cat", "dog"],
    users="who",
    test_fraction=0.4,
    image_size=(3, 2),
    image_mode="L",
  )
  train = everything(dataset.train)
  assert train["inputs"].shape[1:] == (3, 2, 1)
  assert train["targets"].shape[1:] == (2,)
  assert not {*dataset.train_users} & {*dataset.test_users}


def test_images_are_decoded_when_they_are_read(tmp_path):
  _write_images(tmp_path, [f"{i}.png" for i in range(4)])
  dataset = data.from_images(tmp_path, test=tmp_path)
  dataset.train.content_digest()
  (tmp_path / "0.png").write_bytes(b"no image")
  with pytest.raises(ValueError, match="an image cannot be read") as caught:
    everything(dataset.train)
  assert "0.png" not in str(caught.value)
  assert sources.changed_files(dataset.train) == [str(tmp_path / "0.png")]


def test_another_decoder_is_another_encoding(tmp_path, monkeypatch):
  """Its pixels may differ, and must not meet the same keys."""
  _write_images(tmp_path, [f"{i}.png" for i in range(2)])
  source = data.from_images(tmp_path, test=tmp_path).train
  before = source.encoding_digest(), source.content_digest()
  monkeypatch.setattr(features, "version", lambda name: "0.1")
  assert source.encoding_digest() != before[0]
  assert source.content_digest() == before[1]


def test_bad_images_get_one_clear_sentence(tmp_path):
  _write_images(tmp_path / "a", ["0.png"], size=(2, 2))
  _write_images(tmp_path / "a", ["0.png", "1.png"])
  _picture(0, size=(2, 2)).save(tmp_path / "a" / "2.png")
  with pytest.raises(ValueError, match=r"one size; image_size=\(height"):
    everything(data.from_images(tmp_path / "a", test=tmp_path / "a").train)
  _write_images(tmp_path / "a", ["x/3.png"])
  with pytest.raises(errors.ArgumentError, match="images in both places"):
    data.from_images(tmp_path / "a", test_fraction=0.5)
  (tmp_path / "l.csv").write_text("file\nno.png\n")
  with pytest.raises(errors.ArgumentError, match="got 1 that are not"):
    data.from_images(tmp_path / "l.csv", image="file", test_fraction=0.5)
  with pytest.raises(errors.ArgumentError, match="image must name the column"):
    data.from_images(tmp_path / "l.csv", test_fraction=0.5)


def _png(seed):
  buffer = io.BytesIO()
  _picture(seed).save(buffer, "png")
  return buffer.getvalue()


def test_images_inside_parquet(tmp_path):
  path = _write_parquet(
    tmp_path / "a.parquet", {"image": [_png(i) for i in range(3)]}
  )
  batch = everything(data.from_parquet(path, test=path, inputs="image").train)
  np.testing.assert_array_equal(
    batch["inputs"] * 255, np.stack([np.asarray(_picture(i)) for i in range(3)])
  )


# Other libraries.


def test_huggingface_images_and_splits(tmp_path):
  import datasets

  columns = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
  )
  parts = {
    name: datasets.Dataset.from_dict(
      {
        "image": [{"bytes": _png(i), "path": None} for i in range(3)],
        "label": [1, 0, 1],
      },
      features=columns,
    )
    for name in ("train", "valid")
  }
  stored = datasets.DatasetDict(parts)
  stored.save_to_disk(tmp_path / "hf")
  dataset = data.from_huggingface(
    tmp_path / "hf", test="valid", inputs="image", targets="label"
  )
  batch = everything(dataset.train)
  assert batch["inputs"].shape == (3, 5, 4, 3)
  assert batch["targets"].tolist() == [1, 0, 1]
  assert len(dataset.test) == 3
  # What is selected and shuffled there is so here.
  turned = data.from_huggingface(
    parts["train"].select([2, 1]), test=parts["valid"], targets="label",
    inputs="image",
  )  # fmt: skip
  assert everything(turned.train)["targets"].tolist() == [1, 0]
  with pytest.raises(errors.ArgumentError, match=r"\['train', 'valid'\]"):
    data.from_huggingface(stored, split="all", test="valid")
  with pytest.raises(errors.ArgumentError, match=r"\['train', 'valid'\]"):
    data.from_huggingface(stored, test="tset")
  with pytest.raises(
    errors.ArgumentError, match=r"must be a datasets\.Dataset"
  ):
    data.from_huggingface([1, 2], test_fraction=0.5)


class _Tensor:
  """What is used of a tensor that is part of a graph."""

  def __init__(self, values):
    self._values = np.asarray(values, np.float32)

  def detach(self):
    return types.SimpleNamespace(cpu=lambda: self._values)

  def __array__(self, *_, **__):
    raise RuntimeError("call detach() first")


class _MapStyle:
  """A map-style data set of tuples."""

  def __len__(self):
    return 12

  def __getitem__(self, index):
    if index >= 12:
      raise IndexError
    return _Tensor([index, 1]), index % 3


def test_torch_items_are_tuples_of_tensors():
  dataset = data.from_torch(_MapStyle(), test_fraction=0.3)
  batch = everything(dataset.train)
  np.testing.assert_array_equal(batch["inputs"][:, 0] % 3, batch["targets"])
  assert batch["targets"].dtype == np.int32
  named = data.from_torch(_MapStyle(), test=_MapStyle(), columns=("x", "y"))
  assert sorted(everything(named.train)) == ["x", "y"]


def test_torch_itself():
  torch = pytest.importorskip("torch")
  inputs = torch.arange(12.0).reshape(6, 2).requires_grad_()
  items = torch.utils.data.TensorDataset(inputs, torch.arange(6))
  batch = everything(data.from_torch(items, test=items).train)
  np.testing.assert_array_equal(batch["inputs"], inputs.detach().numpy())
  assert batch["targets"].tolist() == [*range(6)]


def test_items_that_change_are_refused():
  """An augmentation there would be one that nobody accounts for."""
  rng = np.random.default_rng(0)

  class Random(_MapStyle):
    def __getitem__(self, index):
      return rng.normal(size=3), 0

  with pytest.raises(errors.ArgumentError, match="the same item each time"):
    data.from_torch(Random(), test_fraction=0.5)


@pytest.mark.parametrize(
  ("items", "message"),
  [
    (iter([1]), "items must have a length and items by index"),
    ([], "items must have an item or more"),
    ([(1, 2, 3)], "columns must name all 3 parts of an item"),
    ([(1.0, 2), (1, 2)], "'inputs' must hold values of one dtype"),
    ([{"x": 1}, {"y": 1}], "examples must all have the names of the first"),
  ],
)
def test_bad_items_get_one_clear_sentence(items, message):
  with pytest.raises(ValueError, match=message):
    data.from_torch(items, test_fraction=0.5)


def test_tensorflow_datasets_that_are_prepared(tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")

  class Tiny(tfds.testing.DummyDataset):
    pass

  builder = Tiny(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  dataset = data.from_tfds("tiny", data_dir=str(tmp_path), test_fraction=0.5)
  whole = [*everything(dataset.train)["id"], *everything(dataset.test)["id"]]
  assert sorted(whole) == [0, 1, 2]
  with pytest.raises(errors.ArgumentError, match="prepared on disk"):
    data.from_tfds("mnist", data_dir=str(tmp_path), test="test")


@pytest.mark.parametrize(
  ("package", "extra", "build"),
  [
    ("pyarrow", "parquet", lambda: data.from_parquet("x", test_fraction=0.5)),
    ("PIL", "images", lambda: data.from_images("x", test_fraction=0.5)),
    (
      "datasets",
      "huggingface",
      lambda: data.from_huggingface("x", test_fraction=0.5),
    ),
    (
      "tensorflow_datasets",
      "tfds",
      lambda: data.from_tfds("x", test_fraction=0.5),
    ),
  ],
)
def test_a_missing_package_is_named(monkeypatch, package, extra, build):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(errors.MissingPackageError, match=rf"dpdist\[{extra}\]"):
    build()
