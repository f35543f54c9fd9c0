"""Data in a bucket, of a server that speaks S3."""

import gzip
import os
import stat

import numpy as np
import pyarrow as pa
from pyarrow import fs
from pyarrow import parquet
import pytest

import dpdist
from dpdist import config as config_lib
from dpdist import data
from dpdist import errors
from dpdist.data import array_record
from dpdist.data import parquet as parquet_source
from dpdist.data import retry
from dpdist.data import sources
from dpdist.files import places
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import stores
from tests.support import object_store

_ROWS = 60
_OPTIONS = {
  "inputs": ["x"],
  "targets": "y",
  "classes": [0, 1, 2],
  "test_fraction": 0.2,
}


@pytest.fixture(scope="module")
def server():
  with object_store.serving("examples") as port:
    yield port


@pytest.fixture
def put(server, monkeypatch):
  """Returns a function that puts bytes into the bucket, and returns a URL."""
  for name, value in object_store.VARIABLES.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server}")

  def into(name, body):
    url = f"s3://examples/{name}"
    store, key = fs.FileSystem.from_uri(url)
    with store.open_output_stream(key, compression=None) as file:
      file.write(body)
    return url

  return into


def _columns(seed=0):
  rng = np.random.default_rng(seed)
  return {"x": rng.normal(size=_ROWS), "y": rng.integers(0, 3, _ROWS)}


def _parquet(path, seed=0):
  parquet.write_table(pa.table(_columns(seed)), path, row_group_size=25)
  return path.read_bytes()


def _csv(path, seed=0):
  columns = _columns(seed)
  rows = zip(*(column.tolist() for column in columns.values()), strict=True)
  text = "".join(f"{x},{y}\n" for x, y in [("x", "y"), *rows])
  path.write_bytes(gzip.compress(text.encode()))
  return path.read_bytes()


def _records(path, seed=0):
  columns = _columns(seed)
  array_record.write_array_record(
    path, [{k: v[i] for k, v in columns.items()} for i in range(_ROWS)]
  )
  return path.read_bytes()


@pytest.mark.parametrize(
  ("name", "written", "read"),
  [
    ("x.parquet", _parquet, data.from_parquet),
    ("x.csv.gz", _csv, data.from_csv),
    ("x.array_record", _records, data.from_array_record),
  ],
)
def test_a_file_in_a_bucket_is_the_data_set_that_it_is_on_a_disk(
  put, tmp_path, name, written, read
):
  url = put(name, written(tmp_path / name))
  here, there = (read(path, **_OPTIONS) for path in (tmp_path / name, url))
  assert here.train.content_digest() == there.train.content_digest()
  rows = np.arange(len(here.train))[::-3]
  for key, values in here.train.read(rows).items():
    np.testing.assert_array_equal(values, there.train.read(rows)[key])
  if name != "x.csv.gz":
    assert sources.changed_files(there.train) == []
    put(name, written(tmp_path / "other", seed=1))
    assert sources.changed_files(there.train) == [url]


def test_columns_in_memory_come_from_a_bucket(put, tmp_path):
  url = put("m.parquet", _parquet(tmp_path / "m.parquet"))
  found = parquet_source.ParquetSource(url, {"inputs": "x"})
  np.testing.assert_array_equal(
    found.read(np.arange(_ROWS))["inputs"], _columns()["x"]
  )


def test_parts_of_an_object_are_read_and_not_all_of_it(put):
  body = os.urandom(1 << 20)
  with places.open_arrow(put("parts", body)) as file:
    file.seek(-5, os.SEEK_END)
    assert (file.read(5), file.tell()) == (body[-5:], len(body))
    file.seek(77)
    assert file.read(9) == body[77:86]


def test_a_copy_on_the_disk_is_its_owners_alone(put, tmp_path, monkeypatch):
  monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
  copy = places.on_disk(put("folder/copied", b"rows"))
  assert os.path.basename(copy) == "copied"
  with open(copy, "rb") as file:
    assert file.read() == b"rows"
  (folder,) = tmp_path.iterdir()
  assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
  ("url", "said"),
  [
    ("s3://examples/none.parquet", "missing"),
    ("s3://examples", "s3://BUCKET/PATH"),
    ("ftp://host/x.parquet", "s3://BUCKET/PATH"),
    ("gs://bucket/x.parquet", "s3://BUCKET/PATH"),
    ("s3://key:word@examples/x.parquet", "without credentials"),
    ("s3://key:wo/word@examples/x.parquet", "without credentials"),
    ("s3://key:word%40examples/x.parquet", "without credentials"),
    ("s3:/key:word@examples/x.parquet", "without credentials"),
    ("s3://key:word/x.parquet", "s3://BUCKET/PATH"),
    ("s3://examples/x.parquet?secret_key=word", "without credentials"),
    ("s3://examples/x.parquet?%73ecret_key=word", "without credentials"),
    ("https://examples/x.parquet?X-Amz-Signature=word", "without credentials"),
    (
      "s3://examples/x.parquet?endpoint_override=http://user:word@host",
      "without credentials",
    ),
  ],
)
def test_other_urls_are_refused_without_their_secrets(put, url, said):
  with pytest.raises(ValueError, match=said) as caught:
    data.from_parquet(url, **_OPTIONS)
  assert "word" not in str(caught.value)


@pytest.mark.parametrize(
  "location",
  [
    "s3://AKIA:word@copies/x",
    "s3://copies/x?secret_key=word",
    "ftp://a:word@b",
  ],
)
def test_a_store_s_location_is_shown_without_its_secrets(location):
  with pytest.raises(ValueError, match="location must be") as caught:
    stores.opening(location)
  assert "word" not in str(caught.value)


def test_a_file_that_is_replaced_while_it_is_read_is_no_mixture(
  put, tmp_path, monkeypatch
):
  """CSV and columns stay in memory, where no later look would find it."""
  url = put("torn.csv", b"x,y\n" + b"1,0\n" * 9)
  read = places._Object.readinto

  def replaced(self, buffer):
    count = read(self, buffer)
    put("torn.csv", b"x,y\n" + b"2,1\n" * 9)
    return count

  monkeypatch.setattr(places._Object, "readinto", replaced)
  with pytest.raises(OSError, match="replaced while it was read"):
    data.from_csv(url, **_OPTIONS)


def test_an_answer_that_was_cut_short_may_come_whole_later(put):
  with places._object(put("short", b"0123456789")) as file:
    file._size += 1
    with pytest.raises(OSError, match="cut short"):
      file.readall()


@pytest.mark.slow  # The client waits between its own attempts.
def test_a_store_that_dies_is_waited_for_and_then_an_error(
  put, tmp_path, monkeypatch
):
  url = put("dies.parquet", _parquet(tmp_path / "dies.parquet"))
  source = data.from_parquet(url, cache_bytes=0, **_OPTIONS).train
  lines = []
  retried = retry.RetryingSource(
    source,
    name="the data",
    retry_seconds=0.2,
    stall_seconds=0,
    tell=lines.append,
  )
  retried.read(np.arange(3))
  # Another server, or Amazon's own: none of them answers here.
  monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
  monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
  with pytest.raises(errors.ReadError, match="network connection"):
    retried.read(np.arange(3) + len(source) // 2)
  assert "dies.parquet" not in "".join(lines)
  with pytest.raises(errors.ReadError, match=r"dies\.parquet cannot be read"):
    data.from_parquet(url, **_OPTIONS)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
def test_a_run_on_a_bucket_is_the_run_on_a_disk(put, tmp_path):
  url = put("run.parquet", _parquet(tmp_path / "run.parquet"))
  config = config_lib.default()
  config.update_from_flattened_dict(
    {
      "model.name": "linear",
      "model.num_outputs": 3,
      "privacy.expected_batch_size": 8,
      "privacy.num_steps": 3,
      "privacy.noise_multiplier": 2.0,
      "insecure_seed": 1,
    }
  )
  results, branches = [], []
  for number, path in enumerate((url, tmp_path / "run.parquet")):
    workdir = tmp_path / str(number)
    dataset = data.from_parquet(path, **_OPTIONS)
    config.privacy.num_examples = len(dataset.train)
    results.append(dpdist.train(config, workdir, dataset=dataset))
    branches.append(ledger_lib.Ledger(workdir / "ledger").branches[-1].identity)
  assert branches[0] == branches[1]
  assert results[0]["test"] == results[1]["test"]
