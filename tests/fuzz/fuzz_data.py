"""Kinds of inputs: the files that examples are read from, and secrets."""

from collections.abc import Callable
import io
import json
import os
import pathlib
import random
from typing import Any

import ml_collections
import numpy as np
import pyarrow
from pyarrow import parquet

from dpdist.data import array_record
from dpdist.data import dataset as dataset_lib
from dpdist.data.datasets import chitchat
from dpdist.data.datasets import datasets
from dpdist.keys import keys
from dpdist.ledger import stores
from tests.fuzz import mangle
from tests.fuzz import outcomes
from tests.support import packages

Write = Callable[[pathlib.Path, np.random.Generator], None]


def _config(name: str, folder: pathlib.Path, **fields: Any) -> Any:
  given = {
    "name": name,
    "path": str(folder),
    "sequence_length": 8,
    "num_train": 20,
    "num_test": 5,
    "inputs_column": "inputs",
    "targets_column": "targets",
    "examples_per_unit": 0,
    "unit_column": "user",
  }
  return ml_collections.ConfigDict({**given, **fields})


def _check(dataset: dataset_lib.Dataset) -> None:
  """Reads all that there is."""
  for source in (dataset.train, dataset.test):
    for rows in (np.arange(len(source)), np.zeros(0, np.int64)):
      for name, array in source.read(rows).items():
        if len(array) != len(rows) or array.dtype.hasobject:
          raise outcomes.FaultError(f"{name}: {array.dtype} {array.shape}")
    assert len(source.content_digest()) == 64


def _loaded(config: Any) -> str:
  def load() -> None:
    _check(datasets.load(config))

  return outcomes.tried(load, lambda nothing: None)


def _kind(
  write: Write,
  configs: Callable[[pathlib.Path], list[Any]],
  change: Callable[[random.Random, bytes], bytes] = mangle.raw,
) -> Callable[[pathlib.Path], outcomes.Kind]:
  """A folder of files of which one is damaged, read as by a run."""

  def make(folder: pathlib.Path) -> outcomes.Kind:
    place = folder / "data"
    place.mkdir()
    write(place, np.random.default_rng(0))
    files = outcomes.snapshot(place)
    for config in configs(place):
      _check(datasets.load(config))  # They are right as they are.

    def one(rng: random.Random) -> str:
      name = rng.choice(sorted(files))
      changed = dict(files)
      roll = rng.random()
      if roll < 0.02:
        del changed[name]
      elif roll < 0.06:
        changed[name] = changed[rng.choice(sorted(files))]
      else:
        changed[name] = change(rng, files[name])
      outcomes.put(place, changed)
      outcome = _loaded(rng.choice(configs(place)))
      if outcomes.snapshot(place) != changed:
        raise outcomes.FaultError("the data was changed")
      return outcome

    return one

  return make


def _write_idx(folder: pathlib.Path, rng: np.random.Generator) -> None:
  for prefix, count in (("train", 9), ("t10k", 4)):
    images = rng.integers(0, 256, (count, 5, 5), np.uint8)
    labels = rng.integers(0, 10, count, np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
      suffix = ".gz" if prefix == "t10k" else ""
      packages.write_idx(folder / f"{prefix}-{name}-ubyte{suffix}", array)


def _arrays(
  rng: np.random.Generator, count: int, first_user: int
) -> dict[str, np.ndarray]:
  return {
    "inputs": rng.normal(size=(count, 3)).astype(np.float32),
    "targets": rng.integers(0, 9, count).astype(np.int32),
    "user": first_user + np.arange(count) // 2,
  }


def _write_npz(folder: pathlib.Path, rng: np.random.Generator) -> None:
  for part, count, save in (("train", 9, np.savez), ("test", 4, np.savez)):
    save(folder / f"{part}.npz", **_arrays(rng, count, 100 * (part == "test")))


def _write_parquet(folder: pathlib.Path, rng: np.random.Generator) -> None:
  for part, count in (("train-0", 5), ("train-1", 4), ("test", 4)):
    arrays = _arrays(
      rng, count, 100 * (part == "test") + 10 * (part == "train-1")
    )
    table = pyarrow.table(
      {name: array.tolist() for name, array in arrays.items()}
    )
    parquet.write_table(table, folder / f"{part}.parquet")


def _write_array_record(folder: pathlib.Path, rng: np.random.Generator) -> None:
  for part, count in (("train", 6), ("test", 4)):
    arrays = _arrays(rng, count, 100 * (part == "test"))
    np.save(folder / f"{part}_user.npy", arrays.pop("user"))
    array_record.write_array_record(
      folder / f"{part}.array_record",
      [{k: v[i] for k, v in arrays.items()} for i in range(count)],
    )


def _write_text(folder: pathlib.Path, rng: np.random.Generator) -> None:
  (folder / "text").write_bytes(rng.bytes(400))


def _write_chitchat(folder: pathlib.Path, rng: np.random.Generator) -> None:
  del rng
  turns = [
    [{"sender": f"{i:06}", "text": f"{i} is what I say. " * 4}]
    for i in range(12)
  ]
  (folder / "dataset.json").write_text(json.dumps({"0": {"messages": turns}}))
  chitchat.load(folder / "dataset.json", sequence_length=8, examples_per_unit=2)


def _both(name: str) -> Callable[[pathlib.Path], list[Any]]:
  """By examples, and by users."""
  return lambda folder: [
    _config(name, folder),
    _config(name, folder, examples_per_unit=2),
  ]


def _npz_inside(rng: random.Random, data: bytes) -> bytes:
  """An archive of which a member is damaged, or is something else."""
  if rng.random() < 0.4:
    return mangle.raw(rng, data)
  with np.load(io.BytesIO(data)) as archive:
    arrays = {name: archive[name] for name in archive.files}
  name = rng.choice(sorted(arrays))
  length = len(arrays[name])
  arrays[name] = rng.choice(
    [
      np.zeros(0),
      np.zeros((length, 0)),
      np.zeros(()),
      np.array(["x"] * length),
      np.array(["2020-01-01"] * length, "datetime64[D]"),
      np.full(length, np.nan),
      np.zeros(length, "c16"),
      np.zeros(length, [("a", "i4")]),
      np.arange(length + 1),
      np.arange(length).astype(">i8"),
      np.zeros(length, "V3"),
      np.zeros(length, bool),
    ]
  )
  if rng.random() < 0.3:
    arrays[rng.choice(["is_empty_slot", "", "a/b", "file"])] = arrays.pop(name)
  buffer = io.BytesIO()
  with_names = {k: v for k, v in arrays.items() if k != "file"}
  np.savez(buffer, **with_names)
  return buffer.getvalue()


def _npy_or_raw(rng: random.Random, data: bytes) -> bytes:
  if not data.startswith(b"\x93NUMPY") or rng.random() < 0.5:
    return mangle.raw(rng, data)
  header = data[:128].decode("latin-1")
  for was, now in rng.sample(
    [
      ("'<i8'", rng.choice(["'|O'", "'<M8[s]'", "'<U3'", "'<f8'", "'x'", "0"])),
      ("(", rng.choice(["(-1, ", "(10**9,", "(99999999999999, ", "[", ""])),
      ("False", rng.choice(["True", "None", "x", "()"])),
      ("'descr'", rng.choice(["'descr", "b'x'", "'shape'"])),
    ],
    k=2,
  ):
    header = header.replace(was, now, 1)
  return header.encode("latin-1")[:128].ljust(128) + data[128:]


def secret(folder: pathlib.Path) -> outcomes.Kind:
  """A secret's file: of another size or mode, or no file at all."""

  def one(rng: random.Random) -> str:
    path = folder / f"secret{rng.randrange(10**9)}"
    size = rng.choice([0, 1, 31, 32, 32, 33, 64, 100_000])
    data, mode = rng.randbytes(size), 0o600
    if rng.random() < 0.5:
      mode = rng.randrange(0o1000)
    kind = rng.random()
    if kind < 0.05:
      path.mkdir()
    elif kind < 0.1:
      path.symlink_to(path)
    elif kind < 0.15:
      os.mkfifo(path)
    elif kind < 0.2:
      path = path / "below"
    else:
      path.write_bytes(data)
      path.chmod(mode)

    def check(found: bytes) -> None:
      if found != data or len(found) != 32 or mode & 0o077:
        raise outcomes.FaultError(
          f"{len(found)} bytes of mode {mode:o} were taken"
        )

    outcome = outcomes.tried(lambda: keys.load_or_create_secret(path), check)
    if path.is_file() and path.read_bytes() != data:
      raise outcomes.FaultError("the file was changed")
    return outcome

  return one


def location(folder: pathlib.Path) -> outcomes.Kind:
  """Where a ledger is said to be."""
  here = {"driver": "file", "path": f"{folder}/x/"}

  def one(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.5:
      text = json.dumps(mangle.fields(rng, here))
    elif roll < 0.7:
      text = mangle.json_text(rng, json.dumps(here).encode()).decode("latin-1")
    else:
      text = rng.choice(
        [
          *(
            "memory://",
            "file://",
            "http://localhost:1/x",
            "x://y",
            "://",
            "{}",
          ),
          *("{", "[]", "s3:/x", "gs:", '{"driver":"s3"}', '{"driver":"gcs"}'),
          *(f"file://{folder}/\0", "a" * 5000, f"{folder}/\0", "\ud800"),
          *('{"driver":"file"}', '{"driver":["file"]}', '{"driver":null}'),
          *('{"driver":"file","path":"' + "/x" * 4000 + '"}', "ocdbt://x"),
        ]
      )
    if '"gs' in text or '"s3' in text:
      return "skipped"  # A store of that kind would be asked.

    def look() -> None:
      stores.opening(text).result()

    return outcomes.tried(look, lambda nothing: None)

  return one


KINDS = {
  "idx": _kind(_write_idx, lambda folder: [_config("idx", folder)]),
  "npz": _kind(_write_npz, _both("npz"), _npz_inside),
  "parquet": _kind(_write_parquet, _both("parquet")),
  "array_record": _kind(
    _write_array_record, _both("array_record"), _npy_or_raw
  ),
  "text": _kind(_write_text, lambda folder: [_config("text", folder / "text")]),
  "chitchat": _kind(
    _write_chitchat,
    lambda folder: [
      _config("chitchat", folder / "dataset.json", examples_per_unit=2)
    ],
    mangle.file,
  ),
  "secret": secret,
  "location": location,
}
