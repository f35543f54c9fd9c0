"""What the processes of a real job read, against what one process reads."""

import functools
import itertools
import json

import numpy as np
import pytest

from tests.support import jobs

pytestmark = pytest.mark.cluster

_NUM_TRAIN = 1438
_ARGS = (
  # About every other step takes a second chunk, with little in it.
  "--config.privacy.expected_batch_size=190",
  "--config.chunk_size=192",
  "--config.privacy.num_steps=8",
  # So that reads are in the order of the steps.
  "--config.data.num_threads=1",
)


def _note_reads(path):
  """In a process: writes down what it reads of the training set."""
  from dpdist.data import arrays as arrays_lib

  read = arrays_lib.ArraySource.read

  def noted(self, indices):
    if len(self) == _NUM_TRAIN:
      with open(path, "a") as file:
        file.write(json.dumps(indices.tolist()) + "\n")
    return read(self, indices)

  arrays_lib.ArraySource.read = noted


def _reads(directory, count):
  """By process, the examples of every chunk of a job."""
  directory.mkdir()
  paths = [directory / f"reads{number}" for number in range(count)]
  runs = jobs.start(
    directory / "run",
    count,
    *_ARGS,
    aside=directory,
    changes={
      number: [functools.partial(_note_reads, path)]
      for number, path in enumerate(paths)
    },
  )
  assert [run.wait() for run in runs] == [0] * count, runs[0].screen
  found = []
  for number, path in enumerate(paths):
    first, second, *chunks = map(json.loads, path.read_text().splitlines())
    assert first == second == [0]  # For its columns, and for their shapes.
    if number == 0:
      # It holds every row against the held-out ones, before the first step.
      rows: list[int] = []
      while len(rows) < _NUM_TRAIN:
        rows += chunks.pop(0)
      assert rows == [*range(_NUM_TRAIN)]
    found.append(chunks)
  return found


def test_each_process_reads_its_own_part_of_the_draw(tmp_path):
  (whole,) = _reads(tmp_path / "1", 1)
  assert len(whole) > 8  # More chunks than steps.
  for count in (3, 4):
    parts = _reads(tmp_path / str(count), count)
    # As many chunks in all, though nobody told how many there are.
    assert [len(part) for part in parts] == [len(whole)] * count
    for chunk, *mine in zip(whole, *parts, strict=True):
      assert [*itertools.chain(*mine)] == chunk
    # Some had nothing to read, and knew it.
    assert [] in parts[-1]


def test_users_are_shared_as_examples_are(tmp_path):
  rng = np.random.default_rng(0)
  for prefix, ids in ("train", rng.integers(0, 40, 400)), ("test", [50] * 20):
    np.savez(
      tmp_path / f"{prefix}.npz",
      inputs=rng.normal(size=(len(ids), 4)).astype(np.float32),
      targets=rng.integers(0, 10, len(ids)).astype(np.int32),
      user=ids,
    )
  args = (
    "--config.data.name=npz",
    f"--config.data.path={tmp_path}",
    "--config.data.examples_per_unit=3",
    "--config.privacy.unit=user",
    "--config.privacy.num_examples=40",
    "--config.privacy.expected_batch_size=20",
    "--config.privacy.num_steps=8",
    "--config.chunk_size=48",
  )
  found = []
  for count in (1, 3):
    directory = tmp_path / str(count)
    directory.mkdir()
    runs = jobs.start(directory / "run", count, *args, aside=directory)
    assert [run.wait() for run in runs] == [0] * count, runs[0].screen
    result = json.loads((directory / "run" / "result.json").read_text())
    found.append(result["params_sha256"])
  assert found[0] == found[1]
