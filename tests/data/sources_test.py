"""Tests of dpdist.data.sources."""

from concurrent import futures
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import sys

from array_record.python import array_record_module
import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from dpdist.data import array_record
from dpdist.data import arrays as arrays_lib
from dpdist.data import parquet as parquet_lib
from dpdist.data import sources


def examples(num_examples=12):
  generator = np.random.default_rng(0)
  return {
    "inputs": generator.normal(size=(num_examples, 3, 2)).astype(np.float32),
    "targets": np.arange(num_examples, dtype=np.int32),
  }


def to_rows(arrays):
  length = len(next(iter(arrays.values())))
  return [{name: a[i] for name, a in arrays.items()} for i in range(length)]


def write_parquet(path, arrays, **options):
  columns = {name: values.tolist() for name, values in arrays.items()}
  parquet.write_table(pyarrow.table(columns), path, **options)


def array_source(directory):
  np.savez(directory / "data.npz", **examples())
  return arrays_lib.ArraySource.from_npz(directory / "data.npz")


def array_record_source(directory):
  rows = to_rows(examples())
  # Two files of unequal length, so that the numbering runs across them.
  paths = [directory / "a.array_record", directory / "b.array_record"]
  array_record.write_array_record(paths[0], rows[:5])
  array_record.write_array_record(paths[1], rows[5:])
  return array_record.ArrayRecordSource(paths)


def parquet_source(directory):
  arrays = examples()
  paths = [directory / "a.parquet", directory / "b.parquet"]
  for path, part in zip(paths, (slice(0, 5), slice(5, None)), strict=True):
    table = pyarrow.table(
      {
        "label": arrays["targets"][part],
        "x": pyarrow.array(
          arrays["inputs"][part].tolist(),
          pyarrow.list_(pyarrow.list_(pyarrow.float32())),
        ),
      }
    )
    # Small row groups, so that a column comes in several pieces.
    parquet.write_table(table, path, row_group_size=2)
  return parquet_lib.ParquetSource(paths, {"inputs": "x", "targets": "label"})


MAKERS = [array_source, array_record_source, parquet_source]


@pytest.fixture(params=MAKERS, ids=lambda maker: maker.__name__)
def make(request):
  return request.param


# What every source promises.


@pytest.mark.parametrize(
  "indices", [[0], [11], [4, 5], [7, 2, 11, 2], list(range(12)), []]
)
def test_read_returns_the_examples_in_the_order_asked(make, tmp_path, indices):
  source = make(tmp_path)
  assert len(source) == 12
  batch = source.read(np.array(indices, np.int64))
  assert batch.keys() == examples().keys()
  for name, array in examples().items():
    np.testing.assert_array_equal(batch[name], array[indices])
    assert batch[name].dtype == array.dtype
    assert batch[name].shape == (len(indices), *array.shape[1:])


@pytest.mark.parametrize(
  "indices", [[-1], [12], [3, 12], [-1, 3], [0.5], [[1]], 1]
)
def test_bad_indices_are_refused(make, tmp_path, indices):
  with pytest.raises(ValueError, match="indices must be"):
    make(tmp_path).read(np.array(indices))


def test_errors_do_not_tell_the_index(make, tmp_path):
  with pytest.raises(ValueError, match="indices must be") as caught:
    make(tmp_path).read(np.array([7, 987654321]))
  assert "987654321" not in str(caught.value)
  assert "7" not in str(caught.value)


def test_reads_from_many_threads_agree(make, tmp_path):
  source = make(tmp_path)
  draws = [np.random.default_rng(i).permutation(12)[:7] for i in range(64)]
  with futures.ThreadPoolExecutor(8) as pool:
    batches = list(pool.map(source.read, draws))
  for draw, batch in zip(draws, batches, strict=True):
    for name, array in examples().items():
      np.testing.assert_array_equal(batch[name], array[draw])


def test_manifest_depends_on_content_alone(make, tmp_path):
  digests = []
  for name in ("first", "second"):
    (tmp_path / name).mkdir()
    source = make(tmp_path / name)
    digests.append(source.content_digest())
    source.read(np.array([1, 2]))
    assert source.content_digest() == digests[-1]
  assert digests[0] == digests[1]
  assert len(bytes.fromhex(digests[0])) == 32


# Arrays.


def test_array_manifest_is_what_it_always_was():
  source = arrays_lib.ArraySource(
    {
      "targets": np.array([1, 2], "<i4"),
      "inputs": np.array([[0.5], [1.5]], "<f4"),
    }
  )
  # Written out: a change of the format would refuse to resume older runs.
  content = (
    b'[["inputs", "<f4", [2, 1]], ["targets", "<i4", [2]]]\n'
    b"\0\0\0\x3f\0\0\xc0\x3f\1\0\0\0\2\0\0\0"
  )
  assert source.content_digest() == hashlib.sha256(content).hexdigest()


def test_array_manifest_changes_with_any_byte_name_dtype_or_shape():
  arrays = examples()
  variants = [arrays]
  for name in arrays:
    changed = {key: a.copy() for key, a in arrays.items()}
    changed[name].view(np.uint8).flat[-1] ^= 1
    variants.append(changed)
  variants += [
    {"inputs": arrays["inputs"]},
    {"inputs": arrays["inputs"], "labels": arrays["targets"]},
    {**arrays, "targets": arrays["targets"].view(np.uint32)},
    {**arrays, "inputs": arrays["inputs"].reshape(12, 2, 3)},
    {name: array[::-1] for name, array in arrays.items()},
  ]
  digests = {arrays_lib.ArraySource(v).content_digest() for v in variants}
  assert len(digests) == len(variants)


def test_array_manifest_ignores_layout_and_order_of_names():
  arrays = examples()
  same = {
    "targets": arrays["targets"],
    "inputs": np.asfortranarray(arrays["inputs"]),
  }
  digest = arrays_lib.ArraySource(arrays).content_digest()
  assert arrays_lib.ArraySource(same).content_digest() == digest


@pytest.mark.parametrize("block_bytes", [1, 50])
def test_array_manifest_does_not_depend_on_the_block(monkeypatch, block_bytes):
  digest = arrays_lib.ArraySource(examples()).content_digest()
  monkeypatch.setattr(sources, "HASH_BLOCK_BYTES", block_bytes)
  assert arrays_lib.ArraySource(examples()).content_digest() == digest


def test_arrays_on_disk_stay_there(tmp_path):
  inputs = examples()["inputs"]
  np.save(tmp_path / "inputs.npy", inputs)
  mapped = np.load(tmp_path / "inputs.npy", mmap_mode="r")
  source = arrays_lib.ArraySource({"inputs": mapped})
  assert np.shares_memory(source._arrays["inputs"], mapped)
  batch = source.read(np.array([3, 1]))["inputs"]
  np.testing.assert_array_equal(batch, inputs[[3, 1]])
  batch[:] = 0  # What was read is the reader's own.
  expected = arrays_lib.ArraySource({"inputs": inputs}).content_digest()
  assert source.content_digest() == expected


def test_convert_applies_to_what_is_read():
  source = arrays_lib.ArraySource(
    {"x": np.arange(5)}, convert=lambda batch: {"y": batch["x"] * 10}
  )
  np.testing.assert_array_equal(source.read(np.array([1, 4]))["y"], [10, 40])
  assert source.read(np.array([], np.int64))["y"].shape == (0,)


@pytest.mark.parametrize(
  "arrays",
  [
    {},
    {"a": np.zeros(3), "b": np.zeros(4)},
    {"a": np.zeros(())},
    {"a": np.array([None, 1])},
  ],
  ids=["none", "unequal", "scalar", "objects"],
)
def test_bad_arrays_are_refused(arrays):
  with pytest.raises(ValueError, match=r"^arrays"):
    arrays_lib.ArraySource(arrays)


# ArrayRecord.


def _array_record(path, arrays, *parts):
  """A source of arrays in one file, or in several that are cut at `parts`."""
  rows, cuts = to_rows(arrays), [0, *parts, None]
  paths = []
  for start, stop in itertools.pairwise(cuts):
    paths.append(path.with_name(f"{path.name}-{start}"))
    array_record.write_array_record(paths[-1], rows[start:stop])
  return array_record.ArrayRecordSource(paths)


def test_array_record_manifest_is_of_the_examples_alone(tmp_path):
  """Not of how they are stored: a budget is kept under it."""
  arrays = examples()
  expected = arrays_lib.ArraySource(arrays).content_digest()
  one = _array_record(tmp_path / "a", arrays)
  assert one.content_digest() == expected
  # Files that have other names, sizes and bytes.
  assert _array_record(tmp_path / "b", arrays, 5).content_digest() == expected
  assert (
    _array_record(tmp_path / "c", arrays, 2, 7).content_digest() == expected
  )
  writer = array_record_module.ArrayRecordWriter(
    str(tmp_path / "packed"), "group_size:4"
  )
  for row in to_rows(arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(reversed(row.items())))
    writer.write(buffer.getvalue())
  writer.close()
  packed = array_record.ArrayRecordSource(tmp_path / "packed")
  assert packed.content_digest() == expected
  # And not of what files hold beside them.
  data = bytearray((tmp_path / "a-0").read_bytes())
  data[-1] ^= 1
  (tmp_path / "a-0").write_bytes(data)
  assert (
    array_record.ArrayRecordSource(tmp_path / "a-0").content_digest()
    == expected
  )


def test_array_record_manifest_changes_with_any_example(tmp_path):
  arrays, digests = examples(), set()
  changed = {key: a.copy() for key, a in arrays.items()}
  changed["inputs"].view(np.uint8).flat[-1] ^= 1
  other = {key: a.copy() for key, a in arrays.items()}
  other["targets"][0] += 1
  variants = [
    *(arrays, changed, other),
    {name: array[:-1] for name, array in arrays.items()},
    {name: array[::-1] for name, array in arrays.items()},
    {"inputs": arrays["inputs"], "labels": arrays["targets"]},
  ]
  for number, variant in enumerate(variants):
    source = _array_record(tmp_path / str(number), variant, 5)
    digests.add(source.content_digest())
  assert len(digests) == len(variants)


def test_array_record_manifest_changes_with_the_order_of_files(tmp_path):
  source = array_record_source(tmp_path)
  other = array_record.ArrayRecordSource(source._paths[::-1])
  assert other.content_digest() != source.content_digest()


@pytest.mark.parametrize("held_bytes", [0, 12 * 4, 1 << 20])
def test_array_record_manifest_does_not_depend_on_blocks_or_room(
  tmp_path, monkeypatch, held_bytes
):
  arrays = examples() | {"z": np.arange(24, dtype=np.uint8).reshape(12, 2)}
  expected = arrays_lib.ArraySource(arrays).content_digest()
  monkeypatch.setattr(sources, "HASH_BLOCK_BYTES", 100)
  monkeypatch.setattr(array_record, "_HELD_BYTES", held_bytes)
  assert _array_record(tmp_path / "a", arrays, 5).content_digest() == expected


def test_what_earlier_releases_called_an_array_record_is_known(tmp_path):
  source = array_record_source(tmp_path)
  names = ["a.array_record", "b.array_record"]
  header = [[name, (tmp_path / name).stat().st_size] for name in names]
  content = b"".join((tmp_path / name).read_bytes() for name in names)
  (earlier,) = sources.earlier_digests(source)
  assert (
    earlier
    == hashlib.sha256(json.dumps(header).encode() + b"\n" + content).hexdigest()
  )
  assert earlier != source.content_digest()
  assert sources.earlier_digests(array_source(tmp_path)) == []


# Files that are changed while they are read.


def _touched(path):
  os.utime(path, ns=(0, 0))


def _overwritten(path):
  """The same size and time, in the same place."""
  before = path.stat()
  aside = path.with_name("aside")
  shutil.copy(path, aside)
  aside.rename(path)
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _longer(path):
  before = path.stat()
  with path.open("ab") as file:
    file.write(b"x")
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def mapped_source(directory):
  """Arrays that stay on disk, one of them seen through a view."""
  for name, array in examples().items():
    np.save(directory / f"{name}.npy", array)
  load = lambda name: np.load(directory / f"{name}.npy", mmap_mode="r")
  arrays = {"inputs": load("inputs")[:], "targets": load("targets")}
  return arrays_lib.ArraySource({k: np.asarray(a) for k, a in arrays.items()})


@pytest.mark.parametrize("change", [_touched, _overwritten, _longer])
@pytest.mark.parametrize(
  ("lazy", "names"),
  [
    (array_record_source, ["a.array_record", "b.array_record"]),
    (mapped_source, ["inputs.npy", "targets.npy"]),
  ],
  ids=["array_record", "mapped"],
)
def test_a_source_says_which_of_its_files_were_changed(
  lazy, names, change, tmp_path
):
  for name in names:
    source = lazy(tmp_path)
    source.read(np.arange(12))
    source.content_digest()
    assert sources.changed_files(source) == []
    change(tmp_path / name)
    assert sources.changed_files(source) == [str(tmp_path / name)]


_LAZY = pytest.mark.parametrize(
  ("lazy", "names"),
  [
    (array_record_source, ["a.array_record", "b.array_record"]),
    (mapped_source, ["inputs.npy", "targets.npy"]),
  ],
  ids=["array_record", "mapped"],
)


def _later(path, do):
  """Does something, and then sees that the clock of the disk has moved."""
  before = path.stat().st_ctime_ns
  do(path)
  while path.stat().st_ctime_ns == before:
    path.chmod(path.stat().st_mode)


def _exchanged(path, other):
  """The same size, in the same inode, at the time of before."""
  before = path.stat()
  content = other.read_bytes()
  assert len(content) == before.st_size
  with path.open("r+b") as file:
    file.write(content)
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
  after = path.stat()
  for name in ("st_size", "st_mtime_ns", "st_ino", "st_dev"):
    assert getattr(after, name) == getattr(before, name)


@_LAZY
def test_a_file_whose_time_was_set_back_is_found(lazy, names, tmp_path):
  """By its ctime, which nobody can set back, and then by its content."""
  other = tmp_path / "other"
  other.mkdir()
  source = lazy(other)
  if lazy is mapped_source:
    np.save(other / names[1], 1 + np.load(other / names[1]))
  else:
    rows = [source.read(np.array([i])) for i in range(len(source))]
    rows = [{name: 1 + array[0] for name, array in row.items()} for row in rows]
    count = len(array_record.ArrayRecordSource(other / names[0]))
    array_record.write_array_record(other / names[1], rows[count:])
  source = lazy(tmp_path)
  source.content_digest()
  assert not sources.is_touched(source)
  exchange = functools.partial(_exchanged, other=other / names[1])
  _later(tmp_path / names[1], exchange)
  assert sources.is_touched(source)
  for _ in range(2):
    assert sources.changed_files(source) == [str(tmp_path / names[1])]


def _renamed(path):
  aside = path.with_name("aside")
  path.rename(aside)
  aside.rename(path)


@_LAZY
@pytest.mark.parametrize(
  "innocent",
  [
    _renamed,
    lambda path: path.chmod(0o640),
    lambda path: os.link(path, path.with_name("linked")),
  ],
  ids=["renamed", "mode", "link"],
)
def test_who_changes_no_content_is_not_accused(lazy, names, innocent, tmp_path):
  source = lazy(tmp_path)
  source.content_digest()
  _later(tmp_path / names[0], innocent)
  assert sources.is_touched(source)
  assert sources.changed_files(source) == []
  # Looked at once, and then known.
  assert not sources.is_touched(source)
  _touched(tmp_path / names[0])
  assert sources.changed_files(source) == [str(tmp_path / names[0])]


@pytest.mark.parametrize("lazy", [array_record_source, mapped_source])
def test_a_file_that_is_away_may_come_back(lazy, tmp_path):
  source = lazy(tmp_path)
  path = next(iter(source._stamps._stamps))
  os.rename(path, tmp_path / "away")
  with pytest.raises(OSError, match="No such file"):
    sources.changed_files(source)
  os.rename(tmp_path / "away", path)
  assert sources.changed_files(source) == []


@pytest.mark.parametrize("eager", [array_source, parquet_source])
def test_what_is_in_memory_is_what_was_hashed(eager, tmp_path):
  """Whatever becomes of the files meanwhile."""
  expected = eager(tmp_path).content_digest()
  source = eager(tmp_path)
  for path in tmp_path.iterdir():
    path.write_bytes(b"")
  assert source.content_digest() == expected
  assert sources.changed_files(source) == []


@pytest.mark.parametrize(
  "odd",
  [
    {"inputs": np.zeros(1, np.float32)},
    {"inputs": np.zeros(2, np.float64)},
    {"labels": np.zeros(2, np.float32)},
    {"inputs": np.zeros(2, np.float32), "more": np.zeros(1)},
  ],
  ids=["shape", "dtype", "name", "more"],
)
def test_records_that_differ_are_refused(tmp_path, odd):
  plain = {"inputs": np.zeros(2, np.float32)}
  with pytest.raises(ValueError, match="examples must all be like the first"):
    array_record.write_array_record(tmp_path / "mixed", [plain, odd])
  array_record.write_array_record(tmp_path / "a", [plain])
  array_record.write_array_record(tmp_path / "b", [odd])
  source = array_record.ArrayRecordSource([tmp_path / "a", tmp_path / "b"])
  assert source.read(np.array([0]))["inputs"].shape == (1, 2)
  with pytest.raises(ValueError, match="names, shapes and dtypes"):
    source.read(np.array([0, 1]))


def test_array_record_refuses_objects(tmp_path):
  with pytest.raises(ValueError, match="allow_pickle"):
    array_record.write_array_record(
      tmp_path / "a", [{"inputs": np.array([None, 1])}]
    )


def test_array_record_without_records_is_refused(tmp_path):
  array_record.write_array_record(tmp_path / "empty", [])
  with pytest.raises(ValueError, match="paths must hold records"):
    array_record.ArrayRecordSource(tmp_path / "empty")


@pytest.mark.parametrize("paths", [[], "nowhere", ["nowhere"]])
def test_missing_files_are_refused(paths):
  with pytest.raises(ValueError, match="paths must name files"):
    array_record.ArrayRecordSource(paths)
  with pytest.raises(ValueError, match="paths must name files"):
    parquet_lib.ParquetSource(paths, {"inputs": "x"})


# Parquet.


def test_parquet_manifest_is_over_values_not_encoding(tmp_path):
  arrays = {"x": np.arange(40).reshape(20, 2), "y": np.arange(20)}
  columns = {"inputs": "x", "targets": "y"}
  changed = {**arrays, "y": arrays["y"] + (np.arange(20) == 19)}
  write_parquet(tmp_path / "a", arrays, compression="snappy")
  write_parquet(tmp_path / "b", arrays, compression="none", row_group_size=3)
  write_parquet(tmp_path / "c", changed)
  a, b, c = (
    parquet_lib.ParquetSource(tmp_path / n, columns).content_digest()
    for n in "abc"
  )
  assert a == b
  assert a != c


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    (pyarrow.array([True, False]), np.array([True, False])),
    (
      pyarrow.array([[1, 2], [3, 4]], pyarrow.list_(pyarrow.int16(), 2)),
      np.array([[1, 2], [3, 4]], np.int16),
    ),
    (
      pyarrow.array([[1], [2]], pyarrow.large_list(pyarrow.uint8())),
      np.array([[1], [2]], np.uint8),
    ),
  ],
  ids=["bool", "fixed_size_list", "large_list"],
)
def test_parquet_types(tmp_path, values, expected):
  parquet.write_table(pyarrow.table({"x": values}), tmp_path / "a")
  source = parquet_lib.ParquetSource(tmp_path / "a", {"inputs": "x"})
  batch = source.read(np.array([1, 0]))["inputs"]
  np.testing.assert_array_equal(batch, expected[::-1])
  assert batch.dtype == expected.dtype


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ([[1, 2], [3]], "lists of one length"),
    ([1, None], "no nulls"),
    ([[1, 2], None], "no nulls"),
    ([[1, None], [1, 2]], "no nulls"),
    (["a", "b"], "must hold numbers"),
    ([[["a"]], [["b"]]], "must hold numbers"),
    (pyarrow.array([], pyarrow.int64()), "rows of one shape"),
  ],
  ids=["ragged", "null", "null_list", "null_inside", "text", "nested", "empty"],
)
def test_bad_parquet_columns_are_refused(tmp_path, values, message):
  parquet.write_table(pyarrow.table({"x": values}), tmp_path / "a")
  with pytest.raises(ValueError, match=message) as caught:
    parquet_lib.ParquetSource(tmp_path / "a", {"inputs": "x"})
  assert "'x'" in str(caught.value)


def test_parquet_files_of_different_widths_are_refused(tmp_path):
  write_parquet(tmp_path / "a", {"x": np.zeros((2, 3))})
  write_parquet(tmp_path / "b", {"x": np.zeros((2, 4))})
  with pytest.raises(ValueError, match=r"'x' with shapes \[\(3,\), \(4,\)\]"):
    parquet_lib.ParquetSource([tmp_path / "a", tmp_path / "b"], {"inputs": "x"})


def test_unknown_parquet_column_is_refused(tmp_path):
  write_parquet(tmp_path / "a", {"x": np.zeros(2)})
  with pytest.raises(ValueError, match=r"one of \['x'\] of .* got 'y'"):
    parquet_lib.ParquetSource(tmp_path / "a", {"inputs": "y"})


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ModuleNotFoundError, match=r"dpdist\[parquet\]"):
    parquet_lib.ParquetSource("a", {"inputs": "x"})


# Trouble.


def test_an_array_record_that_is_away_is_an_os_error_and_then_read(tmp_path):
  expected = array_record_source(tmp_path).read(np.arange(12))
  source = array_record_source(tmp_path)
  file = tmp_path / "b.array_record"
  file.rename(tmp_path / "away")
  with pytest.raises(OSError, match="No such file or directory") as caught:
    source.read(np.arange(12))
  # Which file a step reads from is private.
  assert "b.array_record" not in str(caught.value)
  (tmp_path / "away").rename(file)
  for name, array in source.read(np.arange(12)).items():
    np.testing.assert_array_equal(array, expected[name])


def test_an_array_record_that_is_cut_off_is_an_os_error(tmp_path):
  source = array_record_source(tmp_path)
  file = tmp_path / "b.array_record"
  content = file.read_bytes()
  source.read(np.arange(12))
  os.truncate(file, 100)
  with pytest.raises(OSError, match="cut short"):
    source.read(np.arange(12))
  file.write_bytes(content)
  source.read(np.arange(12))


@pytest.mark.parametrize("record", [b"", b"none", b"PK\x03\x04none"])
def test_a_record_that_holds_no_example_is_refused(tmp_path, record):
  path = tmp_path / "data.array_record"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  writer.write(record)
  writer.close()
  with pytest.raises(ValueError, match=r"must hold records that are \.npz"):
    array_record.ArrayRecordSource(path)


def test_a_file_that_is_no_array_record_is_an_os_error(tmp_path):
  path = tmp_path / "data.array_record"
  path.write_text("none" * 30_000)
  with pytest.raises(OSError, match=r"riegeli|Riegeli|ArrayRecord"):
    array_record.ArrayRecordSource(path)
